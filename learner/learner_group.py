"""The learner's ranks as one object: spawns them as Ray actors and calls them together.

Invariant: every rank gets the same call with the same groups, and a rank that dies or exceeds its deadline fails
the whole group at once; no rank is waited for after another has failed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np

from learner.distributed import free_port, learner_environment
from learner.learner import Learner
from shared.config import Config
from shared.errors import LearnerFailed, LearnerLost, one_line
from shared.ledger import TimeSlice
from shared.types import RolloutGroup, StepReport
from shared.weights import Link, Publication, remove_segments

START_TIMEOUT_S = 300.0
KNOWN_STEPS, SHORTEST_LIMIT_S = 5, 120.0
ECHO_S = 5.0
"""Longest wait for a death to be known after another rank has failed."""


def _master_address() -> tuple[str, int]:
    import ray

    return ray.util.get_node_ip_address(), free_port()


class LearnerGroup:
    """``config.learner.num_ranks`` learners; ``slots`` holds the place of each in the cluster."""

    def __init__(self, config: Config, run_id: str, slots: list[Any], environment: dict[str, str]) -> None:
        self._config, self._run_id, self._slots = config, run_id, slots
        self._environment = environment | learner_environment(config)
        self._ranks: list[Any] = []
        self._lives = 0
        self._durations: deque[float] = deque(maxlen=20)
        """Seconds of the last steps."""
        self.slices: list[TimeSlice] = []
        """What the ranks did, as far as their answers told."""

    async def start(self) -> None:
        """Spawn the ranks and wait until each holds its share of the model."""
        import ray

        count = self._config.learner.num_ranks
        probe = ray.remote(_master_address).options(**self._options(0) | {"num_gpus": 0, "num_cpus": 0})
        master = await asyncio.wait_for(probe.remote(), START_TIMEOUT_S)
        actor = ray.remote(Learner)
        for rank in range(count):
            options = self._options(rank) | {"max_restarts": 0, "max_concurrency": 1}
            self._ranks.append(actor.options(**options).remote(self._config, rank, count, master))
        self._lives += 1
        await self._call("open_sender", f"{self._run_id}-{self._lives}", timeout_s=START_TIMEOUT_S)

    async def train_step(self, groups: list[RolloutGroup], canary: np.ndarray) -> tuple[StepReport, Publication | None]:
        """All updates on ``groups``, and the publication of the new weights unless none was applied."""
        import ray

        # One copy in the object store serves all ranks; a plain argument would be stored once per rank.
        shared = ray.put(groups) if len(self._ranks) > 1 else groups
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
        return replace(first, handles=handles)

    async def connect(self, engines_connect: Callable[[Link], Awaitable[None]], workers: int) -> None:
        """Open a link with ``workers`` engine workers, which join it through ``engines_connect`` at the same time."""
        import ray

        probe = ray.remote(_master_address).options(**self._options(0) | {"num_gpus": 0, "num_cpus": 0})
        host, port = await asyncio.wait_for(probe.remote(), START_TIMEOUT_S)
        link = Link(host, port, workers)
        await asyncio.gather(self._call("connect", link, timeout_s=START_TIMEOUT_S), engines_connect(link))

    async def send(self, publication: Publication) -> str:
        """The digest of what the engines receive; sends it first where a publication is no snapshot."""
        return (await self._call("send"))[0] if publication.collective else publication.digest

    async def save(self, directory: str) -> None:
        """Write the policy to ``directory``/hf, and to ``directory``/learner all that ``load`` needs."""
        await self._call("save", directory)

    async def load(self, directory: str) -> None:
        """Go on from what ``save`` wrote."""
        await self._call("load", directory)

    async def restart(self) -> None:
        """New ranks in the places of the old ones, of which some may be dead or hang; they hold the model that a run begins with."""
        self.close()
        self._ranks = []
        remove_segments(f"{self._run_id}-{self._lives}")
        await self.start()

    async def close_books(self) -> None:
        """Ask every rank for what is still missing in ``slices``."""
        self.slices += await self._call("times")

    def close(self) -> None:
        """Kill the ranks."""
        import ray

        for rank in self._ranks:
            ray.kill(rank)

    async def _call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        limit = timeout_s or self._config.learner.step_timeout_s
        calls = [asyncio.ensure_future(getattr(rank, method).remote(*arguments)) for rank in self._ranks]
        try:
            return list(await asyncio.wait_for(asyncio.gather(*calls), limit))
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
        from ray.exceptions import RayActorError, RayTaskError

        from shared.errors import MillraceError

        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, MillraceError | OSError):
            raise cause from error
        if deaths := [failure for failure in failures if isinstance(failure, RayActorError)]:
            raise LearnerLost(f"{method}: a learner rank died: {one_line(deaths[0], 400)}") from error

    def _options(self, rank: int) -> dict[str, Any]:
        return self._slots[rank].options() | {"runtime_env": {"env_vars": self._environment}}
