"""The learner's ranks as one object: spawns them and calls them together.

Invariant: every rank gets the same call with the same groups, and a rank that dies or exceeds its deadline fails
the whole group at once; no rank is waited for after another has failed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from learner.distributed import free_port, learner_environment
from learner.learner import Learner
from shared.actors import Actor, ActorDied, ActorUnreachable, Slot, named
from shared.config import Config
from shared.errors import LearnerFailed, LearnerLost, MillraceError, one_line
from shared.ledger import TimeSlice
from shared.types import RolloutGroup, StepReport
from shared.weights import Link, Publication, read_s, remove_segments, stage_limit

START_TIMEOUT_S = 300.0
"""Seconds to start the ranks or to open the link, beside the time in which they read the model."""
CHECK_EVERY = 100
"""Number of publications without a snapshot after which one is compared with the CPU's view of it; so is the first."""
KNOWN_STEPS, SHORTEST_LIMIT_S = 5, 120.0
ECHO_S = 5.0
"""Longest wait for a death to be known after another rank has failed."""


def _free_address() -> tuple[str, int]:
    import ray

    return ray.util.get_node_ip_address(), free_port()


class LearnerGroup:
    """``config.learner.num_ranks`` learners; ``slots`` holds the place of each in the cluster."""

    def __init__(self, config: Config, run_id: str, slots: Sequence[Slot], environment: dict[str, str]) -> None:
        self._config, self._run_id, self._slots = config, run_id, slots
        self._environment = environment | learner_environment(config)
        self._ranks: list[Actor] = []
        self._lives, self._node, self._host = 0, "", ""
        self._sends = 0
        """Publications sent by these ranks, of those that are no snapshots."""
        self._checking: asyncio.Task[None] | None = None
        self._start_limit_s = START_TIMEOUT_S + read_s(config.model.path, len(slots))
        self._durations: deque[float] = deque(maxlen=20)
        """Seconds of the last steps."""
        self.slices: list[TimeSlice] = []
        """What the ranks did, as far as their answers told."""

    async def start(self) -> None:
        """Spawn the ranks and wait until each holds its share of the model."""
        self._host, _ = master = await self._free_address()
        for rank, slot in enumerate(self._slots):
            arguments = self._config, rank, len(self._slots), master
            environment = self._environment | named(f"learner-{rank}")
            self._ranks.append(slot.spawn(Learner, *arguments, environment=environment))
        self._lives += 1
        await self._call("open_sender", f"{self._run_id}-{self._lives}", timeout_s=self._start_limit_s)
        self._node = await self._ranks[0].node()

    async def train_step(self, groups: list[RolloutGroup], canary: np.ndarray) -> tuple[StepReport, Publication | None]:
        """All updates on ``groups``, and the publication of the new weights unless none was applied."""
        await self._checked()
        # One copy serves all ranks; a plain argument would be stored once per rank.
        shared = self._slots[0].share(groups) if len(self._ranks) > 1 else groups
        started = time.monotonic()
        answers = await self._call("train_and_publish", shared, canary, timeout_s=self._step_limit())
        self._durations.append(time.monotonic() - started)
        self.slices += [report.times for report, _ in answers if report.times is not None]
        report: StepReport = answers[0][0]
        return report, self._merged([publication for _, publication in answers]) if report.applied else None

    def _step_limit(self) -> float:
        """Seconds after which a step is given up: ten times the usual, once that is known, or the configured limit."""
        limit = self._config.learner.step_timeout_s
        if len(self._durations) < KNOWN_STEPS:
            return limit
        return min(limit, max(SHORTEST_LIMIT_S, 10 * statistics.median(self._durations)))

    async def publish(self, canary: np.ndarray) -> Publication:
        """Snapshot the weights for the engines, with the log-probs of the ``canary`` tokens ``[T]``."""
        return self._merged(await self._call("publish", canary))

    def _merged(self, publications: list[Publication | None]) -> Publication:
        """The first rank's publication, with the handles of all."""
        first, *others = publications
        assert first is not None
        if any(other is not None and other.digest != first.digest for other in others):
            raise LearnerFailed(f"learner ranks hold different weights of version {first.version}")
        handles = {gpu: h for p in publications if p is not None for gpu, h in p.handles.items()}
        return replace(first, handles=handles, node=self._node)

    async def connect(self, engines_connect: Callable[[Link], Awaitable[None]], workers: int) -> None:
        """Open a link with ``workers`` engine workers, which join it through ``engines_connect`` at the same time."""
        if self._config.rollout.colocate:  # Memory of the same GPU: nothing has to be opened.
            return
        port = await self._ranks[0].call("listen", self._host).answer
        link = Link(self._host, port, workers)
        joining = [asyncio.ensure_future(c) for c in (self._call("connect", link), engines_connect(link))]
        try:
            async with asyncio.timeout(self._start_limit_s):
                await asyncio.gather(*joining)
        except LearnerLost:
            raise
        except Exception as error:  # Of two ends that wait for each other either may say so.
            raise LearnerLost(f"no link to the engines: {one_line(error, 400)}") from error
        finally:
            for end in joining:
                end.cancel()

    async def send(self, publication: Publication) -> str:
        """The digest of what the engines receive; sends it first where a publication is no snapshot.

        Raises ``LearnerLost`` if it was not sent in the time of a stage: the ranks may hang for good.
        """
        if not publication.collective:
            return publication.digest
        sent = {text for text in await self._call("send", timeout_s=stage_limit(publication)) if text}
        if len(sent) != 1:
            raise LearnerFailed(f"learner ranks hold different weights of version {publication.version}")
        if self._sends % CHECK_EVERY == 0:
            self._checking = asyncio.ensure_future(self._check(publication.version))
        self._sends += 1
        return sent.pop()

    async def _check(self, version: int) -> None:
        """Compare what was sent with the learner's weights on the CPU; the ranks do it before anything else."""
        began = time.monotonic()
        digest, *_ = await self._call("send", True)
        print(f"weights of version {version}: blake3 {digest}, checked in {time.monotonic() - began:.1f} s", flush=True)

    async def _checked(self) -> None:
        """Wait for the last check, whose result nobody has heard yet. Raises ``WeightProofFailed``."""
        checking, self._checking = self._checking, None
        if checking is not None:
            await checking

    async def save(self, directory: str) -> None:
        """Write the policy to ``directory``/hf, and to ``directory``/learner all that ``load`` needs."""
        await self._checked()
        await self._call("save", directory)

    async def load(self, directory: str) -> None:
        """Go on from what ``save`` wrote."""
        await self._call("load", directory)

    def end(self) -> None:
        """End the ranks, of which some may be dead or hang, and what they hold; ``start`` makes new ones in their places."""
        if self._checking is not None:
            self._checking.cancel()
        self.close()
        self._ranks, self._sends, self._checking = [], 0, None
        remove_segments(f"{self._run_id}-{self._lives}")

    async def has_place(self, limit_s: float) -> bool:
        """Whether every rank has a place, now or within ``limit_s``: a host that is lost takes some away."""
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*(slot.ready() for slot in self._slots))
        except TimeoutError:
            return False
        return True

    async def nodes(self) -> list[str]:
        """Where in the cluster each rank lives."""
        return await asyncio.gather(*(rank.node() for rank in self._ranks))

    async def close_books(self) -> None:
        """Ask every rank for what is still missing in ``slices``."""
        self.slices += await self._call("times")

    def close(self) -> None:
        """Kill the ranks."""
        for rank in self._ranks:
            rank.kill()

    async def _call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        limit = timeout_s or self._config.learner.step_timeout_s
        calls = [rank.call(method, *arguments).answer for rank in self._ranks]
        try:
            async with asyncio.timeout(limit):
                return list(await asyncio.gather(*calls))
        except TimeoutError:
            raise LearnerLost(
                f"{method}: no answer from the learner within {limit:g} s (ranks: {len(calls)})"
            ) from None
        except Exception as error:
            # A dead rank breaks the collectives of the others, and they may say so first.
            await asyncio.wait(calls, timeout=ECHO_S)
            failures = [call.exception() for call in calls if call.done() and not call.cancelled()]
            self._raise(method, error, [failure for failure in failures if failure is not None])
            raise

    def _raise(self, method: str, error: Exception, failures: list[BaseException]) -> None:
        if isinstance(error, MillraceError | OSError):
            raise error
        if deaths := [failure for failure in failures if isinstance(failure, ActorDied | ActorUnreachable)]:
            raise LearnerLost(f"{method}: a learner rank died: {deaths[0]}") from error

    async def _free_address(self) -> tuple[str, int]:
        """Host of the first rank, and a port there."""
        async with asyncio.timeout(START_TIMEOUT_S):
            return await self._slots[0].run(_free_address)
