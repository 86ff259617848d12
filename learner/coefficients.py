"""Coefficients that a run steers by what it measures: of the KL term and of the entropy bonus.

The learner reads ``value`` before a step and calls ``observe`` after it, with the same numbers on every rank. The fields
named in ``MOVING`` are all the state there is; a checkpoint holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar


class FixedKl:
    """The coefficient stays what the configuration and its schedule make it."""

    MOVING = ()
    skipped = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def observe(self, sequence_kl: float, token_kl: float, sequences: int) -> None:
        """Nothing to learn."""


class AdaptiveKl:
    """Raises the coefficient while the KL is above ``target``, lowers it below (arXiv 1909.08593, eq. 2).

    ``horizon`` is in sequences; ``unit`` says whether the target is nats per sequence or per token.
    """

    MOVING = ("value", "skipped")

    def __init__(self, value: float, *, target: float, horizon: float = 10000.0, unit: str = "sequence") -> None:
        self.value, self._target, self._horizon, self._unit = value, target, horizon, unit
        self.skipped = 0
        """Steps whose KL was not finite and changed nothing."""

    def observe(self, sequence_kl: float, token_kl: float, sequences: int) -> None:
        """One step of ``sequences`` sequences had these mean KLs, in nats."""
        kl = sequence_kl if self._unit == "sequence" else token_kl
        if not math.isfinite(kl):
            self.skipped += 1
            return
        error = min(max(kl / self._target - 1, -0.2), 0.2)
        self.value *= 1 + error * sequences / self._horizon


KL_CONTROLS: dict[str, Callable[..., Any]] = {"fixed": FixedKl, "adaptive": AdaptiveKl}


@dataclass(kw_only=True)
class NoBonus:
    """No entropy term in the loss."""

    MOVING: ClassVar[tuple[str, ...]] = ()
    value: float = field(default=0.0, init=False)

    def observe(self, entropy: float) -> None:
        """Nothing to learn."""


@dataclass(kw_only=True)
class Bonus:
    """A fixed weight of the mean entropy, taken off the loss."""

    MOVING: ClassVar[tuple[str, ...]] = ()
    coef: float

    @property
    def value(self) -> float:
        """The coefficient of the next step."""
        return self.coef

    def observe(self, entropy: float) -> None:
        """Nothing to learn."""


@dataclass(kw_only=True)
class AdaptiveBonus:
    """Holds the entropy near ``target`` nats: the coefficient moves by ``delta`` a step, and acts below the target alone."""

    MOVING: ClassVar[tuple[str, ...]] = ("coef", "last_entropy")
    target: float = 0.2
    delta: float = 0.005
    lowest: float = 0.0
    highest: float = 1.0
    coef: float = field(default=0.0, init=False)
    last_entropy: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        self.coef = self.lowest

    @property
    def value(self) -> float:
        """The coefficient of the next step."""
        return self.coef if self.last_entropy <= self.target else 0.0

    def observe(self, entropy: float) -> None:
        """The mean entropy of a step, in nats over all its tokens."""
        if not math.isfinite(entropy):
            return
        self.last_entropy = entropy
        step = self.delta if entropy <= self.target else -self.delta
        self.coef = min(max(self.coef + step, self.lowest), self.highest)


ENTROPY_BONUSES: dict[str, Callable[..., Any]] = {"none": NoBonus, "bonus": Bonus, "adaptive": AdaptiveBonus}
