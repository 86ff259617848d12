"""A short profile of a configuration: what its engine, its learner and its weights take, fitted to ``Timings``.

One engine and the learner, first each alone and then in the real loop, on real prompts and on completions that the policy
itself samples; about a minute on a laptop. ``millrace plan`` reckons with the result.
"""

from __future__ import annotations

import asyncio
import math
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.cluster import nodes
from launch.parts import Parts
from launch.plan_model import calibrated, predict
from launch.timings import Timings
from rollout.engine import Sampling
from rollout.prompts import PromptStream
from shared.config import Config
from shared.types import RolloutGroup
from shared.weights import Publication

PUBLICATIONS = 4
TURNS, TURNS_S = 3, 25.0
"""Rollouts and training steps of every size, in turns: at least so many, for so long; machines differ from second to second."""
WARMING = 2
"""Training steps that are left out: the first ones take longer."""
LOOP_WARMING, LOOP_S, LOOP_STEPS = 12, 30.0, 15
"""Of the real loop: steps that are left out, and the least that are measured."""
TINY_LR = 1e-12
"""The profile trains for real, but must not change what it measures."""
ENDLESS = 1_000_000


async def profile(config: Config, stream: PromptStream, origin: str) -> Timings:
    """Measure; in a session of Ray of its own."""
    from launch.cluster import check_resources, ray_session
    from launch.parts import started

    ranks = (
        [1, 2] if config.completions_per_step % 2 == 0 and not config.rollout.colocate else [config.learner.num_ranks]
    )
    timings = Timings()
    for count in ranks:
        learner = config.learner.model_copy(update={"num_ranks": count, "lr": TINY_LR})
        rollout = config.rollout.model_copy(update={"num_engines": count if config.rollout.colocate else 1})
        changed = _undisturbed(config).model_copy(update={"learner": learner, "rollout": rollout})
        async with ray_session(changed), started(changed, check_resources(changed, origin)) as parts:
            run = _Profile(changed, stream, parts)
            if count == ranks[0]:
                timings = await run.everything(timings)
            else:
                step_s, token_s = await run.learner(timings)
                # What is lost between ranks, at the size of a whole batch: memory, imbalance, waiting for each other.
                share = run.batch_tokens / config.updates_per_batch / count
                more = step_s - timings.train_step_s + (token_s - timings.train_token_s) * share
                timings = replace(timings, ranks_s=max(more, 0.0))
    return timings


def _undisturbed(config: Config) -> Config:
    """A run that goes on until it is stopped, and does nothing but steps on whatever is sampled."""
    run = {"steps": ENDLESS, "sinks": [], "samples_every": 0, "checkpoint_every": 0, "trace": False}
    changes = {
        "run": config.run.model_copy(update=run),
        "eval": config.eval.model_copy(update={"every_steps": 0}),
        "algorithm": config.algorithm.model_copy(update={"zero_variance": "keep"}),
    }
    return config.model_copy(update=changes)


