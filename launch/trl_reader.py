"""Reads what a TRL run is described by: a script, or a JSON or YAML file of its arguments.

``millrace import-trl`` calls ``read``. A YAML file is one for ``trl grpo --config``; a JSON file may also be what
TrainingArguments wrote. Every value gets the kind that TRL's own parser would give it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.trl_found import BUILTINS, Found, builtin_reward, source_of
from launch.trl_script import read_script
from launch.trl_settings import coerced
from shared.errors import InputError, nearest, one_line

OVERLONG = {"max_completion_len": 1280, "soft_punish_cache": 256}  # What `trl grpo` calls it with.


def read(path: Path) -> Found:
    """Whatever ``path`` says. Raises ``InputError`` E105 for an unreadable file, E102 for a value of a wrong kind."""
    if not path.is_file():
        similar = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        fix = f"did you mean {path.parent / similar}?" if similar else "check the path"
        raise InputError("E105", "cannot read script", str(path), "no such file", "a .py, .json, .yaml file", fix)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at offset {error.start}"
        raise InputError("E105", "cannot parse script", path.name, found, "UTF-8", "save it as UTF-8") from None
    if path.suffix == ".py":
        return read_script(path, text)
    if path.suffix not in (".json", ".yaml", ".yml"):
        expected, fix = "a .py, .json, .yaml or .yml file", "rename it"
        raise InputError("E105", "cannot read script", path.name, path.suffix or "no suffix", expected, fix)
    return _read_arguments(path, _parsed(path, text))


def _parsed(path: Path, text: str) -> dict[str, Any]:
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


def _read_arguments(path: Path, table: dict[str, Any]) -> Found:
    given = {name: coerced(name, value, f"{path.name}:{name}") for name, value in table.items()}
    found = Found(path, given, given.get("model_name_or_path"))
    if given.get("model_revision", "main") != "main":
        found.settings["model_init_kwargs"] = {"revision": given["model_revision"]} | _table(given, "model_init_kwargs")
    if given.get("dtype") or given.get("torch_dtype"):
        kind = given.get("dtype") or given["torch_dtype"]
        found.settings["model_init_kwargs"] = {"dtype": kind} | _table(found.settings, "model_init_kwargs")
    _rows(found, given)
    if given.get("reward_model_name_or_path"):
        found.rewards.append({"model": given["reward_model_name_or_path"]})
    names = given.get("reward_funcs") or []
    found.rewards += [_reward(path, name) for name in ([names] if isinstance(names, str) else names)]
    return found


def _table(given: dict[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name)
    return value if isinstance(value, dict) else {}


def _rows(found: Found, given: dict[str, Any]) -> None:
    mixture, name = given.get("datasets"), given.get("dataset_name")
    splits = {"train": given.get("dataset_train_split", "train"), "eval": given.get("dataset_test_split", "test")}
    for part, split in splits.items():
        source = source_of(str(name), given.get("dataset_config"), split, None) if name else None
        if isinstance(mixture, list) and len(mixture) == 1 and isinstance(mixture[0], dict):
            one = {"split": split} | mixture[0] if part == "train" else mixture[0] | {"split": split}
            source = source_of(str(one.get("path")), one.get("name"), one["split"], one.get("data_files"))
        elif mixture and part == "train":
            expected = "one dataset, as there are no mixtures"
            found.refuse("train rows not readable", 0, f"datasets = {mixture}", expected, "--train ROWS.jsonl")
            return
        setattr(found, part, source)


def _reward(path: Path, name: Any) -> dict[str, Any]:
    if name in BUILTINS:
        return builtin_reward(name, [], OVERLONG if name == "get_soft_overlong_punishment" else {})
    module, dot, function = str(name).rpartition(".")
    if dot:
        return {"function": f"{module}:{function}"}
    guess = nearest(str(name), BUILTINS)
    expected, fix = f"one of {', '.join(BUILTINS)}, or a dotted path", f"did you mean {guess}?" if guess else "name it"
    raise InputError("E102", "unknown reward", f"{path.name}:reward_funcs", str(name), expected, fix)
