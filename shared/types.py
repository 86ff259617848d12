"""The data contract between rollout and learner: what a prompt, a completion and a scored group are.

Dimensions: ``P`` prompt tokens, ``C`` completion tokens, ``G`` completions per prompt, ``N`` groups per optimizer
step, ``F`` reward functions. Arrays are numpy, so that Ray moves them without a copy and reward workers need no
torch. Alignment: ``x[t]`` always belongs to ``token_ids[t]``. A log-prob is named after whoever produced it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.ledger import TimeSlice

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row of the dataset, tokenised."""

    prompt_id: int
    """Row number in the dataset, from 0."""
    token_ids: IntArray
    """``[P] int32``, chat template applied."""
    text: str | list[dict[str, Any]]
    """The prompt as the reward functions see it: a string, or a list of messages."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other dataset column of the row, for the reward functions."""
    source: str = ""
    """Name of the source that the row is from."""


class VersionSpan(NamedTuple):
    """Tokens ``[start, end)`` of a completion were sampled under policy ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, eq=False, slots=True)
class Completion:
    """One sampled answer."""

    token_ids: IntArray
    """``[C] int32``; the end token is included when it was sampled."""
    logprobs: FloatArray
    """``[C] float32``: rollout log-probs at the sampling temperature, under the weights that sampled each token."""
    text: str
    """Decoded without special tokens."""
    finish_reason: str
    """``stop`` (end token or stop string) or ``length`` (hit ``max_new_tokens``)."""
    version_spans: tuple[VersionSpan, ...] = ()
    messages: list[dict[str, Any]] | None = None
    """The answer as messages, where it is more than one assistant's text (stored rows)."""

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that produced a token; None for an empty completion."""
        return min((span.version for span in self.version_spans), default=None)


@dataclass(frozen=True, eq=False)
class RolloutGroup:
    """G completions of one prompt with their rewards: the unit of admission, scoring, staleness and training."""

    group_id: int
    """Admission order, from 0."""
    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: FloatArray
    """``[G] float32``: the combined reward; NaN where no reward function applied."""
    reward_parts: dict[str, FloatArray] = field(default_factory=dict)
    """Per reward function ``[G] float32``, unweighted; NaN where it did not apply."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns that reward functions logged with ``log_extra``, each of length G."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars that reward functions logged with ``log_metric``."""
    advantages: FloatArray | None = None
    """``[G] float32``, known after training; None for a group that was left out."""

    def staleness(self, policy_version: int) -> int:
        """Optimizer steps between the oldest token of the group and ``policy_version``."""
        versions = [v for c in self.completions if (v := c.oldest_version) is not None]
        return policy_version - min(versions) if versions else 0

    def has_signal(self, by_part: bool = False) -> bool:
        """True if at least two completions have rewards that differ (tested exactly, before any arithmetic).

        ``by_part`` looks at each reward function instead of their sum.
        """
        return any(_varies(values) for values in (self.reward_parts.values() if by_part else [self.rewards]))


def _varies(values: FloatArray) -> bool:
    valid = values[~np.isnan(values)]
    return bool(valid.size > 1 and valid.max() != valid.min())


@dataclass(frozen=True)
class StepReport:
    """What one call of the learner did."""

    policy_version: int
    """Finished optimizer steps after the call."""
    applied: bool
    """False if the optimizer step was skipped (nothing to train, or a non-finite gradient)."""
    metrics: dict[str, float] = field(default_factory=dict)
    advantages: dict[int, list[float]] = field(default_factory=dict)
    """By group id, of the groups that trained."""
    times: TimeSlice | None = None
    """What the rank did since its last report."""

    def label(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """``groups`` with the advantages that they trained on."""
        return [
            replace(group, advantages=np.array(self.advantages[group.group_id], dtype=np.float32))
            if group.group_id in self.advantages
            else group
            for group in groups
        ]
