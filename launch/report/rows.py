"""The recorded rows of a run as series: read, checked, rounded and thinned for a page.

``run_data`` calls it for every run folder. A row that a running or killed run has written in part is left out; any
other line that is no row is refused. Invariant: the series of a run are as long as its steps, with None where a step
recorded nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from shared.errors import InputError
from shared.metrics import Row, read_metrics

MAX_POINTS = 1500
"""Longest series on a page; longer ones are averaged."""
MAX_VALUES = 280_000
"""Values of all series of a page, of some seven bytes each: many metrics or runs make the series shorter."""
FEWEST_POINTS = 200
MAX_PROCESSES = 16
"""Processes whose times keep series of their own; more are added up by kind."""


def read_rows(folder: Path) -> list[Row]:
    """All rows of ``metrics.jsonl``. Raises ``InputError`` E603 if there is no run, E606 for a line that is no row."""
    path = folder / "metrics.jsonl"
    if not path.is_file() or not (folder / "config.toml").is_file():
        found = "no such folder" if not folder.is_dir() else "no config.toml with metrics.jsonl"
        raise InputError("E603", "not a run folder", str(folder), found, "the folder of a run", "check the path")
    try:
        return read_metrics(folder)
    except OSError as error:
        raise InputError("E606", "cannot read metrics", str(path), str(error), "JSON lines", "restore it") from None


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of steps, and rows of evaluations."""
    evaluated = [row for row in rows if all(name == "step" or name.startswith("eval/") for name in row)]
    return [row for row in rows if any(name != "step" and not name.startswith("eval/") for name in row)], evaluated


def numbers(rows: list[Row], name: str) -> list[float]:
    """The recorded values of ``name``, without the steps that have none."""
    return [float(row[name]) for row in rows if _is_number(row.get(name))]


def rounded(value: Any, digits: int = 5) -> float | int | None:
    """``value`` with few significant digits, whole numbers whole; None for what is no number."""
    if not _is_number(value):
        return None
    if float(value).is_integer() and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.{digits}g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def times(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Process -> state -> seconds, added up over ``rows``."""
    total: dict[str, dict[str, float]] = {}
    for row in rows:
        for name in row:
            head, _, rest = name.partition("/")
            process, _, state = rest.partition("/")
            if head == "time" and state and _is_number(row[name]):
                states = total.setdefault(process, {})
                states[state] = states.get(state, 0.0) + row[name]
    return total


def kind_of(process: str) -> str:
    """``engine`` of ``engine-12``."""
    return process.partition("-")[0]


def series(rows: list[Row], notes: list[str], runs: int = 1) -> dict[str, Any]:
    """``{"steps": [n], "values": {name: [n]}}`` of one of ``runs``; a constant is kept once.

    Where times are recorded, ``"seconds": [n]`` of training until then: rows may be several steps apart.
    What was thinned out is added to ``notes``.
    """
    rows = _folded(rows, notes)
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    lively = sum(len(set(numbers(rows, name))) > 1 for name in names)
    points = min(MAX_POINTS, max(FEWEST_POINTS, MAX_VALUES // max(lively * runs, 1)))
    every = max(1, math.ceil(len(rows) / points))
    chunks = [rows[i : i + every] for i in range(0, len(rows), every)]
    if every > 1:
        notes.append(f"Curves: every point is the mean of {every} steps ({len(rows):,} were recorded).")
    values = {name: [_mean(numbers(chunk, name)) for chunk in chunks] for name in names}
    kept = {name: _once(column) for name, column in values.items() if any(v is not None for v in column)}
    shown: dict[str, Any] = {"steps": [chunk[-1]["step"] for chunk in chunks], "values": kept}
    if "time/step" in kept:
        clock = itertools.accumulate(sum(numbers(chunk, "time/step")) for chunk in chunks)
        shown["seconds"] = [rounded(passed, 7) for passed in clock]
    return shown


def _folded(rows: list[Row], notes: list[str]) -> list[Row]:
    """``rows`` with the times of many processes added up by kind, so that a page does not grow with the cluster."""
    processes = {name.split("/")[1] for row in rows for name in row if name.startswith("time/") and name.count("/") > 1}
    if len(processes) <= MAX_PROCESSES:
        return rows
    notes.append(f"Curves: the seconds by state of {len(processes):,} processes are added up by kind of process.")
    folded = []
    for row in rows:
        rest = {name: value for name, value in row.items() if not (name.startswith("time/") and name.count("/") > 1)}
        sums: dict[str, float] = defaultdict(float)
        for process, states in times([row]).items():
            for state, seconds in states.items():
                sums[f"time/{kind_of(process)}s/{state}"] += seconds
        folded.append(rest | sums)
    return folded


def _mean(values: list[float]) -> float | int | None:
    return rounded(sum(values) / len(values)) if values else None


def _once(column: list[Any]) -> list[Any]:
    return column[:1] if len(set(column)) == 1 else column
