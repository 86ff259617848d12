"""A translation in the making: TRL's settings on one side, Millrace's keys and what is to be said on the other.

The rules of ``launch/trl_rules.py`` and ``launch/trl_batches.py`` read and fill it. Invariant: every written key says which of
TRL's settings it comes from, or why it is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from launch.trl_found import Found
from launch.trl_settings import VERSION, settings
from shared.config import Config
from shared.errors import InputError, nearest, one_line

CLIP = {"name": "clip", "low": 0.2, "high": 0.2}
"""Millrace's default policy loss, with the arguments that it has when none are given."""
SECRET = ("token", "key", "secret", "password", "env")
"""Settings with such names are never shown with their value."""


@dataclass
class Translation:
    """What was found, and what became of it so far."""

    found: Found
    processes: int = 1
    """Training processes, accelerate's num_processes."""
    rows: int | None = None
    """Rows to train on, if known."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Millrace's values by dotted key."""
    origins: dict[str, str] = field(default_factory=dict)
    """For each key what it comes from, for a comment."""
    defaults: list[str] = field(default_factory=list)
    """What a default of TRL made other than Millrace's own default."""
    different: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    """Settings that have no equal."""
    steps: int = 100
    updates: int = 1
    """Optimizer steps on one generated batch."""
    steps_per_epoch: int | None = None

    def __getitem__(self, name: str) -> Any:
        """The value that a TRL setting has: the given one, or TRL's default."""
        return self.found.settings.get(name, settings()[name].default)

    def given(self, *names: str) -> list[str]:
        """Those of ``names`` that the file gives."""
        return [name for name in names if name in self.found.settings]

    def put(self, key: str, value: Any, *names: str, why: str = "") -> None:
        """Write a key that comes from the settings ``names``, unless it is Millrace's default and nobody gave them."""
        usual = default_of(key)
        given = self.given(*names)
        same = _same(value, usual)
        if same and not given:
            return
        self.keys[key] = value
        told = [name for i, name in enumerate(names) if i == 0 or self[name] is not None]
        shown = ", ".join(f"{name} = {one_line(repr(self[name]), 40)}" for name in told)
        self.origins[key] = ", ".join(given) if given else why or "TRL's default"
        if not given:
            cause = why or f"TRL's default {shown}"
            self.defaults.append(f"{key} = {written(value)}: {cause}; Millrace's own default is {_usual(value, usual)}")

    def differs(self, name: str, text: str) -> None:
        """Say that a setting means something else here."""
        self.different.append(f"{name}: {text}")

    def lacks(self, name: str, text: str, value: Any = None) -> None:
        """Say that a setting has no equal."""
        shown = one_line(repr(self[name] if value is None and name in settings() else value), 40)
        bare = shown == "None" or any(word in name.lower() for word in SECRET)
        self.without.append(f"{name}: {text}" if bare else f"{name} = {shown}: {text}")

    def refuse(self, code: str, name: str, found: object, expected: str, fix: str) -> InputError:
        """The error for a value with which there is nothing to translate."""
        what = {"E102": "bad value", "E104": "batch does not divide", "E108": "options disagree"}[code]
        return InputError(code, what, f"{self.found.path.name}:{name}", str(found), expected, fix)

    def account(self) -> list[str]:
        """Say what has no equal or is unknown; returns the names that have no meaning here."""
        idle = []
        for name, value in self.found.settings.items():
            row = settings().get(name)
            if row is None:
                guess = nearest(name, settings())
                self.lacks(name, f"unknown to {VERSION}" + (f"; did you mean {guess}?" if guess else ""), value)
            elif value != row.default and row.fate == "no equal":
                self.lacks(name, row.text)
            elif value != row.default and row.fate == "no meaning":
                idle.append(name)
        return idle


def default_of(key: str) -> Any:
    """Millrace's own default of a dotted key; None if it has none."""
    if key == "algorithm.policy_loss":
        return CLIP
    value: Any = Config
    for part in key.split("."):
        field_ = value.model_fields.get(part) if isinstance(value, type) and issubclass(value, BaseModel) else None
        if field_ is None:
            return None
        value = field_.annotation if field_.is_required() or _is_section(field_.annotation) else field_.default
        if not field_.is_required() and _is_section(field_.annotation) and key.endswith(f".{part}"):
            return field_.default.model_dump()
    return value.model_dump() if isinstance(value, BaseModel) else None if isinstance(value, type) else value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation.__name__ != "Choice"


def _same(value: Any, usual: Any) -> bool:
    if isinstance(value, dict) and isinstance(usual, dict) and "name" not in value:
        return all(name in usual and usual[name] == one for name, one in value.items())
    return bool(value == usual)


def _usual(value: Any, usual: Any) -> str:
    if isinstance(value, dict) and isinstance(usual, dict) and "name" not in value:
        usual = {name: usual.get(name) for name in value}
    return "none" if usual is None else written(usual)


def written(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {written(one)}" for key, one in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(written(one) for one in value) + "]"
    return _quoted(value) if isinstance(value, str) else "none" if value is None else repr(value)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _quoted(name)


def _quoted(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in plain) + '"'
