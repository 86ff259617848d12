"""A short profile of a configuration: what its engine, its learner and its weights take, fitted to ``Timings``.

One engine and a learner of one rank, first each alone and then in the real loop, and a learner of two ranks likewise, on real
prompts and on completions that the policy itself samples; three minutes on a laptop. ``millrace plan`` reckons with the result.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np

from launch.cluster import nodes
from launch.parts import Parts
from launch.plan_model import as_split, calibrated, predict
from launch.profile_loop import MEASURED_S, timed_loop, undisturbed
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


async def profile(config: Config, stream: PromptStream, origin: str) -> Timings:
    """Measure; in a session of Ray of its own."""
    from launch.cluster import check_resources, ray_session
    from launch.parts import started

    timings = Timings()
    for ranks in (1, 2)[: 2 - config.completions_per_step % 2]:
        changed = undisturbed(as_split(config, 1, ranks, config.rollout.max_staleness))
        async with ray_session(changed), started(changed, check_resources(changed, origin)) as parts:
            run = Measurement(changed, stream, parts)
            timings = await (run.everything(timings) if ranks == 1 else run.of_ranks(timings))
    return timings


class Measurement:
    """What is measured with the parts of a run of ``config``, which must be ``undisturbed``."""

    def __init__(self, config: Config, stream: PromptStream, parts: Parts) -> None:
        self._config, self._stream, self._parts = config, stream, parts
        self._canary = np.concatenate([stream.at(0).token_ids] * 2)[:64]
        self._next = 0
        self._groups: list[RolloutGroup] = []
        """Sampled and scored so far."""
        self._batch_tokens = 0.0
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
        self._parts.rewards.slices.clear()
        await self._turns(self._rollouts, self._steps)
        timings = self._rewards(self._engine(timings))
        step_s, token_s = self._learner(timings)
        timings = replace(timings, train_step_s=step_s, train_token_s=token_s)
        return await self._calibrated(timings)

    async def of_ranks(self, timings: Timings) -> Timings:
        """What is lost between ranks, at the size of a whole batch: memory, imbalance, waiting for each other."""
        await self._publish()
        await self._warm_up()
        await self._turns(self._steps)
        step_s, token_s = self._learner(timings)
        share = self._batch_tokens / self._config.updates_per_batch / self._config.learner.num_ranks
        more = step_s - timings.train_step_s + (token_s - timings.train_token_s) * share
        return await self._calibrated(replace(timings, ranks_s=max(more, 0.0)))

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
        )

    def _rewards(self, timings: Timings) -> Timings:
        """What the workers' own clocks saw of the rounds' groups; the rest of one that was alone is the call's."""
        states = [state for slice_ in self._parts.rewards.slices for state in slice_.intervals]
        busy = sum(end - start for state, start, end in states if state == "score")
        score_s = busy / sum(groups for (groups, *_), _ in self._sampled)
        return replace(timings, score_s=score_s, score_call_s=max(statistics.median(self._scores) - score_s, 0.0))

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
            self._batch_tokens = max(self._batch_tokens, tokens)
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

    async def loop(self, step_s: float, seconds: float = MEASURED_S) -> tuple[float, float]:
        """See ``timed_loop``."""
        version = (await self._publish())[0].version
        return await timed_loop(self._config, self._stream, self._parts, version, step_s, seconds)

    async def _calibrated(self, timings: Timings) -> Timings:
        """Some seconds of the real loop: what everything takes longer there."""
        if len(places := nodes()) == 1 and not places[0].count("GPU"):
            timings = replace(timings, cores=os.cpu_count() or 1)
        split = self._config.rollout.num_engines, self._config.learner.num_ranks
        step_s = predict(self._config, timings, *split).step_s
        step_s, cpu_s = await self.loop(step_s)
        if timings.cores:  # Of the first loop: ``together`` was found with it.
            timings = replace(timings, control_s=timings.control_s or cpu_s)
        return calibrated(self._config, timings, *split, step_s)


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
