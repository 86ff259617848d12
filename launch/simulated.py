"""Engines, learner ranks and reward workers that only let time pass: what the real controller and pools simulate with.

Each is an object with the methods of the real actor, in this process; a simulated slot spawns the one whose real class
it is asked for. An engine decodes all its running sequences in lock step, as vLLM does.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from launch.timings import Timings
from rollout.engine import Received, Sampling
from rollout.reward_worker import Group, Scores
from shared.actors import Call
from shared.config import Config
from shared.ledger import TimeLedger, TimeSlice
from shared.types import Completion, RolloutGroup, StepReport, VersionSpan
from shared.weights import Canary, Publication, TensorMeta

TOKENS = np.zeros(1 << 16, np.int32)
ROUNDING_S = 1e-7
"""A timer that was set for the end of a sequence may come so much early."""
LOGPROBS = np.zeros(1 << 16, np.float32)


class _Actor:
    """The actor's side of ``shared/actors.py``, without a process."""

    def call(self, method: str, *arguments: Any) -> Call:
        """See ``Actor``."""
        answer = asyncio.ensure_future(getattr(self, method)(*arguments))
        return Call(answer, answer.cancel)

    def offer(self, method: str, *arguments: Any) -> Any:
        """Nothing is ever sent."""
        raise NotImplementedError(method)

    async def node(self) -> str:
        """All on one."""
        return ""

    def kill(self) -> None:
        """Nothing to end."""

    def release(self) -> None:
        """Nothing to end."""


@dataclass(eq=False)
class _Request:
    """A group in an engine."""

    lengths: np.ndarray
    left: int
    born: int
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SimulatedEngine(_Actor):
    """``k`` running sequences gain a token each ``timings.decode_s(k)`` seconds; what does not fit waits its turn."""

    def __init__(self, timings: Timings, config: Config, index: int) -> None:
        self._timings, self._room = timings, config.max_num_seqs
        self._rng = np.random.default_rng((config.run.seed, index))
        self._ledger = TimeLedger(f"engine-{index}", "wait_for_prompts")
        self._version = -1
        self._tokens = 0.0
        """That every sequence would have gained since the beginning."""
        self._since = time.monotonic()
        """When that was; later than now while prompts are being prefilled."""
        self._running: list[tuple[float, int, _Request]] = []
        """By the token count at which each sequence ends, in order."""
        self._waiting: deque[tuple[int, _Request]] = deque()
        self._order = 0
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    async def health(self) -> int:
        """It always answers."""
        return 0

    async def times(self) -> TimeSlice:
        """See ``Engine``."""
        return self._ledger.take()

    async def generate(self, token_ids: np.ndarray, sampling: Sampling, version: int) -> tuple[Completion, ...]:
        """See ``Engine``."""
        request = _Request(self._timings.sample(self._rng, sampling.n), sampling.n, self._version)
        self._advance()
        self._waiting.extend((int(length), request) for length in request.lengths)
        self._since += self._timings.request_s + self._timings.prefill_token_s * len(token_ids)
        self._admit()
        await request.done
        now = self._version
        return tuple(_completion(int(length), request.born, now) for length in request.lengths)

    async def receive(self, publication: Publication) -> Received:
        """See ``Engine``."""
        await asyncio.sleep(self._timings.prepare_s)
        self._advance()
        before = self._ledger.state
        self._paused = True
        self._ledger.enter("receive")
        await asyncio.sleep(self._timings.pause_s)
        self._paused, self._version = False, publication.version
        self._since = max(self._since, time.monotonic())
        self._ledger.enter(before)
        self._admit()
        seconds = {"prepare": self._timings.prepare_s, "paused": self._timings.pause_s, "transfer": 0.0}
        return Received({publication.digest}, seconds, 0.0, False, self._ledger.take())

    async def prove(self, canary: Canary, version: int) -> float:
        """See ``Engine``."""
        await asyncio.sleep(self._timings.prove_s)
        return 0.0

    def _advance(self) -> None:
        """Everything up to now: tokens gained, sequences that ended on the way, and what took their place."""
        now = time.monotonic()
        while not self._paused and self._running and now >= self._since:
            pace = self._timings.decode_s(len(self._running))
            end = self._running[0][0]
            if (end - self._tokens) * pace > now - self._since + ROUNDING_S:
                self._tokens += (now - self._since) / pace
                break
            self._since = min(self._since + (end - self._tokens) * pace, now)
            self._tokens = end
            self._end(self._running.pop(0)[2])
            self._fill()
        if not self._paused:
            self._since = max(self._since, now)

    def _end(self, request: _Request) -> None:
        request.left -= 1
        if not request.left and not request.done.done():
            request.done.set_result(None)

    def _fill(self) -> None:
        """Start what fits."""
        while self._waiting and len(self._running) < self._room:
            length, request = self._waiting.popleft()
            self._order += 1
            insort(self._running, (self._tokens + length, self._order, request))

    def _admit(self) -> None:
        """Start what fits, and set the clock for when somebody outside will see something."""
        self._fill()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._paused:
            self._ledger.enter("generate" if self._running else "wait_for_prompts")
            if self._running:
                delay = max(self._since - time.monotonic(), 0.0) + self._next()
                self._timer = asyncio.get_running_loop().call_later(delay, self._wake)

    def _next(self) -> float:
        """Decoding seconds until a group is complete; while some wait for room, until a sequence ends."""
        tokens, seconds, left = self._tokens, 0.0, len(self._running)
        unfinished: dict[_Request, int] = {}
        for end, _, request in self._running:
            seconds += (end - tokens) * self._timings.decode_s(left)
            tokens, left = end, left - 1
            unfinished[request] = unfinished.get(request, request.left) - 1
            if self._waiting or not unfinished[request]:
                break
        return seconds

    def _wake(self) -> None:
        if not self._paused:  # It is set again when the pause ends.
            self._advance()
            self._admit()


