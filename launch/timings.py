"""What engines, learner ranks and reward workers take for their work: measured by ``millrace plan``, or given by hand.

The planner reckons with them and the simulator passes the time by them; both describe continuous batching the same way.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InputError, nearest


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
    score_s: float = 0.5e-3
    """The rewards of a group."""
    together: float = 1.0
    """Engines and learner on the same cores: how much more CPU time each takes beside the other."""
    cores: int = 0
    """Cores that engines and learner share; 0: everyone has a device of its own."""
    control_s: float = 0.0
    """CPU time of driver and reward workers in a step, from the same cores."""
    lengths: tuple[int, ...] = ()
    """Completion lengths seen, in tokens; empty: geometric."""
    mean_length: float = 128.0
    """Without ``lengths``: mean of the geometric distribution,"""
    longest: int = 512
    """cut here."""
    prompt_tokens: float = 32.0
    """Mean length of a prompt."""

    def sample(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Lengths ``[count]`` of completions."""
        if self.lengths:
            return rng.choice(np.asarray(self.lengths, dtype=np.int64), count)
        return np.minimum(rng.geometric(1 / self.mean_length, count), self.longest).astype(np.int64)

    def decode_s(self, running: float) -> float:
        """Seconds of a decoding step with so many sequences."""
        return self.decode_step_s + self.decode_sequence_s * running

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Timings:
        """Read them; what is left out has its default. Raises ``InputError`` E105, E101 or E102."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            expected, fix = "a JSON object of timings", "millrace plan CONFIG.toml --devices N --save timings.json"
            raise InputError("E105", "cannot read timings", str(path), str(error), expected, fix) from None
        return cls.of(table, str(path))

    @classmethod
    def of(cls, table: dict[str, Any], where: str) -> Timings:
        """From a table that came from ``where``. Raises ``InputError`` E101 or E102."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in table.items():
            if name not in fields:
                guess = nearest(name, fields) or "see launch/timings.py"
                raise InputError("E101", "unknown timing", f"{where}:{name}", name, ", ".join(fields), guess)
            good = isinstance(value, list) if name == "lengths" else isinstance(value, int | float) and value >= 0
            if not good:
                raise InputError("E102", "bad value", f"{where}:{name}", repr(value), "a number >= 0", "seconds")
        values: dict[str, Any] = {name: tuple(v) if name == "lengths" else v for name, v in table.items()}
        return cls(**values)
