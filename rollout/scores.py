"""What reward functions made of a group of completions, and the rewards that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.reward_loading import reward_name
from shared.config_reward import RewardFunction
from shared.ledger import TimeSlice
from shared.types import Completion, FloatArray


@dataclass
class Scores:
    """What the reward functions made of one group of G completions."""

    parts: dict[str, FloatArray]
    """``[G] float32`` per function; NaN where it returned None."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns given to ``log_extra``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars given to ``log_metric``, averaged over the call."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time inside each function, of the whole call."""
    warnings: list[str] = field(default_factory=list)
    times: TimeSlice | None = None
    """What the worker did since its last answer; in the first group of a call."""

    def combined(self, functions: Sequence[RewardFunction]) -> FloatArray:
        """``[G] float32``: weighted sum over the functions that applied; NaN where none did."""
        stacked = np.stack([self.parts[reward_name(f)] for f in functions])
        weights = np.array([f.weight for f in functions], dtype=np.float32)[:, None]
        total = np.nansum(stacked * weights, axis=0)
        return np.where(np.isnan(stacked).all(axis=0), np.nan, total).astype(np.float32)


def penalise_truncated(rewards: FloatArray, completions: Sequence[Completion], penalty: float) -> FloatArray:
    """``rewards [G]`` where completions that hit the limit get ``penalty`` times theirs, or ``penalty`` if negative."""
    cut = np.array([completion.finish_reason == "length" for completion in completions])
    changed = rewards * penalty if penalty >= 0 else np.where(np.isnan(rewards), rewards, penalty)
    return np.where(cut, changed, rewards).astype(np.float32)
