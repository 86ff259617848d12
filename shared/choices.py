"""Binds a function that the configuration names to the arguments that stand beside the name.

A name is looked up in a table, or imported when it reads ``package.module:function``. The other keys are the function's
own keyword arguments; they are checked against its signature before any resource is taken (E107).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from shared.config_algorithm import Choice
from shared.errors import InputError, nearest, one_line

SUPPLIED = {"logprobs", "lengths", "groups", "batch_tokens", "log_weights"}
"""Keyword arguments that the learner supplies, not the configuration."""

BOUNDS: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    "low": (lambda value, _: 0 <= value < 1, "a number in [0, 1)"),
    "high": (lambda value, _: value >= 0, "a number >= 0"),
    "delta": (
        lambda value, others: value is None or value > (1 + others["high"] if "high" in others else 0),
        "a number > 1 + high (clip), > 0 (entropy)",
    ),
    "c": (lambda value, _: value > 1, "a number > 1"),
    "cap": (lambda value, _: value > 0, "a number > 0"),
    "floor": (lambda value, others: 0 <= value <= others["cap"], "a number from 0 to cap"),
    "length": (lambda value, _: value > 0, "a number > 0"),
    "sequences": (lambda value, _: value >= 1 and not isinstance(value, float), "an integer >= 1"),
    "skip_empty": (lambda value, _: isinstance(value, bool), "true or false"),
    "ddof": (lambda value, _: value in (0, 1) and not isinstance(value, bool), "0 or 1"),
    "eps": (lambda value, _: value >= 0, "a number >= 0"),
    "tau_pos": (lambda value, _: value > 0, "a number > 0"),
    "tau_neg": (lambda value, _: value > 0, "a number > 0"),
    "scale": (lambda value, _: value in ("group", "batch", "none"), "group, batch or none"),
    "target": (lambda value, _: value > 0, "a number > 0"),
    "horizon": (lambda value, _: value > 0, "a number > 0"),
    "unit": (lambda value, _: value in ("sequence", "token"), "sequence or token"),
    "coef": (lambda value, _: value >= 0, "a number >= 0"),
    "highest": (lambda value, others: value >= others["lowest"], "a number >= lowest"),
    "warmup_steps": (lambda value, _: value >= 0, "a number >= 0"),
    "mode": (lambda value, _: value in ("max", "min"), "max or min"),
    "patience": (lambda value, _: value >= 1, "an integer >= 1"),
    "min_delta": (lambda value, _: value >= 0, "a number >= 0"),
}
"""Argument name -> a test of its value, given all arguments, and the values that pass it in words."""


def bind(
    choice: Choice, table: Mapping[str, Callable[..., Any]], kind: str, key: str, name_key: str | None = None
) -> Callable[..., Any]:
    """The chosen function with its arguments bound; ``name_key`` is the key that names it. Raises E107."""
    function = _find(choice.name, table, kind, name_key or f"{key}.name")
    parameters = inspect.signature(function).parameters
    accepted = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in SUPPLIED]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in choice.args:
        if name not in accepted and not takes_any:
            guess = nearest(name, accepted)
            raise InputError(
                "E107",
                f"unknown argument of {kind} {choice.name}",
                f"{key}.{name}",
                name,
                f"one of {', '.join(accepted)}" if accepted else "no arguments",
                f"{key}.{guess}" if guess else "remove it",
            )
    for name in accepted:
        if parameters[name].default is inspect.Parameter.empty and name not in choice.args:
            raise InputError(
                "E107", f"missing argument of {kind} {choice.name}", key, "nothing", name, f"set {key}.{name}"
            )
    arguments = {name: parameters[name].default for name in accepted} | choice.args
    for name, value in arguments.items():
        if table.get(choice.name) is not function or name not in BOUNDS:
            continue
        allowed, expected = BOUNDS[name]
        try:
            fine = allowed(value, arguments)
        except TypeError:  # A string where a number belongs.
            fine = False
        if not fine:
            default = parameters[name].default
            fix = f"set {key}.{name}" if default is inspect.Parameter.empty else f"{key}.{name} = {default}"
            raise InputError("E107", f"{kind} {choice.name} refuses", f"{key}.{name}", str(value), expected, fix)
    return functools.partial(function, **choice.args)


def _find(name: str, table: Mapping[str, Callable[..., Any]], kind: str, key: str) -> Callable[..., Any]:
    if name in table:
        return table[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
            inspect.signature(function)  # Refuses what is not callable, or has no signature to check arguments against.
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise InputError(
                "E107", f"cannot import {kind}", key, one_line(error), "an importable function", "correct the name"
            ) from None
        return function
    guess = nearest(name, table)
    raise InputError(
        "E107",
        f"unknown {kind}",
        key,
        name,
        f"one of {', '.join(table)}",
        f'"{guess}"' if guess else "choose one of these",
    )
