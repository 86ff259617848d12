"""KL between the policy and a reference: estimators for the loss, and the penalty inside the reward.

Pure float32 functions of log-probs of sampled tokens; ``full`` alone takes whole distributions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.off_policy import LOG_RATIO_LIMIT, bounded_exp, masked

# --- estimators: (logprobs [B, T], ref_logprobs [B, T]) -> [B, T], tokens sampled from the policy ---


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


def full(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``sum_v p_v (ln p_v - ln q_v)``, exact: whole distributions ``[..., V]`` of both models -> ``[...]``.

    The learner computes it inside the output head, in chunks (``logprobs.py``); this is its definition.
    """
    p = logprobs.exp()
    return torch.where(p > 0, p * (logprobs - ref_logprobs), 0.0).sum(-1)


KL_ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "k1": k1,
    "k2": k2,
    "mse": k2,
    "k3": k3,
    "abs": absolute,
    "full": full,
}


def straight_through(value: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``value`` as a number, with ``k2``'s gradient."""
    surrogate = k2(logprobs, ref_logprobs)
    return surrogate - surrogate.detach() + value.detach()


def within_reach(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``ref_logprobs``, at most 20 nats below the policy's where the reference's own filter leaves a token out (-inf)."""
    return torch.where(ref_logprobs == -torch.inf, logprobs.detach() - LOG_RATIO_LIMIT, ref_logprobs)


def penalised_rewards(kl: Tensor, mask: Tensor, score: Tensor, eta: float) -> Tensor:
    """Per-token rewards ``-eta kl``, the score added at the last trainable token (PPO form, arXiv 1909.08593).

    ``kl`` and ``mask [B, T]``, ``score [B]`` -> ``[B, T]`` without gradient. A row without trainable tokens has none.
    """
    rewards = -eta * masked(kl, mask).detach()
    last = torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), -1).amax(1)
    rows = torch.nonzero(last >= 0)[:, 0]
    rewards[rows, last[rows]] += score[rows]
    return rewards
