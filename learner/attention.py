"""Attention over packed tokens, exact and without a mask that could leak.

Sequences lie end to end in one row without padding, and a prompt lies there once for all its completions. Attention
is separate by construction: tokens are laid out as right-padded rows inside the attention alone, where causality
already hides the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import ModelRefused

ATTENTION_NAME = "millrace_packed"
FILL = 0.75
SHORT = 512
"""Longest rows for which a bfloat16 CPU works on whole score matrices instead of torch's flash kernel, ..."""
SCORES = 32 << 20
"""... and the most scores of one block: they are kept for the backward pass."""

WITHOUT_EFFECT = {"is_causal", "position_ids", "cache_position", "output_attentions", "use_cache"}
"""Arguments of attention functions that change nothing here: every layout is causal, and positions are applied before."""


@dataclass(frozen=True)
class Layout:
    """Where each of ``T`` packed tokens goes in right-padded rows, one row per completion.

    Rows of similar length lie in one block, padded to its longest: with long-tailed lengths most padding is gone.
    Completions of one prompt share its tokens: they are packed once and occur in every such row. Keys and values are
    read by all rows; the output of a shared token, which cannot depend on what follows, is taken from one of them.
    """

    gather: Tensor
    """``[cells] int64``: packed index of each cell of all blocks, one block after the other; T for padding."""
    scatter: Tensor
    """``[T] int64``: cell that gives each packed token its output."""
    blocks: tuple[tuple[int, int], ...]
    """``(rows, length)`` of each block."""

    @classmethod
    def of(cls, rows: list[list[range]]) -> Layout:
        """The layout of ``rows``, each a list of ranges of packed indices (its prompt, its completion)."""
        count = max(part.stop for row in rows for part in row)
        parts: list[np.ndarray] = []
        blocks: list[tuple[int, int]] = []
        for block in _blocks(rows):
            longest = sum(map(len, block[0]))
            cells = np.full((len(block), longest), count, dtype=np.int64)
            for line, row in zip(cells, block, strict=True):
                tokens = np.concatenate([np.arange(part.start, part.stop) for part in row])
                line[: len(tokens)] = tokens
            parts.append(cells.ravel())
            blocks.append((len(block), longest))
        gather = np.concatenate(parts)
        packed, first_cell = np.unique(gather, return_index=True)
        return cls(torch.from_numpy(gather), torch.from_numpy(first_cell[packed < count]), tuple(blocks))

    def to(self, device: torch.device) -> Layout:
        """The layout on another device."""
        return Layout(self.gather.to(device), self.scatter.to(device), self.blocks)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(length for _, length in self.blocks)


def _blocks(rows: list[list[range]]) -> list[list[list[range]]]:
    """``rows``, longest first, in blocks whose shortest row has at least ``FILL`` of the tokens of its longest."""
    blocks: list[list[list[range]]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -sum(map(len, row))):
        length = sum(map(len, row))
        if not blocks or length < FILL * longest:
            blocks.append([])
            longest = length
        blocks[-1].append(row)
    return blocks


def _pad(packed: Tensor, layout: Layout) -> list[Tensor]:
    """``[T, H, D]`` to ``[B, H, L, D]`` for each block, zeros in the padding."""
    padded = torch.cat([packed, packed.new_zeros((1, *packed.shape[1:]))]).index_select(0, layout.gather)
    parts = padded.split([rows * length for rows, length in layout.blocks])
    return [
        part.view(rows, length, *packed.shape[1:]).transpose(1, 2)
        for part, (rows, length) in zip(parts, layout.blocks, strict=True)
    ]


