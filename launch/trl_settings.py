"""What became of each of TRL's settings: the table ``launch/data/trl/settings.txt``, read once and checked.

``launch/trl_reader.py`` takes names, kinds and defaults from it, ``launch/trl_rules.py`` what is copied, and
``docs/import-trl.md`` shows it. Invariant: every Millrace key that it names exists.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config_loader import known_keys
from shared.errors import InputError

TABLE = Path(__file__).resolve().parent / "data" / "trl" / "settings.txt"
VERSION = "TRL 1.16.0"
TRAINER = "GRPOTrainer"
MAY_BE_NONE = {"vllm_importance_sampling_clip_max", "max_completion_length"}
"""Settings with a number as default for which None means something."""


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
    unknown = [key for key in named if not any(known == key or known.startswith(f"{key}.") for known in known_keys())]
    assert not unknown, f"{name}: no such key {unknown}"
    return Row(section, name, ast.literal_eval(default), named, fate, text)


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
    row = settings().get(name)
    default = None if row is None else row.default
    if isinstance(value, str):
        value = _from_text(value, default)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, int) and isinstance(value, float) and (value.is_integer() or name == "warmup_steps"):
        return int(value) if value.is_integer() else value
    if isinstance(default, int | float) and not isinstance(value, bool if isinstance(default, bool) else int | float):
        expected = "true or false" if isinstance(default, bool) else "a number"
        if value is None:  # As in the JSON of an older release, where it was allowed.
            return None if name in MAY_BE_NONE else default
        raise InputError("E102", "bad value", place, repr(value), expected, f"{name} = {default}")
    return value


def _from_text(value: str, default: Any) -> Any:
    """YAML reads 1e-6 as text, and a command line everything."""
    if value.lower() in ("none", "null") and not isinstance(default, str):
        return None
    if isinstance(default, bool) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    number = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?" if isinstance(default, int | float) else r"[+-]?\d\S*[eE][+-]?\d+"
    if isinstance(default, str) or not re.fullmatch(number, value):
        return value
    try:
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    except ValueError:
        return value


def markdown() -> str:
    """The table for the documentation, one part a section."""
    lines: list[str] = []
    section = ""
    for row in rows():
        if row.section != section:
            section = row.section
            lines += [
                "",
                f"### {section}",
                "",
                "| TRL | its default | Millrace | how, or why not |",
                "|---|---|---|---|",
            ]
        keys = ", ".join(f"`{key}`" for key in row.keys) or row.fate
        text = row.text.replace("|", "\\|")
        lines.append(f"| `{row.name}` | `{row.default!r}` | {keys} | {text} |")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":  # Writes the documentation's copy: python -m launch.trl_settings > table.md
    print(markdown(), end="")
