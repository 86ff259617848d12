"""READ THIS FIRST: the run, as two loops joined by one bounded buffer.

``_produce`` turns prompts into scored groups; ``_learn`` takes groups in admission order, trains, and publishes
weights while both loops go on. A slot of the buffer is released only after the weights of the step that used it are
loaded in every engine: that bounds staleness, and ``max_staleness = 0`` is the synchronous mode. It knows no Ray.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from launch.accounts import Accounts, trainer_state
from launch.delivery import Delivery
from launch.early_stopping import EARLY_STOPPING
from launch.failures import FailureBudget, RefusedSteps, stalled
from launch.held_out import Judges, evaluate
from launch.keeper import Keeper, rescuing
from launch.partners import Done, Engines, Learners, Recorder, Rewards, Training
from rollout.buffer import RolloutBuffer
from rollout.engine import Sampling
from rollout.prompts import PromptStream
from rollout.scores import penalise_truncated
from shared import faults
from shared.choices import bind
from shared.config import Config
from shared.errors import GroupFailed, LearnerFailed, Stalled, first_cause
from shared.ledger import TimeLedger
from shared.metrics import group_metrics
from shared.types import Prompt, RolloutGroup, StepReport
from shared.weights import Publication

CANARY_TOKENS = 64


class Controller:
    """Runs a training run from version 0, or from a checkpoint, to ``run.steps``."""

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
        rewards.state = trainer_state(config, 0, 0.0, [])
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
        self._refusals = RefusedSteps(config.learner.max_skipped_steps, recorder.refused)
        self._replaced: list[RolloutGroup] = []
        self._canary = np.concatenate([train.at(0).token_ids] * 2)[:CANARY_TOKENS]
        self._delivery: asyncio.Task[None] | None = None
        self._way = Delivery(learners, engines)
        self._evaluated, self._samples = -1, recorder.samples
        self._training: Training | None = None
        self._unrecorded: list[Done] = []
        self._again: list[int] = []
        self._time = TimeLedger("controller")
        self._keeper = Keeper(learners, recorder, self._time)
        self._accounts = Accounts(config, recorder.book, self._time, (engines, rewards, learners), recorder.room)

    async def run(self) -> None:
        """Publish the weights, evaluate, train, evaluate, save. Any failure on either side ends both."""
        publication = await self._learners.publish(self._canary)
        await self._engines.prove(publication, (await self._way.bring(publication))[0])
        self.buffer.limit(self._config.batches_left(self.version))
        if self._evaluated < 0 or self._due(self._config.eval.every_steps, self._evaluated):
            await self._evaluate()
        await self._accounts.begin()
        try:
            async with asyncio.TaskGroup() as tasks:
                producer = tasks.create_task(self._produce())
                await self._learn(tasks)
                producer.cancel()
            self._recorder.summary(await self._accounts.finish())
            if self._evaluated < self.version and not self._stopping.stop:
                await self._evaluate()
            await self._keeper.save_for_good(self._state(), self.buffer.queued())
        except (Exception, asyncio.CancelledError) as failure:
            cause = first_cause(failure)
            await self._rescue(cause)
            raise cause from None
        finally:
            if self._training:
                self._training.call.cancel()

    # --- prompts become scored groups ---

    async def _produce(self) -> None:
        async with asyncio.TaskGroup() as groups:
            for group_id in self.buffer.unfinished:  # Of the run that this one continues.
                groups.create_task(self._roll_out(group_id, self._train.at(group_id)))
            while True:
                await self.buffer.admit()
                group_id, prompt = self._next()
                self.buffer.enter(group_id)
                groups.create_task(self._roll_out(group_id, prompt))

    def _next(self) -> tuple[int, Prompt]:
        """First the groups that another configuration had begun, then fresh ones."""
        if self._again:
            group_id = self._again.pop(0)
            return group_id, self._train.at(group_id)
        self._samples.admit(self._train.cursor)
        return self._train.next()

    async def _roll_out(self, group_id: int, prompt: Prompt) -> None:
        """One group: generated, scored, put in the buffer; a failed one gives its slot back, counted."""
        try:
            completions = await self._engines.generate(group_id, prompt, Sampling.training(self._config, group_id))
            self._samples.sampled(group_id, len(completions), sum(len(c.token_ids) for c in completions))
            scores = await self._rewards.score(group_id, prompt, completions)
        except GroupFailed as failure:
            self._accounts.wasted(prompt, *self._samples.close(group_id, "failed", failure.cause))
            await self.buffer.discard(group_id)
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
            self._accounts.wasted(prompt, *self._samples.close(group_id, "filtered", "no_signal"))
            await self.buffer.replace(group_id)
        else:
            await self.buffer.put(group, signal)

    # --- scored groups become new weights ---

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        config, saved = self._config, self.version
        while self.version < config.run.steps and not self._stopping.stop:
            before = self.version
            try:
                async with asyncio.timeout(config.run.stall_timeout_s):
                    await self._step(tasks)
            except TimeoutError:
                raise stalled(self._config, self.version, self.buffer, self._delivery) from None
            if self._due(config.eval.every_steps, before):
                await self._delivered()
                await self._evaluate()
            if self._due(config.run.checkpoint_every, saved):
                saved = self.version
                await self._delivered()
                await self._checkpoint()
        await self._delivered()

    def _due(self, every: int, since: int) -> bool:
        """True if a multiple of ``every`` steps lies after version ``since``, and more steps are to come."""
        return every > 0 and self.version // every > since // every and self.version < self._config.run.steps

    async def _step(self, tasks: asyncio.TaskGroup) -> None:
        """Take, train, publish; the publication is delivered while the next step already begins."""
        self._time.enter("wait_for_groups")
        groups = await self.buffer.take()
        if not groups:  # Every group of the batch was without signal and could not be replaced.
            await self.buffer.release(self._config.batches_left(self.version))
            return
        metrics, self._replaced = group_metrics(groups, self.version, self._replaced), []
        assert metrics["staleness/max"] <= self._config.rollout.max_staleness, f"staleness bound broken: {metrics}"
        self._time.enter("train")
        call = asyncio.ensure_future(self._learners.train_step(groups, self._canary))
        self._training = Training(groups, metrics, call)
        report, publication = await asyncio.shield(call)
        done = self._applied(self._training, report)
        if publication is None:
            await self.buffer.release(self._config.batches_left(self.version))
            return
        await self._delivered()
        self._delivery = tasks.create_task(self._deliver(publication, done))
        if publication.collective:  # No snapshot: the weights must not change while they are sent.
            await self._delivered()

    def _applied(self, step: Training, report: StepReport) -> Done:
        """The learner has answered: every group of the step meets its fate, trained or why not."""
        self._training = None
        refused = self._refusals.observe(report, step.groups, self.version)
        for group in step.groups:
            if group.group_id in report.advantages:
                self._samples.close(group.group_id, "trained", step=report.policy_version)
                continue
            spent = self._samples.close(group.group_id, "filtered", "step_refused" if refused else "no_signal")
            if not report.applied:  # Else it is among the groups of the step.
                self._accounts.wasted(group.prompt, *spent)
        self.version = report.policy_version
        metrics = step.metrics | report.metrics | self.buffer.metrics() | {"policy_version": float(self.version)}
        done = Done(self.version, report.label(step.groups), metrics)
        self._unrecorded += [done] if report.applied else []
        return done

    async def _deliver(self, publication: Publication, done: Done) -> None:
        """Bring the engines to the publication, release the step's slots, prove the engines, record the step."""
        digest, sync = await self._way.bring(publication)
        await self.buffer.release(self._config.batches_left(publication.version))
        sync |= await self._engines.prove(publication, digest)
        sync |= {"sync/export_seconds": publication.seconds, "sync/bytes": float(publication.nbytes)}
        training = self._training.groups if self._training else []
        self._samples.check([*self.buffer.members, *(group.group_id for group in training), *self._again])
        self._record(done, sync, digest)

    def _record(self, done: Done, sync: dict[str, float], digest: str) -> None:
        """A step into the run folder, with what publishing its weights gave."""
        metrics = done.metrics | sync | self._keeper.metrics() | self._samples.metrics() | self._engines.metrics()
        metrics |= self._accounts.step(done.groups, metrics.get("train_tokens", 0.0), self._engines.size)
        metrics |= {f"reward_pool/{name}": value for name, value in self._rewards.metrics().items()}
        history = [{"step": done.version, "reward": metrics["reward"]}]
        self._rewards.state = trainer_state(self._config, done.version, self._train.epoch, history)
        faults.point("controller.before_record")
        self._recorder.step(done.version, metrics, done.groups, digest)
        self._unrecorded.remove(done)

    async def _delivered(self) -> None:
        """Wait until the previous publication, if any, has reached every engine."""
        if self._delivery is not None:
            self._time.enter("wait_for_delivery")
            # A stall that cancels this wait must find the delivery alive, to say that it is what hangs.
            await asyncio.shield(self._delivery)

    # --- a run that can go on later ---

    async def _checkpoint(self) -> None:
        """Save everything at this version; generation goes on meanwhile, and training as soon as the files are written."""
        await self._keeper.save(self._state(), self.buffer.queued())

    async def _rescue(self, cause: BaseException) -> None:
        """Save what the learner has learned before the run ends for a reason that is not the learner's."""
        self._recorder.cut_short()
        async with rescuing(cause, bool(self._training) or self._keeper.version < self.version):
            hangs = isinstance(cause, LearnerFailed) or (isinstance(cause, Stalled) and self._training)
            if hangs or not await self._way.ended_well():
                await self._keeper.finish()
                return
            if self._training is not None:
                self._applied(self._training, (await self._training.call)[0])
            await self._keeper.save_for_good(self._state(), self.buffer.queued())
            for done in list(self._unrecorded):  # Trained, but no engine has taken the weights.
                self._record(done, {}, "")

    def _state(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "cursor": self._train.cursor,
            "data": self._train.digest,
            "evaluated": self._evaluated,
            "samples": self._samples.mark(),
            "buffer": self.buffer.state(),
            "again": self._again.copy(),
            "stopping": {name: value for name, value in vars(self._stopping).items() if name[0] != "_"},
            "failures": dict(self._failures.causes),
            "trainer_state": self._rewards.state,
            "num_tokens": self._accounts.seen,
        }

    def restore(self, state: dict[str, Any], queued: list[RolloutGroup] | None) -> None:
        """Go on from a checkpoint: ``queued`` groups are trained as they are, unfinished ones rolled out again.

        Without ``queued``, because the configuration has changed, all are, as it admits them.
        """
        self.version = self._keeper.version = state["version"]
        self._train.cursor, self._evaluated = state["cursor"], state["evaluated"]
        self._stopping.restore(state["stopping"], self.version)
        self._rewards.state, self._accounts.seen = state["trainer_state"], state["num_tokens"]
        self._failures.causes.update(state["failures"])
        unfinished = sorted(set(self._samples.open) - {group.group_id for group in queued or ()})
        for group_id in unfinished:
            self._samples.lose(group_id)
        self._again = unfinished if queued is None else state["again"]
        if queued is not None:
            self.buffer.restore(state["buffer"], queued, set(unfinished) - set(self._again))

    async def _evaluate(self) -> None:
        """Score the held-out prompts with the weights that the engines hold; the best so far is kept."""
        if not self._held_out:
            return
        with self._time.during("evaluate"):
            by = Judges(self._engines.generate, self._rewards.score)
            metrics = await evaluate(self._config, self._held_out, by, self._failures)
        self._evaluated, improved = self.version, self._stopping.observe(metrics, self.version)
        self._recorder.evaluated(self.version, metrics, self._stopping.story())
        if improved and self.version:
            await self._checkpoint()
