"""Policy losses: ``(log_ratio [B, T], advantages [B, 1], mask [B, T], *, logprobs) -> [B, T]``, to be minimised.

Pure float32 functions; ``rho = exp(log_ratio)`` is differentiable, nothing here averages. Invariant: entries outside
the mask, whatever they hold, influence neither value nor gradient of entries inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.off_policy import LOG_RATIO_LIMIT, bounded_exp, masked


def row_lengths(mask: Tensor) -> Tensor:
    """Trainable tokens of each row, ``[B, 1]``, at least 1."""
    return mask.sum(1, keepdim=True).clamp(min=1)


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
    mean = masked(log_ratio, mask).sum(1, keepdim=True) / row_lengths(mask)
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
    mean = masked(pessimistic, mask).sum(1, keepdim=True) / row_lengths(mask)
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
    log_weights: Tensor | None = None,
) -> Tensor:
    """``-phi A logprobs`` with a detached gamma-shaped weight phi of the sequence's log-ratio (arXiv 2602.10693).

    Token-level importance weights enter here as ``log_weights [B, T]``, and are not multiplied on afterwards.
    """
    least = -18.420680743952367  # ln 1e-8
    s = masked(log_ratio, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).sum(1, keepdim=True)
    if log_weights is not None:
        s = s + masked(log_weights, mask).clamp(least, LOG_RATIO_LIMIT).sum(1, keepdim=True)
    s = s.clamp(least, LOG_RATIO_LIMIT)
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
SEQUENCE_LEVEL = frozenset({"sequence_clip", "gmpo", "vespo"})
"""Losses of one ratio per row: clip metrics and a corrected KL use the row's ratio too."""
