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

ATTENTION_NAME = "millrace_packed"
FILL = 0.75
SHORT = 512
"""Longest rows for which a bfloat16 CPU works on whole score matrices instead of torch's flash kernel, ..."""
SCORES = 32 << 20
"""... and the most scores of one block: they are kept for the backward pass."""


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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; query ``[1, H, T, D]``, key and value ``[1, H_kv, T, D]``."""
    if sliding_window is not None and sliding_window < layout.longest:
        raise ValueError(f"sequences of {layout.longest} tokens exceed the sliding window of {sliding_window}")
    blocks = zip(*(_pad(x[0].transpose(0, 1), layout) for x in (query, key, value)), strict=True)
    outputs = [_causal(q, k, v, scaling, dropout).transpose(1, 2).flatten(0, 1) for q, k, v in blocks]
    return torch.cat(outputs).index_select(0, layout.scatter)[None], None


def register_attention() -> None:
    """Make ``packed_attention`` known to transformers under ``ATTENTION_NAME``."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
