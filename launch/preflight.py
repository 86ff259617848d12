"""Everything that can be checked before an actor exists: choices, model files, tokenizer, data, rewards.

Errors of one pass are collected and raised together; nothing here needs a cluster.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch.environment import check_environment, check_secrets, open_token_file
from launch.model_files import PINNED, check_model
from launch.sinks import check_sinks
from rollout.generated_tasks import refuse_denied_rows
from rollout.prompts import PromptSet
from rollout.reward_loading import default_column, isolation_of, load_reward, missing_column, reward_name
from rollout.row_checks import read_checked
from rollout.sandbox import require_sandbox
from shared.choices import bind
from shared.config import Config
from shared.config_checks import warnings as combination_warnings
from shared.config_data import Source
from shared.errors import InputError, InputErrors, nearest, one_line, raise_all
from shared.types import Prompt

ADDED_TOKENS = 8
"""More than the class of a tokenizer adds to what its files name."""


@dataclass
class Prepared:
    """What a checked configuration turned into."""

    config: Config
    train: PromptSet
    held_out: list[Prompt]
    warnings: list[str]


def prepare(config: Config, origin: str, base: Path, probing: bool = True, rehearsal: bool = False) -> Prepared:
    """Check and load everything that needs no cluster. ``base``: the folder that reward files are relative to.

    ``probing`` also calls every reward function on canned completions, in a child that can be killed. A ``rehearsal``
    makes nothing that takes long: a built-in model that is not there yet stays untrained.

    Raises ``InputErrors`` with all the problems found.
    """
    from launch.builtin import resolve

    check_environment()
    config = _with_paths(resolve(config, origin, make_model=not rehearsal), base)
    problems: list[InputError] = []
    _collect(problems, lambda: _check_choices(config, origin))
    _collect(problems, lambda: check_sinks(config, origin))
    _collect(problems, lambda: check_secrets(config, origin))
    tokenizer = _collect(problems, lambda: _checked_tokenizer(config, origin, light=rehearsal))
    # Rows are read without a tokenizer too: what is wrong with them, and with rewards, is told in the same pass.
    load = partial(PromptSet.load, config, tokenizer=tokenizer) if tokenizer is not None else partial(_read, config)
    train = _collect(problems, lambda: load(config.data.train, "train", f"{origin}:data.train"))
    held = _collect(problems, lambda: load(config.data.eval or [], "test", f"{origin}:data.eval"))
    sound = not problems
    _collect(problems, lambda: check_rewards(config, origin, train.columns if train else None))
    if sound and not problems and held.prompts:  # Else the same would be said twice.
        _collect(problems, lambda: check_rewards(config, origin, held.columns))
    held_out = held.prompts[: config.eval.max_rows] if held else []
    warnings = combination_warnings(config, origin)
    if train is not None:
        _collect(problems, lambda: _check_tasks(config, origin, train.prompts + held_out))
        warnings += _check_rows(config, train, held_out, problems)
    if held is not None:
        warnings += _check_held_out(config, held, problems)
    raise_all(problems)
    assert train is not None
    warnings += filter(None, [open_token_file()])
    if not _names_pad_token(config):
        warnings.append(
            f"info: no pad token — {origin}:model.tokenizer. None is needed: sequences are packed, not padded"
        )
    if probing:
        from launch.doctor import probe

        warnings += probe(config, origin, train.prompts)
    return Prepared(config, train, held_out, warnings)


def _read(config: Config, sources: list[Source], split: str, key: str) -> None:
    """The rows of ``sources``, for what is wrong with them."""
    problems: list[InputError] = []
    for i, source in enumerate(sources):
        _collect(problems, partial(read_checked, config, source, split, f"{key}[{i}]" if len(sources) > 1 else key))
    raise_all(problems)


def _collect(problems: list[InputError], check: Any) -> Any:
    try:
        return check()
    except InputErrors as errors:
        problems += errors.problems
    except InputError as error:
        problems.append(error)
    return None


def _with_paths(config: Config, base: Path) -> Config:
    """Absolute paths, so that workers in other directories find the same files; a cached hub model becomes its folder.

    Reward files are relative to the configuration file, data files to the working directory or else to that file.
    """
    functions = []
    for spec in config.reward.functions:
        source, colon, attribute = (spec.function or "").rpartition(":")
        if colon and source.endswith(".py") and not Path(source).is_absolute():
            spec = spec.model_copy(update={"function": f"{(base / source).resolve()}:{attribute}"})
        functions.append(spec)
    data = {key: _located(getattr(config.data, key), base) for key in ("train", "eval")}
    model, trusted = config.model, config.model.trust_remote_code
    tokenizer = model.tokenizer and _local_model(model.tokenizer, trusted)
    changes = {
        "model": model.model_copy(update={"path": _local_model(model.path, trusted), "tokenizer": tokenizer}),
        "data": config.data.model_copy(update=data),
        "reward": config.reward.model_copy(update={"functions": functions}),
    }
    return config.model_copy(update=changes)


def _located(sources: list[Source] | None, base: Path) -> list[Source] | None:
    """``sources`` with their files found: in the working directory, or else in ``base``; hub names stay as they are."""

    def found(path: str) -> str:
        there = next((place for place in (Path(path), base / path) if place.exists()), None)
        return str(there.resolve()) if there else path

    return [s.model_copy(update={"path": found(s.path)}) for s in sources] if sources else None


def _local_model(path: str, trusted: bool) -> str:
    """The folder of a model: itself, or that of a hub id, from the cache or else downloaded; unchanged if neither.

    ``org/name@<commit>`` is that commit. Code comes along only if it is ``trusted``, and then only with a commit.
    """
    if Path(path).is_dir():
        return str(Path(path).resolve())
    pinned = PINNED.fullmatch(path)
    if path.count("/") != 1 or path.startswith((".", "/")) or (trusted and not pinned):
        return path
    from huggingface_hub import snapshot_download

    name, revision = pinned.groups() if pinned else (path, None)
    kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if trusted else [])]
    # A cached folder may lack the code; with a commit, asking the hub first can bring nothing new.
    for offline in (False, True) if trusted else (True, False):
        try:
            return snapshot_download(name, revision=revision, allow_patterns=kinds, local_files_only=offline)
        except Exception:  # Any failure to find it ends in the same E401, which names the path.
            continue
    return path


def _check_choices(config: Config, origin: str) -> None:
    from launch.early_stopping import EARLY_STOPPING
    from learner.choices import Choices

    Choices(config, origin)
    bind(config.eval.early_stopping, EARLY_STOPPING, "early stopping", f"{origin}:eval.early_stopping")


def _checked_tokenizer(config: Config, origin: str, light: bool) -> Any:
    check_model(config, origin)
    return _load_tokenizer(config, origin, light)


def _load_tokenizer(config: Config, origin: str, light: bool) -> Any:
    """``light``: by the class that reads any tokenizer.json, if that tells enough. To import the automatic one takes longer
    than all checks together, and what it may do otherwise is a token at an end."""
    source, trusted = config.model.tokenizer or config.model.path, config.model.trust_remote_code
    rows = json.loads((Path(config.model.path) / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    tokenizer = None
    try:
        if light and (Path(source) / "tokenizer.json").is_file() and not trusted:
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
        if tokenizer is None or (rows and len(tokenizer) > rows - ADDED_TOKENS):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
    except Exception as error:  # A damaged file surfaces as whatever its parser raises.
        place = f"{origin}:model.tokenizer"
        raise InputError(
            "E401", "tokenizer not found", place, one_line(error), "a tokenizer directory", "check the path"
        ) from None
    if len(tokenizer) < 2:  # transformers makes an empty one where the files are missing.
        place, found = f"{origin}:model.tokenizer", f"no tokenizer files in {source}"
        raise InputError("E401", "tokenizer not found", place, found, "a tokenizer directory", "check the path")
    if rows and len(tokenizer) > rows:
        place, fix = f"{origin}:model.tokenizer", "use the model's own tokenizer"
        raise InputError(
            "E402", "tokenizer does not fit", place, f"{len(tokenizer)} tokens", f"<= {rows} embedding rows", fix
        )
    return tokenizer


def _names_pad_token(config: Config) -> bool:
    """Whether the tokenizer's own files name one; transformers may add one of its class."""
    folder = Path(config.model.tokenizer or config.model.path)
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    return any(re.search(r'"pad_token":\s*["{]', file.read_text(encoding="utf-8")) for file in files if file.is_file())


