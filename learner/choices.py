"""Turns the algorithm section of a configuration into bound functions: every name in the learner's tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from learner.advantages import ADVANTAGES, normalize_then_sum
from learner.coefficients import ENTROPY_BONUSES, KL_CONTROLS
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, ROW_RATIO, SEQUENCE_LEVEL, LossSettings
from learner.rejection import REJECTIONS
from learner.schedules import SCHEDULES
from shared.choices import bind
from shared.config import Config
from shared.config_algorithm import Choice
from shared.errors import InputError, raise_all


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
        rejection = bound(algorithm.rejection, REJECTIONS, "rejection", "algorithm.rejection")
        raise_all(problems)
        self._part_weights = torch.tensor([function.weight for function in config.reward.functions])
        self._by_part = algorithm.combine == "normalize_then_sum"
        name, unit = algorithm.policy_loss.name, _parameters(policy_loss).get("unit")
        by_row = name in POLICY_LOSSES and unit is not None and unit.default == "sequence"
        self.loss = LossSettings(
            policy_loss=policy_loss,
            kl_estimator=KL_ESTIMATORS.get(kl.estimator, estimator),
            kl_coef=kl.coef,
            kl_corrected=bool(kl.corrected),
            kl_straight_through=kl.straight_through,
            kl_by_row=by_row or name in ROW_RATIO if kl.corrected in (True, False) else kl.corrected == "sequence",
            importance_sampling=None
            if sampling.level == "none"
            else sampling.model_dump(include={"level", "mode", "low", "high"}),
            off_policy_threshold=algorithm.off_policy_threshold,
            rejection=None if algorithm.rejection.name == "none" else rejection,
            sequence_level=by_row or name in SEQUENCE_LEVEL,
            folds_weights="log_weights" in _parameters(policy_loss),
            **_clip_bounds(name, policy_loss),
        )
        rollout = config.rollout
        self.full_in_loss = kl.coef > 0 and kl.estimator == "full"
        self.full_in_reward = kl.reward_coef > 0 and kl.reward_estimator == "full"
        self.needs_ref_logprobs = (kl.coef > 0 and (not self.full_in_loss or kl.straight_through is True)) or (
            kl.reward_coef > 0 and not self.full_in_reward
        )
        """Some KL compares log-probs of sampled tokens, not whole distributions."""
        self.truncates = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        """The engines sample from a part of the distribution."""
        self.needs_old_pass = (
            algorithm.top_entropy_quantile < 1 or kl.reward_coef > 0 or self.truncates or sampling.normalise
        )
        """Something is taken from the old log-probs before the first update."""

    def advantages(self, rewards: Tensor, parts: Tensor, lengths: Tensor) -> Tensor:
        """``rewards [N, G]``, by function ``parts [N, G, F]``, token counts ``lengths [N, G]`` -> ``[N, G]``."""
        if self._by_part:
            eps = _parameters(self._advantage)["eps"].default
            return normalize_then_sum(parts, self._part_weights, eps=eps)
        extra = {"lengths": lengths} if "lengths" in _parameters(self._advantage) else {}
        advantages: Tensor = self._advantage(rewards, **extra)
        return advantages

    def weights(self, lengths: Tensor, groups: Tensor, batch_tokens: float | None = None) -> Tensor:
        """Trainable tokens ``[M]`` and group numbers ``[M]`` of the step's sequences -> loss weights ``[M]``.

        ``batch_tokens`` is the mean number of trainable tokens of the batch's steps.
        """
        given = {"groups": groups, "batch_tokens": batch_tokens}
        asked = {name: value for name, value in given.items() if name in _parameters(self._aggregation)}
        weights: Tensor = self._aggregation(lengths, **asked)
        return weights


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _clip_bounds(name: str, policy_loss: Callable[..., Any]) -> dict[str, float]:
    """The bounds that clip metrics count against: those of a clip, cispo's cap, else the usual ones."""
    parameters = _parameters(policy_loss)
    if name == "cispo":
        return {"clip_low": 1.0, "clip_high": parameters["cap"].default - 1.0}
    if name not in ("clip", "dual_clip", "sequence_clip", "gspo_token"):
        return {}
    return {f"clip_{side}": parameters[side].default for side in ("low", "high")}
