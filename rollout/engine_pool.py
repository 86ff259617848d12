"""The engines as one object: routes groups, and takes every engine through a publication of weights.

Invariants: an engine serves a version only after the digest of its bytes and the canary's log-probs matched the
learner's, and nothing is dispatched to an engine between its resume and that proof. Engines are updated
independently and in parallel.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from rollout.engine import Engine, Sampling, engine_environment
from shared.config import Config
from shared.errors import EngineFailed, GroupFailed, MillraceError, WeightProofFailed, one_line
from shared.types import Completion, Prompt
from shared.weights import Publication

ROUND_TRIES = 3


@dataclass
class _Replica:
    """One engine actor, as the pool sees it."""

    index: int
    actor: Any
    version: int = -1
    """Newest policy version proved here."""
    outstanding: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Open while requests may be dispatched here."""


class EnginePool:
    """``config.rollout.num_engines`` engines; ``placements`` holds one Ray placement group for each."""

    def __init__(self, config: Config, placements: list[Any], environment: dict[str, str]) -> None:
        self._config, self._placements, self._environment = config, placements, environment
        self._replicas: list[_Replica] = []

    async def start(self) -> None:
        """Start all engines side by side and wait until each answers. Raises ``EngineFailed``."""
        self._replicas = [_Replica(i, self._spawn(i)) for i in range(self._config.rollout.num_engines)]
        limit = self._config.rollout.start_timeout_s
        await asyncio.gather(*(self._ask(r, "health", timeout_s=limit) for r in self._replicas))

    async def generate(self, group_id: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        """Sample one prompt on the least busy engine. Raises ``GroupFailed`` if the request exceeds its deadline."""
        replica = await self._choose()
        replica.outstanding += 1
        try:
            return await self._ask(
                replica, "generate", prompt.token_ids, sampling, replica.version, timeout_s=self._config.rollout.request_timeout_s
            )
        except TimeoutError:
            raise GroupFailed(group_id, "generation_timeout", f"> {self._config.rollout.request_timeout_s:g} s on engine-{replica.index}") from None
        finally:
            replica.outstanding -= 1

    async def receive(self, publication: Publication) -> dict[str, float]:
        """Bring every engine to ``publication`` and prove it there. Returns the slowest engine's figures."""
        reports = await asyncio.gather(*(self._update(replica, publication) for replica in self._replicas))
        worst = {name: max(report[name] for report in reports) for name in reports[0]}
        return {f"sync/{name}": value for name, value in worst.items()} | {"sync/bytes": float(publication.nbytes)}

    def close(self) -> None:
        """Kill the engines."""
        import ray

        for replica in self._replicas:
            ray.kill(replica.actor)

    async def _update(self, replica: _Replica, publication: Publication) -> dict[str, float]:
        """One engine: pause, receive, resume, prove; then, and only then, open its gate again."""
        clock = asyncio.get_running_loop().time
        started = clock()
        replica.gate.clear()
        limit = 30 + publication.nbytes / 100e6
        stages = await self._receive_round(replica, publication, limit)
        resumed = clock()
        gap = await self._ask(replica, "prove", publication.canary, publication.version, timeout_s=limit)
        if not gap <= self._config.canary_tolerance:
            raise WeightProofFailed(
                f"engine-{replica.index}, version {publication.version}: canary log-probs differ from the learner's "
                f"by {gap:.3g} nats, allowed {self._config.canary_tolerance:g}"
            )
        replica.version = publication.version
        replica.gate.set()
        return {
            "seconds": clock() - started,
            "pause_seconds": stages["paused"],
            "transfer_seconds": stages["transfer"],
            "proof_seconds": clock() - resumed,
            "canary_gap": gap,
        }

    async def _receive_round(self, replica: _Replica, publication: Publication, limit: float) -> dict[str, float]:
        """A failed round leaves the engine paused and is repeated as a whole; resuming it would kill it."""
        for attempt in range(1, ROUND_TRIES + 1):
            try:
                return await self._ask(replica, "receive", publication, timeout_s=limit)
            except (EngineFailed, TimeoutError):
                raise
            except Exception as error:
                if attempt == ROUND_TRIES:
                    raise WeightProofFailed(
                        f"engine-{replica.index} refused version {publication.version} {attempt} times: {one_line(error, 400)}"
                    ) from error
        raise AssertionError("unreachable")

    async def _choose(self) -> _Replica:
        """The open engine with the fewest outstanding groups; waits for the first to open if all are closed."""
        while not (ready := [r for r in self._replicas if r.gate.is_set()]):
            waits = [asyncio.ensure_future(r.gate.wait()) for r in self._replicas]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return min(ready, key=lambda r: r.outstanding)

    async def _ask(self, replica: _Replica, method: str, *arguments: Any, timeout_s: float) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(getattr(replica.actor, method).remote(*arguments), timeout_s)
        except RayActorError as error:
            raise EngineFailed(f"engine-{replica.index} died in {method}: {one_line(error, 400)}") from error
        except TimeoutError:
            if method in ("generate",):
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
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placement = self._placements[index]
        bundle = placement.bundle_specs[0]
        options = {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "max_restarts": 0,
            "max_concurrency": 4096,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placement, 0),
            "runtime_env": {"env_vars": self._environment | engine_environment(self._config, index)},
        }
        return ray.remote(Engine).options(**options).remote(self._config, index)
