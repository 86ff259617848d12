"""Early stopping: what the evaluations so far say about going on, and which of them was the best.

The controller calls ``observe`` after every evaluation. The fields are all the state there is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from shared.errors import InputError, nearest


class NoStopping:
    """Runs to the last step."""

    best_version = -1
    stop = False

    def story(self) -> str:
        """Nothing to tell."""
        return ""

    def observe(self, metrics: dict[str, float], version: int) -> bool:
        """Never an improvement worth a checkpoint."""
        return False

    def restore(self, state: dict[str, Any], version: int) -> None:
        """Nothing to remember."""


class Patience:
    """Stops after ``patience`` evaluations in a row that did not beat the best by more than ``min_delta``.

    ``mode`` is max or min; nothing stops before policy version ``min_steps``; a NaN never improves.
    """

    def __init__(
        self,
        *,
        metric: str = "eval/reward",
        mode: str = "max",
        patience: int = 3,
        min_delta: float = 0.0,
        min_steps: int = 0,
    ) -> None:
        self._metric, self._sign = metric, 1.0 if mode == "max" else -1.0
        self._patience, self._min_delta, self._min_steps = patience, min_delta, min_steps
        self.best, self.best_version, self.without = math.nan, -1, 0
        self.stop = False

    def observe(self, metrics: dict[str, float], version: int) -> bool:
        """Take an evaluation in; True if it is the best so far. Raises ``InputError`` E107 for an unknown metric."""
        if self._metric not in metrics:
            guess = nearest(self._metric, metrics)
            place, expected = "eval.early_stopping.metric", f"one of {', '.join(metrics)}"
            raise InputError("E107", "unknown metric", place, self._metric, expected, f'"{guess or "eval/reward"}"')
        value = metrics[self._metric]
        improved = not math.isnan(value) and (
            math.isnan(self.best) or self._sign * (value - self.best) > self._min_delta
        )
        if improved:
            self.best, self.best_version, self.without = value, version, 0
        else:
            self.without += 1
        self._decide(version)
        return improved

    def story(self) -> str:
        """Where it stands, for people; empty before the first evaluation."""
        if self.best_version < 0:
            return ""
        best = f"best {self._metric.removeprefix('eval/')} {self.best:.4g} at version {self.best_version}"
        left = self._patience - self.without
        if self._patience == sys.maxsize:
            return best
        return f"{best}; stops now" if self.stop else f"{best}; stops after {max(left, 1)} more without a better one"

    def restore(self, state: dict[str, Any], version: int) -> None:
        """Remember the evaluations before a checkpoint, and decide by the settings of today."""
        vars(self).update(state)
        self._decide(version)

    def _decide(self, version: int) -> None:
        self.stop = self.without >= self._patience and version >= self._min_steps


def keep_best(*, metric: str = "eval/reward", mode: str = "max", min_delta: float = 0.0) -> Patience:
    """Never stops, but knows the best evaluation, whose checkpoint is kept."""
    return Patience(metric=metric, mode=mode, min_delta=min_delta, patience=sys.maxsize)


EARLY_STOPPING: dict[str, Callable[..., Any]] = {"none": NoStopping, "best": keep_best, "patience": Patience}
