"""Scored groups become packed micro-batches, the same number on every rank.

Every rank sees all groups of the batch and computes the same plan, so nothing has to be agreed over the network.
Advantages and loss weights are added later, once per optimizer step over all of its sequences: no split into
micro-batches or ranks can change the gradient.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.attention import Layout
from learner.logprobs import PackedTokens
from shared.types import Completion, IntArray, Prompt, RolloutGroup


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of a generated batch."""

    prompt: Prompt
    completion: Completion
    index: int
    """Number among all sequences of the batch, ``group * G + completion``; -1 for a filler."""
    group: int
    """Index of its group among the batch's groups."""
    trainable: int
    """Tokens in its loss mask: all of the completion, or none."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass on one rank works on; ``B`` rows, ``C`` columns of completion tokens.

    The first five fields are known from the groups; the rest is filled in before the first update.
    """

    rows: tuple[Row, ...]
    tokens: PackedTokens
    index: Tensor
    """``[B] int64``: number of each row in the batch, -1 for a filler."""
    rollout_logprobs: Tensor
    """``[B, C] float32``, 0 in the padding."""
    mask: Tensor
    """``[B, C] bool``: trainable tokens."""
    old_logprobs: Tensor | None = None
    """``[B, C]``; none: those of the training pass."""
    ref_logprobs: Tensor | None = None
    """``[B, C]``; none: no reference is needed."""
    ref_hidden: Tensor | None = None
    """``[K, D]``: the reference's hidden states, for a KL over the vocabulary."""
    entropy_keep: Tensor | None = None
    """``[B, C] bool``: tokens whose policy term counts; none: all."""
    advantages: Tensor | None = None
    """``[B, 1] float32``."""
    weights: Tensor | None = None
    """``[B, 1] float32``: factor on the row's token losses (see AGGREGATIONS)."""
    importance_scale: float = 1.0
    """Factor on the step's importance weights, 1 / their mean if they are normalised."""

    def pick(self, values: Tensor) -> Tensor:
        """``[B, 1]`` of ``values [M]``, which belong to all sequences of the batch; 0 for a filler."""
        known = values.to(self.index.device)[self.index.clamp(min=0)]
        return torch.where(self.index >= 0, known, 0.0)[:, None]

    def place(self, values: Tensor, total: int) -> Tensor:
        """``values [B]`` at their places among ``total`` sequences, 0 elsewhere."""
        real = self.index >= 0
        placed = torch.zeros(total, dtype=torch.float64, device=self.index.device)
        return placed.index_add(0, self.index[real], values[real].double())

    def lay_out(self, per_sequence: Sequence[Sequence[Any]]) -> Tensor:
        """``[B, C] float32`` of given values, ``per_sequence[group][completion]`` being ``[C_i]``."""
        laid = torch.zeros(self.mask.shape, dtype=torch.float32)
        for line, row in zip(laid, self.rows, strict=True):
            if row.index >= 0:
                group = per_sequence[row.group]
                given = torch.as_tensor(group[row.index % len(group)])
                line[: len(given)] = given
        return laid.to(self.mask.device)


def build_rows(groups: list[RolloutGroup], *, mask_truncated: bool) -> list[Row]:
    """All sequences of the batch, in group order."""
    rows: list[Row] = []
    for i, group in enumerate(groups):
        for completion in group.completions:
            out = mask_truncated and completion.finish_reason == "length"
            rows.append(Row(group.prompt, completion, len(rows), i, 0 if out else len(completion.token_ids)))
    return rows


@dataclass(frozen=True)
class Step:
    """One optimizer step: its ``M`` sequences over all ranks, and the micro-batches of this rank."""

    members: Tensor
    """``[M] int64``: numbers of its sequences in the batch, masked ones included."""
    groups: Tensor
    """``[M] int64``: the group of each, numbered from 0."""
    lengths: Tensor
    """``[M] int64``: trainable tokens of each."""
    batches: tuple[MicroBatch, ...]
    rows: tuple[Row, ...] = ()
    """The sequences themselves, those of other ranks included."""
    entropy_tokens: int = 0
    """Tokens that an entropy bonus covers."""


def plan_steps(rows: list[Row], count: int, budget: int, rank: int, num_ranks: int, device: torch.device) -> list[Step]:
    """``count`` optimizer steps over ``rows``, whole groups each; ``rank`` gets its share of their micro-batches."""
    steps = []
    number_of_groups = 1 + max((row.group for row in rows), default=-1)
    for chosen in np.array_split(np.arange(number_of_groups), count):
        members = [row for row in rows if chosen.size and chosen[0] <= row.group <= chosen[-1]]
        mine = split(members, budget, num_ranks)[rank]
        steps.append(
            Step(
                members=torch.tensor([row.index for row in members], dtype=torch.int64),
                groups=torch.tensor([row.group - int(chosen[0]) for row in members], dtype=torch.int64),
                lengths=torch.tensor([row.trainable for row in members], dtype=torch.int64),
                batches=tuple(collate(part, device) for part in mine),
                rows=tuple(members),
            )
        )
    return steps


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
    filler = Row(shortest.prompt, shortest.completion, -1, shortest.group, 0)
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


def collate(rows: list[Row], device: torch.device) -> MicroBatch:
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

    return MicroBatch(
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
        index=tensor([row.index for row in rows], torch.int64),
        rollout_logprobs=tensor(rollout, torch.float32),
        mask=tensor(mask, torch.bool),
    )
