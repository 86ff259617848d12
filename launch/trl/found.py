"""What was read of a TRL run, whichever way it was described; and the way that is no script: YAML or JSON arguments.

``script`` and ``read_arguments`` fill a ``Found``, ``rules`` translates it. A YAML file is one for ``trl grpo --config``; a JSON
file may also be what TrainingArguments wrote. Nothing here runs what it describes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.trl.settings import coerced
from shared.errors import InputError, nearest, one_line

Table = dict[str, Any]
# trl.rewards -> our built-in, and its arguments by theirs, in the order of theirs.
BUILTINS: dict[str, tuple[str, dict[str, str]]] = {
    "accuracy_reward": ("math_accuracy", {}),
    "reasoning_accuracy_reward": ("reasoning_math_accuracy", {}),
    "think_format_reward": ("think_format", {}),
    "get_soft_overlong_punishment": ("soft_overlong", {"max_completion_len": "limit", "soft_punish_cache": "buffer"}),
    "get_repetition_penalty_reward": ("repetition", {"ngram_size": "ngram", "max_penalty": "worst"}),
}
OVERLONG = {"max_completion_len": 1280, "soft_punish_cache": 256}  # What `trl grpo` calls it with.
FILL_IN = "FILL-IN"
"""Stands where something has to be written by hand."""
LOADERS = ("json", "csv", "parquet")


@dataclass
class Found:
    """Everything that was read of ``path``."""

    path: Path
    settings: Table = field(default_factory=dict)
    """As given, by TRL's name."""
    model: str | None = None
    train: list[Table] = field(default_factory=list)
    """Sources of data.train."""
    eval: list[Table] = field(default_factory=list)
    data: Table = field(default_factory=dict)
    """What else [data] needs: chat and system_prompt."""
    rewards: list[Table] = field(default_factory=list)
    """Tables of ``reward.functions``, without weights; functions of the script itself are called ``:name``."""
    own: str = ""
    """A module of those functions and all that they use."""
    trainer: dict[str, int] = field(default_factory=dict)
    """Further arguments of GRPOTrainer, with their lines."""
    first: list[str] = field(default_factory=list)
    """What has to be done before a run."""
    unread: list[str] = field(default_factory=list)
    """What could not be read, one line each."""

    def skip(self, line: int, text: str) -> None:
        """Note that something at ``line`` was not read."""
        self.unread.append(f"{self.path.name}:{line}: {text}" if line else f"{self.path.name}: {text}")

    def miss(self, line: int, what: str, found: str) -> None:
        """Note that something without which there is no run cannot be read."""
        self.first.append(f"{self.path.name}:{line}: {found} is not read: write {what} for {FILL_IN}")


def sources(found: Found, line: int, given: Table) -> list[Table]:
    """Tables of data.train for what ``load_dataset`` would be given; none if that is no file and no dataset of the hub."""
    name, split, files = str(given["path"]), str(given.get("split") or "train"), given.get("data_files")
    base, part = re.split(r"[\[+]", split)[0], re.fullmatch(r"[\w.-]+\[:(\d+)\]", split)
    if not base:  # A list of them, as text.
        return []
    limit = {"max_rows": int(part[1])} if part else {}
    if base != split and not part:
        found.skip(line, f'split "{split}": all rows of "{base}" are taken')
    files = files.get(base) if isinstance(files, dict) else files
    files = [files] if isinstance(files, str) else files
    if name in LOADERS:
        local = isinstance(files, list) and not any("://" in file or set("*?[") & set(file) for file in files)
        return [{"path": file} | limit for file in files] if local and files else []
    if Path(name).suffix[1:] in (*LOADERS, "jsonl") or name.startswith((".", "/")) or Path(name).is_dir():
        return [{"path": name, "split": base} | limit]
    revision = given.get("revision")
    if revision and re.fullmatch("[0-9a-f]{40}", str(revision)):
        name = f"{name}@{revision}"
    elif revision:
        found.skip(line, f'revision "{revision}" is no commit: a dataset of the hub is pinned by org/name@COMMIT')
    if "/" not in name:
        found.skip(line, f'a dataset of the hub is called org/name here: give the owner of "{name}"')
    subset = given.get("name") or given.get("data_dir")
    return [
        {"path": name} | ({"subset": str(subset)} if subset else {}) | {"split": files[0] if files else base} | limit
    ]


def builtin_reward(name: str, values: list[Any], named: Table) -> Table:
    """The table of our built-in for ``name`` of trl.rewards."""
    ours, renamed = BUILTINS[name]
    args = {renamed[key]: value for key, value in (dict(zip(renamed, values)) | named).items() if key in renamed}
    return {"function": ours} | ({"args": args} if args else {})


def read_arguments(path: Path, text: str) -> Found:
    """What a file of arguments says. Raises ``InputError`` E105 or E102."""
    table = _parsed(path, text)
    given = {name: coerced(name, value, f"{path.name}:{name}") for name, value in table.items()}
    found = Found(path, given, given.get("model_name_or_path"))
    options = {"revision": given.get("model_revision"), "dtype": given.get("dtype") or given.get("torch_dtype")}
    options = {name: value for name, value in options.items() if value}
    if options:
        found.settings["model_init_kwargs"] = options | dict(given.get("model_init_kwargs") or {})
    one = {"path": given.get("dataset_name"), "name": given.get("dataset_config")}
    mixture = [entry for entry in given.get("datasets") or [] if isinstance(entry, dict) and entry.get("path")]
    if mixture:
        found.train = [table for entry in mixture for table in sources(found, 0, entry)]
    elif one["path"]:
        found.train = sources(found, 0, one | {"split": given.get("dataset_train_split")})
        found.eval = sources(found, 0, one | {"split": given.get("dataset_test_split", "test")})
    if given.get("reward_model_name_or_path"):
        found.rewards.append({"model": given["reward_model_name_or_path"]})
    names = given.get("reward_funcs") or []
    found.rewards += [_reward(path, str(name)) for name in ([names] if isinstance(names, str) else names)]
    return found


def _parsed(path: Path, text: str) -> Table:
    import yaml

    try:
        table = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        wanted = "valid JSON" if path.suffix == ".json" else "valid YAML"
        raise InputError("E105", "cannot parse arguments", path.name, one_line(error), wanted, "correct it") from None
    if not isinstance(table, dict):
        found, fix = type(table).__name__, "write name: value"
        raise InputError("E105", "cannot parse arguments", path.name, found, "a table of arguments", fix)
    return {str(key): value for key, value in table.items() if not str(key).startswith("_")}


def _reward(path: Path, name: str) -> Table:
    if name in BUILTINS:
        return builtin_reward(name, [], OVERLONG if name == "get_soft_overlong_punishment" else {})
    module, dot, function = name.rpartition(".")
    if dot:
        return {"function": f"{module}:{function}"}
    guess = nearest(name, BUILTINS)
    expected, fix = f"one of {', '.join(BUILTINS)}, or a dotted path", f"did you mean {guess}?" if guess else "name it"
    raise InputError("E102", "unknown reward", f"{path.name}:reward_funcs", name, expected, fix)
