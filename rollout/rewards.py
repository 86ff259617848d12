"""Built-in reward functions, and the loader for a user's own.

A reward function takes keyword lists with one entry per completion (``prompts``, ``completions``,
``completion_ids``, every dataset column) and returns one number per completion, None where it does not apply: a
function written for TRL's GRPOTrainer runs unchanged. Higher is better.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from shared.config import RewardFunction
from shared.errors import InputError, nearest

Rewards = list[float | None]


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last assistant message."""
    if isinstance(completion, str):
        return completion
    return next((m["content"] for m in reversed(completion) if m["role"] == "assistant"), "")


def exact_match(
    completions: list[Any], *, column: str = "answer", strip: bool = True, ignore_case: bool = False, **columns: Any
) -> Rewards:
    """1 if the completion equals the column, else 0."""

    def normal(value: Any) -> str:
        text = str(value).strip() if strip else str(value)
        return text.lower() if ignore_case else text

    return [float(normal(text_of(c)) == normal(gold)) for c, gold in zip(completions, columns[column], strict=True)]


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def extract_number(text: str) -> float | None:
    """The number after the last ``####`` where present, else the last number; thousands separators removed."""
    tail = text.rsplit("####", 1)[1] if "####" in text else text
    found = _NUMBER.findall(tail)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def final_number(completions: list[Any], *, column: str = "answer", **columns: Any) -> Rewards:
    """1 if the final numbers of completion and column agree, else 0; None if the column has none."""
    scores: Rewards = []
    for completion, gold in zip(completions, columns[column], strict=True):
        expected = extract_number(str(gold))
        scores.append(None if expected is None else float(extract_number(text_of(completion)) == expected))
    return scores


_THINK_ANSWER = re.compile(
    r"<think>((?:(?!</?think>|</?answer>).)*)</think>\s*<answer>((?:(?!</?think>|</?answer>).)*)</answer>", re.DOTALL
)


def think_answer_format(completions: list[Any], **_: Any) -> Rewards:
    """1 if the text is exactly one ``<think>...</think>`` followed by one ``<answer>...</answer>``, else 0."""
    return [float(_THINK_ANSWER.fullmatch(text_of(c).strip()) is not None) for c in completions]


def regex(completions: list[Any], *, pattern: str, **_: Any) -> Rewards:
    """1 if the pattern is found, else 0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(text_of(c)) is not None) for c in completions]


def _distances(completions: list[Any], completion_ids: list[Any], target: float, unit: str) -> list[float]:
    if unit == "tokens":
        return [abs(len(ids) - target) for ids in completion_ids]
    return [abs(len(text_of(c)) - target) for c in completions]


def length_negative_abs(
    completions: list[Any], completion_ids: list[Any], *, target: float, unit: str = "characters", **_: Any
) -> Rewards:
    """``-D`` with D the distance to the target length."""
    return [-d for d in _distances(completions, completion_ids, target, unit)]


def length_reciprocal(
    completions: list[Any], completion_ids: list[Any], *, target: float, unit: str = "characters", **_: Any
) -> Rewards:
    """``1 / (1 + D)``: steep near the target, flat far away."""
    return [1 / (1 + d) for d in _distances(completions, completion_ids, target, unit)]


def length_exponential(
    completions: list[Any],
    completion_ids: list[Any],
    *,
    target: float,
    rate: float = 0.1,
    unit: str = "characters",
    **_: Any,
) -> Rewards:
    """``exp(-rate D)``: smooth, in (0, 1]."""
    return [math.exp(-rate * d) for d in _distances(completions, completion_ids, target, unit)]


def soft_overlong(completion_ids: list[Any], *, limit: int, buffer: int, factor: float = 1.0, **_: Any) -> Rewards:
    """0 up to ``limit - buffer`` tokens, then linear down to ``-factor`` at ``limit`` (DAPO, arXiv 2503.14476)."""

    def penalty(n: int) -> float:
        if n <= limit - buffer:
            return 0.0
        return -factor if n > limit or buffer == 0 else factor * (limit - buffer - n) / buffer

    return [penalty(len(ids)) for ids in completion_ids]


BUILTINS: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "final_number": final_number,
    "gsm8k_answer": final_number,
    "think_answer_format": think_answer_format,
    "regex": regex,
    "length_negative_abs": length_negative_abs,
    "length_reciprocal": length_reciprocal,
    "length_exponential": length_exponential,
    "soft_overlong": soft_overlong,
}

SUPPLIED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def load_reward(spec: RewardFunction, key: str) -> Callable[..., Any]:
    """The reward function that ``spec`` names, with its ``args`` bound. Raises ``InputError`` E301."""
    found: Any = _find(spec.function, key)
    try:
        if isinstance(found, type):
            return cast("Callable[..., Any]", found(**spec.args))
        if spec.args:
            inspect.signature(found).bind_partial(**spec.args)
            return functools.partial(found, **spec.args)
    except (TypeError, ValueError) as error:
        raise InputError(
            "E301",
            "reward arguments refused",
            f"{key}.args",
            str(error),
            "the function's own parameters",
            "correct args",
        ) from None
    if not callable(found):
        place, said = f"{key}.function", f"{spec.function} is a {type(found).__name__}"
        raise InputError("E301", "reward is no function", place, said, "a function or class", "correct the name")
    return cast("Callable[..., Any]", found)


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


def reward_name(spec: RewardFunction) -> str:
    """The metric name of a reward function: its ``name``, else the last part of ``function``."""
    return spec.name or spec.function.rpartition(":")[2]


def default_column(name: str) -> str | None:
    """The dataset column that a built-in reward reads unless told otherwise; None if it reads none."""
    parameters = inspect.signature(BUILTINS[name]).parameters if name in BUILTINS else {}
    return str(parameters["column"].default) if "column" in parameters else None


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
