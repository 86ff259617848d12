"""The health of one engine slot as a state machine: no Ray, no asyncio, and a clock that is given.

``EnginePool`` tells it what happens and does what the state says. Invariants: only a healthy engine is given requests; a
new life passes through ``stale`` and becomes healthy by a proof of its weights alone; a slot has at most
``run.max_restarts`` further lives. An event that the table does not have in a state is a fault of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["starting", "stale", "healthy", "suspect", "dead", "restarting", "retired"]
"""``stale`` runs but lacks a proof of its weights; ``suspect`` gets no new work; ``retired`` has no life left."""
Event = Literal[
    "ready", "synced", "outdated", "progressed", "probe_ok", "probe_missed", "overdue", "stuck", "died", "restarted"
]
"""``progressed``: a request finished. ``overdue``, ``stuck``: one exceeded its deadline, while others finished or none."""

MISSES = 3
"""Probes missed in a row, after which an engine is dead."""
GRACE_S = 5.0
"""For a suspect with an overdue request: to answer a probe, and to finish something if it is stuck."""
BACKOFF_S, MAX_BACKOFF_S = 0.25, 30.0
"""Before a restart, doubled for each restart since the engine served last; and its limit."""

_RUNNING: dict[Event, State] = {"outdated": "stale", "died": "dead"}
TABLE: dict[State, dict[Event, State]] = {
    "starting": {"ready": "stale", "died": "dead"},
    "stale": _RUNNING
    | dict.fromkeys(("progressed", "probe_ok", "probe_missed", "overdue", "stuck"), "stale")
    | {"synced": "healthy"},
    "healthy": _RUNNING
    | dict.fromkeys(("synced", "progressed", "probe_ok"), "healthy")
    | dict.fromkeys(("probe_missed", "overdue", "stuck"), "suspect"),
    "suspect": _RUNNING
    | dict.fromkeys(("synced", "progressed", "probe_missed", "overdue", "stuck"), "suspect")
    | {"probe_ok": "healthy"},
    "dead": {"restarted": "restarting"},
    "restarting": {"ready": "stale", "died": "dead"},
    "retired": {},
}
"""Where each event leads; ``EngineHealth`` diverts what counts and deadlines decide."""


class EngineHealth:
    """One slot of the fleet, over all its lives."""

    def __init__(self, max_restarts: int, clock: Callable[[], float] | None = None) -> None:
        """``max_restarts`` lives beyond the first; ``clock`` is monotonic, in seconds, by default the system's."""
        self._max_restarts, self._clock = max_restarts, clock or time.monotonic
        self.state: State = "starting"
        self.restarts = 0
        """Lives begun after the first."""
        self.backoff_s = 0.0
        """To wait before the life that has been granted last."""
        self._misses = self._stuck = self._in_vain = 0
        self._grace_ends: float | None = None
        """When a suspect with an overdue request must have cleared itself."""

    @property
    def runs(self) -> bool:
        """True if the engine has started and is not lost."""
        return self.state in ("stale", "healthy", "suspect")

    @property
    def restarts_left(self) -> int:
        """Further lives that it may have."""
        return self._max_restarts - self.restarts

    def on(self, event: Event) -> State:
        """What ``event`` makes of the engine."""
        assert event in TABLE[self.state], f"{event} while {self.state}"
        if event == "restarted" and self.restarts_left == 0:
            self.state = "retired"
            return self.state
        self._count(event)
        if self._is_lost(event):
            self.state = "dead"
        elif self.state != "suspect" or event != "probe_ok" or not self._must_progress:
            self.state = TABLE[self.state][event]
        if self.state != "suspect":
            self._grace_ends = None
        return self.state

    def _count(self, event: Event) -> None:
        if event == "restarted":
            self.restarts += 1
            self.backoff_s = min(BACKOFF_S * 2.0**self._in_vain, MAX_BACKOFF_S)
            self._in_vain += 1
        if event == "synced":
            self._in_vain = 0
        if event in ("ready", "probe_ok"):
            self._misses = 0
        if event in ("ready", "progressed", "outdated"):
            self._stuck = 0
        self._misses += event == "probe_missed"
        self._stuck += event == "stuck"
        if event in ("overdue", "stuck") and self._grace_ends is None:
            self._grace_ends = self._clock() + GRACE_S

    @property
    def _must_progress(self) -> bool:
        """One request may be too long for its deadline; two, and nothing finished in between, are the engine's fault."""
        return self._stuck > 1

    def _is_lost(self, event: Event) -> bool:
        """Whether a probe was the last: too many missed, or the grace is over and the suspicion stands."""
        over = self.state == "suspect" and self._grace_ends is not None and self._clock() >= self._grace_ends
        if event == "probe_missed":
            return over or self._misses >= MISSES
        return event == "probe_ok" and over and self._must_progress
