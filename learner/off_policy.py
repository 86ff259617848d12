"""Weights that correct for tokens sampled by older weights or by another implementation, and the guards around exp.

Behaviour (``rollout``) and proximal (``old``) policy meet here; the ratio current/old belongs to the policy losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def bounded_exp(x: Tensor) -> Tensor:
    """``exp`` with its argument clamped to +-20 (gradient 0 beyond), so that no ratio overflows."""
    return torch.exp(x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` on the mask, 0 elsewhere; unlike a product this also removes NaN, in value and in gradient."""
    return torch.where(mask.bool(), x, 0.0)


def gap(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    """``old - rollout`` on the mask, detached; 0 where either is no finite number."""
    difference = masked(old - rollout, mask).detach()
    return torch.where(torch.isfinite(difference), difference, 0.0)


def importance_weights(
    old: Tensor, rollout: Tensor, mask: Tensor, *, level: str, mode: str, low: float | None, high: float | None
) -> Tensor:
    """Weights ``exp(old - rollout)`` that correct staleness and engine mismatch: ``[B, T]`` or ``[B, 1]``, detached.

    Truncated importance sampling: ``truncate`` clamps to ``[low, high]``, ``mask`` sets weights outside to 0. A
    non-finite difference counts as 0, that is weight 1.
    """
    difference = gap(old, rollout, mask)
    if level != "token":
        difference = difference.sum(1, keepdim=True)
    if level == "sequence_geometric":
        difference = difference / mask.sum(1, keepdim=True).clamp(min=1)
    weights = bounded_exp(difference)
    lowest, highest = 0.0 if low is None else low, float("inf") if high is None else high
    if mode == "truncate":
        return weights.clamp(lowest, highest)
    return torch.where((weights >= lowest) & (weights <= highest), weights, 0.0)


def weight_metrics(
    weight: Tensor, old: Tensor, rollout: Tensor, mask: Tensor, settings: dict[str, Any]
) -> dict[str, Tensor]:
    """Extremes, moments and the share of weights that a bound changed, as sums over the mask's tokens."""
    mask = mask.bool()
    free = importance_weights(old, rollout, mask, **settings | {"mode": "truncate", "low": None, "high": None})
    applied, free = (masked(w.expand_as(mask), mask).float() for w in (weight, free))
    inside = applied[mask] if mask.any() else applied.new_ones(1)
    return {
        "importance_sampling/mean_sum": applied.sum(),
        "importance_sampling/square_sum": applied.square().sum(),
        "importance_sampling/bounded_frac_sum": (applied != free).sum().float(),
        "importance_sampling/ratio_min": inside.min(),
        "importance_sampling/ratio_max": inside.max(),
    }


def off_policy_keep(logprobs: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """``[B, 1]``: 0 where ``A < 0`` and the mean of ``rollout - current`` exceeds ``threshold``, else 1 (DeepSeek-V3.2).

    A sequence that the policy has already moved away from is not pushed further. A token for which the engine gave no
    number counts as one that has not drifted.
    """
    drift = masked(rollout - logprobs.detach(), mask)
    drift = torch.where(torch.isnan(drift) | (drift == -torch.inf), 0.0, drift)
    drift = drift.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (drift <= threshold)).float()
