"""Find the setting that a wrong name stands for: a typo, a setting of another section, or TRL's name for it."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "launch" / "trl" / "settings.txt"
"""TRL's settings with ours; ``launch/trl/settings.py`` says what its columns are."""
VAGUE = {"path", "name"}
"""Names that say too little without their section."""
CLOSE = 0.75
"""Least similarity, of 1, of a typo and what was meant."""


@functools.cache
def table() -> tuple[tuple[str, ...], ...]:
    """Return the rows of the table: section, name, default, keys and text of each."""
    found, section = [], ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            found.append((section, *(cell.strip() for cell in line.split(" | ", 3))))
    return tuple(found)


def of_trl(name: str, keys: Iterable[str]) -> tuple[str, str] | None:
    """Return our setting for TRL's ``name`` and what is to be said of it; an empty setting if there is none."""
    row = next((row for row in table() if row[1] == name), None)
    if row is None:
        return None
    *_, named, text = row
    text = text.removeprefix("! ")
    if named in ("none", "-"):
        return "", text
    key = named.lstrip("= ").split(",")[0].strip()
    inner = re.match(r"\w*", text)
    if inner and f"{key}.{inner[0]}" in keys:
        return f"{key}.{inner[0]}", ""
    return key, "" if named.startswith("=") else text


def meant(name: str, keys: Iterable[str]) -> tuple[str, str]:
    """Return which of ``keys`` a wrong ``name`` stands for and what is to be said of it; both may be empty."""
    name, keys = name.replace("-", "_"), list(keys)
    last = name.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last and last not in VAGUE]
    if len(same) == 1:
        return same[0], ""
    if found := of_trl(last, keys):
        return found
    if same:
        return same[0], ""
    if "." in name:
        close = difflib.get_close_matches(name, keys, n=1, cutoff=CLOSE)
        return (close[0], "") if close else ("", "")
    ours = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(name, [*ours, *(row[1] for row in table())], n=1, cutoff=CLOSE)
    if not close:
        return "", ""
    return (ours[close[0]], "") if close[0] in ours else of_trl(close[0], keys) or ("", "")


def advice(name: str, keys: Iterable[str], form: str) -> str:
    """Return what to write instead of a wrong ``name``, by ``form`` of a setting; empty if nothing is near."""
    key, text = meant(name, keys)
    if key:
        return form.format(key) + (f" ({text})" if text else "")
    return f"remove it: {text}" if text else ""
