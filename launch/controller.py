"""READ THIS FIRST: the run, as two loops joined by one bounded buffer.

``_produce`` turns prompts into scored groups; ``_learn`` takes groups in admission order, trains, and publishes
weights while both loops go on. A slot of the buffer is released only after the weights of the step that used it are
loaded in every engine: that bounds staleness, and ``max_staleness = 0`` is the synchronous mode. The controller
knows no Ray; engines, rewards and learners are objects with async methods.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import numpy as np

from launch.accounts import Accounts, Part
from launch.early_stopping import EARLY_STOPPING
from launch.failures import FailureBudget
from learner.choices import bind
from rollout.buffer import RolloutBuffer
from rollout.engine import Sampling
from rollout.prompts import PromptStream
from rollout.reward_worker import penalise_truncated
from shared.config import Config
from shared.errors import GroupFailed, LearnerFailed, NothingToLearn, Stalled
from shared.ledger import TimeBook, TimeLedger
from shared.metrics import group_metrics
from shared.types import Completion, IntArray, Prompt, RolloutGroup, StepReport
from shared.weights import Publication

CANARY_TOKENS = 64


class Engines(Part, Protocol):
    """What the controller needs of ``EnginePool``."""

    async def generate(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]: ...
    async def receive(self, publication: Publication) -> dict[str, float]: ...
    async def prove(self, publication: Publication, digest: str) -> dict[str, float]: ...


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
    async def save(self, directory: str) -> str: ...


class Recorder(Protocol):
    """What the controller needs of ``RunFolder``."""

    book: TimeBook

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup]) -> None: ...
    def evaluated(self, step: int, metrics: dict[str, float]) -> None: ...
    def failed(self, failure: GroupFailed, prompt: Prompt) -> None: ...
    def best_checkpoint(self, step: int) -> str: ...
    def summary(self, summary: dict[str, Any]) -> None: ...


class Controller:
    """Runs a training run from version 0 to ``run.steps``."""

    def __init__(
        self,
        config: Config,
        train: PromptStream,
        held_out: list[Prompt],
        engines: Engines,
        rewards: Rewards,
        learners: Learners,
        recorder: Recorder,
    ) -> None:
        self._config, self._train, self._held_out = config, train, held_out
        self._engines, self._rewards, self._learners, self._recorder = engines, rewards, learners, recorder
        self.version = 0
        """Policy version: finished optimizer steps."""
        self.buffer = RolloutBuffer(
            config.groups_per_batch,
            config.rollout.max_staleness // config.updates_per_batch,
            config.algorithm.barren_limit,
            config.algorithm.max_resampled_groups,
        )
        self._stopping = bind(config.eval.early_stopping, EARLY_STOPPING, "early stopping", "eval.early_stopping")()
        self._failures = FailureBudget(config.reward, recorder.failed)
        self._replaced: list[RolloutGroup] = []
        self._canary = np.concatenate([train.peek().token_ids] * 2)[:CANARY_TOKENS]
        self._delivery: asyncio.Task[None] | None = None
        self._skipped = 0
        self._time = TimeLedger("controller")
        self._accounts = Accounts(config, recorder.book, self._time, (engines, rewards, learners))

    async def run(self) -> None:
        """Publish version 0, evaluate, train, evaluate. Any failure on either side ends both."""
        publication = await self._learners.publish(self._canary)
        digest, _ = await asyncio.gather(self._learners.send(publication), self._engines.receive(publication))
        await self._engines.prove(publication, digest)
        await self._evaluate()
        await self._accounts.begin()
        try:
            async with asyncio.TaskGroup() as tasks:
                producer = tasks.create_task(self._produce())
                await self._learn(tasks)
                producer.cancel()
        except BaseExceptionGroup as failures:
            raise _first_cause(failures) from None
        self._recorder.summary(await self._accounts.finish())
        if not self._stopping.stop:
            await self._evaluate()

    # --- prompts become scored groups ---

    async def _produce(self) -> None:
        async with asyncio.TaskGroup() as groups:
            while True:
                await self.buffer.admit()
                group_id, prompt = self._train.next()
                self.buffer.enter(group_id)
                groups.create_task(self._roll_out(group_id, prompt))

    async def _roll_out(self, group_id: int, prompt: Prompt) -> None:
        """One group: generated, scored, put in the buffer; a failed one gives its slot back, counted."""
        try:
            completions = await self._engines.generate(group_id, prompt, Sampling.training(self._config.rollout))
            scores = await self._rewards.score(group_id, prompt, completions)
        except GroupFailed as failure:
            await self.buffer.discard(group_id, failure.cause)
            self._failures.failed(failure, prompt)
            return
        self._failures.succeeded()
        algorithm = self._config.algorithm
        rewards = scores.combined(self._config.reward.functions)
        if algorithm.truncation_penalty is not None:
            rewards = penalise_truncated(rewards, completions, algorithm.truncation_penalty)
        group = RolloutGroup(group_id, prompt, completions, rewards, scores.parts, scores.extra, scores.metrics)
        signal = group.has_signal(by_part=algorithm.combine == "normalize_then_sum")
        if algorithm.zero_variance == "resample" and not signal:
            self._replaced.append(group)
            await self.buffer.replace(group_id)
        else:
            await self.buffer.put(group, signal)

    # --- scored groups become new weights ---

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        config, evaluated = self._config, 0
        while self.version < config.run.steps and not self._stopping.stop:
            try:
                async with asyncio.timeout(config.run.stall_timeout_s):
                    await self._step(tasks)
            except TimeoutError:
                raise Stalled(self._status()) from None
            every = config.eval.every_steps
            if every and self.version // every > evaluated // every and self.version < config.run.steps:
                evaluated = self.version
                await self._delivered()
                await self._evaluate()
        await self._delivered()

    async def _step(self, tasks: asyncio.TaskGroup) -> None:
        """Take, train, publish; the publication is delivered while the next step already begins."""
        self._time.enter("wait_for_groups")
        groups = await self.buffer.take()
        if not groups:  # Every group of the batch was without signal and could not be replaced.
            await self.buffer.release(self._batches_left(self.version))
            return
        replaced, self._replaced = self._replaced, []
        metrics = group_metrics(groups, self.version, replaced)
        assert metrics["staleness/max"] <= self._config.rollout.max_staleness, f"staleness bound broken: {metrics}"
        self._time.enter("train")
        report, publication = await self._learners.train_step(groups, self._canary)
        if publication is None:
            self._count_skipped(report, groups)
            await self.buffer.release(self._batches_left(self.version))
            return
        self._skipped, self.version = 0, report.policy_version
        metrics |= report.metrics | {
            "policy_version": float(self.version),
            "buffer/ready": float(self.buffer.ready),
            "buffer/in_flight": float(self.buffer.in_flight),
        }
        await self._delivered()
        self._delivery = tasks.create_task(self._deliver(publication, report.label(groups), replaced, metrics))
        if publication.collective:  # No snapshot: the weights must not change while they are sent.
            await self._delivered()

    async def _deliver(
        self,
        publication: Publication,
        groups: list[RolloutGroup],
        replaced: list[RolloutGroup],
        metrics: dict[str, float],
    ) -> None:
        """Bring the engines to the publication, release the step's slots, prove the engines, record the step."""
        digest, sync = await asyncio.gather(self._learners.send(publication), self._engines.receive(publication))
        await self.buffer.release(self._batches_left(publication.version))
        sync |= await self._engines.prove(publication, digest)
        metrics |= sync | self._accounts.step(groups, replaced, metrics.get("train_tokens", 0.0))
        metrics |= {"sync/export_seconds": publication.seconds, "sync/bytes": float(publication.nbytes)}
        metrics |= {f"reward_pool/{name}": value for name, value in self._rewards.metrics().items()}
        metrics |= {f"groups/{fate}": float(n) for fate, n in self.buffer.fates.items()}
        self._rewards.state = {
            "global_step": publication.version,
            "max_steps": self._config.run.steps,
            "epoch": self._train.epoch,
            "log_history": [{"step": publication.version, "reward": metrics["reward"]}],
        }
        self._recorder.step(publication.version, metrics, groups)

    async def _delivered(self) -> None:
        """Wait until the previous publication, if any, has reached every engine."""
        if self._delivery is not None:
            self._time.enter("wait_for_delivery")
            # A stall that cancels this wait must find the delivery alive, to say that it is what hangs.
            await asyncio.shield(self._delivery)

    def _batches_left(self, version: int) -> int:
        """Batches still to be trained after policy ``version``."""
        return -(-(self._config.run.steps - version) // self._config.updates_per_batch)

    def _count_skipped(self, report: StepReport, groups: list[RolloutGroup]) -> None:
        """A step without any training signal is normal; non-finite gradients, or masks without a token, in a row are not."""
        if report.metrics.get("groups/trained") == 0.0:
            return
        self._skipped += 1
        if self._skipped >= self._config.learner.max_skipped_steps:
            ids = ", ".join(str(group.group_id) for group in groups)
            reason = "had a non-finite loss or gradient"
            if not report.metrics.get("trainable_tokens", 1.0):
                reason = "had not one trainable token (algorithm.mask_truncated?)"
            raise LearnerFailed(
                f"{self._skipped} steps in a row {reason} at policy version {self.version} "
                f"(learner.max_skipped_steps); last groups: {ids}; lower learner.lr or check the rewards"
            )

    # --- held-out prompts become a score ---

    async def _evaluate(self) -> None:
        """Greedy completions of the held-out prompts, scored by the run's own reward functions."""
        if not self._held_out:
            return
        limit = self._config.eval.max_new_tokens or self._config.rollout.max_new_tokens
        sampling = Sampling(1, limit, 0.0, stop=tuple(self._config.rollout.stop))

        async def one(index: int, prompt: Prompt) -> Any:
            try:
                completions = await self._engines.generate(-1 - index, prompt, sampling)
                return await self._rewards.score(-1 - index, prompt, completions)
            except GroupFailed as failure:
                self._failures.failed(failure, prompt)
                return None

        with self._time.during("evaluate"):
            answers = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(self._held_out)))
        scores = [score for score in answers if score is not None]
        if not scores:
            raise NothingToLearn(f"not one of {len(answers)} held-out prompts could be generated and scored")
        parts = {name: np.concatenate([s.parts[name] for s in scores]) for name in scores[0].parts}
        combined = np.concatenate([s.combined(self._config.reward.functions) for s in scores])
        metrics = {f"eval/rewards/{name}/mean": float(np.nanmean(values)) for name, values in parts.items()}
        if len(scores) < len(answers):
            metrics["eval/failed"] = float(len(answers) - len(scores))
        metrics["eval/reward"] = float(np.nanmean(combined))
        if self._stopping.observe(metrics, self.version):
            await self._learners.save(self._recorder.best_checkpoint(self.version))
        self._recorder.evaluated(self.version, metrics)

    def _status(self) -> str:
        """Who waits for whom, for the log of a run that stands still."""
        waiting = self.buffer.in_flight - self.buffer.ready
        delivering = self._delivery is not None and not self._delivery.done()
        return (
            f"no step finished within run.stall_timeout_s = {self._config.run.stall_timeout_s:g} s: policy version {self.version}, "
            f"{self.buffer.ready} scored groups wait for the learner, {waiting} groups are generated, scored or trained, "
            f"a publication is {'still on its way to an engine' if delivering else 'not under way'}"
        )


def _first_cause(failures: BaseException) -> BaseException:
    """The first failure inside nested groups: it tells the story, the rest are its echoes."""
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures
