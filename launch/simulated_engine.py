"""An engine that only lets time pass: continuous batching as vLLM does it, all running sequences in lock step."""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.timings import MOST_TOKENS, Timings
from rollout.engine import Received, Sampling
from shared.actors import Call
from shared.config import Config
from shared.ledger import TimeLedger, TimeSlice
from shared.types import Completion, VersionSpan
from shared.weights import Canary, Publication

TOKENS = np.zeros(MOST_TOKENS, np.int32)
ROUNDING_S = 1e-7
"""A timer that was set for the end of a sequence may come so much early."""
LOGPROBS = np.zeros(MOST_TOKENS, np.float32)


class SimulatedActor:
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


class SimulatedEngine(SimulatedActor):
    """``k`` running sequences gain a token each ``timings.decode_s(k)`` seconds; what does not fit waits its turn."""

    def __init__(self, timings: Timings, config: Config, index: int) -> None:
        self._timings, self._room = timings, timings.places(config.max_num_seqs)
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
