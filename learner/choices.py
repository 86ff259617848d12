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

import torch
from torch import Tensor

from learner.advantages import ADVANTAGES, normalize_then_sum
from learner.coefficients import ENTROPY_BONUSES, KL_CONTROLS
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, SEQUENCE_LEVEL, LossSettings
from learner.schedules import SCHEDULES
from shared.config import Config
from shared.config_algorithm import Choice
from shared.errors import InputError, nearest, one_line, raise_all

# Keyword arguments that the learner supplies, not the configuration.
SUPPLIED = {"logprobs", "lengths", "groups", "log_weights"}


# Arguments without meaning, by name: a test of the value among all arguments, and what it should have been.
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


class Choices:
    """Every table's entry, bound for one run."""

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

        kl, sampling = algorithm.kl, algorithm.importance_sampling
        self._advantage = bound(algorithm.advantage, ADVANTAGES, "advantage", "algorithm.advantage")
        self._aggregation = bound(algorithm.aggregation, AGGREGATIONS, "aggregation", "algorithm.aggregation")
        self.schedule = bound(config.learner.schedule, SCHEDULES, "schedule", "learner.schedule")
        self.kl_schedule = bound(kl.schedule, SCHEDULES, "schedule", "algorithm.kl.schedule")
        self.entropy_schedule = bound(algorithm.entropy_schedule, SCHEDULES, "schedule", "algorithm.entropy_schedule")
        self.kl_control = bound(kl.control, KL_CONTROLS, "KL control", "algorithm.kl.control")
        self.entropy_bonus = bound(algorithm.entropy, ENTROPY_BONUSES, "entropy bonus", "algorithm.entropy")
        key = "algorithm.kl.estimator"
        estimator = bound(Choice(name=kl.estimator), KL_ESTIMATORS, "KL estimator", key, key)
        policy_loss = bound(algorithm.policy_loss, POLICY_LOSSES, "policy loss", "algorithm.policy_loss")
        raise_all(problems)
        self._part_weights = torch.tensor([function.weight for function in config.reward.functions])
        self._by_part = algorithm.combine == "normalize_then_sum"
        self.loss = LossSettings(
            policy_loss=policy_loss,
            kl_estimator=KL_ESTIMATORS.get(kl.estimator, estimator),
            kl_coef=kl.coef,
            kl_corrected=kl.corrected,
            kl_straight_through=kl.straight_through,
            importance_sampling=None
            if sampling.level == "none"
            else sampling.model_dump(include={"level", "mode", "low", "high"}),
            off_policy_threshold=algorithm.off_policy_threshold,
            sequence_level=algorithm.policy_loss.name in SEQUENCE_LEVEL,
            folds_weights="log_weights" in _parameters(policy_loss),
            **_clip_bounds(algorithm.policy_loss.name, policy_loss),
        )
        rollout = config.rollout
        self.full_in_loss = kl.coef > 0 and kl.estimator == "full"
        self.full_in_reward = kl.reward_coef > 0 and kl.reward_estimator == "full"
        self.needs_ref_logprobs = (kl.coef > 0 and (not self.full_in_loss or kl.straight_through)) or (
            kl.reward_coef > 0 and not self.full_in_reward
        )
        """Some KL compares log-probs of sampled tokens, not whole distributions."""
        self.truncates = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        """The engines sample from a part of the distribution."""
        self.needs_old_pass = algorithm.top_entropy_quantile < 1 or kl.reward_coef > 0 or self.truncates
        """Something is taken from the old log-probs before the first update."""

    def advantages(self, rewards: Tensor, parts: Tensor, lengths: Tensor) -> Tensor:
        """``rewards [N, G]``, by function ``parts [N, G, F]``, token counts ``lengths [N, G]`` -> ``[N, G]``."""
        if self._by_part:
            eps = _parameters(self._advantage)["eps"].default
            return normalize_then_sum(parts, self._part_weights, eps=eps)
        extra = {"lengths": lengths} if "lengths" in _parameters(self._advantage) else {}
        advantages: Tensor = self._advantage(rewards, **extra)
        return advantages

    def weights(self, lengths: Tensor, groups: Tensor) -> Tensor:
        """Trainable tokens ``[M]`` and group numbers ``[M]`` of the step's sequences -> loss weights ``[M]``."""
        extra = {"groups": groups} if "groups" in _parameters(self._aggregation) else {}
        weights: Tensor = self._aggregation(lengths, **extra)
        return weights


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _clip_bounds(name: str, policy_loss: Callable[..., Any]) -> dict[str, float]:
    """The bounds that clip metrics count against: those of a clip, cispo's cap, else the usual ones."""
    parameters = _parameters(policy_loss)
    if name == "cispo":
        return {"clip_low": 1.0, "clip_high": parameters["cap"].default - 1.0}
    if name not in ("clip", "dual_clip", "sequence_clip"):
        return {}
    return {f"clip_{side}": parameters[side].default for side in ("low", "high")}