class _Profile:
    """The parts of a run, and what is measured with them."""

    def __init__(self, config: Config, stream: PromptStream, parts: Parts) -> None:
        self._config, self._stream, self._parts = config, stream, parts
        self._canary = np.concatenate([stream.at(0).token_ids] * 2)[:64]
        self._next = 0
        self._groups: list[RolloutGroup] = []
        """Sampled and scored so far."""
        self.batch_tokens = 0.0
        """Of a whole batch, over all epochs."""
        self._scoring: list[float] = []
        """Seconds of each group since it was emptied last."""
        self._scores: list[float] = []
        self._sampled: list[tuple[list[float], float]] = []
        self._trained: list[tuple[list[float], float]] = []
        """What each round or step held, and its seconds."""

    async def everything(self, timings: Timings) -> Timings:
        """All of it."""
        timings = await self._publications(timings)
        await self._sample(2)  # The first requests compile.
        await self._warm_up()
        await self._turns(self._rollouts, self._steps)
        timings = self._engine(timings)
        step_s, token_s = self._learner(timings)
        timings = replace(timings, train_step_s=step_s, train_token_s=token_s)
        return await self._loop(timings)

    async def learner(self, timings: Timings) -> tuple[float, float]:
        """Seconds of a training step, and of one of its tokens, the publication left out."""
        await self._publish()
        await self._warm_up()
        await self._turns(self._steps)
        return self._learner(timings)

    async def _turns(self, *works: Callable[[], Awaitable[None]]) -> None:
        begun, turns = time.monotonic(), 0
        while turns < TURNS or time.monotonic() < begun + TURNS_S:
            for work in works:
                await work()
            turns += 1

    async def _publish(self) -> tuple[Publication, dict[str, float], float]:
        started = time.monotonic()
        publication = await self._parts.learners.publish(self._canary)
        exported = time.monotonic() - started
        engines, learners = self._parts.engines, self._parts.learners
        digest, sync = await asyncio.gather(learners.send(publication), engines.receive(publication))
        return publication, sync | await engines.prove(publication, digest), exported

    async def _publications(self, timings: Timings) -> Timings:
        found = [await self._publish() for _ in range(PUBLICATIONS)][1:]

        def median(name: str) -> float:
            return statistics.median(sync[name] for _, sync, _ in found)

        return replace(
            timings,
            publish_s=statistics.median(seconds for *_, seconds in found),
            prepare_s=median("sync/prepare_seconds"),
            pause_s=median("sync/pause_seconds"),
            prove_s=median("sync/proof_seconds"),
        )

    async def _sample(self, groups: int) -> tuple[list[RolloutGroup], float]:
        """So many groups at once, scored; and the seconds until the last was sampled."""
        started, ended = time.monotonic(), [0.0]

        async def one(number: int) -> RolloutGroup:
            prompt = self._stream.at(number)
            completions = await self._parts.engines.generate(number, prompt, Sampling.training(self._config, number))
            ended[0] = max(ended[0], time.monotonic())
            waiting = time.monotonic()
            scores = await self._parts.rewards.score(number, prompt, completions)
            self._scoring.append(time.monotonic() - waiting)
            rewards = scores.combined(self._config.reward.functions)
            return RolloutGroup(number, prompt, completions, rewards, scores.parts)

        numbers = range(self._next, self._next + groups)
        self._next += groups
        found = await asyncio.gather(*map(one, numbers))
        return list(found), ended[0] - started

    async def _rollouts(self) -> None:
        """Rounds of few and of many groups; each takes ``request m + step max(L) + sequence sum(L)`` seconds."""
        most = max(4, 2 * self._config.groups_per_batch)
        for size in sorted({1, max(2, most // 8), max(3, most // 4), max(4, most // 2), most}):
            self._scoring.clear()
            groups, took = await self._sample(size)
            self._scores += self._scoring if size == 1 else []  # Of several, some wait for a worker.
            self._groups += groups
            lengths = [len(c.token_ids) for group in groups for c in group.completions]
            self._sampled.append(([size, max(lengths), sum(lengths)], took))

    def _engine(self, timings: Timings) -> Timings:
        request, step, sequence = _fit(self._sampled)
        lengths = [len(c.token_ids) for group in self._groups for c in group.completions]
        return replace(
            timings,
            request_s=float(request),
            prefill_token_s=0.0,  # In request_s: prompts of the size that they have here.
            decode_step_s=float(step),
            decode_sequence_s=float(sequence),
            lengths=tuple(sorted(lengths)),
            prompt_tokens=statistics.fmean(len(group.prompt.token_ids) for group in self._groups),
            score_s=statistics.median(self._scores),
        )

    async def _warm_up(self) -> None:
        while len(self._groups) < self._config.groups_per_batch:
            self._groups += (await self._sample(self._config.groups_per_batch))[0]
        for _ in range(WARMING):
            await self._steps()
        self._trained.clear()

    async def _steps(self) -> None:
        """A small batch and a whole one."""
        config = self._config
        for size in (max(1, config.groups_per_batch // 4), config.groups_per_batch):
            groups = self._batch(size)
            tokens, took = config.learner.epochs_per_batch * _tokens(groups), await self._train(groups)
            self.batch_tokens = max(self.batch_tokens, tokens)
            self._trained.append(([config.updates_per_batch, tokens / config.learner.num_ranks], took))

    def _learner(self, timings: Timings) -> tuple[float, float]:
        step, token = _fit([(held, max(took - timings.publish_s, took / 10)) for held, took in self._trained])
        return float(step), float(token)

    def _batch(self, count: int) -> list[RolloutGroup]:
        """``count`` of the groups, with rewards that differ, in turn."""
        picked = [self._groups[(self._next + i) % len(self._groups)] for i in range(count)]
        self._next += count
        size = self._config.rollout.group_size
        rewards = np.linspace(0, 1, size, dtype=np.float32)
        return [replace(g, group_id=i, rewards=rewards) for i, g in enumerate(picked)]

    async def _train(self, groups: list[RolloutGroup]) -> float:
        started = time.monotonic()
        await self._parts.learners.train_step(groups, self._canary)
        return time.monotonic() - started

    async def _loop(self, timings: Timings) -> Timings:
        """Steps of the real loop: what everything takes longer there, and the driver's own part where all share cores."""
        from launch.controller import Controller
        from launch.run_folder import RunFolder

        parts, split = self._parts, (self._config.rollout.num_engines, self._config.learner.num_ranks)
        if len(places := nodes()) == 1 and not places[0].count("GPU"):
            timings = replace(timings, cores=os.cpu_count() or 1)
        watch = _Watch(max(LOOP_STEPS, math.ceil(LOOP_S / predict(self._config, timings, *split).step_s)))
        version = (await self._publish())[0].version
        with tempfile.TemporaryDirectory(prefix="millrace-profile-") as place:
            folder = RunFolder(self._config, Path(place), watch)
            controller = Controller(
                self._config, self._stream, [], parts.engines, parts.rewards, parts.learners, folder
            )
            controller.version = version
            run = asyncio.create_task(controller.run())
            try:
                await asyncio.wait([run, watch.enough], return_when=asyncio.FIRST_COMPLETED)
                if run.done():  # It failed: nothing else ends it.
                    run.result()
            finally:
                run.cancel()
                await asyncio.wait([run])
                folder.close()
        step_s, cpu_s = (seconds / self._config.updates_per_batch for seconds in watch.seconds())
        if timings.cores:
            timings = replace(timings, control_s=cpu_s)
        return calibrated(self._config, timings, *split, step_s)


class _Watch:
    """Sees the steps of a run (``Screen``) until it has seen enough."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen: list[float] = []
        self._cpu: list[float] = []
        self.enough = asyncio.get_running_loop().create_future()

    def step(self, _: int, row: dict[str, Any], __: float) -> None:
        """See ``Screen``."""
        self._seen.append(row["time/step"])
        self._cpu.append(time.process_time())
        if len(self._seen) == LOOP_WARMING + self._steps and not self.enough.done():
            self.enough.set_result(None)

    def evaluated(self, *_: Any) -> None:
        """Nothing is."""

    def close(self) -> None:
        """Nothing to close."""

    def seconds(self) -> tuple[float, float]:
        """Of a batch, without the worst twentieth; and the driver's CPU seconds in it."""
        seen = sorted(self._seen[LOOP_WARMING:])
        spent = self._cpu[-1] - self._cpu[LOOP_WARMING - 1]
        return statistics.fmean(seen[: math.ceil(0.95 * len(seen))]), spent / len(seen)


def _tokens(groups: list[RolloutGroup]) -> int:
    return sum(len(g.prompt.token_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups)


def _fit(seen: list[tuple[list[float], float]]) -> np.ndarray:
    """Non-negative factors of what was held that give the seconds, relative errors weighed alike."""
    seconds = np.array([took for _, took in seen])
    rows, ones = np.array([held for held, _ in seen], dtype=float), np.ones(len(seen))
    weighed = rows / seconds[:, None]
    active = list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(weighed[:, active], ones, rcond=None)
        if (found >= 0).all() or len(active) == 1:
            factors: Any = np.zeros(rows.shape[1])
            factors[active] = np.maximum(found, 0.0)
            return np.asarray(factors)
        active.pop(int(np.argmin(found)))
