"""Turns the algorithm section of a configuration into bound functions.

A name is looked up in its table, or imported when it reads ``package.module:function``; the other keys are the
function's own keyword arguments, checked against its signature before any resource is taken (E107).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from learner.advantages import ADVANTAGES
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, LossSettings
from learner.schedules import SCHEDULES
from shared.config import Choice, Config
from shared.errors import InputError, nearest, one_line, raise_all

# Keyword arguments that the learner supplies, not the configuration.
SUPPLIED = {"logprobs", "lengths", "groups"}


# Arguments without meaning, by name: a test of the value among all arguments, and what it should have been.
BOUNDS: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    "low": (lambda value, _: 0 <= value < 1, "a number in [0, 1)"),
    "high": (lambda value, _: value >= 0, "a number >= 0"),
    "delta": (lambda value, others: value is None or value > 1 + others["high"], "a number > 1 + high"),
    "c": (lambda value, _: value > 1, "a number > 1"),
    "cap": (lambda value, _: value > 0, "a number > 0"),
}


def bind(
    choice: Choice, table: Mapping[str, Callable[..., Any]], kind: str, key: str, name_key: str | None = None
) -> Callable[..., Any]:
    """The chosen function with its arguments bound; ``name_key`` is the key that names it. Raises E107."""
    function = _find(choice.name, table, kind, name_key or f"{key}.name")
    parameters = inspect.signature(function).parameters
    accepted = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in SUPPLIED]
    for name in choice.args:
        if name not in accepted:
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
        allowed, expected = BOUNDS.get(name, (lambda *_: True, ""))
        if table.get(choice.name) is function and not allowed(value, arguments):
            fix = f"{key}.{name} = {parameters[name].default}"
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


class Choices:
    """The four tables and the schedule, bound for one run."""

    def __init__(self, config: Config, origin: str = "") -> None:
        """Bind everything; raises ``InputErrors`` with every E107 found, at keys of the file ``origin``."""
        algorithm, problems = config.algorithm, []
        prefix = f"{origin}:" if origin else ""

        def bound(
            choice: Choice, table: Mapping[str, Callable[..., Any]], kind: str, key: str, name_key: str = ""
        ) -> Callable[..., Any]:
            try:
                return bind(choice, table, kind, prefix + key, prefix + (name_key or f"{key}.name"))
            except InputError as error:
                problems.append(error)
                return lambda *_: None

        self._advantage = bound(algorithm.advantage, ADVANTAGES, "advantage", "algorithm.advantage")
        self._aggregation = bound(algorithm.aggregation, AGGREGATIONS, "aggregation", "algorithm.aggregation")
        self.schedule = bound(config.learner.schedule, SCHEDULES, "schedule", "learner.schedule")
        estimator, key = Choice(name=algorithm.kl.estimator), "algorithm.kl.estimator"
        policy_loss = bound(algorithm.policy_loss, POLICY_LOSSES, "policy loss", "algorithm.policy_loss")
        sampling = algorithm.importance_sampling
        self.loss = LossSettings(
            policy_loss=policy_loss,
            kl_estimator=bound(estimator, KL_ESTIMATORS, "KL estimator", key, key),
            kl_coef=algorithm.kl.coef,
            kl_corrected=algorithm.kl.corrected,
            importance_sampling=None if sampling.level == "none" else sampling.model_dump(),
            **_clip_bounds(algorithm.policy_loss.name, policy_loss),
        )
        raise_all(problems)

    def advantages(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """``rewards [N, G]`` and token counts ``lengths [N, G]`` -> advantages ``[N, G]``."""
        extra = {"lengths": lengths} if "lengths" in _parameters(self._advantage) else {}
        return self._advantage(rewards, **extra)

    def weights(self, lengths: Tensor, groups: Tensor) -> Tensor:
        """Trainable tokens ``[M]`` and group numbers ``[M]`` of the step's sequences -> loss weights ``[M]``."""
        extra = {"groups": groups} if "groups" in _parameters(self._aggregation) else {}
        return self._aggregation(lengths, **extra)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _clip_bounds(name: str, policy_loss: Callable[..., Any]) -> dict[str, float]:
    """The bounds that clip metrics count against: those of a per-token clip, else the usual ones."""
    if name not in ("clip", "dual_clip"):
        return {}
    parameters = _parameters(policy_loss)
    return {f"clip_{side}": parameters[side].default for side in ("low", "high") if side in parameters}
