"""What became of each of TRL's settings: the table ``settings.txt`` beside this file, read once and checked.

The readers take names, kinds and defaults from it, ``rules`` what is copied, ``docs/import-trl.md`` shows it. Invariant: every
Millrace key that it names exists.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config_loader import known_keys
from shared.errors import InputError

TABLE = Path(__file__).with_name("settings.txt")
VERSION = "TRL 1.16.0"
TRAINER = "GRPOTrainer"
MAY_BE_NONE = {"vllm_importance_sampling_clip_max", "max_completion_length"}
"""Settings with a number as default for which None means something."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Row:
    """One setting of TRL."""

    section: str
    name: str
    default: Any
    keys: tuple[str, ...]
    """Millrace's keys; none where there is no equal, or no meaning."""
    fate: str
    """copied, mapped, no equal or no meaning."""
    text: str
    """How it is mapped, or why it is not."""
    differs: bool
    """It means something else here, which is said where it is given."""


@functools.cache
def rows() -> tuple[Row, ...]:
    """The whole table, in its order."""
    found, section = [], ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            found.append(_row(section, line))
    return tuple(found)


def _row(section: str, line: str) -> Row:
    name, default, keys, text = (cell.strip() for cell in line.split(" | ", 3))
    fate = {"none": "no equal", "-": "no meaning"}.get(keys, "copied" if keys.startswith("=") else "mapped")
    named = () if fate.startswith("no ") else tuple(key.strip() for key in keys.lstrip("= ").split(","))
    # reward.functions and the like are lists of tables, algorithm.kl a table: both lie on the way to known keys.
    unknown = [key for key in named if not any(f"{known}.".startswith(f"{key}.") for known in known_keys())]
    assert not unknown, f"{name}: no such key {unknown}"
    return Row(section, name, ast.literal_eval(default), named, fate, text.removeprefix("! "), text.startswith("!"))


@functools.cache
def settings() -> dict[str, Row]:
    """Everything that may stand in a GRPOConfig, or in a file for ``trl grpo``, by name."""
    return {row.name: row for row in rows() if row.section != TRAINER}


@functools.cache
def trainer_arguments() -> dict[str, Row]:
    """The arguments of GRPOTrainer, by name."""
    return {row.name: row for row in rows() if row.section == TRAINER}


def coerced(name: str, value: Any, place: str) -> Any:
    """``value`` in the kind of the setting's default, as TRL's own parser would read it. Raises ``InputError`` E102."""
    default = settings()[name].default if name in settings() else None
    if isinstance(value, str) and not isinstance(default, str):
        value = _from_text(value, default)
    if not isinstance(default, int | float):
        return value
    if value is None:  # As in the JSON of an older release, where it was allowed.
        return None if name in MAY_BE_NONE else default
    truth = isinstance(default, bool)
    if not isinstance(value, int | float) or isinstance(value, bool) != truth or not math.isfinite(value):
        expected = "true or false" if truth else "a number"
        raise InputError("E102", "bad value", place, repr(value), expected, f"{name} = {default}")
    if isinstance(default, float):
        return float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _from_text(value: str, default: Any) -> Any:
    """YAML reads 1e-6 as text."""
    words = {"none": None, "null": None} | ({"true": True, "false": False} if isinstance(default, bool) else {})
    if value.lower() in words:
        return words[value.lower()]
    if NUMBER.fullmatch(value) and (isinstance(default, int | float) or "e" in value.lower()):
        return float(value)
    return value
