"""Named scalars: what a step's groups add up to, and the file they go to.

``metrics.jsonl`` is the truth, one object a step; every plot, sink and test reads it. Names follow TRL where TRL
has one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from shared.errors import InputError
from shared.types import RolloutGroup

Row = dict[str, Any]

OWN = frozenset(
    [
        "step",
        "logged",
        "advantages",
        "buffer",
        "checkpoint",
        "clip_ratio",
        "completions",
        "engines",
        "entropy",
        "entropy_coef",
        "entropy_kept_frac",
        "eval",
        "frac_reward_zero_std",
        "goodput",
        "grad_norm",
        "groups",
        "importance_sampling",
        "kl",
        "kl_coef",
        "kl_control_skipped",
        "learning_rate",
        "loss",
        "micro_batches",
        "num_tokens",
        "off_policy",
        "policy_loss",
        "policy_version",
        "rejection",
        "reward",
        "reward_group_std",
        "reward_kl",
        "reward_kl_per_token",
        "reward_pool",
        "reward_std",
        "rewards",
        "rollout_logprobs_not_finite",
        "samples",
        "source",
        "staleness",
        "sync",
        "throughput",
        "time",
        "train_tokens",
        "trainable_tokens",
        "truncated_sampling",
        "updates",
    ]
)
"""First parts, up to a ``/``, of the names that a run writes: a reward function that logs such a name gets ``logged/`` before it."""


def group_metrics(
    groups: Sequence[RolloutGroup], policy_version: int, replaced: Sequence[RolloutGroup] = ()
) -> dict[str, float]:
    """Rewards, lengths and staleness of ``groups``, used at ``policy_version``; ``replaced`` were generated beside them.

    Groups without variance are counted before the replaced ones are gone: they say how hard the prompts are.
    """
    rewards = np.stack([group.rewards for group in groups])
    completions = [c for group in groups for c in group.completions]
    lengths = np.array([len(c.token_ids) for c in completions], dtype=np.float64)
    ended = np.array([c.finish_reason == "stop" for c in completions])
    staleness = np.array([group.staleness(policy_version) for group in groups], dtype=np.float64)
    flat = rewards[~np.isnan(rewards)]
    metrics = {
        "reward": _mean(flat),
        "reward_std": float(flat.std(ddof=1)) if flat.size > 1 else 0.0,
        "reward_group_std": _mean(np.array([_std(row) for row in rewards])),
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1.0 - float(ended.mean()),
        "staleness/mean": _mean(staleness),
        "staleness/max": float(staleness.max()),
    }
    seen = [group for group in [*groups, *replaced] if not np.isnan(group.rewards).all()]
    flat_ones = [float(np.nanmax(group.rewards)) for group in seen if not group.has_signal()]
    best = max((float(np.nanmax(group.rewards)) for group in seen), default=math.nan)
    worst = min((float(np.nanmin(group.rewards)) for group in seen), default=math.nan)
    metrics["frac_reward_zero_std"] = len(flat_ones) / max(len(seen), 1)
    metrics["frac_reward_zero_std/all_best"] = sum(value == best for value in flat_ones) / max(len(seen), 1)
    metrics["frac_reward_zero_std/all_worst"] = sum(value == worst for value in flat_ones) / max(len(seen), 1)
    if ended.any():
        metrics["completions/mean_terminated_length"] = _mean(lengths[ended])
        metrics["completions/min_terminated_length"] = float(lengths[ended].min())
        metrics["completions/max_terminated_length"] = float(lengths[ended].max())
    for name in dict.fromkeys(name for group in groups for name in group.metrics):
        metrics.setdefault(name, _mean(np.array([g.metrics[name] for g in groups if name in g.metrics])))
    nones = np.array([[np.isnan(values).mean() for values in group.reward_parts.values()] for group in groups])
    metrics["reward/partly_applicable_groups"] = (
        float(((nones > 0) & (nones < 1)).any(axis=1).sum()) if nones.size else 0.0
    )
    for name in groups[0].reward_parts:
        values = np.concatenate([group.reward_parts[name] for group in groups])
        given = values[~np.isnan(values)]
        metrics[f"rewards/{name}/mean"] = _mean(given)
        metrics[f"rewards/{name}/std"] = float(given.std(ddof=1)) if given.size > 1 else 0.0
        metrics[f"rewards/{name}/none_frac"] = 1.0 - given.size / values.size
    sources = sorted({group.prompt.source for group in groups})
    for source in sources if len(sources) > 1 else ():
        own = np.concatenate([group.rewards for group in groups if group.prompt.source == source])
        metrics[f"source/{source}/reward"] = _mean(own[~np.isnan(own)])
    return metrics


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _std(row: np.ndarray) -> float:
    given = row[~np.isnan(row)]
    return float(given.std(ddof=1)) if given.size > 1 else 0.0


class MetricsWriter:
    """Appends one JSON object a step to ``metrics.jsonl``, flushed; NaN and infinity become null."""

    def __init__(self, directory: Path) -> None:
        self._file: TextIO = (directory / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` under ``step``."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(directory: Path) -> list[Row]:
    """All objects of a run folder's ``metrics.jsonl``. Raises ``InputError`` E606 for a line that is none."""
    return [row for _, row in read_lines(directory / "metrics.jsonl") if row is not None]


def read_lines(path: Path) -> list[tuple[str, Row | None]]:
    """The lines of a file of JSON objects that have a ``step``, each with its object. Raises ``InputError`` E606 for others.

    An empty line has none, and a last line that a running or killed run has written in part.
    """
    lines: list[tuple[str, Row | None]] = []
    for number, data in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        line = data.decode("utf-8", "replace")
        row = _row(data)
        if row is None and data.endswith(b"\n") and data.strip():
            found, fix = repr(line.strip()[:40]), "remove that line"
            raise InputError("E606", "damaged record", f"{path}:{number}", found, "an object with a step", fix)
        lines.append((line, row))
    return lines


def _row(data: bytes) -> Row | None:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
