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

from learner.aggregations import AGGREGATIONS
from learner.kl import KL_ESTIMATORS, straight_through, within_reach
from learner.off_policy import LOG_RATIO_LIMIT, bounded_exp, importance_weights, masked, off_policy_keep, weight_metrics
from learner.policy_losses import POLICY_LOSSES, ROW_RATIO, SEQUENCE_LEVEL, row_ratio

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "POLICY_LOSSES",
    "ROW_RATIO",
    "SEQUENCE_LEVEL",
    "LossInputs",
    "LossSettings",
    "grpo_loss",
]


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
    importance_scale: float = 1.0
    """Factor on the importance weights, after their bounds."""


@dataclass(frozen=True)
class LossSettings:
    """The chosen functions with their arguments bound."""

    policy_loss: Callable[..., Tensor]
    kl_estimator: Callable[..., Tensor]
    kl_coef: float = 0.0
    kl_corrected: bool = False
    kl_straight_through: bool | str = False
    """True: k2's gradient. "corrected": the plain value with the corrected estimator's gradient."""
    kl_by_row: bool | None = None
    """A corrected KL takes the row's ratio, not the token's; none: as ``sequence_level``."""
    importance_sampling: dict[str, Any] | None = None
    rejection: Callable[..., Tensor] | None = None
    """``(old, rollout, mask) -> keep``, an entry of ``REJECTIONS``; none: all are kept."""
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
        given["log_weights"] = (weight * x.importance_scale).log()
    token_loss = masked(settings.policy_loss(log_ratio, x.advantages, mask, **given), mask)
    metrics = {"policy_loss": (token_loss * x.weights).sum().detach()}
    metrics |= _ratio_metrics(x, settings, log_ratio.detach(), mask)
    token_loss = _kept(x, settings, token_loss, mask, metrics)
    if weight is not None:
        token_loss = token_loss if folded else token_loss * (weight * x.importance_scale)
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


def _kept(
    x: LossInputs, settings: LossSettings, token_loss: Tensor, mask: Tensor, metrics: dict[str, Tensor]
) -> Tensor:
    """The policy terms of the tokens that no filter drops; the shares that each filter keeps go into ``metrics``."""
    if settings.off_policy_threshold is not None:
        keep = off_policy_keep(x.logprobs, x.rollout_logprobs, x.advantages, mask, settings.off_policy_threshold)
        token_loss = token_loss * keep
        metrics["off_policy/kept_frac_sum"] = masked(keep.expand_as(token_loss), mask).sum()
    if settings.rejection is not None:
        inside = settings.rejection(x.old_logprobs, x.rollout_logprobs, mask).expand_as(mask) & mask
        token_loss = masked(token_loss, inside)
        metrics["rejection/kept_frac_sum"] = inside.sum().float()
    if x.entropy_keep is not None:
        token_loss = masked(token_loss, x.entropy_keep)
        metrics["entropy_kept_frac_sum"] = (x.entropy_keep & mask).sum().float()
    return token_loss


def _kl(x: LossInputs, settings: LossSettings, log_ratio: Tensor, mask: Tensor) -> Tensor:
    logprobs = masked(x.logprobs, mask)
    reference = None if x.ref_logprobs is None else within_reach(logprobs, masked(x.ref_logprobs, mask))
    if settings.kl_estimator is KL_ESTIMATORS["full"]:
        assert x.full_kl is not None
        kl = x.full_kl
    else:
        assert reference is not None, "a KL term needs reference log-probs"
        kl = settings.kl_estimator(logprobs, reference)
    by_row = settings.sequence_level if settings.kl_by_row is None else settings.kl_by_row
    ratio = row_ratio(log_ratio, mask) if by_row else bounded_exp(log_ratio)
    if settings.kl_straight_through == "corrected":
        surrogate = kl * ratio
        return surrogate - surrogate.detach() + (surrogate if settings.kl_corrected else kl).detach()
    if settings.kl_corrected:
        kl = kl * ratio
    if settings.kl_straight_through and reference is not None:
        kl = straight_through(kl, logprobs, reference)
    return kl


def _ratio_metrics(x: LossInputs, settings: LossSettings, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Clip shares of current/old, and how far the tokens are from the learner's own: log-prob gap, sums for the ESS."""
    ratio = row_ratio(log_ratio, mask) if settings.sequence_level else bounded_exp(log_ratio)
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
