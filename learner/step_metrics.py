"""How a learner step's numbers add up: over micro-batches, over ranks, over the updates on one batch.

``x_sum`` is a sum over tokens and becomes the token mean ``x``; ``_max`` and ``_min`` are extremes; the rest is
summed over micro-batches and ranks, and averaged over updates.
"""

from __future__ import annotations

import torch

from learner.distributed import learner_device


def reduce_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Sums over one rank's micro-batches become sums over all ranks; ``_max`` and ``_min`` are extremes."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return dict(sums)
    found = dict(sums)
    for suffix, op in (("_max", "MAX"), ("_min", "MIN"), ("", "SUM")):
        names = [n for n in sums if (n.endswith(suffix) if suffix else not n.endswith(("_max", "_min")))]
        values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=learner_device())
        torch.distributed.all_reduce(values, getattr(torch.distributed.ReduceOp, op))
        found |= dict(zip(names, values.tolist(), strict=True))
    return found


def token_means(sums: dict[str, float]) -> dict[str, float]:
    """``x_sum`` over tokens becomes the token mean ``x``; the rest stays."""
    tokens = max(sums.pop("tokens"), 1.0)
    metrics = {n.removesuffix("_sum"): v / tokens if n.endswith("_sum") else v for n, v in sums.items()}
    for kind in ("importance_sampling", "off_policy"):
        # Kong's effective sample size over the number of tokens: how much of a batch stale weights leave.
        if square := metrics.pop(f"{kind}/square", 0.0):
            metrics[f"{kind}/ess"] = metrics[f"{kind}/mean"] ** 2 / square
    return metrics


def over_updates(reports: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every metric over a batch's updates; of extremes the extreme."""
    merged: dict[str, float] = {}
    for name in reports[0]:
        values = [report[name] for report in reports]
        merged[name] = (
            max(values)
            if name.endswith("_max")
            else min(values)
            if name.endswith("_min")
            else sum(values) / len(values)
        )
    return merged