def check_rewards(config: Config, origin: str, columns: list[str] | None) -> None:
    """Every reward function exists, can run where it should, and finds its ``columns``, if those are known.

    Raises ``InputErrors``.
    """
    problems: list[InputError] = []
    names = [reward_name(spec) for spec in config.reward.functions]
    if config.eval.pass_reward not in (None, *names):
        place, found = f"{origin}:eval.pass_reward", str(config.eval.pass_reward)
        fix = f'"{nearest(found, names) or names[0]}"'
        problems.append(InputError("E107", "unknown reward", place, found, f"one of {', '.join(names)}", fix))
    for i, spec in enumerate(config.reward.functions):
        key = f"{origin}:reward.functions[{i}]"
        kinds = [kind for kind in ("function", "model", "url") if getattr(spec, kind) is not None]
        if len(kinds) != 1:
            found, fix = " and ".join(kinds) or "none of them", "name one of the three"
            problems.append(InputError("E108", "options disagree", key, found, "function, model or url", fix))
            continue
        if isolation_of(spec) == "sandbox":
            _collect(problems, lambda key=key: require_sandbox(f"{key}.isolation"))
        if names.count(names[i]) > 1 and names.index(names[i]) == i:
            found, fix = names[i], "set reward.functions.name"
            problems.append(InputError("E301", "reward name twice", f"{key}.name", found, "different names", fix))
        if spec.function is None:
            continue
        function = _collect(problems, lambda spec=spec, key=key: load_reward(spec, key))
        if columns is None:
            continue
        missing = missing_column(function, columns) if function else None
        expected = f"one of {', '.join(columns)}"
        if missing:
            found, fix = f'parameter "{missing}" without a column', "rename the parameter or the column"
            problems.append(InputError("E301", "reward needs a column", key, found, expected, fix))
        column = spec.args.get("column", default_column(spec.function))
        if column is not None and column not in columns:
            place = f"{key}.args.column"
            problems.append(InputError("E301", "reward needs a column", place, str(column), expected, "name a column"))
    raise_all(problems)


