"""One life of one engine, as the pool sees it: every call with a deadline, and the way through a publication.

A lost engine never comes back as the same ``Replica``; the next life is another one. Invariant: once a replica has ended,
nothing that its actor still answers reaches anyone.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rollout.engine import Engine, Received, Sampling
from rollout.engine_health import EngineHealth
from rollout.vllm_setup import engine_environment
from shared.actors import ActorDied, ActorUnreachable, Slot, named
from shared.config import Config
from shared.errors import EngineFailed, MillraceError, WeightProofFailed, one_line
from shared.fingerprints import differing, summary
from shared.ledger import TimeSlice
from shared.types import Completion, Prompt
from shared.weights import Publication, stage_limit

ROUND_TRIES = 3


def slowest(reports: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest value of each figure in ``reports``, one of each engine."""
    names = {name for report in reports for name in report}
    return {name: max(report[name] for report in reports if name in report) for name in names}


class Unanswered(Exception):
    """An engine did not answer in time; it may do so later."""


class Unreachable(Unanswered):
    """An engine could not be reached; that may pass."""


class Replica:
    """An engine actor in ``slot``, from its spawn to its end."""

    def __init__(
        self, config: Config, index: int, slot: Slot, environment: dict[str, str], health: EngineHealth
    ) -> None:
        """``health`` is that of the place, over all its lives."""
        self._config = config
        self.index, self.name, self.health = index, f"engine-{index}", health
        environment = environment | engine_environment(config) | named(self.name)
        self._actor = slot.spawn(Engine, config, index, environment=environment, concurrency=4096)
        self.end_of_life: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outstanding = 0
        """Requests that it has; kept by ``Traffic``."""
        self.finished_at = 0.0
        """When a request finished last, on the monotonic clock."""
        self.catching_up = False
        """Takes publications by itself, not together with the others."""
        self.publication: Publication | None = None
        """The one taken last."""
        self._proved = asyncio.Event()
        self._digests: set[str] = set()
        """Of the bytes that its workers took last."""
        self.taken: dict[str, float] = {}
        self.proof: dict[str, float] = {}
        """Figures of the last publication, and of its proof."""

    @property
    def version(self) -> int:
        """Policy version of the weights loaded here; -1 before the first."""
        return self.publication.version if self.publication is not None else -1

    @property
    def ended(self) -> bool:
        """True once it is lost."""
        return self.end_of_life.done()

    @property
    def runs(self) -> bool:
        """True if it has started and is not lost."""
        return not self.ended and self.health.runs

    @property
    def serves(self) -> bool:
        """True if it may be given requests."""
        return not self.ended and self.health.state == "healthy"

    @property
    def trusted(self) -> bool:
        """Whether there is reason to wait for it: it runs and nothing is suspected."""
        return not self.ended and self.health.state in ("stale", "healthy")

    @property
    def proved(self) -> bool:
        """Whether the weights loaded now are proved."""
        return self._proved.is_set()

    def doubt(self) -> None:
        """What it holds counts as not proved."""
        self._proved.clear()

    async def start(self, timeout_s: float) -> None:
        """Wait until the engine answers. Raises ``EngineFailed``."""
        await self.ask("health", timeout_s=timeout_s)

    async def generate(self, prompt: Prompt, sampling: Sampling, timeout_s: float) -> tuple[Completion, ...]:
        """Sample one prompt. Raises ``EngineFailed``, ``Unreachable`` or, after ``timeout_s``, ``Unanswered``."""
        arguments = prompt.token_ids, sampling, self.version
        completions: tuple[Completion, ...] = await self.try_ask("generate", *arguments, timeout_s=timeout_s)
        self.finished_at = time.monotonic()
        return completions

    async def node(self) -> str:
        """Where in the cluster it lives. Raises ``EngineFailed``."""
        try:
            return await self._actor.node()
        except (ActorDied, ActorUnreachable) as error:
            raise EngineFailed(f"{self.name} died: {error}") from None

    async def take(self, publication: Publication, here: Publication) -> TimeSlice:
        """Pause, receive, resume; ``here`` is the ``publication`` as this host has it.

        Raises ``EngineFailed``, or ``WeightProofFailed`` after ``ROUND_TRIES`` refusals.
        """
        started = time.monotonic()
        self.doubt()
        received = await self._receive_round(here)
        self.publication, self._digests = publication, received.digests
        self.taken = {
            "sync/seconds": time.monotonic() - started,
            "sync/prepare_seconds": received.seconds["prepare"],
            "sync/pause_seconds": received.seconds["paused"],
            "sync/transfer_seconds": received.seconds["transfer"],
            "sync/stale_kv_gap": received.stale_kv_gap,
            "sync/recomputed": float(received.recomputed),
        }
        return received.times

    async def prove(self, publication: Publication, digest: str) -> None:
        """Compare the digest and the canary's log-probs with the learner's. Raises ``WeightProofFailed``."""
        started, where = time.monotonic(), f"{self.name}, version {publication.version}"
        if self._digests != {digest}:
            raise WeightProofFailed(f"{where}: {_difference(publication, digest, self._digests)}")
        limit = stage_limit(publication)
        try:
            gap = await self.ask("prove", publication.canary, publication.version, timeout_s=limit)
        except EngineFailed:
            raise
        except Exception as error:
            raise WeightProofFailed(f"{where}: no canary log-probs: {_reason(error)}") from error
        if not gap <= self._config.canary_tolerance:
            raise WeightProofFailed(
                f"{where}: canary log-probs differ from the learner's "
                f"by {gap:.3g} nats, allowed {self._config.canary_tolerance:g}"
            )
        self._proved.set()
        self.proof = {"sync/proof_seconds": time.monotonic() - started, "sync/canary_gap": gap}

    async def _receive_round(self, publication: Publication) -> Received:
        """A failed round leaves the engine paused and is repeated as a whole; resuming it would kill it."""
        # A broadcast that failed has no sender any more: only a snapshot can be taken again.
        tries = 1 if publication.collective else ROUND_TRIES
        for attempt in range(1, tries + 1):
            try:
                taken: Received = await self.ask("receive", publication, timeout_s=stage_limit(publication))
                return taken
            except EngineFailed:
                raise
            except Exception as error:
                if attempt == tries:
                    raise WeightProofFailed(
                        f"{self.name} refused version {publication.version} {attempt} times: {_reason(error)}"
                    ) from error
        raise AssertionError("unreachable")

    async def ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """What the engine answers to ``method``. Raises ``EngineFailed`` when it is lost or silent."""
        try:
            return await self.try_ask(method, *arguments, timeout_s=timeout_s)
        except Unanswered as error:
            raise EngineFailed(f"{self.name} {error}") from None

    async def try_ask(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """As ``ask``, but raises ``Unanswered`` where the engine may answer yet.

        A caller that goes away, in time or cancelled, takes a ``generate`` with it; other calls go on to their end.
        """
        if self.ended:
            self.end_of_life.result()
        answer, abort = self._actor.call(method, *arguments)
        try:
            await asyncio.wait((answer, self.end_of_life), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and not self.ended:
                return self._result(answer, method)
        finally:
            if not answer.done() and method == "generate":
                abort()
            answer.cancel()
        if self.ended:
            self.end_of_life.result()
        raise Unanswered(f"did not answer {method} within {timeout_s:g} s")

    def _result(self, answer: asyncio.Future[Any], method: str) -> Any:
        try:
            return answer.result()
        except ActorUnreachable as error:
            raise Unreachable(f"could not be reached for {method}: {error}") from None
        except ActorDied as error:
            raise EngineFailed(f"{self.name} died in {method}: {error}") from error
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise EngineFailed(f"{self.name}: vLLM's engine process died in {method}") from error
            raise

    async def settled(self) -> None:
        """Wait until it is known what becomes of results: the weights are proved, or the engine is lost."""
        if not self.proved and not self.ended:
            proof = asyncio.ensure_future(self._proved.wait())
            try:
                await asyncio.wait((proof, self.end_of_life), return_when=asyncio.FIRST_COMPLETED)
            finally:
                proof.cancel()

    async def ends_within(self, seconds: float) -> bool:
        """Wait so long, or until it is lost; whether it is."""
        await asyncio.wait((self.end_of_life,), timeout=seconds)
        return self.ended

    def end(self, error: Exception) -> None:
        """From now on whoever waits for it, or asks it, gets ``error``."""
        self.end_of_life.set_exception(error)
        self.end_of_life.exception()  # Nobody may be waiting.

    def release(self) -> None:
        """End a process that is as it should be."""
        self._actor.release()

    def kill(self) -> None:
        """End its process."""
        self._actor.kill()


def _difference(publication: Publication, sent: str, received: set[str]) -> str:
    """Say what an engine received, or which tensors differ where each has a fingerprint."""
    names = [tensor.name for tensor in publication.tensors]
    wrong = sorted({name for text in received for name in differing(sent, text, names)})
    if wrong:
        return f"received {len(wrong)} of {len(names)} tensors otherwise than they were sent: {', '.join(wrong[:3])}"
    return f"received {sorted(summary(text) for text in received)}, sent {summary(sent)}"


def _reason(error: Exception) -> str:
    """What the actor's code raised."""
    return one_line(error if isinstance(error, MillraceError) else f"{type(error).__name__}: {error}", 400)
