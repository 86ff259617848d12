"""The GRPO loss as independent choices: how policy losses, KL estimators and aggregations compose.

Pure float32 functions of tensors: no state, no device logic, no communication. ``B`` rows, ``T`` token columns;
``x[b, t]`` belongs to token ``t`` of row ``b``; the mask is 1 on trainable tokens. Invariant: entries outside the
mask, whatever they hold, influence neither value nor gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.kl import KL_ESTIMATORS, straight_through
from learner.off_policy import LOG_RATIO_LIMIT, bounded_exp, importance_weights, masked, off_policy_keep, weight_metrics
from learner.policy_losses import POLICY_LOSSES, SEQUENCE_LEVEL, row_lengths

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "POLICY_LOSSES",
    "SEQUENCE_LEVEL",
    "LossInputs",
    "LossSettings",
    "grpo_loss",
]


# --- aggregations: lengths [M] of all sequences of the optimizer step -> weights [M]; the loss is their weighted sum ---


def token_mean(lengths: Tensor) -> Tensor:
    """``1 / sum(n)``: every token equal (DAPO, arXiv 2503.14476)."""
    return _where_tokens(lengths, 1.0 / lengths.sum().clamp(min=1))


def sequence_mean(lengths: Tensor) -> Tensor:
    """``1 / (M n_i)``: every sequence equal (GRPO, arXiv 2402.03300)."""
    return _where_tokens(lengths, 1.0 / (len(lengths) * lengths.clamp(min=1)))


def constant(lengths: Tensor, *, length: int) -> Tensor:
    """``1 / (M length)``: no length in the weight (Dr. GRPO, arXiv 2503.20783)."""
    return _where_tokens(lengths, torch.tensor(1.0 / (len(lengths) * length)))


def sequence_sum(lengths: Tensor) -> Tensor:
    """``1 / M``: sum over tokens, mean over sequences."""
    return _where_tokens(lengths, torch.tensor(1.0 / max(len(lengths), 1)))


def prompt_mean(lengths: Tensor, *, groups: Tensor) -> Tensor:
    """``1 / (N n_group)``: every prompt equal; ``groups [M]`` numbers the row's group from 0 to N - 1."""
    count = int(groups.max()) + 1
    tokens = torch.zeros(count, dtype=torch.float32).index_add(0, groups, lengths.float())
    return _where_tokens(lengths, 1.0 / (count * tokens[groups].clamp(min=1)))


def _where_tokens(lengths: Tensor, weights: Tensor) -> Tensor:
    return torch.where(lengths > 0, weights.float(), 0.0)


AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
    "sequence_sum": sequence_sum,
    "prompt_mean": prompt_mean,
}


# --- composition ---


@dataclass(frozen=True)
class LossInputs:
    """What the loss of one micro-batch is made of; log-probs and mask ``[B, T]``, the rest ``[B, 1]``."""

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    mask: Tensor
    full_kl: Tensor | None = None
    """``[B, T]``: KL over the vocabulary, where that is the estimator."""
    entropy: Tensor | None = None
    """``[B, T]``, differentiable; needed for the bonus alone."""
    entropy_keep: Tensor | None = None
    """``[B, T]`` bool: tokens whose policy term counts; none: all."""
    entropy_weight: float = 0.0
    """1 / tokens of the whole step that the entropy bonus covers."""


@dataclass(frozen=True)
class LossSettings:
    """The chosen functions with their arguments bound."""

    policy_loss: Callable[..., Tensor]
    kl_estimator: Callable[..., Tensor]
    kl_coef: float = 0.0
    kl_corrected: bool = False
    kl_straight_through: bool = False
    importance_sampling: dict[str, Any] | None = None
    off_policy_threshold: float | None = None
    entropy_coef: float = 0.0
    sequence_level: bool = False
    """The ratio that clipping limits belongs to the row, not to the token."""
    folds_weights: bool = False
    """The policy loss takes token-level importance weights itself, as ``log_weights``."""
    clip_low: float = 0.2
    """Bounds that the clip metrics count against: those of the policy loss."""
    clip_high: float = 0.2