def _completion(length: int, born: int, now: int) -> Completion:
    half = length // 2 if born != now else 0
    spans = (VersionSpan(born, 0, half), VersionSpan(now, half, length)) if half else (VersionSpan(now, 0, length),)
    return Completion(TOKENS[:length], LOGPROBS[:length], "", "stop", spans)


_counted: tuple[list[RolloutGroup], int] = ([], 0)


def _count(groups: list[RolloutGroup]) -> int:
    """Tokens of a step, each prompt's once; counted by the first rank that asks."""
    global _counted
    if _counted[0] is not groups:
        total = sum(len(g.prompt.token_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups)
        _counted = groups, total
    return _counted[1]


class SimulatedLearner(_Actor):
    """A rank: its share of a step's tokens takes its time; all ranks end together."""

    def __init__(self, timings: Timings, config: Config, rank: int, world_size: int, _: tuple[str, int]) -> None:
        self._timings, self._config, self._rank, self._ranks = timings, config, rank, world_size
        self._ledger = TimeLedger(f"learner-{rank}", "wait_for_groups")
        self._version = 0

    async def open_sender(self, run_id: str) -> None:
        """Nothing to open."""

    async def times(self) -> TimeSlice:
        """See ``Learner``."""
        return self._ledger.take()

    async def save(self, directory: str) -> None:
        """Nothing to save."""
        Path(directory).mkdir(parents=True, exist_ok=True)

    async def publish(self, canary: np.ndarray) -> Publication | None:
        """See ``Learner``."""
        with self._ledger.during("gather"):
            await asyncio.sleep(self._timings.publish_s)
        if self._rank:
            return None
        proof = Canary(canary, np.zeros(len(canary) - 1, np.float32))
        return Publication(self._version, "simulated", "", (TensorMeta("w", "float32", (1,), 0, 4),), "digest", proof)

    async def train_and_publish(
        self, groups: list[RolloutGroup], canary: np.ndarray
    ) -> tuple[StepReport, Publication | None]:
        """See ``Learner``."""
        updates = self._config.updates_per_batch
        tokens = _count(groups)
        with self._ledger.during("backward"):
            share = self._timings.train_token_s * tokens / self._ranks * self._config.learner.epochs_per_batch
            await asyncio.sleep(updates * self._timings.train_step_s + share)
        self._version += updates
        advantages = {group.group_id: [1.0] * len(group.completions) for group in groups} if not self._rank else {}
        metrics = {"train_tokens": float(tokens), "advantages/abs_mean": 1.0}
        publication = await self.publish(canary)
        return StepReport(self._version, True, metrics, advantages, self._ledger.take()), publication


class SimulatedRewards(_Actor):
    """A worker whose rewards are fair coins."""

    def __init__(self, timings: Timings, names: list[str], seed: int, index: str) -> None:
        self._timings, self._names = timings, names
        self._rng = np.random.default_rng(seed)
        self._ledger = TimeLedger(index, "wait_for_groups")

    async def ready(self) -> bool:
        """At once."""
        return True

    async def times(self) -> TimeSlice:
        """See ``RewardWorker``."""
        return self._ledger.take()

    async def score(self, groups: list[Group], _: dict[str, Any]) -> list[Scores]:
        """See ``RewardWorker``."""
        with self._ledger.during("score"):
            await asyncio.sleep(self._timings.score_s * len(groups))
        scores = [Scores({name: self._coins(len(c)) for name in self._names}) for _, _, c in groups]
        scores[0].times = self._ledger.take()
        return scores

    def _coins(self, count: int) -> np.ndarray:
        coins = self._rng.integers(0, 2, count).astype(np.float32)
        coins[0] = 1 - coins[-1]  # Always something to learn.
        return coins


class SimulatedSlot:
    """A place for any of them."""

    def __init__(self, timings: Timings, config: Config) -> None:
        self._timings, self._config = timings, config

    async def ready(self) -> None:
        """At once."""

    def spawn(self, kind: type, *arguments: Any, environment: dict[str, str], concurrency: int = 1) -> Any:
        """The stand-in for ``kind``."""
        if kind.__name__ == "Engine":
            return SimulatedEngine(self._timings, *arguments)
        if kind.__name__ == "Learner":
            return SimulatedLearner(self._timings, *arguments)
        names = [f.name or f.function or "reward" for f in self._config.reward.functions]
        return SimulatedRewards(self._timings, names, self._config.run.seed, arguments[-1])

    async def _here(self, function: Callable[[], Any]) -> Any:
        return ("", 0)

    def run(self, function: Callable[[], Any]) -> Awaitable[Any]:
        """Nothing is asked of a host that is not there."""
        return self._here(function)

    def share(self, value: Any) -> Any:
        """Itself."""
        return value

    def free(self) -> None:
        """Nothing to give back."""


class SimulatedPlaces:
    """Room for whatever is asked."""

    def __init__(self, timings: Timings, config: Config) -> None:
        self._slot = SimulatedSlot(timings, config)
        self.engines = [self._slot] * config.rollout.num_engines
        self.ranks = [self._slot] * config.learner.num_ranks
        self.rewards = [self._slot] * config.reward.workers

    def another_engine(self) -> SimulatedSlot:
        """At once."""
        return self._slot

    def on(self, node: str) -> SimulatedSlot:
        """All are on one."""
        return self._slot
