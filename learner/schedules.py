"""Schedules: pure functions of the policy version, so that resuming needs no schedule state.

``s`` is the policy version before the step, ``total`` the planned number of steps; the result multiplies the base
value. Warm-up gives ``(s + 1) / warmup_steps``, so the first step is not a no-op; ``warmup_from_zero`` makes it one.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _progress(s: int, total: int, warmup_steps: int) -> float:
    return min(max((s - warmup_steps) / max(total - warmup_steps, 1), 0.0), 1.0)


def _warm(s: int, warmup_steps: int, from_zero: bool) -> float | None:
    if s >= warmup_steps:
        return None
    return (s if from_zero else s + 1) / warmup_steps


def constant(s: int, total: int, *, warmup_steps: int = 0, warmup_from_zero: bool = False) -> float:
    """1 after the warm-up."""
    warm = _warm(s, warmup_steps, warmup_from_zero)
    return 1.0 if warm is None else warm


def linear(
    s: int, total: int, *, warmup_steps: int = 0, final_fraction: float = 0.0, warmup_from_zero: bool = False
) -> float:
    """From 1 to ``final_fraction`` on a straight line."""
    warm = _warm(s, warmup_steps, warmup_from_zero)
    return 1.0 - (1.0 - final_fraction) * _progress(s, total, warmup_steps) if warm is None else warm


def cosine(
    s: int, total: int, *, warmup_steps: int = 0, final_fraction: float = 0.0, warmup_from_zero: bool = False
) -> float:
    """From 1 to ``final_fraction`` on half a cosine (arXiv 1608.03983)."""
    warm = _warm(s, warmup_steps, warmup_from_zero)
    falling = 0.5 * (1.0 + math.cos(math.pi * _progress(s, total, warmup_steps)))
    return final_fraction + (1.0 - final_fraction) * falling if warm is None else warm


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "linear": linear, "cosine": cosine}
