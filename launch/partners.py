"""What the controller needs of its partners: engines, rewards, learner ranks and the run folder, as protocols.

The real ones are ``EnginePool``, ``RewardPool``, ``LearnerGroup`` and ``RunFolder``; tests give fakes.
"""

from __future__ import annotations

from asyncio import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from launch.accounts import Part
from launch.room import Room
from rollout.engine import Sampling
from shared.errors import GroupFailed
from shared.ledger import TimeBook
from shared.sample_ledger import SampleLedger
from shared.types import Completion, IntArray, Prompt, RolloutGroup, StepReport
from shared.weights import Publication


class Engines(Part, Protocol):
    """What the controller needs of ``EnginePool``."""

    @property
    def size(self) -> int: ...
    async def generate(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]: ...
    def check(self) -> None: ...
    async def receive(self, publication: Publication) -> dict[str, float]: ...
    async def prove(self, publication: Publication, digest: str) -> dict[str, float]: ...
    def metrics(self) -> dict[str, float]: ...


class Rewards(Part, Protocol):
    """What the controller needs of ``RewardPool``."""

    state: dict[str, Any]

    async def score(self, group_id: int, prompt: Prompt, completions: tuple[Completion, ...]) -> Any: ...
    def metrics(self) -> dict[str, float]: ...


class Learners(Part, Protocol):
    """What the controller needs of ``LearnerGroup``."""

    async def train_step(
        self, groups: list[RolloutGroup], canary: IntArray
    ) -> tuple[StepReport, Publication | None]: ...
    async def publish(self, canary: IntArray) -> Publication: ...
    async def send(self, publication: Publication) -> str: ...
    async def save(self, directory: str) -> None: ...


class Training(NamedTuple):
    """A step that the learner has not answered yet."""

    groups: list[RolloutGroup]
    metrics: dict[str, float]
    call: Future[tuple[StepReport, Publication | None]]


class Done(NamedTuple):
    """A finished step on its way into the record."""

    version: int
    groups: list[RolloutGroup]
    metrics: dict[str, float]


class Recorder(Protocol):
    """What the controller needs of ``RunFolder``."""

    book: TimeBook
    samples: SampleLedger
    room: Room | None

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup], digest: str) -> None: ...
    def evaluated(self, step: int, metrics: dict[str, float], story: str) -> None: ...
    def failed(self, failure: GroupFailed, prompt: Prompt) -> None: ...
    def refused(self, step: int, groups: list[RolloutGroup]) -> Path: ...
    def draft(self, step: int) -> Path: ...
    def unsaved(self, step: int, error: OSError) -> None: ...
    def cut_short(self) -> None: ...
    async def commit(self, draft: Path, state: dict[str, Any], queued: list[RolloutGroup]) -> bool: ...
    def summary(self, summary: dict[str, Any]) -> None: ...
