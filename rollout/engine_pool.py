"""The engines as one object: routes groups, and takes every engine through a publication of weights.

Invariant: no completion leaves the pool before the weights that sampled it were proved on their engine, by the
digest of the received bytes and by the canary's log-probs. Generation goes on while a proof is under way; its
results are held back until the proof is in. Engines are updated independently and in parallel.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from rollout.engine import Engine, Received, Sampling
from rollout.vllm_setup import engine_environment
from shared.config import Config
from shared.errors import EngineFailed, GroupFailed, MillraceError, WeightProofFailed, one_line
from shared.ledger import TimeSlice
from shared.types import Completion, Prompt
from shared.weights import Link, Publication

ROUND_TRIES = 3


def _stage_limit(publication: Publication) -> float:
    """Seconds that a stage of a weight update may take: 30 plus the bytes at 100 MB/s."""
    return 30 + publication.nbytes / 100e6


def _worst(reports: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(report[name] for report in reports) for name in reports[0]}


@dataclass
class _Replica:
    """One engine actor, as the pool sees it."""

    index: int
    actor: Any
    version: int = -1
    """Policy version of the weights loaded here."""
    digests: set[str] = field(default_factory=set)
    """Of the bytes that its workers took last."""
    outstanding: int = 0
    proved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the weights loaded here are proved."""


class EnginePool:
    """``config.rollout.num_engines`` engines; ``slots`` holds the place of each in the cluster."""

    def __init__(self, config: Config, slots: list[Any], environment: dict[str, str]) -> None:
        self._config, self._slots, self._environment = config, slots, environment
        self._replicas: list[_Replica] = []
        self.slices: list[TimeSlice] = []
        """What the engines did, as far as their answers told."""

    async def start(self) -> None:
        """Start all engines side by side and wait until each answers. Raises ``EngineFailed``."""
        self._replicas = [_Replica(i, self._spawn(i)) for i in range(self._config.rollout.num_engines)]
        limit = self._config.rollout.start_timeout_s
        await asyncio.gather(*(self._ask(r, "health", timeout_s=limit) for r in self._replicas))

    async def generate(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        """Sample one prompt on the least busy engine. Raises ``GroupFailed`` if the request exceeds its deadline."""
        replica = min(self._replicas, key=lambda r: r.outstanding)
        limit = self._config.rollout.request_timeout_s
        replica.outstanding += 1
        try:
            completions = await self._ask(
                replica, "generate", prompt.token_ids, sampling, replica.version, timeout_s=limit
            )
        except TimeoutError:
            raise GroupFailed(group_id, "generation_timeout", f"> {limit:g} s on engine-{replica.index}") from None
        finally:
            replica.outstanding -= 1
        await replica.proved.wait()
        return completions

    async def connect(self, link: Link) -> None:
        """Join the learner's link; every engine's workers get ranks of their own in it."""
        per_engine = self._config.rollout.tensor_parallel_size
        limit = self._config.rollout.start_timeout_s
        await asyncio.gather(
            *(self._ask(r, "connect", link, 1 + r.index * per_engine, timeout_s=limit) for r in self._replicas)
        )

    async def receive(self, publication: Publication) -> dict[str, float]:
        """Bring every engine to ``publication``; on return all of them sample with it. Returns the slowest's figures."""
        return _worst(await asyncio.gather(*(self._update(replica, publication) for replica in self._replicas)))

    async def prove(self, publication: Publication, digest: str) -> dict[str, float]:
        """Compare every engine's digest and canary log-probs with the learner's; then results flow.

        Raises ``WeightProofFailed``.
        """
        return _worst(await asyncio.gather(*(self._prove(replica, publication, digest) for replica in self._replicas)))

    async def close_books(self) -> None:
        """Ask every engine for what is still missing in ``slices``."""
        limit = self._config.rollout.request_timeout_s
        self.slices += await asyncio.gather(*(self._ask(r, "times", timeout_s=limit) for r in self._replicas))

    def close(self) -> None:
        """Kill the engines."""
        import ray

        for replica in self._replicas:
            ray.kill(replica.actor)

    async def _update(self, replica: _Replica, publication: Publication) -> dict[str, float]:
        """One engine: pause, receive, resume."""
        started = time.monotonic()
        replica.proved.clear()
        taken = await self._receive_round(replica, publication)
        replica.digests = taken.digests
        self.slices.append(taken.times)
        replica.version = publication.version
        seconds = time.monotonic() - started
        return {
            "sync/seconds": seconds,
            "sync/prepare_seconds": taken.seconds["prepare"],
            "sync/pause_seconds": taken.seconds["paused"],
            "sync/transfer_seconds": taken.seconds["transfer"],
            "sync/stale_kv_gap": taken.stale_kv_gap,
            "sync/recomputed": float(taken.recomputed),
        }

    async def _prove(self, replica: _Replica, publication: Publication, digest: str) -> dict[str, float]:
        started, limit = time.monotonic(), _stage_limit(publication)
        if replica.digests != {digest}:
            found = sorted(replica.digests)
            raise WeightProofFailed(
                f"engine-{replica.index}, version {publication.version}: received {found}, sent {digest}"
            )
        gap = await self._ask(replica, "prove", publication.canary, publication.version, timeout_s=limit)
        if not gap <= self._config.canary_tolerance:
            raise WeightProofFailed(
                f"engine-{replica.index}, version {publication.version}: canary log-probs differ from the learner's "
                f"by {gap:.3g} nats, allowed {self._config.canary_tolerance:g}"
            )
        replica.proved.set()
        return {"sync/proof_seconds": time.monotonic() - started, "sync/canary_gap": gap}

    async def _receive_round(self, replica: _Replica, publication: Publication) -> Received:
        """A failed round leaves the engine paused and is repeated as a whole; resuming it would kill it."""
        # A broadcast that failed has no sender any more: only a snapshot can be taken again.
        tries = 1 if publication.collective else ROUND_TRIES
        for attempt in range(1, tries + 1):
            try:
                taken: Received = await self._ask(replica, "receive", publication, timeout_s=_stage_limit(publication))
                return taken
            except (EngineFailed, TimeoutError):
                raise
            except Exception as error:
                if attempt == tries:
                    raise WeightProofFailed(
                        f"engine-{replica.index} refused version {publication.version} {attempt} times: {one_line(error, 400)}"
                    ) from error
        raise AssertionError("unreachable")

    async def _ask(self, replica: _Replica, method: str, *arguments: Any, timeout_s: float) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(getattr(replica.actor, method).remote(*arguments), timeout_s)
        except RayActorError as error:
            raise EngineFailed(f"engine-{replica.index} died in {method}: {one_line(error, 400)}") from error
        except TimeoutError:
            if method == "generate":
                raise
            raise EngineFailed(f"engine-{replica.index} did not answer {method} within {timeout_s:g} s") from None
        except RayTaskError as error:
            if isinstance(error.cause, MillraceError):
                raise error.cause from error
            if type(error.cause).__name__ == "EngineDeadError":
                raise EngineFailed(f"engine-{replica.index}: vLLM's engine process died in {method}") from error
            raise

    def _spawn(self, index: int) -> Any:
        import ray

        options = self._slots[index].options() | {
            "max_restarts": 0,
            "max_concurrency": 4096,
            "runtime_env": {"env_vars": self._environment | engine_environment(self._config, index)},
        }
        return ray.remote(Engine).options(**options).remote(self._config, index)
