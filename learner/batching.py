"""Scored groups become packed micro-batches, the same number on every rank.

Every rank sees all groups of the step and computes the same plan, so nothing has to be agreed over the network.
Advantages and loss weights are fixed here, once per optimizer step over all sequences: no split into micro-batches
or ranks can change the gradient.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.logprobs import Layout, PackedTokens
from shared.types import Completion, Prompt, RolloutGroup


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of the step."""

    prompt: Prompt
    completion: Completion
    group: int
    """Index of its group among the step's groups."""
    advantage: float
    weight: float
    """Factor on each of its token losses (see AGGREGATIONS)."""
    trainable: int
    """Tokens in its loss mask: all of the completion, or none."""

    @property
    def length(self) -> int:
        """Prompt and completion tokens."""
        return len(self.prompt.token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch on one rank; ``B`` rows, ``C`` columns of completion tokens."""

    rows: tuple[Row, ...]
    tokens: PackedTokens
    rollout_logprobs: Tensor
    """``[B, C] float32``, 0 in the padding."""
    mask: Tensor
    """``[B, C] bool``: trainable tokens."""
    advantages: Tensor
    """``[B, 1] float32``."""
    weights: Tensor
    """``[B, 1] float32``."""


def build_rows(groups: list[RolloutGroup], advantages: Tensor, weights_of: object, *, mask_truncated: bool) -> list[Row]:
    """All sequences of the step with their loss weights.

    ``advantages [N, G]``; ``weights_of(lengths [M], groups [M]) -> [M]`` is the bound aggregation.
    """
    pairs = [(i, group.prompt, c) for i, group in enumerate(groups) for c in group.completions]
    trainable = [0 if mask_truncated and c.finish_reason == "length" else len(c.token_ids) for _, _, c in pairs]
    weights = weights_of(torch.tensor(trainable), torch.tensor([i for i, _, _ in pairs]))  # type: ignore[operator]
    flat = advantages.flatten().tolist()
    return [
        Row(prompt, completion, i, advantage, weight, n)
        for (i, prompt, completion), advantage, weight, n in zip(pairs, flat, weights.tolist(), trainable, strict=True)
    ]


def split(rows: list[Row], budget: int, num_ranks: int) -> list[list[list[Row]]]:
    """``[rank][micro-batch][row]``: balanced by tokens, each within ``budget`` tokens, equally many on every rank.

    Rows without trainable tokens contribute nothing and are left out. A bin that stays empty gets a filler: a row
    of weight 0, because ZeRO-3 ranks must run the same number of forward passes.
    """
    useful = sorted((row for row in rows if row.trainable), key=lambda row: -row.length)
    if not useful:
        return [[] for _ in range(num_ranks)]
    total = sum(row.length for row in useful)
    per_rank = max(1, -(-total // (budget * num_ranks)))
    while (bins := _pack(useful, budget, per_rank * num_ranks)) is None:
        per_rank += 1
    shortest = useful[-1]
    filler = Row(shortest.prompt, shortest.completion, shortest.group, 0.0, 0.0, 0)
    bins = [bin_ or [filler] for bin_ in bins]
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _pack(rows: list[Row], budget: int, count: int) -> list[list[Row]] | None:
    """Longest first into the emptiest of ``count`` bins; None if a bin would overflow."""
    bins: list[list[Row]] = [[] for _ in range(count)]
    heap = [(0, i) for i in range(count)]
    for row in rows:
        load, i = heapq.heappop(heap)
        if load and load + row.length > budget:
            return None
        bins[i].append(row)
        heapq.heappush(heap, (load + row.length, i))
    return bins


def collate(rows: list[Row], device: torch.device) -> TrainBatch:
    """Pack ``rows`` into one micro-batch on ``device``."""
    prompts = [len(r.prompt.token_ids) for r in rows]
    sizes = [len(r.completion.token_ids) for r in rows]
    lengths = [r.length for r in rows]
    ends = np.cumsum(lengths)
    columns = max(sizes)
    token_ids = np.concatenate([part for r in rows for part in (r.prompt.token_ids, r.completion.token_ids)])
    position_ids = np.concatenate([np.arange(n) for n in lengths])
    targets = np.concatenate([np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)])
    cells = np.concatenate([i * columns + np.arange(size) for i, size in enumerate(sizes)])
    assert min(prompts) > 0, "a prompt needs at least one token: the first completion token is predicted from it"

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(device)

    rollout = np.zeros(len(rows) * columns, dtype=np.float32)
    rollout[cells] = np.concatenate([r.completion.logprobs for r in rows])
    mask = np.zeros(len(rows) * columns, dtype=bool)
    mask[cells] = np.concatenate([np.full(size, bool(r.trainable)) for r, size in zip(rows, sizes, strict=True)])
    shape = (len(rows), columns)
    return TrainBatch(
        rows=tuple(rows),
        tokens=PackedTokens(
            token_ids=tensor(token_ids, torch.int64),
            position_ids=tensor(position_ids, torch.int64),
            layout=Layout.of(lengths).to(device),
            targets=tensor(targets, torch.int64),
            cells=tensor(cells, torch.int64),
            shape=shape,
        ),
        rollout_logprobs=tensor(rollout, torch.float32).view(shape),
        mask=tensor(mask, torch.bool).view(shape),
        advantages=tensor([[r.advantage] for r in rows], torch.float32),
        weights=tensor([[r.weight] for r in rows], torch.float32),
    )
