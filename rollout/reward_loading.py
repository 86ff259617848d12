"""From the name of a reward function to a callable: built-in, module, or file; its checks against the data's columns.

Imported by the light child processes too, so it needs the standard library alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from rollout.rewards import BUILTINS, ISOLATED, SANDBOXED
from shared.errors import InputError, nearest

SUPPLIED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


class Spec(Protocol):
    """What is read of ``shared.config.RewardFunction``."""

    function: str | None
    model: str | None
    url: Any
    name: str | None
    args: dict[str, Any]
    factory: bool
    isolation: Any


def load_reward(spec: Spec, key: str) -> Callable[..., Any]:
    """The reward function that ``spec.function`` names, with its ``args`` bound. Raises ``InputError`` E301."""
    assert spec.function is not None
    found: Any = _find(spec.function, key)
    try:
        if spec.factory:
            found = found(**spec.args)
        elif isinstance(found, type):
            return cast("Callable[..., Any]", found(**spec.args))
        elif spec.args:
            _check_arguments(spec, found, key)
            inspect.signature(found).bind_partial(**spec.args)
            return functools.partial(found, **spec.args)
    except (TypeError, ValueError) as error:
        place, expected = f"{key}.args", "the function's own parameters"
        raise InputError("E301", "reward arguments refused", place, str(error), expected, "correct args") from None
    if not callable(found):
        place, said = f"{key}.function", f"{spec.function} is a {type(found).__name__}"
        raise InputError("E301", "reward is no function", place, said, "a function or class", "correct the name")
    return cast("Callable[..., Any]", found)


def _check_arguments(spec: Spec, found: Any, key: str) -> None:
    """A built-in takes any column as a keyword; its arguments have to be among those it declares."""
    if spec.function not in BUILTINS:
        return
    declared = [n for n, p in inspect.signature(found).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in spec.args:
        if name not in declared:
            guess = nearest(name, declared)
            fix = f"{key}.args.{guess}" if guess else "remove it"
            expected = f"one of {', '.join(declared)}" if declared else "no arguments"
            raise InputError("E301", "reward arguments refused", f"{key}.args.{name}", name, expected, fix)


def _find(name: str, key: str) -> Callable[..., Any]:
    if ":" not in name:
        if name in BUILTINS:
            return BUILTINS[name]
        guess = nearest(name, BUILTINS)
        fix = f'"{guess}"' if guess else "name a function as package.module:function or file.py:function"
        raise InputError("E301", "unknown reward", f"{key}.function", name, f"one of {', '.join(BUILTINS)}", fix)
    source, _, attribute = name.rpartition(":")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # Importing runs the user's code, which may do anything.
        found = f"{type(error).__name__}: {error}"
        raise InputError(
            "E301", "reward import failed", f"{key}.function", found, name, "install it or correct the name"
        ) from None
    if not hasattr(module, attribute):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        guess = nearest(attribute, public)
        found = f'no attribute "{attribute}" in {source}'
        fix = f'"{source}:{guess}"' if guess else "correct the name"
        raise InputError("E301", "reward import failed", f"{key}.function", found, f"one of {', '.join(public)}", fix)
    return cast("Callable[..., Any]", getattr(module, attribute))


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = f"millrace_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def reward_name(spec: Spec) -> str:
    """The metric name: ``name``, else the last part of the function, the model's path, or the URL's host."""
    if spec.name:
        return spec.name
    if spec.function:
        return spec.function.rpartition(":")[2]
    if spec.model:
        return Path(spec.model).name
    url = str(spec.url if isinstance(spec.url, str) else (spec.url or [""])[0])
    return urlsplit(url).hostname or url


def reward_place(spec: Spec) -> str:
    """What messages call it: ``file.py:function`` of a user's file, else its metric name."""
    source, _, attribute = (spec.function or "").rpartition(":")
    if not source.endswith(".py"):
        return reward_name(spec)
    return f"{Path(source).name}:{attribute}" + (f" ({spec.name})" if spec.name else "")


def isolation_of(spec: Spec) -> str:
    """Where a function runs: as configured, else ``actor`` for code of ours and ``subprocess`` for a user's."""
    if spec.function in SANDBOXED:
        return "sandbox"  # Of code_tests each program in one of its own; the harness around it is ours.
    if spec.isolation:
        return str(spec.isolation)
    ours = spec.function is None or (spec.function in BUILTINS and spec.function not in ISOLATED)
    return "actor" if ours else "subprocess"


def default_column(name: str) -> str | None:
    """The dataset column that a built-in reward reads unless told otherwise; None if it reads none."""
    parameters = inspect.signature(BUILTINS[name]).parameters if name in BUILTINS else {}
    return str(parameters["column"].default) if "column" in parameters else None


def read_columns(spec: Spec, function: Callable[..., Any], columns: list[str]) -> list[str]:
    """Those of ``columns`` that a reward names: its parameters, or of a built-in the column that it compares with."""
    if spec.function in BUILTINS:
        named = [spec.args.get("column", default_column(spec.function))]
    else:
        named = list(inspect.signature(function).parameters)
    return [name for name in columns if name in named]


def missing_column(function: Callable[..., Any], columns: list[str]) -> str | None:
    """A required parameter that is neither a supplied keyword nor a dataset column, or None."""
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in SUPPLIED and name not in columns:
            return name
    return None
