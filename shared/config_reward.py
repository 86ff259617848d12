"""The settings of reward functions and their pool; part of ``shared/config.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from shared.config_algorithm import NonNegative, Positive, Section, Share


class RewardFunction(Section):
    """One reward function."""

    function: str | None = None
    """Built-in name, package.module:function, or path/to/file.py:function (relative to the configuration file)."""
    model: str | None = None
    """Instead of a function: a Hugging Face sequence-classification model with one label."""
    url: str | list[str] | None = None
    """Instead of a function: a reward service, or its replicas; https, or http to this machine."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """Number of GPUs, or share of one, that a model or function has in each reward worker; with 0 it sees none."""
    weight: float = 1.0
    """Factor in the combined reward; may be negative."""
    name: str | None = None
    """Metric name; default: the function's own name."""
    args: dict[str, Any] = {}
    """Constructor arguments of a class or factory, keyword arguments bound to a function, or options of model or url."""
    factory: bool = False
    """The function returns the reward function, when called once with args."""
    isolation: Literal["actor", "subprocess", "sandbox"] | None = None
    """Where it runs; default: a subprocess for your own code, the pool's actor for what is built in."""
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Longest time of one call; default: reward.timeout_s. Of one test of ``code_tests``; default: 5."""
    cpu_s: Positive | None = None
    """Isolated: CPU seconds of one call, or of one test of ``code_tests``; default: 2 in the sandbox, else the time limit."""
    memory_mb: Positive | None = None
    """Isolated: address space in MB; default: 512 in the sandbox, else 8192."""
    nan_is_none: bool = False
    """Read a returned NaN as "not applicable" instead of refusing it."""
    objective: dict[str, Any] | None = None
    """For the doctor: {kind = "target_length", value = 200}, longer, shorter, or match."""
    accept: list[str] = []
    """Findings of the doctor that are meant to be."""


class Reward(Section):
    """The reward functions and their pool."""

    functions: list[RewardFunction] = Field(min_length=1)
    """One table per reward function; the combined reward is their weighted sum."""
    workers: Positive = 1
    """Reward worker processes."""
    groups_per_call: Positive = 1
    """Most waiting groups that one call may score together."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Longest time one call may take; then its worker is killed and replaced."""
    retries: NonNegative = 2
    """Further tries for a failed call before its group is dropped."""
    max_failed_groups: NonNegative = 100
    """Dropped groups that end the run."""
    max_failed_share: Share = 0.1
    """Share of the last 200 groups that, when dropped, ends the run."""