class _ShortAttention(torch.autograd.Function):
    """Causal attention in bfloat16 with float32 scores, whole rows at a time; the backward pass multiplies in bfloat16.

    On CPUs torch's flash kernel in bfloat16 is slower than in float32, its backward pass up to seven times; batched
    products of whole rows use the bfloat16 units: twice as fast as float32 flash for rows up to some 500 tokens.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        """Query ``[B, H, L, D]``, key and value ``[B, H_kv, L, D]``."""
        rows, heads, length, width = query.shape
        # The query heads that share a key head become rows of one product: nothing is repeated.
        q = query.reshape(-1, heads // key.shape[1] * length, width)
        k, v = key.reshape(-1, length, width), value.reshape(-1, length, width)
        later = torch.full((length, length), -torch.inf).triu_(1).repeat(heads // key.shape[1], 1)
        scores = torch.baddbmm(later.expand(len(q), -1, -1), q.float(), k.float().transpose(1, 2), alpha=scale)
        shares = scores.softmax(-1).to(v.dtype)
        ctx.save_for_backward(q, k, v, shares)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return torch.bmm(shares, v).view(rows, heads, length, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, shares = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_shares = torch.bmm(grad, v.transpose(1, 2))
        # d softmax: P (dP - sum P dP), rows at a time.
        grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype).mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        grad_v = torch.bmm(shares.transpose(1, 2), grad)
        return grad_q.view(ctx.shapes[0]), grad_k.view(ctx.shapes[1]), grad_v.view(ctx.shapes[1]), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention of one block of rows: query ``[B, H, L, D]``, key and value ``[B, H_kv, L, D]``."""
    half_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    rows, heads, length, _ = query.shape
    if half_on_cpu and length <= SHORT and rows * heads * length**2 <= SCORES and not dropout:
        output: Tensor = _ShortAttention.apply(query, key, value, scale or query.shape[-1] ** -0.5)
        return output
    inner = torch.float32 if half_on_cpu else query.dtype
    return nn.functional.scaled_dot_product_attention(
        *(x.to(inner) for x in (query, key, value)),
        dropout_p=dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    ).to(query.dtype)


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None, dropout: float) -> Tensor:
    """``_causal`` where a token attends to itself and to the ``window - 1`` tokens before it.

    Queries go in chunks of ``window``: no ``[L, L]`` mask, and work in proportion to ``L * window``.
    """
    length, heads = query.shape[2], query.shape[1]
    inner = torch.float32 if query.device.type == "cpu" and query.dtype == torch.bfloat16 else query.dtype
    # Kernels that take both a mask and fewer key heads are rare.
    k, v = (x.to(inner).repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    outputs = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        positions = torch.arange(first, stop, device=query.device)
        distance = positions[start - first :, None] - positions[None]
        chunk = nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop].to(inner),
            k[:, :, first:stop],
            v[:, :, first:stop],
            attn_mask=(distance >= 0) & (distance < window),
            dropout_p=dropout,
            scale=scale,
        )
        outputs.append(chunk.to(query.dtype))
    return torch.cat(outputs, dim=2)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; query ``[1, H, T, D]``, key and value ``[1, H_kv, T, D]``.

    With ``sliding_window`` a token attends to that many tokens, itself included. Raises ``ModelRefused`` for an
    argument that changes attention in another way.
    """
    _refuse({"attention_mask": attention_mask, **others}, module, layout)
    assert layout is not None
    blocks = zip(*(_pad(x[0].transpose(0, 1), layout) for x in (query, key, value)), strict=True)
    outputs = []
    for q, k, v in blocks:
        if sliding_window is not None and sliding_window < q.shape[2]:
            output = _banded(q, k, v, sliding_window, scaling, dropout)
        else:
            output = _causal(q, k, v, scaling, dropout)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.scatter)[None], None


def _refuse(arguments: dict[str, Any], module: nn.Module, layout: Layout | None) -> None:
    """Raises ``ModelRefused`` if one of ``arguments`` is set and not known to leave the result as it is."""
    where = f"model refused: attention of {type(module).__name__}"
    if layout is None:
        raise ModelRefused(f"{where} does not hand on where packed sequences lie; use another model")
    if arguments.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ModelRefused(f"{where} is not causal; use another model")
    used = sorted(name for name, value in arguments.items() if value is not None and name not in WITHOUT_EFFECT)
    if used:
        raise ModelRefused(f"{where} needs {', '.join(used)}, which the learner does not compute; use another model")


def register_attention() -> None:
    """Make ``packed_attention`` known to transformers under ``ATTENTION_NAME``."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
