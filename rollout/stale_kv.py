"""What keeping the KV cache across publications does to what is sampled, and when to drop it.

Running requests go on over keys and values that older weights computed. Dropping them costs the prefill of all that is
running, so an engine keeps them until it measures that it matters. Invariant: the gap compares two log-probs of the
same token under the same weights on the same engine; the cache is all that differs, staleness has no part in it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np

from shared.types import Completion

TOKENS_COMPARED = 4
"""Of one completion between two publications."""

Rescore = Callable[[Completion, int], Awaitable[tuple[int, float]]]
"""Completion, position ``t`` -> (policy version, log-prob) of ``token_ids[t]``, everything before it computed afresh."""


class StaleKV:
    """The measure and the decision of one engine; ``limit`` is ``rollout.max_stale_kv_gap`` in nats."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._gaps: list[float] = []
        self._measured = False

    async def measure(self, completions: tuple[Completion, ...], rescore: Rescore) -> None:
        """Compare one completion, once between two publications: the first that has tokens of several versions."""
        crossing = next((c for c in completions if len(c.version_spans) > 1), None)
        if crossing is None or self._measured:
            return
        self._measured = True
        last, gaps = crossing.version_spans[-1], []
        # The end of the last span is furthest from the old weights' keys, its start is nearest: both count.
        for position in np.unique(np.linspace(last.start, last.end - 1, TOKENS_COMPARED).astype(int)):
            version, logprob = await rescore(crossing, int(position))
            if version == last.version:  # Else new weights have arrived in between.
                gaps.append(abs(logprob - float(crossing.logprobs[position])))
        self._gaps = gaps

    def take(self) -> tuple[float, bool]:
        """(Mean gap in nats since the last publication, whether this one drops the KV cache); begins anew.

        The gap is 0 when no completion went on over older keys and values.
        """
        gap = float(np.mean(self._gaps)) if self._gaps else 0.0
        self._gaps, self._measured = [], False
        return gap, self._limit == 0 or gap > self._limit
