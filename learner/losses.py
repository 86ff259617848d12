"""The GRPO loss as independent choices: policy losses, KL estimators, aggregations, and how they compose.

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

from learner.off_policy import LOG_RATIO_LIMIT, bounded_exp, importance_weights, masked


def _lengths(mask: Tensor) -> Tensor:
    """Trainable tokens of each row, ``[B, 1]``, at least 1."""
    return mask.sum(1, keepdim=True).clamp(min=1)


# --- policy losses: (log_ratio [B, T], advantages [B, 1], mask [B, T], *, logprobs) -> [B, T], to be minimised ---


def clip(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
) -> Tensor:
    """``-min(rho A, clamp(rho, 1-low, 1+high) A)`` (PPO, arXiv 1707.06347); ``delta`` caps rho for A < 0."""
    return _clipped(bounded_exp(masked(log_ratio, mask)), advantages, low, high, delta)


def _clipped(rho: Tensor, advantages: Tensor, low: float, high: float, delta: float | None) -> Tensor:
    free = rho if delta is None else rho.clamp(max=delta)
    return -torch.minimum(free * advantages, rho.clamp(1 - low, 1 + high) * advantages)


def dual_clip(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 0.2,
    high: float = 0.2,
    c: float = 3.0,
) -> Tensor:
    """``clip``, and for A < 0 at most ``-c A`` (arXiv 1912.09729)."""
    loss = clip(log_ratio, advantages, mask, low=low, high=high)
    return torch.where(advantages < 0, torch.minimum(loss, -c * advantages), loss)


def reinforce(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, logprobs: Tensor | None = None) -> Tensor:
    """``-A logprobs``: plain policy gradient, no ratio."""
    return -advantages * masked(_current(log_ratio, logprobs), mask)


def cispo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    cap: float = 5.0,
    floor: float = 0.0,
) -> Tensor:
    """``-sg(clamp(rho, floor, cap)) A logprobs`` (CISPO, arXiv 2506.13585); ``cap`` is an absolute ratio."""
    weight = bounded_exp(masked(log_ratio, mask)).clamp(floor, cap).detach()
    return -weight * advantages * masked(_current(log_ratio, logprobs), mask)


def sapo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Tensor:
    """``-(4/tau) sigmoid(tau (rho - 1)) A``: a smooth gate instead of a clip (SAPO, arXiv 2511.20347)."""
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    return -(4 / tau) * torch.sigmoid(tau * (bounded_exp(masked(log_ratio, mask)) - 1)) * advantages


def sequence_clip(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 3e-4,
    high: float = 4e-4,
    delta: float | None = None,
) -> Tensor:
    """``clip`` of the row's geometric-mean ratio, the same value in every column (GSPO, arXiv 2507.18071)."""
    mean = masked(log_ratio, mask).sum(1, keepdim=True) / _lengths(mask)
    return _clipped(bounded_exp(mean), advantages, low, high, delta).expand_as(log_ratio)


def gmpo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 0.4,
    high: float = 0.4,
) -> Tensor:
    """Geometric mean of token ratios clipped in log space, the same value in every column (arXiv 2507.20673)."""
    ratio = masked(log_ratio, mask)
    bounded = ratio.clamp(-low, high)
    pessimistic = torch.where(advantages > 0, torch.minimum(ratio, bounded), torch.maximum(ratio, bounded))
    mean = masked(pessimistic, mask).sum(1, keepdim=True) / _lengths(mask)
    return (-bounded_exp(mean) * advantages).expand_as(log_ratio)


def vespo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    k_pos: float = 2.0,
    lam_pos: float = 3.0,
    k_neg: float = 3.0,
    lam_neg: float = 2.0,
) -> Tensor:
    """``-phi A logprobs`` with a detached gamma-shaped weight phi of the sequence's log-ratio (arXiv 2602.10693)."""
    s = masked(log_ratio, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).sum(1, keepdim=True)
    s = s.clamp(-18.420680743952367, LOG_RATIO_LIMIT)  # ln 1e-8
    k = torch.where(advantages >= 0, k_pos, k_neg)
    lam = torch.where(advantages >= 0, lam_pos, lam_neg).clamp(min=1e-4)
    phi = torch.exp(lam + k * s - lam * torch.exp(s)).nan_to_num(0.0, 0.0, 0.0).detach()
    return -phi * advantages * masked(_current(log_ratio, logprobs), mask)


