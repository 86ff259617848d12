"""Scored groups become packed micro-batches, the same number on every rank.

Every rank sees all groups of the step and computes the same plan, so nothing has to be agreed over the network.
Advantages and loss weights are fixed here, once per optimizer step over all sequences: no split into micro-batches
or ranks can change the gradient.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.logprobs import Layout, PackedTokens
from shared.types import Completion, IntArray, Prompt, RolloutGroup


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


def build_rows(
    groups: list[RolloutGroup], advantages: Tensor, weights_of: object, *, mask_truncated: bool
) -> list[Row]:
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

    Rows of one group stay together while they fit, because they share their prompt's tokens. Rows without trainable
    tokens contribute nothing and are left out. A bin that stays empty gets a filler, a row of weight 0, because
    ZeRO-3 ranks must run the same number of forward passes.
    """
    units = sorted(_units([row for row in rows if row.trainable], budget), key=_cost, reverse=True)
    if not units:
        return [[] for _ in range(num_ranks)]
    per_rank = max(1, -(-sum(map(_cost, units)) // (budget * num_ranks)))
    while (bins := _pack(units, budget, per_rank * num_ranks)) is None:
        per_rank += 1
    shortest = units[-1][0]
    filler = Row(shortest.prompt, shortest.completion, shortest.group, 0.0, 0.0, 0)
    bins = [bin_ or [filler] for bin_ in bins]
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _units(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Rows of one group, in as few lists within ``budget`` as it takes."""
    for _, group in itertools.groupby(rows, key=lambda row: row.group):
        unit: list[Row] = []
        for row in group:
            if unit and _cost([*unit, row]) > budget:
                yield unit
                unit = []
            unit.append(row)
        yield unit


def _cost(unit: list[Row]) -> int:
    """Packed tokens of rows of one group: the prompt once, every completion."""
    return len(unit[0].prompt.token_ids) + sum(len(row.completion.token_ids) for row in unit)


def _pack(units: list[list[Row]], budget: int, count: int) -> list[list[Row]] | None:
    """Largest first into the emptiest of ``count`` bins; None if a bin would overflow."""
    bins: list[list[Row]] = [[] for _ in range(count)]
    heap = [(0, i) for i in range(count)]
    for unit in units:
        load, i = heapq.heappop(heap)
        if load and load + _cost(unit) > budget:
            return None
        bins[i] += unit
        heapq.heappush(heap, (load + _cost(unit), i))
    return bins


def collate(rows: list[Row], device: torch.device) -> TrainBatch:
    """Pack ``rows`` into one micro-batch on ``device``; rows of one group share the tokens of their prompt."""
    prompts: dict[int, range] = {}
    parts: list[IntArray] = []
    positions: list[IntArray] = []
    layout: list[list[range]] = []
    end = 0

    def append(token_ids: IntArray, start_position: int) -> range:
        nonlocal end
        parts.append(token_ids)
        positions.append(np.arange(start_position, start_position + len(token_ids), dtype=np.int32))
        end += len(token_ids)
        return range(end - len(token_ids), end)

    for row in rows:
        prompt_ids = row.prompt.token_ids
        assert len(prompt_ids), "a prompt needs at least one token: the first completion token is predicted from it"
        if row.group not in prompts:
            prompts[row.group] = append(prompt_ids, 0)
        layout.append([prompts[row.group], append(row.completion.token_ids, len(prompt_ids))])

    sizes = [len(row.completion.token_ids) for row in rows]
    columns = max(sizes)
    shape = (len(rows), columns)
    inside = np.arange(columns) < np.array(sizes)[:, None]
    targets = np.concatenate([np.arange(c.start, c.stop) for _, c in layout])
    predictors = np.concatenate([np.array([p.stop - 1, *range(c.start, c.stop - 1)])[: len(c)] for p, c in layout])
    rollout = np.zeros(shape, dtype=np.float32)
    rollout[inside] = np.concatenate([row.completion.logprobs for row in rows])
    mask = inside & np.array([bool(row.trainable) for row in rows])[:, None]

    def tensor(values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(device)

    return TrainBatch(
        rows=tuple(rows),
        tokens=PackedTokens(
            token_ids=tensor(np.concatenate(parts), torch.int64),
            position_ids=tensor(np.concatenate(positions), torch.int64),
            layout=Layout.of(layout).to(device),
            targets=tensor(targets, torch.int64),
            predictors=tensor(predictors, torch.int64),
            cells=tensor(np.flatnonzero(inside), torch.int64),
            shape=shape,
        ),
        rollout_logprobs=tensor(rollout, torch.float32),
        mask=tensor(mask, torch.bool),
        advantages=tensor([[row.advantage] for row in rows], torch.float32),
        weights=tensor([[row.weight] for row in rows], torch.float32),
    )
