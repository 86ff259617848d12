"""The time ledger: every process is in exactly one named state at any moment, and no second is lost.

Each actor keeps a ``TimeLedger`` and hands out what happened since the last time; its answers carry the slice along,
so that accounting costs no call of its own. The controller adds all slices to one ``TimeBook``. Invariant: the slices
of a process follow each other without gap or overlap, so its states sum to its wall clock.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

RESIDUE_LIMIT = 0.005
"""Share of a process's wall clock that its states may miss."""


@dataclass(frozen=True)
class TimeSlice:
    """A stretch of one process's life, in seconds of the Unix clock."""

    process: str
    """``controller``, ``engine-0``, ``learner-0``, ``reward-0``, ..."""
    start: float
    end: float
    intervals: tuple[tuple[str, float, float], ...]
    """``(state, start, end)`` in order, without gaps."""


class TimeLedger:
    """What one process does, as a sequence of states; used by one thread."""

    def __init__(
        self,
        process: str,
        state: str = "start",
        clock: Callable[[], float] | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """``clock`` is monotonic, in seconds; by default the system's.

        ``settle`` waits for work that was begun but goes on by itself, as on a GPU. It is called where a state ends, so that
        the state that began the work has its time.
        """
        clock = clock or time.monotonic
        self._settle = settle
        self._process, self._clock = process, clock
        # Monotonic inside a process, so that nothing ever runs backwards; comparable between them, for one timeline.
        self._offset = time.time() - clock()
        self._state, self._since, self._sliced = state, clock(), clock()
        self._intervals: list[tuple[str, float, float]] = []

    @property
    def state(self) -> str:
        """The state of this moment."""
        return self._state

    def enter(self, state: str) -> None:
        """From now on the process is in ``state``."""
        if state != self._state:
            self._settle()
            now = self._clock()
            self._intervals.append((self._state, self._since + self._offset, now + self._offset))
            self._state, self._since = state, now

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        """``state`` for the length of the block, then the state before it."""
        before = self._state
        self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    def take(self) -> TimeSlice:
        """Everything since the last call; the current state goes on."""
        self._settle()
        now = self._clock()
        self._intervals.append((self._state, self._since + self._offset, now + self._offset))
        taken = TimeSlice(self._process, self._sliced + self._offset, now + self._offset, tuple(self._intervals))
        self._intervals, self._since, self._sliced = [], now, now
        return taken


class TimeBook:
    """The slices of all processes: seconds by state, the check of their sum, and a Chrome trace for Perfetto."""

    def __init__(self, trace: Path | None = None, most_bytes: int | None = None) -> None:
        """``trace``: a JSON file that is appended to as slices arrive; readable at any moment.

        Beyond ``most_bytes`` it is kept as ``<name>.before.json`` in place of the one before, and begun anew.
        """
        self.totals: dict[str, dict[str, float]] = {}
        """Process -> state -> seconds."""
        self._threads: dict[str, int] = {}
        """Numbers of the processes in the trace."""
        self._walls: dict[str, tuple[float, float]] = {}
        self._row: dict[str, float] = defaultdict(float)
        self._path, self._most_bytes = trace, most_bytes
        self._trace: TextIO | None = None
        self._open()

    def add(self, piece: TimeSlice) -> None:
        """Account for ``piece``; one that starts a process anew ends the time for which that was lost."""
        if piece.process not in self.totals:
            self.totals[piece.process] = defaultdict(float)
            self._threads[piece.process] = len(self._threads)
            self._event({"name": "thread_name", "ph": "M", "args": {"name": piece.process}}, piece.process)
        start, last = self._walls.get(piece.process, (piece.start, piece.start))
        self._walls[piece.process] = (start, piece.end)
        intervals = piece.intervals
        if intervals and intervals[0][0] == "start" and piece.start > last:
            intervals = (("lost", last, piece.start), *intervals)
        for state, begin, end in intervals:
            self.totals[piece.process][state] += end - begin
            self._row[f"time/{piece.process}/{state}"] += end - begin
            if end > begin:
                event = {"name": state, "ph": "X", "ts": round(begin * 1e6), "dur": round((end - begin) * 1e6)}
                self._event(event, piece.process)
        if self._trace is not None and self._most_bytes and self._trace.tell() > self._most_bytes:
            self._begin_anew()

    def row(self) -> dict[str, float]:
        """``time/<process>/<state>``: seconds that came in since the last call."""
        row, self._row = dict(self._row), defaultdict(float)
        return row

    def walls(self) -> dict[str, float]:
        """Process -> seconds from its first slice to its last."""
        return {process: end - start for process, (start, end) in self._walls.items()}

    def residues(self) -> dict[str, float]:
        """Process -> share of its wall clock that its states do not account for."""
        walls = self.walls()
        return {
            process: abs(walls[process] - sum(states.values())) / max(walls[process], 1e-9)
            for process, states in self.totals.items()
        }

    def close(self) -> None:
        """End the trace."""
        if self._trace is not None:
            self._trace.write('{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "millrace"}}\n]\n')
            self._trace.close()
            self._trace = None

    def _open(self) -> None:
        if self._path is not None:
            self._trace = self._path.open("w", encoding="utf-8")
            self._trace.write("[\n")  # The format allows a missing end: a killed run leaves a file that opens.

    def _begin_anew(self) -> None:
        assert self._path is not None
        self.close()
        self._path.replace(self._path.with_suffix(".before.json"))
        self._open()
        for process in self._threads:
            self._event({"name": "thread_name", "ph": "M", "args": {"name": process}}, process)

    def _event(self, event: dict[str, object], process: str) -> None:
        if self._trace is not None:
            self._trace.write(json.dumps(event | {"pid": 1, "tid": self._threads[process]}) + ",\n")
