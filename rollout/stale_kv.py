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
BELIEVED_FOR = 16
"""Publications for which what keeping did once decides; then it is tried again."""

Rescore = Callable[[Completion, int], Awaitable[tuple[int, float]]]
"""Completion, position ``t`` -> (policy version, log-prob) of ``token_ids[t]``, everything before it computed afresh."""


class StaleKV:
    """The measure and the decision of one engine; ``limit`` is ``rollout.max_stale_kv_gap`` in nats."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._gaps: list[float] = []
        self._measured = False
        self._publications = 0
        self._kept = 0
        """Publications since the cache was dropped last."""
        self._expected: dict[int, float] = {}
        """Gap after so many publications without a drop, as measured last."""
        self._believed = 0

    async def measure(self, completions: tuple[Completion, ...], rescore: Rescore) -> None:
        """Compare one completion, once between two publications: the first that has tokens of several versions."""
        crossing = next((c for c in completions if len(c.version_spans) > 1), None)
        if crossing is None or self._measured:
            return
        self._measured = True
        begun, last, gaps = self._publications, crossing.version_spans[-1], []
        # The end of the last span is furthest from the old weights' keys, its start is nearest: both count.
        for position in np.unique(np.linspace(last.start, last.end - 1, TOKENS_COMPARED).astype(int)):
            version, logprob = await rescore(crossing, int(position))
            gap = abs(logprob - float(crossing.logprobs[position]))
            # Not under newer weights; and a token at the border of a top-p filter may be outside it, infinitely far.
            if version == last.version and np.isfinite(gap):
                gaps.append(gap)
        if begun == self._publications:
            self._gaps = gaps

    def take(self) -> tuple[float, bool]:
        """(Mean gap in nats since the last publication, whether this one drops the KV cache); begins anew.

        The gap is 0 when no completion went on over older keys and values. It drops as well what is expected to pass
        the limit: waiting for that to be seen would let every second publication through.
        """
        gap = float(np.mean(self._gaps)) if self._gaps else 0.0
        if self._gaps:
            self._expected[self._kept] = gap
        self._gaps, self._measured = [], False
        self._publications += 1
        foreseen = self._expected.get(self._kept + 1, 0.0) > self._limit
        self._believed = self._believed + 1 if foreseen else 0
        if self._believed > BELIEVED_FOR:
            self._expected.clear()
            foreseen, self._believed = False, 0
        drop = self._limit == 0 or gap > self._limit or foreseen
        self._kept = 0 if drop else self._kept + 1
        return gap, drop
