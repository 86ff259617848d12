"""What engines, learner ranks and reward workers take for their work: measured by ``millrace plan``, or given by hand.

The planner reckons with them and the simulator passes the time by them; both describe continuous batching the same way.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError, nearest, one_line

MOST_TOKENS, MOST = 1 << 20, 1e6
"""Of a completion or a prompt; and of whatever else a file may say."""
LIMITS = {
    "together": (0.01, MOST),
    "mean_length": (1.0, MOST_TOKENS),
    "longest": (1.0, MOST_TOKENS),
    "prompt_tokens": (1.0, MOST_TOKENS),
}
"""Smallest and largest value; of all others 0 and ``MOST``."""
WHOLE = ("cores", "room", "longest")
BISECTIONS = 60
GEOMETRIC_POINTS, RESIDUAL_POINTS = 4096, 256


@dataclass(frozen=True)
class Timings:
    """Seconds, on one device each. The defaults are those of ``bench loop --shape tail`` on two CPU cores."""

    decode_step_s: float = 2.6e-3
    """One decoding step of an engine, whatever it decodes."""
    decode_sequence_s: float = 42e-6
    """What each running sequence adds to it."""
    prefill_token_s: float = 20e-6
    """A token of a prompt."""
    request_s: float = 0.5e-3
    """A group's way into an engine and out."""
    train_step_s: float = 25e-3
    """A training step, whatever it holds."""
    train_token_s: float = 60e-6
    """What each of its tokens adds, prompts counted once a group."""
    ranks_s: float = 10e-3
    """What a step takes longer where there is more than one rank."""
    publish_s: float = 10e-3
    """The learner's part of a publication: gather, hash, canary."""
    prepare_s: float = 10e-3
    """An engine takes weights: so long beside its work,"""
    pause_s: float = 1e-3
    """and so long without."""
    prove_s: float = 8e-3
    """Until its canary has come."""
    score_call_s: float = 5e-3
    """A call of a reward worker, whatever it scores."""
    score_s: float = 0.6e-3
    """What each of its groups adds."""
    together: float = 1.0
    """How much longer everything takes in a running loop than timed alone; the simulator leaves it out."""
    ranks_together: float = 0.0
    """The same where there is more than one rank; 0: likewise."""
    cores: int = 0
    """Cores that engines and learner share; 0: everyone has a device of its own."""
    control_s: float = 0.0
    """CPU time of the driver in a step, from the same cores."""
    room: int = 0
    """Sequences whose keys and values fit in an engine's memory at the same time; 0: all."""
    lengths: tuple[int, ...] = ()
    """Completion lengths seen, in tokens; empty: geometric."""
    mean_length: float = 128.0
    """Without ``lengths``: mean of the geometric distribution once it is"""
    longest: int = 512
    """cut here."""
    prompt_tokens: float = 32.0
    """Mean length of a prompt."""

    def sample(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Lengths ``[count]`` of completions."""
        if self.lengths:
            return rng.choice(np.asarray(self.lengths, dtype=np.int64), count)
        return np.minimum(rng.geometric(self.stop_chance, count), self.longest).astype(np.int64)

    @cached_property
    def stop_chance(self) -> float:
        """Of a token to be the last: ``p`` with ``E[min(L, longest)] = (1 - (1 - p)^longest) / p = mean_length``."""
        low, high = 1e-12, 1 - 1e-12
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            mean = -math.expm1(self.longest * math.log1p(-middle)) / middle
            low, high = (middle, high) if mean > self.mean_length else (low, middle)
        return high

    def places(self, admitted: int) -> int:
        """Sequences that run in an engine that admits so many."""
        return min(admitted, self.room or admitted)

    def decode_s(self, running: float) -> float:
        """Seconds of a decoding step with so many sequences."""
        return self.decode_step_s + self.decode_sequence_s * running

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Timings:
        """Read them; what is left out has its default. Raises ``InputError`` E105, E101 or E102."""
        expected, fix = "a JSON object of timings", "millrace plan CONFIG.toml --devices N --save timings.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            found = one_line(error)
            raise InputError("E105", "cannot read timings", str(path), found, expected, fix) from None
        if not isinstance(table, dict):
            raise InputError("E105", "cannot read timings", str(path), one_line(repr(table), 60), expected, fix)
        return cls.of(table, str(path))

    @classmethod
    def of(cls, table: dict[str, Any], where: str) -> Timings:
        """From a table that came from ``where``. Raises ``InputError`` E101 or E102."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in table.items():
            if name not in fields:
                guess = nearest(name, fields) or "see launch/timings.py"
                raise InputError("E101", "unknown timing", f"{where}:{name}", name, ", ".join(fields), guess)
            if expected := _expected(name, value):
                default = fields[name].default
                fix = f"{name} = {list(default) if isinstance(default, tuple) else default}"
                raise InputError("E102", "bad value", f"{where}:{name}", one_line(repr(value), 60), expected, fix)
        values: dict[str, Any] = {name: tuple(v) if name == "lengths" else v for name, v in table.items()}
        timings = cls(**values)
        if not timings.decode_s(1) > 0:
            place, expected = f"{where}:decode_step_s", "a decoding step that takes time"
            raise InputError("E102", "bad value", place, "0", expected, f"decode_step_s = {cls.decode_step_s}")
        if not timings.lengths and timings.mean_length > timings.longest:
            place, expected = f"{where}:mean_length", f"<= longest = {timings.longest}, where completions are cut"
            raise InputError("E102", "bad value", place, f"{timings.mean_length:g}", expected, "raise longest")
        return timings


def _expected(name: str, value: Any) -> str:
    """What a timing must be, if ``value`` is not that; True and NaN are no numbers."""
    if name == "lengths":
        good = isinstance(value, list) and all(type(n) is int and 0 < n <= MOST_TOKENS for n in value)
        return "" if good else f"a list of whole numbers from 1 to {MOST_TOKENS}"
    kinds = (int,) if name in WHOLE else (int, float)
    least, most = LIMITS.get(name, (0.0, MOST))
    good = type(value) in kinds and least <= value <= most
    return "" if good else f"a {'whole ' if name in WHOLE else ''}number from {least:g} to {most:,.0f}"


class Lengths:
    """Completion lengths as a distribution."""

    def __init__(self, timings: Timings) -> None:
        if timings.lengths:
            self._values = np.sort(np.asarray(timings.lengths, dtype=float))
        else:
            quantiles = (np.arange(GEOMETRIC_POINTS) + 0.5) / GEOMETRIC_POINTS
            drawn = np.ceil(np.log1p(-quantiles) / np.log1p(-timings.stop_chance))
            self._values = np.minimum(np.maximum(drawn, 1.0), timings.longest)
        self._ordered = self._values.tolist()
        self._sums = [0.0, *np.cumsum(self._values).tolist()]

    @property
    def mean(self) -> float:
        """``E[L]``."""
        return self._sums[-1] / len(self._ordered)

    @property
    def live(self) -> float:
        """Tokens that a running sequence has on average: ``E[L^2] / (2 E[L])``, for the long ones run the longest."""
        return float((self._values**2).mean() / 2 / self._values.mean())

    def done(self, tokens: float) -> float:
        """``P(L <= tokens)``."""
        return bisect_right(self._ordered, tokens) / len(self._ordered)

    def capped(self, limit: float) -> float:
        """``E[min(L, limit)]``."""
        below, count = bisect_right(self._ordered, limit), len(self._ordered)
        return (self._sums[below] + limit * (count - below)) / count

    def longest(self, count: float) -> float:
        """``E[max of count]``."""
        ranks = np.arange(1, len(self._values) + 1) / len(self._values)
        weights = ranks**count - (ranks - 1 / len(self._values)) ** count
        return float(weights @ self._values)

    def longest_left(self, count: float) -> float:
        """``E[max of count]`` of what running sequences still lack: ``P(rest <= x) = E[min(L, x)] / E[L]``."""
        most = float(self._values[-1])
        points = most * (np.arange(RESIDUAL_POINTS) + 0.5) / RESIDUAL_POINTS
        below = np.array([self.capped(point) for point in points]) / self.mean
        return most * float((1 - below**count).mean())
