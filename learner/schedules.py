"""Schedules: pure functions of the policy version, so that resuming needs no schedule state.

``s`` is the policy version before the step, ``total`` the planned number of steps; the result multiplies the base
value. Warm-up gives ``(s + 1) / warmup_steps``, so the first step is not a no-op.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _progress(s: int, total: int, warmup_steps: int) -> float:
    return min(max((s - warmup_steps) / max(total - warmup_steps, 1), 0.0), 1.0)


def constant(s: int, total: int, *, warmup_steps: int = 0) -> float:
    """1 after the warm-up."""
    return (s + 1) / warmup_steps if s < warmup_steps else 1.0


def linear(s: int, total: int, *, warmup_steps: int = 0, final_fraction: float = 0.0) -> float:
    """From 1 to ``final_fraction`` on a straight line."""
    if s < warmup_steps:
        return (s + 1) / warmup_steps
    return 1.0 - (1.0 - final_fraction) * _progress(s, total, warmup_steps)


def cosine(s: int, total: int, *, warmup_steps: int = 0, final_fraction: float = 0.0) -> float:
    """From 1 to ``final_fraction`` on half a cosine (arXiv 1608.03983)."""
    if s < warmup_steps:
        return (s + 1) / warmup_steps
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * _progress(s, total, warmup_steps)))


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "linear": linear, "cosine": cosine}
