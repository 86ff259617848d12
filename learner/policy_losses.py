"""Policy losses: ``(log_ratio [B, T], advantages [B, 1], mask [B, T], *, logprobs) -> [B, T]``, to be minimised.

Pure float32 functions; ``rho = exp(log_ratio)`` is differentiable, nothing here averages. Invariant: entries outside
the mask, whatever they hold, influence neither value nor gradient of entries inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.off_policy import LOG_RATIO_LIMIT, bounded_exp, masked
from learner.rejection import binary_kl


def row_lengths(mask: Tensor) -> Tensor:
    """Trainable tokens of each row, ``[B, 1]``, at least 1."""
    return mask.sum(1, keepdim=True).clamp(min=1)


def row_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of a row's ratios, in every column, ``[B, T]``."""
    mean = masked(log_ratio, mask).sum(1, keepdim=True) / row_lengths(mask)
    return bounded_exp(mean).expand_as(log_ratio)


def _ratio(log_ratio: Tensor, mask: Tensor, unit: str) -> Tensor:
    """``rho``, or the row's geometric mean of it."""
    return row_ratio(log_ratio, mask) if unit == "sequence" else bounded_exp(masked(log_ratio, mask))


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
    unit: str = "token",
) -> Tensor:
    """``-sg(clamp(rho, floor, cap)) A logprobs`` (CISPO, arXiv 2506.13585); ``cap`` is an absolute ratio.

    ``unit`` is token, or sequence for the geometric mean of the row's ratios.
    """
    weight = _ratio(log_ratio, mask, unit).clamp(floor, cap).detach()
    return -weight * advantages * masked(_current(log_ratio, logprobs), mask)


def sapo(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    unit: str = "token",
) -> Tensor:
    """``-(4/tau) sigmoid(tau (rho - 1)) A``: a smooth gate instead of a clip (SAPO, arXiv 2511.20347).

    ``unit`` is token, or sequence for the geometric mean of the row's ratios.
    """
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    return -(4 / tau) * torch.sigmoid(tau * (_ratio(log_ratio, mask, unit) - 1)) * advantages


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
    return _clipped(row_ratio(log_ratio, mask), advantages, low, high, delta)


def gspo_token(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 3e-4,
    high: float = 4e-4,
    delta: float | None = None,
) -> Tensor:
    """``sequence_clip`` in value, each column with its own token's gradient alone (GSPO-token, arXiv 2507.18071).

    The two differ where tokens of a row have weights of their own.
    """
    own = masked(log_ratio, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = row_ratio(log_ratio, mask).detach() * torch.exp(own - own.detach())
    return _clipped(ratio, advantages, low, high, delta)


def dppo_tv(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 0.2,
    high: float = 0.2,
    cap: float = 20.0,
) -> Tensor:
    """``-sg(min(rho, cap)) A logprobs``, 0 where a token's probability has moved too far the way A pushes it.

    Too far is ``p - p_old > high`` for A > 0, ``p_old - p > low`` else (DPPO with total variation, arXiv 2602.04879).
    """
    current, old = _both(log_ratio, mask, logprobs)
    moved = current.exp() - old.exp()
    out = torch.where(advantages > 0, moved > high, moved < -low)
    return _gated(log_ratio, advantages, mask, logprobs, out, cap)


def dppo_kl(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    low: float = 0.05,
    high: float = 0.05,
    cap: float = 20.0,
) -> Tensor:
    """``dppo_tv`` with the KL of "this token or another" from the old policy as the distance (arXiv 2602.04879)."""
    current, old = _both(log_ratio, mask, logprobs)
    moved = binary_kl(old, current)
    out = torch.where(advantages > 0, (moved > high) & (current > old), (moved > low) & (current < old))
    return _gated(log_ratio, advantages, mask, logprobs, out, cap)


def _both(log_ratio: Tensor, mask: Tensor, logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Detached log-probs of the current and the old policy, at most 0."""
    current = masked(_current(log_ratio, logprobs), mask).detach()
    return current.clamp(max=0), (current - masked(log_ratio, mask).detach()).clamp(max=0)


def _gated(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, logprobs: Tensor | None, out: Tensor, cap: float
) -> Tensor:
    weight = bounded_exp(masked(log_ratio, mask)).clamp(max=cap).detach()
    return -torch.where(out, 0.0, weight) * advantages * masked(_current(log_ratio, logprobs), mask)


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
    known = mask.bool() & ~torch.isnan(log_ratio)  # A token without a number has ratio 1.
    s = masked(log_ratio, known).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).sum(1, keepdim=True)
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
    "gspo_token": gspo_token,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
}
SEQUENCE_LEVEL = frozenset({"sequence_clip", "gspo_token", "gmpo", "vespo"})
"""Losses of one ratio per row, which clip metrics count; likewise those with ``unit = "sequence"``."""
ROW_RATIO = frozenset({"sequence_clip", "gspo_token", "gmpo"})
"""Losses whose ratio is the row's geometric mean; a corrected KL uses it too, likewise with ``unit = "sequence"``."""