def _check_tasks(config: Config, origin: str, prompts: list[Prompt]) -> None:
    """No row, of whatever source, has its completions scored by a task that evaluates text. Raises ``InputError`` E309."""
    if any(spec.function == "reasoning_gym" for spec in config.reward.functions):
        refuse_denied_rows((prompt.columns for prompt in prompts), f"{origin}:data")


def _check_rows(config: Config, train: PromptSet, held_out: list[Prompt], problems: list[InputError]) -> list[str]:
    name, needed = _names(config.data.train), config.learner.prompts_per_step
    if len(train.prompts) < needed:
        found, expected = f"{len(train.prompts)} usable rows", f">= learner.prompts_per_step ({needed})"
        problems.append(
            InputError("E203", "too few rows", name, found, expected, "add rows or lower learner.prompts_per_step")
        )
    warnings = _dropped(train, name)
    seen = {prompt.token_ids.tobytes() for prompt in train.prompts}
    duplicates = len(train.prompts) - len(seen)
    if duplicates:
        warnings.append(f"warning[W209] duplicate prompts — {name}. Found {duplicates}, expected none.")
    shared = [prompt for prompt in held_out if prompt.token_ids.tobytes() in seen]
    if shared and not config.data.allow_overlap:
        place = f"{_names(config.data.eval)}:{shared[0].prompt_id + 1}"
        fix = "remove them or data.allow_overlap = true"
        problems.append(InputError("E209", "eval rows in train", place, f"{len(shared)} shared prompts", "0", fix))
    return warnings


def _check_held_out(config: Config, held: PromptSet, problems: list[InputError]) -> list[str]:
    name, count = _names(config.data.eval), len(held.prompts)
    if config.data.eval and not count:
        dropped = ", ".join(f"{n} {reason}" for reason, n in held.dropped.items() if n)
        problems.append(
            InputError("E203", "no rows", name, f"all dropped ({dropped})", "at least 1", "change the rows")
        )
    lines = _dropped(held, name)
    if count > config.eval.max_rows:
        lines.append(f"info: the first {config.eval.max_rows} of {count} rows of {name} are evaluated (eval.max_rows)")
    return lines


def _dropped(rows: PromptSet, name: str) -> list[str]:
    found = {("rows" if reason == "filtered" else "prompts", reason): n for reason, n in rows.dropped.items() if n}
    return [f"info: {n} {reason} {kind} of {name} dropped" for (kind, reason), n in found.items()]


def _names(sources: list[Source] | None) -> str:
    return " + ".join(Path(source.path).name for source in sources or [])
