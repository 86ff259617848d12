"""Which tokens or sequences keep their policy term, by the gap between the engine's log-probs and the learner's.

Each entry of ``REJECTIONS`` is ``(old [B, T], rollout [B, T], mask [B, T], *, bounds) -> keep [B, T] or [B, 1]``, bool and
without gradient. It leaves importance weights and denominators alone. With ``g = old - rollout`` (0 where it is not
finite) a token has the measures ``k1 = g``, ``k2 = g^2 / 2``, ``k3 = exp(g) - 1 - g``, ``tv = abs(p_old - p_rollout)``
and ``binary_kl``, the KL of "this token or another one" from the engine to the learner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.off_policy import bounded_exp, gap, masked

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
LEAST = 1e-6
"""Smallest probability of a token, and of all others together, in a binary KL."""


def binary_kl(from_logprobs: Tensor, to_logprobs: Tensor) -> Tensor:
    """KL of the two-way choice "this token or another" between log-probs of one shape; never negative."""
    p, q = (torch.exp(x.clamp(max=0)).clamp(LEAST, 1 - LEAST) for x in (from_logprobs, to_logprobs))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).clamp(min=0)


def _k1(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    return gap(old, rollout, mask)


def _k2(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * gap(old, rollout, mask) ** 2


def _k3(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    difference = gap(old, rollout, mask)
    return bounded_exp(difference) - 1 - difference


def _tv(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    known = mask.bool() & torch.isfinite(old - rollout)
    return masked((old.exp() - rollout.exp()).abs(), known).detach()


def _binary_kl(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    known = mask.bool() & torch.isfinite(old - rollout)
    return masked(binary_kl(rollout, old), known).detach()


def _over(unit: str, values: Tensor, mask: Tensor) -> Tensor:
    """``values [B, T]``, which are 0 outside the mask, as they are, or their sum, mean or maximum by row ``[B, 1]``."""
    if unit == "token":
        return values
    if unit == "seq_max":
        return values.amax(1, keepdim=True)
    sums = values.sum(1, keepdim=True)
    return sums if unit == "seq_sum" else sums / mask.sum(1, keepdim=True).clamp(min=1)


def _by_ratio(unit: str, what: str) -> Callable[..., Tensor]:
    def keep(old: Tensor, rollout: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 2.0) -> Tensor:
        ratio = bounded_exp(_over(unit, _k1(old, rollout, mask), mask))
        return (ratio >= low) & (ratio <= high)

    keep.__doc__ = f"Keep {what} old/rollout lies from ``low`` to ``high``."
    return keep


def _by_divergence(unit: str, measure: Measure, what: str, usual: float) -> Callable[..., Tensor]:
    def keep(old: Tensor, rollout: Tensor, mask: Tensor, *, high: float = usual) -> Tensor:
        return _over(unit, measure(old, rollout, mask), mask) <= high

    keep.__doc__ = f"Keep {what} is at most ``high``."
    return keep


def none(old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG001
    """Keep all."""
    return torch.ones_like(mask, dtype=torch.bool)


DIVERGENCES: dict[str, tuple[Measure, str, float]] = {
    "k2": (_k2, "k2 (half the squared log-ratio)", 2.0),
    "k3": (_k3, "k3 (ratio - 1 - log-ratio)", 2.0),
    "tv": (_tv, "tv (distance between the two probabilities)", 0.2),
    "binary_kl": (_binary_kl, "binary_kl (KL of 'this token or another' from engine to learner)", 0.05),
}
UNITS = {
    "token": "tokens whose {}",
    "seq_sum": "sequences whose sum over tokens of {}",
    "seq_mean": "sequences whose mean over tokens of {}",
    "seq_max": "sequences whose largest over tokens of {}",
}
REJECTIONS: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "token_k1": _by_ratio("token", "tokens whose ratio"),
    "seq_sum_k1": _by_ratio("seq_sum", "sequences whose product of ratios"),
    "seq_mean_k1": _by_ratio("seq_mean", "sequences whose geometric mean of ratios"),
    **{
        f"{unit}_{name}": _by_divergence(unit, measure, UNITS[unit].format(what), usual)
        for unit in UNITS
        for name, (measure, what, usual) in DIVERGENCES.items()
    },
}
