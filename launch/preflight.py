"""Everything that can be checked before an actor exists: choices, model files, tokenizer, data, rewards.

Errors of one pass are collected and raised together; nothing here needs a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch.config_secrets import check_secrets
from launch.environment import check_environment, open_token_file
from launch.model_files import PINNED, check_model
from launch.model_tokenizer import check_ids, load_tokenizer, names_pad_token, rehearse_save
from launch.prompt_checks import check_held_out, check_rows, complete_rows
from launch.sinks import check_sinks
from launch.trl.found import FILL_IN
from rollout import hub
from rollout.generated_tasks import refuse_denied_rows
from rollout.prompts import PromptSet
from rollout.reward_loading import (
    default_column,
    isolation_of,
    load_reward,
    missing_column,
    read_columns,
    reward_name,
)
from rollout.row_checks import read_checked
from rollout.sandbox import require_sandbox
from shared.choices import bind
from shared.config import Config
from shared.config_checks import warnings as combination_warnings
from shared.config_data import Source
from shared.errors import InputError, InputErrors, nearest, raise_all
from shared.types import Prompt


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
    from launch.builtin import SCHEME, resolve

    _check_filled(config, origin)
    check_environment(eager=bool(config.rollout.vllm.get("enforce_eager")))
    ours = config.model.path.startswith(SCHEME)
    problems: list[InputError] = []
    config = _with_paths(resolve(config, origin, make_model=not rehearsal), base, origin, problems)
    there = not problems
    _collect(problems, lambda: _check_choices(config, origin))
    _collect(problems, lambda: check_sinks(config, origin))
    _collect(problems, lambda: check_secrets(config, origin))
    told = _collect(problems, lambda: check_model(config, origin, ours)) if there else None
    load = partial(_saved_tokenizer, config, origin, ours, rehearsal)
    tokenizer = _collect(problems, load) if told is not None else None
    # Rows are read without a tokenizer too: what is wrong with them, and with rewards, is told in the same pass.
    rows = partial(PromptSet.load, config, tokenizer=tokenizer) if tokenizer is not None else partial(_read, config)
    train = _collect(problems, lambda: rows(config.data.train, "train", f"{origin}:data.train"))
    held = _collect(problems, lambda: rows(config.data.eval or [], "test", f"{origin}:data.eval"))
    sound = not problems
    reads = _collect(problems, lambda: check_rewards(config, origin, train.columns if train else None)) or {}
    if sound and not problems and held.prompts:  # Else the same would be said twice.
        _collect(problems, lambda: check_rewards(config, origin, held.columns))
    held_out = held.prompts[: config.eval.max_rows] if held else []
    warnings = combination_warnings(config, origin) + (told or [])
    if train is not None:
        _collect(problems, lambda: _check_tasks(config, origin, train.prompts + held_out))
        warnings += check_rows(config, train, held_out, reads, problems)
        prompts = train.prompts + held_out
        warnings += _collect(problems, lambda: check_ids(config, origin, tokenizer, prompts)) or []
    if held is not None:
        warnings += check_held_out(config, held, reads, problems)
    raise_all(problems)
    assert train is not None
    warnings += filter(None, [open_token_file()])
    if not names_pad_token(config):
        warnings.append(
            f"info: no pad token — {origin}:model.tokenizer. None is needed: sequences are packed, not padded"
        )
    if probing:
        from launch.doctor import probe

        warnings += probe(config, origin, complete_rows(train.prompts, reads))
    return Prepared(config, train, held_out, list(dict.fromkeys(warnings)))


def _check_filled(config: Config, origin: str) -> None:
    """Raises ``InputErrors`` E401, E201 and E301 where a file still says what ``import-trl`` wrote for what it could not read."""
    places = [("E401", "model", "model.path", config.model.path)]
    for split in ("train", "eval"):
        sources = getattr(config.data, split) or []
        places += [("E201", "file or dataset of rows", f"data.{split}", source.path) for source in sources]
    for i, spec in enumerate(config.reward.functions):
        places.append(("E301", "reward function", f"reward.functions[{i}].function", spec.function or ""))
    problems = []
    for code, what, key, value in places:
        if value == FILL_IN:
            fix = f"{FILL_IN} from import-trl: write the {what} here"
            problems.append(InputError(code, "not filled in", f"{origin}:{key}", FILL_IN, f"a {what}", fix))
    raise_all(problems)


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


def _with_paths(config: Config, base: Path, origin: str, problems: list[InputError]) -> Config:
    """Absolute paths, so that workers in other directories find the same files; a model of the hub becomes its folder.

    A model that cannot be fetched is added to ``problems``, and keeps its name.

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
    folders = {
        key: _collect(problems, partial(local_model, name, trusted, f"{origin}:model.{key}")) or name
        for key in ("path", "tokenizer")
        if (name := getattr(model, key))
    }
    changes = {
        "model": model.model_copy(update=folders),
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


def local_model(path: str, trusted: bool, key: str) -> str:
    """Return the folder of a model: itself, or that of a model of the hub, which is downloaded if need be.

    ``org/name@COMMIT`` is that commit. Code comes along only if it is ``trusted``, and then only with a commit.
    Raises ``InputError`` E401.
    """
    if Path(path).is_dir():
        return str(Path(path).resolve())
    if not hub.is_named(path) or (trusted and not PINNED.fullmatch(path)):
        return path
    # A copy may lack the code; with a commit, asking the hub first can bring nothing new.
    kinds = [*hub.MODEL_FILES, *(["*.py"] if trusted else [])]
    return str(hub.fetched(path, "model", "E401", key, kinds, hub_first=trusted))


def _check_choices(config: Config, origin: str) -> None:
    from launch.early_stopping import EARLY_STOPPING
    from learner.choices import Choices

    Choices(config, origin)
    bind(config.eval.early_stopping, EARLY_STOPPING, "early stopping", f"{origin}:eval.early_stopping")


def _saved_tokenizer(config: Config, origin: str, ours: bool, rehearsal: bool) -> Any:
    """Return the tokenizer; one that Millrace made is known to save, and in a rehearsal is read without AutoTokenizer."""
    tokenizer = load_tokenizer(config, origin, light=ours and rehearsal)
    if not ours:
        rehearse_save(origin, tokenizer)
    return tokenizer


def check_rewards(config: Config, origin: str, columns: list[str] | None) -> dict[str, list[str]]:
    """Every reward function exists, can run where it should, and finds its ``columns``, if those are known.

    Returns the columns that each reads by name. Raises ``InputErrors``.
    """
    problems: list[InputError] = []
    reads: dict[str, list[str]] = {}
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
        if spec.gpus and spec.url is not None:
            fix = "remove it: the service has GPUs of its own"
            problems.append(InputError("E108", "options disagree", f"{key}.gpus", f"{spec.gpus:g}", "0", fix))
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
        reads[names[i]] = read_columns(spec, function, columns) if function else []
    raise_all(problems)
    return reads


def _check_tasks(config: Config, origin: str, prompts: list[Prompt]) -> None:
    """No row, of whatever source, has its completions scored by a task that evaluates text. Raises ``InputError`` E309."""
    if any(spec.function == "reasoning_gym" for spec in config.reward.functions):
        refuse_denied_rows((prompt.columns for prompt in prompts), f"{origin}:data")