def _current(log_ratio: Tensor, logprobs: Tensor | None) -> Tensor:
    """The policy's log-probs; the log-ratio has the same gradient and serves where they are not given."""
    return log_ratio if logprobs is None else logprobs


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": clip,
    "dual_clip": dual_clip,
    "reinforce": reinforce,
    "cispo": cispo,
    "sapo": sapo,
    "sequence_clip": sequence_clip,
    "gmpo": gmpo,
    "vespo": vespo,
}


# --- KL estimators: (logprobs [B, T], ref_logprobs [B, T]) -> [B, T], tokens sampled from the policy ---


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``d = logprobs - ref``: unbiased value, but as a loss term its expected gradient is zero."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``d^2 / 2``: its expected on-policy gradient is exactly that of KL(policy, reference)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``exp(-d) + d - 1``: unbiased, >= 0, low variance (Schulman 2020; GRPO eq. 4, arXiv 2402.03300)."""
    d = logprobs - ref_logprobs
    return bounded_exp(-d) + d - 1


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``abs(d)``: not a KL, a penalty that is easy to read."""
    return (logprobs - ref_logprobs).abs()


KL_ESTIMATORS: dict[str, Callable[..., Tensor]] = {"k1": k1, "k2": k2, "mse": k2, "k3": k3, "abs": absolute}


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


@dataclass(frozen=True)
class LossSettings:
    """The chosen functions with their arguments bound."""

    policy_loss: Callable[..., Tensor]
    kl_estimator: Callable[..., Tensor]
    kl_coef: float = 0.0
    kl_corrected: bool = False
    importance_sampling: dict[str, Any] | None = None
    clip_low: float = 0.2
    """Bounds that the clip metrics count against: those of the policy loss."""
    clip_high: float = 0.2


def grpo_loss(x: LossInputs, settings: LossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, a weighted sum, and its metrics as sums over the micro-batch.

    Importance weights act on the policy term alone, never on the KL term. Metrics ending in ``_sum`` are to be
    divided by the token count of the step, ``_max`` are maxima.
    """
    mask = x.mask.bool()
    log_ratio = masked(x.logprobs - x.old_logprobs, mask)
    token_loss = settings.policy_loss(log_ratio, x.advantages, mask, logprobs=masked(x.logprobs, mask))
    ratio = bounded_exp(log_ratio.detach())
    gap = masked(x.old_logprobs.detach() - x.rollout_logprobs, mask)
    known = torch.isfinite(gap)
    gap = masked(gap, known)
    metrics = {
        "policy_loss": (masked(token_loss, mask) * x.weights).sum().detach(),
        "gap_abs_sum": gap.abs().sum(),
        "rollout_logprobs_not_finite": (~known).sum().float(),
        "gap_abs_max": gap.abs().max() if gap.numel() else gap.sum(),
        "ratio_low_sum": ((ratio < 1 - settings.clip_low) & (x.advantages < 0) & mask).sum().float(),
        "ratio_high_sum": ((ratio > 1 + settings.clip_high) & (x.advantages > 0) & mask).sum().float(),
    }
    if settings.importance_sampling is not None:
        weight = importance_weights(x.old_logprobs, x.rollout_logprobs, mask, **settings.importance_sampling)
        token_loss = token_loss * weight
        metrics["is_weight_sum"] = masked(weight.expand_as(token_loss), mask).sum()
    if x.ref_logprobs is not None:
        kl = settings.kl_estimator(masked(x.logprobs, mask), masked(x.ref_logprobs, mask))
        if settings.kl_corrected:
            kl = kl * bounded_exp(log_ratio)
        token_loss = token_loss + settings.kl_coef * kl
        metrics["kl_sum"] = masked(kl, mask).sum().detach()
    return (masked(token_loss, mask) * x.weights).sum(), metrics