def grpo_loss(x: LossInputs, settings: LossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """The step's share of this micro-batch: ``sum_i w_i sum_t m_it l_it``, and metrics as sums over its tokens.

    Importance weights and keep masks act on the policy term alone, never on the KL term.
    """
    mask = x.mask.bool()
    log_ratio = masked(x.logprobs - x.old_logprobs, mask)
    weight = None
    if settings.importance_sampling is not None:
        weight = importance_weights(x.old_logprobs, x.rollout_logprobs, mask, **settings.importance_sampling)
    given = {"logprobs": masked(x.logprobs, mask)}
    folded = settings.folds_weights and (settings.importance_sampling or {}).get("level") == "token"
    if folded and weight is not None:
        given["log_weights"] = weight.log()
    token_loss = masked(settings.policy_loss(log_ratio, x.advantages, mask, **given), mask)
    metrics = {"policy_loss": (token_loss * x.weights).sum().detach()}
    metrics |= _ratio_metrics(x, settings, log_ratio.detach(), mask)
    if settings.off_policy_threshold is not None:
        keep = off_policy_keep(x.logprobs, x.rollout_logprobs, x.advantages, mask, settings.off_policy_threshold)
        token_loss = token_loss * keep
        metrics["off_policy/kept_frac_sum"] = masked(keep.expand_as(token_loss), mask).sum()
    if x.entropy_keep is not None:
        token_loss = masked(token_loss, x.entropy_keep)
        metrics["entropy_kept_frac_sum"] = (x.entropy_keep & mask).sum().float()
    if weight is not None:
        token_loss = token_loss if folded else token_loss * weight
        metrics |= weight_metrics(weight, x.old_logprobs, x.rollout_logprobs, mask, settings.importance_sampling or {})
    if settings.kl_coef > 0:
        kl = _kl(x, settings, log_ratio, mask)
        token_loss = token_loss + settings.kl_coef * kl
        metrics["kl_sum"] = masked(kl, mask).sum().detach()
    loss = (masked(token_loss, mask) * x.weights).sum()
    if settings.entropy_coef and x.entropy is not None:
        covered = mask if x.entropy_keep is None else mask & x.entropy_keep
        loss = loss - settings.entropy_coef * x.entropy_weight * masked(x.entropy, covered).sum()
    return loss, metrics


def _row_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The row's geometric-mean ratio in every column, ``[B, T]``."""
    return bounded_exp(log_ratio.sum(1, keepdim=True) / row_lengths(mask)).expand_as(log_ratio)


def _kl(x: LossInputs, settings: LossSettings, log_ratio: Tensor, mask: Tensor) -> Tensor:
    logprobs = masked(x.logprobs, mask)
    if settings.kl_estimator is KL_ESTIMATORS["full"]:
        assert x.full_kl is not None
        kl = x.full_kl
    else:
        assert x.ref_logprobs is not None, "a KL term needs reference log-probs"
        kl = settings.kl_estimator(logprobs, masked(x.ref_logprobs, mask))
    if settings.kl_corrected:
        kl = kl * (_row_ratio(log_ratio, mask) if settings.sequence_level else bounded_exp(log_ratio))
    if settings.kl_straight_through and x.ref_logprobs is not None:
        kl = straight_through(kl, logprobs, masked(x.ref_logprobs, mask))
    return kl


def _ratio_metrics(x: LossInputs, settings: LossSettings, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Clip shares of current/old, and how far the tokens are from the learner's own: log-prob gap, sums for the ESS."""
    ratio = _row_ratio(log_ratio, mask) if settings.sequence_level else bounded_exp(log_ratio)
    low = (ratio < 1 - settings.clip_low) & (x.advantages < 0) & mask
    high = (ratio > 1 + settings.clip_high) & (x.advantages > 0) & mask
    gap = masked(x.old_logprobs.detach() - x.rollout_logprobs, mask)
    known = mask & torch.isfinite(gap)
    gap = masked(gap, known)
    weight = masked(bounded_exp(gap), known)  # What the tokens would weigh if they were corrected.
    return {
        "clip_ratio/low_mean_sum": low.sum().float(),
        "clip_ratio/high_mean_sum": high.sum().float(),
        "clip_ratio/region_mean_sum": (low | high).sum().float(),
        "clip_ratio/saturated": (log_ratio.abs() > LOG_RATIO_LIMIT).sum().float(),
        "off_policy/mean_sum": weight.sum(),
        "off_policy/square_sum": weight.square().sum(),
        "sync/logprob_gap_sum": gap.abs().sum(),
        "sync/logprob_gap_max": gap.abs().max() if gap.numel() else gap.sum(),
        "rollout_logprobs_not_finite": (~torch.isfinite(masked(x.rollout_logprobs, mask))).sum().float(),
    }
