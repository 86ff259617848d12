"""What has to be known before the first update on a batch: reference and old log-probs, and all that follows from them.

The learner's ``train_step`` calls ``prepare`` once per generated batch. Old log-probs are computed exactly where they
are needed: the first optimizer step on a batch starts from the weights that define them, so its own forward pass
has them. Invariant: every number that depends on more than one sequence is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.batching import MicroBatch, Row, Step, build_rows, plan_steps
from learner.choices import Choices
from learner.distributed import sum_over_ranks
from learner.kl import KL_ESTIMATORS, penalised_rewards, within_reach
from learner.off_policy import importance_weights, masked
from learner.reference import Reference
from learner.top_entropy import mark
from shared.config import Config
from shared.errors import LearnerFailed
from shared.ledger import TimeLedger
from shared.types import RolloutGroup

ROUNDING = 256
"""Most that two entropies of one context differ by, in steps of the model's number format."""
Forward = Callable[..., tuple[Tensor, ...]]


@dataclass
class Given:
    """Token-level inputs that the caller fixes instead of the learner; ``[group][completion]`` of ``[C_i]`` arrays."""

    advantages: Tensor | None = None
    """``[N, G]``."""
    old_logprobs: Sequence[Sequence[Any]] | None = None
    ref_logprobs: Sequence[Sequence[Any]] | None = None

    def of(self, kept: list[int]) -> Given:
        """The same for the groups at these positions alone."""

        def chosen(values: Sequence[Sequence[Any]] | None) -> list[Sequence[Any]] | None:
            return None if values is None else [values[i] for i in kept]

        advantages = None if self.advantages is None else self.advantages[kept]
        return Given(advantages, chosen(self.old_logprobs), chosen(self.ref_logprobs))


@dataclass
class Scored:
    """The rewards of a batch of ``N`` groups of ``G`` completions."""

    rewards: Tensor
    """``[N, G]``; NaN where no function applied."""
    parts: Tensor
    """``[N, G, F]``: per reward function, unweighted."""
    lengths: Tensor
    """``[N, G]``: trainable tokens of each completion."""
    kept: list[int]
    """Positions of these groups among those that were handed over."""
    group_ids: list[int]
    metrics: dict[str, float] = field(default_factory=dict)
    advantages: dict[int, list[float]] = field(default_factory=dict)
    """By group id; filled by ``prepare``."""


def plan_batch(
    config: Config, groups: list[RolloutGroup], rank: int, num_ranks: int, device: torch.device
) -> tuple[list[Step], Scored]:
    """The batch's rewards, and its sequences split into updates and micro-batches: the same on every rank."""
    algorithm, settings = config.algorithm, config.learner
    by_part = algorithm.combine == "normalize_then_sum"
    varied = [i for i, group in enumerate(groups) if group.has_signal(by_part)]
    positions = list(range(len(groups))) if algorithm.zero_variance == "keep" else varied
    kept = [groups[i] for i in positions]
    if by_part and any(len(g.reward_parts) != len(config.reward.functions) for g in kept):
        raise ValueError("normalize_then_sum needs reward_parts of every function of reward.functions, in their order")
    rows = build_rows(kept, mask_truncated=algorithm.mask_truncated)
    budget = settings.max_tokens_per_microbatch
    steps = plan_steps(rows, settings.steps_per_batch, budget, rank, num_ranks, device)
    shape = (len(kept), len(kept[0].completions) if kept else 0)
    parts = [np.stack([*g.reward_parts.values()], -1) if g.reward_parts else g.rewards[:, None] for g in kept]
    trained = [row for row in rows if row.trainable]
    _check_rollout_logprobs(config, trained)
    scored = Scored(
        rewards=torch.tensor(np.array([group.rewards for group in kept])).view(shape),
        parts=torch.tensor(np.array(parts)).view(*shape, -1) if kept else torch.zeros(0, 0, 1),
        lengths=torch.tensor([row.trainable for row in rows], dtype=torch.int64).view(shape),
        kept=positions,
        group_ids=[group.group_id for group in kept],
        metrics={
            "groups": float(len(groups)),
            "groups/trained": float(len(kept)),
            "groups/zero_variance": float(len(groups) - len(varied)),
            "train_tokens": float(sum(len(r.prompt.token_ids) + len(r.completion.token_ids) for r in trained)),
            "trainable_tokens": float(sum(row.trainable for row in trained)),
        },
    )
    return steps, scored


