"""What was read of a TRL script or file: settings, model, rows and reward functions, and what could not be read.

``launch/trl_reader.py`` and ``launch/trl_script.py`` fill it, ``launch/trl_rules.py`` translates it. Nothing here runs what
it describes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import InputError, one_line

# trl.rewards -> our built-in, and its arguments by theirs, in the order of theirs.
BUILTINS: dict[str, tuple[str, dict[str, str]]] = {
    "accuracy_reward": ("math_accuracy", {}),
    "reasoning_accuracy_reward": ("reasoning_math_accuracy", {}),
    "think_format_reward": ("think_format", {}),
    "get_soft_overlong_punishment": ("soft_overlong", {"max_completion_len": "limit", "soft_punish_cache": "buffer"}),
    "get_repetition_penalty_reward": ("repetition", {"ngram_size": "ngram", "max_penalty": "worst"}),
    "get_cosine_scaled_reward": ("cosine_length", {"max_len": "limit"}),
}
COSINE = {"min_value_wrong": -1.0, "max_value_wrong": -0.5, "min_value_correct": 0.5, "max_value_correct": 1.0}
FILES = ("json", "csv", "parquet")


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    file: str
    """A local file: the one that was read there, or the one to save to."""
    command: str = ""
    """Python that saves the rows to ``file``; empty if it is there already."""
    rows: int | None = None
    changed: bool = False
    """The script does something to them first."""


@dataclass
class Found:
    """Everything that was read of ``path``."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """As given, by TRL's name."""
    model: str | None = None
    tokenizer: str | None = None
    train: Source | None = None
    eval: Source | None = None
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """Tables of ``reward.functions``, without weights."""
    trainer: dict[str, int] = field(default_factory=dict)
    """Further arguments of GRPOTrainer, with their lines."""
    unread: list[str] = field(default_factory=list)
    """What could not be read, one line each."""
    starts: int = 0
    """The line at which importing the script would start to work; 0: nowhere."""
    refused: list[InputError] = field(default_factory=list)
    """What has to be given some other way, unless it is."""

    def skip(self, line: int, text: str) -> None:
        """Note that something at ``line`` was not read."""
        self.unread.append(f"{self.path.name}:{line}: {text}" if line else f"{self.path.name}: {text}")

    def refuse(self, what: str, line: int, found: str, expected: str, fix: str) -> None:
        """Note that something mandatory cannot be read."""
        place = f"{self.path.name}:{line}" if line else self.path.name
        self.refused.append(InputError("E102", what, place, one_line(found, 80), expected, fix))


def source_of(name: str, config: str | None, split: str, files: Any) -> Source:
    """What ``load_dataset`` would read: a local file, or a dataset of the hub with the command that saves it."""
    if isinstance(files, dict):
        files = files.get(split.partition("[")[0])
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    part = re.fullmatch(r"[\w.-]+\[:(\d+)\]", split)
    rows = int(part.group(1)) if part else None
    if name in FILES and isinstance(files, str) and "://" not in files and not set("*?[") & set(files + split):
        return Source(files)
    given = [repr(name), *([repr(config)] if config else []), *([f"data_files={files!r}"] if files else [])]
    stem = re.sub(r"\W+", "-", f"{Path(name).name} {config or ''} {split}".lower()).strip("-")
    file = f"data/{stem}.parquet"
    command = f"load_dataset({', '.join(given)}, split={split!r}).to_parquet({file!r})"
    return Source(file, command, rows)


def builtin_reward(name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The table of our built-in for ``name`` of trl.rewards."""
    ours, renamed = BUILTINS[name]
    named = dict(zip([*renamed, *COSINE] if ours == "cosine_length" else renamed, args)) | kwargs
    table: dict[str, Any] = {"function": ours}
    translated = {renamed[key]: value for key, value in named.items() if key in renamed}
    if ours == "cosine_length":
        value = COSINE | {key: value for key, value in named.items() if key in COSINE}
        translated["right"] = [value["max_value_correct"], value["min_value_correct"]]
        translated["wrong"] = [value["min_value_wrong"], value["max_value_wrong"]]
        translated["column"] = "solution"
    return table | ({"args": translated} if translated else {})
