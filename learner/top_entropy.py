"""The tokens of a step with the highest entropy, the only ones whose policy term counts (arXiv 2506.01939).

The threshold is the quantile of the whole step, over all ranks. Invariant: tokens of one context (the same prompt, the
same tokens before them) have one entropy; rounding, which differs between micro-batches, never separates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from learner.batching import MicroBatch, Row, Step
from learner.distributed import gather_values, sum_over_ranks
from shared.types import IntArray

QUANTILE_LIMIT = 2**24
"""Largest number of values that ``torch.quantile`` accepts."""


def quantile(values: Tensor, share: float) -> Tensor:
    """The ``share`` quantile of ``values [n]``, interpolated linearly: ``torch.quantile`` of any number of values."""
    if len(values) <= QUANTILE_LIMIT:
        return torch.quantile(values, share)
    ascending = values.sort().values
    place = share * (len(values) - 1)
    return torch.lerp(ascending[int(place)], ascending[min(int(place) + 1, len(values) - 1)], place - int(place))


def mark(step: Step, entropies: Sequence[Tensor], share: float, rounding: float) -> Step:
    """``step`` with ``entropy_keep``: the tokens whose entropy reaches the ``1 - share`` quantile of the step.

    ``entropies`` holds one ``[B, C]`` for each of the step's micro-batches. Two entropies of one context differ by at
    most ``rounding``, as a share of the larger (or in nats, below 1). An entropy that is not finite is kept, so that
    the update shows it.
    """
    values = [entropy[batch.mask] for batch, entropy in zip(step.batches, entropies, strict=True)]
    everywhere = gather_values(torch.cat(values))
    known = everywhere[torch.isfinite(everywhere)]
    if not len(known):  # The engine's filter left nothing, or nothing is a number; the update will be skipped.
        return step
    threshold = quantile(known, 1 - share)
    kept = [~(entropy < threshold) for entropy in entropies]
    lowest = threshold - rounding * threshold.clamp(min=1)
    if ((known < threshold) & (known >= lowest)).any():  # The same answer on every rank.
        kept = _complete_ties(step, kept, [entropy >= lowest for entropy in entropies])
    pairs = list(zip(step.batches, kept, strict=True))
    count = sum_over_ranks(torch.stack([(keep & batch.mask).sum() for batch, keep in pairs]).sum())
    marked = tuple(replace(batch, entropy_keep=keep) for batch, keep in pairs)
    return replace(step, batches=marked, entropy_tokens=int(count))


def _complete_ties(step: Step, kept: list[Tensor], near: list[Tensor]) -> list[Tensor]:
    """``kept``, and the tokens ``near`` the threshold whose context has a token that is kept on any rank."""
    numbers = contexts(step.rows)
    seen = torch.zeros(sum(len(one) for one in numbers.values()), dtype=torch.float64)
    laid = [_lay_out(batch, numbers) for batch in step.batches]
    for batch, where, keep in zip(step.batches, laid, kept, strict=True):
        seen[where[(keep & batch.mask).cpu()]] = 1
    seen = sum_over_ranks(seen)
    return [
        keep | (close & ((where >= 0) & (seen[where.clamp(min=0)] > 0)).to(keep.device))
        for where, keep, close in zip(laid, kept, near, strict=True)
    ]


def _lay_out(batch: MicroBatch, numbers: dict[int, IntArray]) -> Tensor:
    """``[B, C] int64``: the context of each token, -1 in the padding and for fillers."""
    laid = torch.full(batch.mask.shape, -1, dtype=torch.int64)
    for line, row in zip(laid, batch.rows, strict=True):
        if row.index >= 0:
            line[: len(numbers[row.index])] = torch.from_numpy(numbers[row.index])
    return laid


def contexts(rows: Sequence[Row]) -> dict[int, IntArray]:
    """For each row, by its index, the number of every completion token's context; equal contexts have one number.

    In lexical order, whatever a completion shares with any earlier one it shares with the one before it.
    """
    found: dict[int, IntArray] = {}
    total, last_prompt, last = 0, b"", np.zeros(0, np.int64)
    last_tokens = np.zeros(0, np.int32)
    keyed = [(_sortable(row.prompt.token_ids), _sortable(row.completion.token_ids), row) for row in rows]
    for prompt, _, row in sorted(keyed, key=lambda item: item[:2]):
        tokens = row.completion.token_ids
        own = np.arange(total, total + len(tokens))
        total += len(tokens)
        if prompt == last_prompt:
            # The first token that differs still has the same tokens before it.
            shortest = min(len(tokens), len(last_tokens))
            differ = np.flatnonzero(tokens[:shortest] != last_tokens[:shortest])
            shared = int(differ[0]) + 1 if len(differ) else shortest
            own[:shared] = last[:shared]
        found[row.index] = own
        last_prompt, last, last_tokens = prompt, own, tokens
    return found


def _sortable(token_ids: IntArray) -> bytes:
    """Return ``token_ids`` as bytes that sort as the tokens do; a prefix sorts before every longer sequence."""
    return token_ids.astype(">u4").tobytes()