def _check_rollout_logprobs(config: Config, rows: list[Row]) -> None:
    """Raises ``LearnerFailed`` when more of them are NaN or infinite than may be."""
    tokens = sum(row.trainable for row in rows)
    unknown = sum(int((~np.isfinite(row.completion.logprobs)).sum()) for row in rows)
    allowed = config.algorithm.importance_sampling.max_nonfinite
    if unknown > allowed * tokens:
        raise LearnerFailed(
            f"{unknown} of {tokens} rollout log-probs are NaN or infinite "
            f"(algorithm.importance_sampling.max_nonfinite = {allowed:g}); the engine returned broken log-probs"
        )


class Passes:
    """The passes over a batch that come before its first update."""

    def __init__(
        self, config: Config, choices: Choices, forward: Forward, reference: Reference | None, ledger: TimeLedger
    ) -> None:
        """``forward(micro_batch, against)`` is the policy without gradient: ``(logprobs, entropy, kl)``."""
        self._config, self._choices, self._forward, self._reference = config, choices, forward, reference
        self._ledger = ledger
        algorithm = config.algorithm
        self._entropy_share = algorithm.top_entropy_quantile
        self._rounding = ROUNDING * torch.finfo(getattr(torch, config.model.dtype)).eps
        self._filtered = config.rollout.truncated_sampling == "renormalise" and choices.truncates
        self._full = choices.full_in_loss or choices.full_in_reward
        self._kl_in_reward = algorithm.kl.reward_coef > 0

    def prepare(self, steps: list[Step], scored: Scored, given: Given, eta: float) -> list[Step]:
        """``steps`` with log-probs, advantages and weights; ``eta`` is the coefficient of the KL in the reward."""
        kl_sums = torch.zeros(scored.rewards.numel(), dtype=torch.float64)
        outside = torch.zeros(1, dtype=torch.float64)
        prepared: list[Step] = []
        for number, step in enumerate(steps):
            results = [self._score(batch, self._pass_needed(number, given), given) for batch in step.batches]
            for (batch, _, kl), before in zip(results, step.batches, strict=True):
                if self._kl_in_reward:
                    penalties = penalised_rewards(kl, batch.mask, kl.new_zeros(len(kl)), 1.0).sum(1)
                    kl_sums -= batch.place(penalties, len(kl_sums)).cpu()
                outside += (before.mask & ~batch.mask).sum().cpu()
            step = replace(step, batches=tuple(batch for batch, *_ in results))
            if self._entropy_share < 1 and step.batches:
                step = mark(step, [entropy for _, entropy, _ in results], self._entropy_share, self._rounding)
            prepared.append(self._normalise_importance(step))
        if self._filtered:
            scored.metrics["truncated_sampling/outside"] = float(sum_over_ranks(outside))
        if self._kl_in_reward:
            kl_sums = sum_over_ranks(kl_sums)
            if not torch.isfinite(kl_sums).all():
                raise LearnerFailed("the KL in the reward is not a number: policy or reference gave broken log-probs")
            scored.metrics["reward_kl"] = float(kl_sums.mean())
            scored.metrics["reward_kl_per_token"] = float(kl_sums.sum()) / max(scored.metrics["trainable_tokens"], 1.0)
            scored.rewards = scored.rewards - eta * kl_sums.float().view(scored.rewards.shape)
        advantages = given.advantages
        if advantages is None:
            advantages = torch.zeros(scored.rewards.shape)
            for step in prepared:
                groups = torch.unique(step.members // scored.rewards.shape[1])
                parts = (scored.rewards[groups], scored.parts[groups], scored.lengths[groups])
                advantages[groups] = self._choices.advantages(*parts)
        scored.metrics["advantages/abs_mean"] = float(advantages.abs().mean())
        scored.advantages = dict(zip(scored.group_ids, advantages.tolist(), strict=True))
        lengths = [self._lengths(step, scored.rewards.numel()) for step in prepared]
        trained = [int(each.sum()) for each in lengths if each.any()]
        self._batch_tokens = sum(trained) / max(len(trained), 1)
        pairs = zip(prepared, lengths, strict=True)
        return [self._weigh(step, each, advantages.float().flatten()) for step, each in pairs]

    def _pass_needed(self, number: int, given: Given) -> bool:
        """Whether optimizer step ``number`` of the first epoch needs old log-probs from a pass of their own."""
        mode = self._config.algorithm.old_logprobs
        if given.old_logprobs is not None:  # The pass may have to tell something else.
            return self._entropy_share < 1 or self._choices.full_in_reward or self._filtered
        if mode in ("rollout", "current"):
            return False
        # The first step's training pass has them, unless something has to be known before that.
        return mode == "recompute" or number > 0 or self._choices.needs_old_pass

    def _score(self, batch: MicroBatch, with_pass: bool, given: Given) -> tuple[MicroBatch, Tensor, Tensor]:
        """The batch with log-probs; entropies and KLs per token, zeros where nothing needs them."""
        entropy = kl = torch.zeros_like(batch.rollout_logprobs)
        if given.old_logprobs is not None:
            batch = replace(batch, old_logprobs=batch.lay_out(given.old_logprobs))
        elif self._config.algorithm.old_logprobs == "rollout":
            batch = replace(batch, old_logprobs=batch.rollout_logprobs)
        if given.ref_logprobs is not None:
            if self._full:
                raise ValueError("ref_logprobs cannot be given for a full KL: it compares whole distributions")
            batch = replace(batch, ref_logprobs=batch.lay_out(given.ref_logprobs))
        elif self._reference is not None and self._choices.needs_ref_logprobs:
            with self._ledger.during("reference"):
                batch = replace(batch, ref_logprobs=self._reference.logprobs(batch))
        if self._reference is not None and self._full:
            with self._ledger.during("reference"):
                batch = replace(batch, ref_hidden=self._reference.hidden(batch))
        if with_pass:
            against = self._reference.against(batch) if self._reference is not None else None
            with self._ledger.during("old_logprobs"):
                logprobs, entropy, kl = self._forward(batch, against)
            inside = batch.mask & torch.isfinite(logprobs) if self._filtered else batch.mask
            old = logprobs if given.old_logprobs is None else batch.old_logprobs
            batch = replace(batch, old_logprobs=old, mask=inside)
        if not self._choices.full_in_loss:  # The training pass would compute a KL that nobody asks for.
            batch = replace(batch, ref_hidden=None)
        if self._kl_in_reward and not self._choices.full_in_reward:
            estimator = KL_ESTIMATORS[self._config.algorithm.kl.reward_estimator]
            assert batch.old_logprobs is not None
            assert batch.ref_logprobs is not None
            known = batch.mask & torch.isfinite(batch.old_logprobs)  # The engine's may have gaps.
            old = masked(batch.old_logprobs, known)
            kl = masked(estimator(old, within_reach(old, masked(batch.ref_logprobs, known))), known)
        return batch, entropy, kl

    def _normalise_importance(self, step: Step) -> Step:
        """Scale the step's importance weights to a mean of 1: over its tokens, or its sequences where they are rows'."""
        sampling = self._choices.loss.importance_sampling
        if sampling is None or not self._config.algorithm.importance_sampling.normalise or not step.batches:
            return step
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in step.batches:
            assert batch.old_logprobs is not None
            weight = importance_weights(batch.old_logprobs, batch.rollout_logprobs, batch.mask, **sampling)
            counted = batch.mask if sampling["level"] == "token" else batch.mask.any(1, keepdim=True)
            sums += torch.stack([masked(weight, counted).sum(), counted.sum()]).double().cpu()
        total, count = sum_over_ranks(sums).tolist()
        scale = count / total if total > 0 else 1.0
        return replace(step, batches=tuple(replace(batch, importance_scale=scale) for batch in step.batches))

    def _lengths(self, step: Step, total: int) -> Tensor:
        """``[M] int64``: trainable tokens of the step's sequences, without those outside the engine's filter."""
        if not self._filtered or not len(step.members):
            return step.lengths
        counts = torch.zeros(total, dtype=torch.float64)
        for batch in step.batches:
            counts += batch.place(batch.mask.sum(1), total).cpu()
        return sum_over_ranks(counts)[step.members].long()

    def _weigh(self, step: Step, lengths: Tensor, advantages: Tensor) -> Step:
        """Advantages and loss weights of one optimizer step; its sequences alone share the weights' normaliser."""
        if not len(step.members):
            return step
        weights = torch.zeros_like(advantages)
        weights[step.members] = self._choices.weights(lengths, step.groups, self._batch_tokens)
        weighed = tuple(replace(b, advantages=b.pick(advantages), weights=b.pick(weights)) for b in step.batches)
        covered = step.entropy_tokens if self._entropy_share < 1 else int(lengths.sum())
        return replace(step, batches=weighed, lengths=lengths, entropy_tokens=covered)
