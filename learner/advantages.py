"""Rewards ``[N, G]`` become advantages ``[N, G]``: pure float32 functions, listed in ``ADVANTAGES``.

NaN marks a completion to which no reward applied: it gets advantage 0 and statistics skip it. Invariants of every
group-relative entry: a group whose valid rewards are all equal, or with fewer than two of them, gets exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _stats(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``valid [N, G]``, clean rewards ``[N, G]``, group mean ``[N, 1]`` and centred rewards ``[N, G]``.

    Centred rewards are exactly 0 where a group has no variance: in float32 the mean of seven 0.1s is not 0.1.
    """
    if torch.isinf(rewards).any():
        raise ValueError("rewards must be finite (NaN means not applicable), found an infinite one")
    valid = ~torch.isnan(rewards)
    clean = torch.where(valid, rewards, 0.0).float()
    count = valid.sum(1, keepdim=True)
    mean = clean.sum(1, keepdim=True) / count.clamp(min=1)
    highest = torch.where(valid, clean, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(valid, clean, torch.inf).amin(1, keepdim=True)
    centred = torch.where(valid & (highest > lowest), clean - mean, 0.0)
    return valid, clean, mean, centred


def _deviation(centred: Tensor, count: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation along the last dimension, kept; its squares are divided by ``count - ddof``, at least 1."""
    squares = (centred * centred).sum(-1, keepdim=True)
    return torch.sqrt(squares / (count - ddof).clamp(min=1))


def whiten(values: Tensor, valid: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` over the valid entries of the whole step, 0 elsewhere.

    With token counts ``lengths`` every sequence weighs as its tokens do, as in a whitened per-token tensor.
    """
    weight = valid.float() if lengths is None else torch.where(valid, lengths, 0).float()
    count = weight.sum().clamp(min=1)
    mean = (weight * torch.where(valid, values, 0.0)).sum() / count
    centred = torch.where(valid, values - mean, 0.0)
    variance = (weight * centred * centred).sum() / (count - 1).clamp(min=1)
    return centred / torch.sqrt(variance + 1e-8)


def normalize_then_sum(parts: Tensor, weights: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Z-score each reward function within its group, weigh, sum, z-score over the step (GDPO, arXiv 2601.05242).

    ``parts [N, G, F]`` with NaN where a function did not apply, ``weights [F]`` -> advantages ``[N, G]``; a completion
    without any reward gets 0.
    """
    scores = torch.stack([grpo(part, eps=eps) for part in parts.unbind(-1)], -1)
    applies = ~torch.isnan(parts)
    total = (scores * weights.float()).sum(-1)
    valid = applies.any(-1)
    count = valid.sum()
    centred = torch.where(valid, total - torch.where(valid, total, 0.0).sum() / count.clamp(min=1), 0.0)
    return centred / (_deviation(centred.flatten(), count) + eps)


def grpo(rewards: Tensor, *, scale: str = "group", eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Z-score: ``(R - group mean) / (deviation + eps)``; ``scale`` is group, batch or none (arXiv 2402.03300).

    ``batch`` divides by the deviation of all raw rewards of the step. ``ddof`` 0 is the population's deviation.
    """
    centred = _stats(rewards)[3]
    return torch.where(centred != 0, centred / _divisor(rewards, scale, eps, ddof), 0.0)


def _divisor(rewards: Tensor, scale: str, eps: float, ddof: int = 1) -> Tensor:
    """What a difference of rewards is divided by, ``[N, 1]`` or ``[1]``; 1 for ``scale`` none."""
    valid, clean, _, centred = _stats(rewards)
    if scale == "none":
        return torch.ones(1)
    if scale == "group":
        return _deviation(centred, valid.sum(1, keepdim=True), ddof) + eps
    if scale == "batch":
        count = valid.sum()
        around = torch.where(valid, clean - clean.sum() / count.clamp(min=1), 0.0).flatten()
        return _deviation(around, count, ddof) + eps
    raise ValueError(f"scale must be group, batch or none, found {scale!r}")


def dr_grpo(rewards: Tensor) -> Tensor:
    """Centre only: ``R - group mean`` (Dr. GRPO, arXiv 2503.20783)."""
    return _stats(rewards)[3]


def rloo(rewards: Tensor) -> Tensor:
    """``R_i`` minus the mean of the other valid rewards of its group (arXiv 2402.14740)."""
    valid, _, _, centred = _stats(rewards)
    count = valid.sum(1, keepdim=True)
    return centred * count / (count - 1).clamp(min=1)


def maxrl(rewards: Tensor) -> Tensor:
    """``(R - mean) / mean`` where the group mean is positive, else 0; rewards must be >= 0 (arXiv 2602.02710)."""
    _, clean, mean, centred = _stats(rewards)
    if (clean < 0).any():
        raise ValueError(f"maxrl needs rewards >= 0, found {clean.min().item():g}")
    return torch.where(mean > 0, centred / torch.where(mean > 0, mean, 1.0), 0.0)


def grpo_passk(rewards: Tensor, *, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """The best of a group by its lead over the second, the others 0 (for pass@k, arXiv 2503.19595).

    ``scale`` as in ``grpo``. Two equal best completions lead by 0.
    """
    valid, clean, _, _ = _stats(rewards)
    if rewards.shape[1] < 2:
        return torch.zeros_like(clean)
    best = torch.where(valid, clean, -torch.inf).topk(2, dim=1)
    lead = best.values[:, :1] - best.values[:, 1:]
    lead = torch.where(torch.isfinite(lead), lead, 0.0)  # Fewer than two rewards.
    lead = torch.where(lead > 0, lead / _divisor(rewards, scale, eps), 0.0)
    return torch.zeros_like(clean).scatter(1, best.indices[:, :1], lead)


def reinforce_pp(rewards: Tensor, *, lengths: Tensor | None = None, unit: str = "token") -> Tensor:
    """Rewards whitened over the step, no group baseline (REINFORCE++, arXiv 2501.03262).

    With ``unit`` token a reward counts once for each token of its completion (``lengths [N, G]``), as where rewards are
    whitened token by token; with sequence, or without lengths, once.
    """
    valid, clean, _, _ = _stats(rewards)
    valid, lengths = _weighing(valid, lengths, unit)
    known = clean[valid]
    if not known.numel() or known.min() == known.max():
        return torch.zeros_like(clean)
    return whiten(clean, valid, lengths)


def reinforce_pp_baseline(rewards: Tensor, *, lengths: Tensor | None = None, unit: str = "token") -> Tensor:
    """Group-centred rewards whitened over the step (arXiv 2501.03262); ``unit`` as in ``reinforce_pp``.

    A group without variance gets 0 even where the step's mean is not 0.
    """
    valid, _, _, centred = _stats(rewards)
    varied = (centred != 0).any(1, keepdim=True)
    valid, lengths = _weighing(valid, lengths, unit)
    return torch.where(varied, whiten(centred, valid, lengths), 0.0)


def _weighing(valid: Tensor, lengths: Tensor | None, unit: str) -> tuple[Tensor, Tensor | None]:
    """Which rewards are whitened, and by what they weigh: those of completions without tokens are not, by token."""
    if unit not in ("token", "sequence"):
        raise ValueError(f"unit must be token or sequence, found {unit!r}")
    if unit == "sequence" or lengths is None:
        return valid, None
    return valid & (lengths > 0), lengths


def batch_mean(rewards: Tensor) -> Tensor:
    """``R`` minus the mean of the step: no group, so one completion of a prompt is enough."""
    valid, clean, _, _ = _stats(rewards)
    known = clean[valid]
    if not known.numel() or known.min() == known.max():
        return torch.zeros_like(clean)
    return torch.where(valid, clean - known.mean(), 0.0)


def opo(rewards: Tensor, *, lengths: Tensor) -> Tensor:
    """``R`` minus the length-weighted mean of its group; ``lengths [N, G]`` in tokens (OPO, arXiv 2505.23585)."""
    valid, clean, _, centred = _stats(rewards)
    weight = torch.where(valid, lengths, 0).float()
    baseline = (weight * clean).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    varied = (centred != 0).any(1, keepdim=True)
    return torch.where(valid & varied, clean - baseline, 0.0)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "maxrl": maxrl,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "opo": opo,
    "grpo_passk": grpo_passk,
    "batch_mean": batch_mean,
}
