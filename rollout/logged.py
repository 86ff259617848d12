"""What reward functions log, made fit for the run's records: names that are the run's own, endless or unreadable are changed.

``metrics.jsonl`` is the truth for every plot, and a resume cuts it by ``step``; functions and services name what they log as
they like. ``RewardWorker`` passes everything through here. Invariant: no logged name equals one that the run writes.
"""

from __future__ import annotations

import math
from typing import Any

from shared.errors import one_line
from shared.metrics import OWN

LONGEST_NAME = 100
"""Characters of a name; the rest is cut off."""
MOST_NAMES = 100
"""Names of metrics of one reward function; further ones are left out."""
CHANGES = {
    "name": "is written so: its own name is too long or not readable",
    "own": "is recorded so: the run writes metrics of its own name itself",
    "many": f"is left out: {MOST_NAMES} others were logged before",
    "value": "is left out where it is no finite number",
}
"""What is done to a metric -> the words of the warning."""


class Logged:
    """The names that one reward function has logged, and what of them was told."""

    def __init__(self, function: str) -> None:
        self._function = function
        self._names: set[str] = set()
        self._told: set[str] = set()

    def metrics(self, logged: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """``logged`` as it may be recorded, and a warning for each kind of change that was not told before."""
        kept: dict[str, float] = {}
        told: list[str] = []
        for given, value in logged.items():
            name = readable(given)
            change = "name" if name != given else ""
            if not name or name.partition("/")[0] in OWN:
                name, change = f"logged/{name}", "own"
            if not math.isfinite(value):
                change = "value"
            elif name not in self._names and len(self._names) >= MOST_NAMES:
                change = "many"
            else:
                self._names.add(name)
                kept[name] = value
            told += self._warning(name, change)
        return kept, told

    def extra(self, logged: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of ``logged`` under readable names."""
        return {readable(name): values for name, values in logged.items()}

    def _warning(self, name: str, change: str) -> list[str]:
        if not change or change in self._told:
            return []
        self._told.add(change)
        return [f"warning[W311] {self._function}: the logged metric {name} {CHANGES[change]}"]


def readable(name: str) -> str:
    """``name`` on one line, with control characters written out, and not too long."""
    return one_line(name, LONGEST_NAME)
