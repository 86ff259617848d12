"""A translation in the making: TRL's settings on one side, Millrace's keys and what is to be said on the other.

``rules`` and ``sizes`` read and fill it. Invariant: every written key says which of TRL's settings it comes from, or why it
is there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from launch.trl.found import Found
from launch.trl.settings import VERSION, settings
from shared.config import Config
from shared.errors import nearest, one_line

SECRET = ("token", "key", "secret", "password", "env")
"""Settings with such names are never shown with their value."""
LEAST = {"model": {"path": "m"}, "data": {"train": "t"}, "reward": {"functions": [{"function": "f"}]}}


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
    different: list[str] = field(default_factory=list)
    """Settings that mean something else here."""
    without: list[str] = field(default_factory=list)
    """Settings that have no equal."""
    idle: list[str] = field(default_factory=list)
    """Names of those without meaning here."""
    steps: int = 100
    steps_per_epoch: int | None = None

    def __getitem__(self, name: str) -> Any:
        """The value that a TRL setting has: the given one, or TRL's default."""
        return self.found.settings.get(name, settings()[name].default)

    def given(self, *names: str) -> list[str]:
        """Those of ``names`` that the file gives."""
        return [name for name in names if name in self.found.settings]

    def put(self, key: str, value: Any, *names: str, why: str = "") -> None:
        """Write a key that comes from the settings ``names``, unless it is Millrace's default and nobody gave them."""
        usual, given = default_of(key), self.given(*names)
        if isinstance(value, dict) and isinstance(usual, dict):
            usual = {name: usual[name] for name in value if name in usual} if value else usual
        if value == usual and not given:
            return
        self.keys[key] = value
        self.origins[key] = ", ".join(given) or why or f"TRL's default; Millrace's is {written(usual)}"

    def differs(self, name: str, text: str) -> None:
        """Say that a setting means something else here."""
        self.different.append(f"{name}: {text}")

    def lacks(self, name: str, text: str, value: Any = None) -> None:
        """Say that a setting has no equal."""
        shown = one_line(repr(self[name] if value is None and name in settings() else value), 40)
        bare = shown == "None" or any(word in name.lower() for word in SECRET)
        self.without.append(f"{name}: {text}" if bare else f"{name} = {shown}: {text}")

    def account(self) -> None:
        """Say which of the given settings have no equal, are unknown or have no meaning here."""
        for name, value in self.found.settings.items():
            row = settings().get(name)
            if row is None:
                guess = nearest(name, settings())
                self.lacks(name, f"unknown to {VERSION}" + (f"; did you mean {guess}?" if guess else ""), value)
            elif value != row.default and row.fate == "no equal":
                self.lacks(name, row.text)
            elif value != row.default and row.differs:
                self.differs(name, row.text)
            elif value != row.default and row.fate == "no meaning":
                self.idle.append(name)


def default_of(key: str) -> Any:
    """Millrace's own default of a dotted key."""
    value: Any = Config.model_validate(LEAST)
    for part in key.split("."):
        value = getattr(value, part)
    return value.model_dump() if isinstance(value, BaseModel) else value


def written(value: Any) -> str:
    """A value as TOML has it, on one line."""
    if isinstance(value, dict):
        pairs = [f"{key if _is_bare(key) else written(key)} = {written(one)}" for key, one in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(written(one) for one in value) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "none" if value is None else repr(value)


def _is_bare(key: str) -> bool:
    return key.isascii() and key.replace("_", "").replace("-", "").isalnum()
