"""A run's time for a page: seconds by process and state, and the timeline of the processes, thinned to a fixed size.

``run_data`` calls it. The trace may be gigabytes and may lack its end: it is read line by line, and what a running or
killed run left half written is skipped. Invariant: the size of what is returned does not grow with the length of the run.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.rows import kind_of, rounded

BINS = 600
"""Stretches into which the run is cut for the overview."""
MAX_LANES = 48
"""Processes on the timeline."""
MAX_INTERVALS = 5000
"""Intervals kept exactly, the newest of the run."""
KINDS = ("controller", "engine", "learner", "reward")


def in_order(processes: list[str]) -> list[str]:
    """By kind, then by number."""

    def key(process: str) -> tuple[int, str, list[int]]:
        kind = kind_of(process)
        place = KINDS.index(kind) if kind in KINDS else len(KINDS)
        digits = process.partition("-")[2].replace(".", " ").replace("-", " ").split()
        return place, kind, [int(part) for part in digits if part.isdigit()]

    return sorted(processes, key=key)


def seconds(times: dict[str, dict[str, float]], notes: list[str]) -> dict[str, dict[str, float]]:
    """Seconds by process and state, rounded; of many processes of a kind only the sum."""
    if len(times) > MAX_LANES:
        notes.append(f"Time ledger: the {len(times):,} processes are added up by kind.")
        folded: dict[str, dict[str, float]] = {}
        for process, states in times.items():
            kind = folded.setdefault(f"{kind_of(process)}s", {})
            for state, value in states.items():
                kind[state] = kind.get(state, 0.0) + value
        times = folded
    return {
        process: {state: float(rounded(value) or 0) for state, value in times[process].items() if value > 0}
        for process in in_order(list(times))
    }


@dataclass
class Trace:
    """The intervals of every process, in seconds since the beginning of the trace."""

    origin: float
    """Unix time of the beginning."""
    states: list[str] = field(default_factory=list)
    lanes: dict[str, Lane] = field(default_factory=dict)


class Lane:
    """The intervals of one process in order."""

    def __init__(self) -> None:
        self.begin, self.end, self.state = array("d"), array("d"), array("H")

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``begin [n] float64, end [n] float64, state [n] uint16``."""
        return np.array(self.begin), np.array(self.end), np.array(self.state)


def read_trace(path: Path) -> Trace | None:
    """The Chrome trace of a run's last life; None if there is none, or nothing in it."""
    trace = Trace(0.0)
    names: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for event in _events(path):
        if event.get("name") == "thread_name":
            names[event["tid"]] = str(event["args"]["name"])
        if event.get("ph") != "X" or event.get("tid") not in names:
            continue
        state, begin = str(event["name"]), event["ts"] / 1e6
        lane = trace.lanes.setdefault(names[event["tid"]], Lane())
        lane.begin.append(begin)
        lane.end.append(begin + event["dur"] / 1e6)
        lane.state.append(numbers.setdefault(state, len(numbers)))
    if not trace.lanes:
        return None
    trace.origin, trace.states = min(min(lane.begin) for lane in trace.lanes.values()), list(numbers)
    for lane in trace.lanes.values():
        lane.begin = array("d", (value - trace.origin for value in lane.begin))
        lane.end = array("d", (value - trace.origin for value in lane.end))
    return trace


def _events(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line.strip().rstrip(","))
            except ValueError:  # The brackets around it all, or a line that was cut.
                continue
            if isinstance(event, dict):
                yield event


def timeline(trace: Trace, notes: list[str]) -> dict[str, Any]:
    """The overview in bins, and the newest intervals exactly.

    ``bins``: per process a list of ``[state, count]`` runs, state -1 for no process; ``window``: per process
    ``[state, start, length, ...]`` in milliseconds after ``window_from``.
    """
    chosen = _chosen(in_order(list(trace.lanes)), notes)
    lanes = {process: trace.lanes[process].arrays() for process in chosen}
    end = max(float(finish.max()) for _, finish, _ in lanes.values())
    since = _window_start(lanes)
    kept = sum(int((finish > since).sum()) for _, finish, _ in lanes.values())
    total = sum(len(finish) for _, finish, _ in lanes.values())
    if kept < total:
        notes.append(
            f"Timeline: the overview shows the state that takes most of each of {BINS} stretches of "
            f"{end / BINS:.3g} s; the last {end - since:.3g} s are kept exactly ({kept:,} of {total:,} intervals)."
        )
    return {
        "origin": round(trace.origin, 3),
        "seconds": float(rounded(end, 7) or 0),
        "states": trace.states,
        "bins": {process: _runs(_dominant(lane, end, len(trace.states))) for process, lane in lanes.items()},
        "window_from": float(rounded(since, 9) or 0),
        "window": {process: _exact(lane, since) for process, lane in lanes.items()},
    }


def _chosen(processes: list[str], notes: list[str]) -> list[str]:
    if len(processes) <= MAX_LANES:
        return processes
    notes.append(f"Timeline: {MAX_LANES} of {len(processes):,} processes are shown, evenly over their kinds.")
    kept = {int(i) for i in np.linspace(0, len(processes) - 1, MAX_LANES)}
    return [process for i, process in enumerate(processes) if i in kept]


def _dominant(lane: tuple[np.ndarray, np.ndarray, np.ndarray], end: float, states: int) -> np.ndarray:
    """``[BINS] int``: the state with most time in each stretch, -1 where there is none."""
    begin, finish, state = lane
    sums = np.zeros((states, BINS))
    width = max(end, 1e-9) / BINS
    first = np.minimum((begin / width).astype(int), BINS - 1)
    last = np.minimum((finish / width).astype(int), BINS - 1)
    inside = first == last
    np.add.at(sums, (state[inside], first[inside]), (finish - begin)[inside])
    edges = np.arange(BINS + 1) * width
    for i in np.flatnonzero(~inside):  # At most as many as there are edges, for each process.
        span = slice(first[i], last[i] + 1)
        covered = np.minimum(edges[1:][span], finish[i]) - np.maximum(edges[:-1][span], begin[i])
        sums[state[i], span] += np.maximum(covered, 0)
    return np.where(sums.max(axis=0) > 0, sums.argmax(axis=0), -1)


def _runs(bins: np.ndarray) -> list[int]:
    """``[state, count, state, count, ...]``."""
    edges = np.flatnonzero(np.diff(bins)) + 1
    starts = [0, *edges.tolist()]
    lengths = np.diff([*starts, len(bins)])
    return [number for start, length in zip(starts, lengths) for number in (int(bins[start]), int(length))]


def _window_start(lanes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """The moment from which on all intervals fit."""
    ends = np.sort(np.concatenate([finish for _, finish, _ in lanes.values()]))
    return 0.0 if len(ends) <= MAX_INTERVALS else float(ends[-MAX_INTERVALS - 1])


def _exact(lane: tuple[np.ndarray, np.ndarray, np.ndarray], since: float) -> list[float]:
    begin, finish, state = lane
    kept = finish > since
    start = np.maximum(begin[kept], since) - since
    length = finish[kept] - since - start
    return [
        number
        for s, t, d in zip(state[kept].tolist(), start.tolist(), length.tolist())
        for number in (s, round(t * 1e3, 1), round(d * 1e3, 1))
    ]
