"""Fingerprints of tensors, computed where the tensors lie: they prove weights that travel between GPUs.

A fingerprint is 128 bits of the bytes of one tensor, and the same on every device: all arithmetic is that of integers modulo
2**64, in which the order of a sum does not matter. It is no defence against somebody who looks for a collision. It finds
what goes wrong on the way: flipped bits, swapped elements, tensors under another's name, half a buffer of an older version.

The bytes are read as words of 32 bits. A block of words becomes two sums of word times key, each of 64 bits, where the keys
are fixed odd numbers of the word's position. A change of one word changes both sums. Two words or more that change by chance
leave both sums as they were once in 2**64 times. The sums of all blocks are words again, which are folded in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16
"""Number of 32-bit words in a block."""
ROWS = 64
"""Number of blocks that a GPU folds at once: they bound the memory that it needs beside the tensor, to about 70 MB."""
HEX = 32
"""Number of characters of a fingerprint as text."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Return the fingerprint of the bytes of ``tensor``, ``[2] int64`` on its device."""
    import torch

    if not tensor.numel():
        return torch.zeros(2, dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    size = flat.numel()
    if flat.storage_offset() % 4:  # Words must begin where the device can read them.
        flat = flat.clone()
    whole, level = size - size % 4, 0
    words = flat[:whole].view(torch.int32)
    sums = _fold(words, level)
    if size % 4:
        last = torch.zeros(4, dtype=torch.uint8, device=flat.device)
        last[: size % 4] = flat[whole:]
        sums = torch.cat([sums, _fold(last.view(torch.int32), 3)])
    while len(sums) > 1:
        level += 1
        sums = _fold(sums.view(-1).view(torch.int32), min(level, 2))
    return sums[0] + size


def _fold(words: Tensor, level: int) -> Tensor:
    """Return the two sums of each block of ``words``, ``[blocks, 2] int64``; at least one block."""
    import torch

    keys = _keys_on(level, words.device)
    if len(words) <= BLOCK:
        return _sums(words, keys[:, : len(words)])
    whole = len(words) // BLOCK
    rows = words[: whole * BLOCK].view(whole, BLOCK)
    step = 1 if words.device.type == "cpu" else ROWS  # On a CPU a block and its products stay in the cache.
    sums = [_sums(rows[at : at + step], keys) for at in range(0, whole, step)]
    if rest := len(words) - whole * BLOCK:
        sums.append(_sums(words[-rest:], keys[:, :rest]))
    return torch.cat(sums)


def _sums(words: Tensor, keys: Tensor) -> Tensor:
    import torch

    wide = words.view(-1 if len(words) else 1, words.shape[-1]).to(
        torch.int64
    )  # A tensor of one to three bytes has none.
    return torch.stack([(wide * key).sum(-1) for key in keys], dim=-1)


def _keys_on(level: int, device: object) -> Tensor:
    return _keys_of(level, str(device))


@cache
def _keys_of(level: int, device: str) -> Tensor:
    """The keys ``[2, BLOCK] int64`` of a level of folding, kept on ``device``."""
    import torch

    return torch.from_numpy(_keys(level)).to(device)


def _keys(level: int) -> NDArray[np.int64]:
    """Odd numbers in a fixed order that looks random (splitmix64 of their positions)."""
    first = np.uint64(1 + level * 2 * BLOCK)
    with np.errstate(over="ignore"):
        mixed = (np.arange(2 * BLOCK, dtype=np.uint64) + first) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return (mixed | np.uint64(1)).view(np.int64).reshape(2, BLOCK)


class Fingerprints:
    """The fingerprints of the tensors of one publication, in order; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Take the fingerprint of the next tensor; the device works it out while the caller goes on."""
        self._found.append(fingerprint(tensor))

    def text(self) -> str:
        """Return all fingerprints as one text: ``HEX`` characters for each tensor."""
        import torch

        if not self._found:
            return ""
        return bytes(torch.stack(self._found).cpu().numpy().astype(">i8").tobytes()).hex()


def summary(digest: str) -> str:
    """Return ``digest`` itself if it is short, else the blake3 of its text: a publication has one fingerprint a tensor."""
    from blake3 import blake3

    return digest if len(digest) <= 2 * HEX else blake3(digest.encode()).hexdigest()


def differing(sent: str, received: str, names: Sequence[str]) -> list[str]:
    """Return the names of the tensors whose fingerprints differ between two texts; empty unless both are texts of ``names``."""
    if not len(sent) == len(received) == HEX * len(names):
        return []
    parts = range(0, len(sent), HEX)
    return [name for name, at in zip(names, parts, strict=True) if sent[at : at + HEX] != received[at : at + HEX]]
