"""From the name of a reward function to a callable: built-in, module, or file; its checks against the data's columns.

Imported by the light child processes too, so it needs the standard library alone.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from rollout.rewards import BUILTINS, ISOLATED, SANDBOXED
from shared.errors import InputError, nearest

SUPPLIED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
OPENED: set[Path] = set()
"""Folders of reward files that this process has imported."""


class Spec(Protocol):
    """What is read of ``shared.config.RewardFunction``."""

    function: str | None
    model: str | None
    url: Any
    name: str | None
    args: dict[str, Any]
    factory: bool
    isolation: Any


def _number_from(least: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and value >= least


def _pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(one) in (int, float) for one in value)


def _compiles(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "unit": (lambda value: value in ("characters", "tokens"), "characters or tokens"),
    "ngram": (lambda value: type(value) is int and value >= 1, "an integer >= 1"),
    "worst": (lambda value: type(value) in (int, float) and value <= 0, "a number <= 0"),
    "target": (_number_from(0), "a number >= 0"),
    "rate": (_number_from(0), "a number >= 0"),
    "limit": (_number_from(1), "a number >= 1"),
    "buffer": (_number_from(0), "a number >= 0"),
    "factor": (_number_from(0), "a number >= 0"),
    "right": (_pair, "two numbers"),
    "wrong": (_pair, "two numbers"),
    "pattern": (_compiles, "a regular expression"),
    "column": (lambda value: isinstance(value, str), "the name of a column"),
}
"""Argument of built-in functions -> whether a value can be meant, and what is expected."""


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
        fits, expected = ARGUMENTS.get(name, (None, ""))
        if fits is not None and not fits(spec.args[name]):
            found, fix = repr(spec.args[name]), f"correct {name}"
            raise InputError("E301", "reward arguments refused", f"{key}.args.{name}", found, expected, fix)


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
    _open_folder(path.parent.resolve())
    name = f"millrace_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _open_folder(folder: Path) -> None:
    """Let a reward file import its neighbours: they come after the standard library and our code, before packages.

    A neighbour of another reward file with the name of one in ``folder`` is forgotten, so that each file gets its own.
    """
    for name in [name for name in sys.modules if "." not in name and _beside(folder, name)]:
        place = getattr(sys.modules[name], "__file__", None)
        if place and any(Path(place) == _beside(other, name) for other in OPENED - {folder}):
            for loaded in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
                del sys.modules[loaded]
    OPENED.add(folder)
    rest = [entry for entry in sys.path if entry != str(folder)]
    packages = (i for i, entry in enumerate(rest) if entry.endswith("-packages") or Path(entry) in OPENED)
    rest.insert(next(packages, len(rest)), str(folder))
    sys.path[:] = rest


def _beside(folder: Path, name: str) -> Path | None:
    """The file of module ``name`` in ``folder``."""
    places = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((place for place in places if os.path.isfile(place)), None)


def visible_files(path: Path) -> list[Path]:
    """A reward file, and the files and packages beside it that it imports, directly or through one another."""
    found, waiting = [path], [path]
    while waiting:
        for name in _imported(waiting.pop()):
            place = _beside(path.parent, name)
            shown = place.parent if place and place.name == "__init__.py" else place
            if place and shown and shown not in found:
                found.append(shown)
                waiting += sorted(shown.rglob("*.py")) if shown.is_dir() else [shown]
    return found


def _imported(path: Path) -> set[str]:
    """First names of the modules that a file imports; nothing if it is no Python, which its import will say."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return set()
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in named}


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
