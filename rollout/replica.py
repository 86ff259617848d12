"""One life of one engine, as the pool sees it: every call with a deadline, and the way through a publication.

A lost engine never comes back as the same ``Replica``; the next life is another one. Invariant: once a replica has ended,
nothing that its actor still answers reaches anyone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any, NamedTuple

from rollout.engine import Engine, Received, Sampling
from rollout.vllm_setup import engine_environment
from shared.config import Config
from shared.errors import EngineFailed, MillraceError, WeightProofFailed, one_line
from shared.ledger import TimeSlice
from shared.types import Completion, Prompt
from shared.weights import Publication

ROUND_TRIES = 3


def stage_limit(publication: Publication) -> float:
    """Seconds that a stage of a weight update may take: 30 plus the bytes at 100 MB/s."""
    return 30 + publication.nbytes / 100e6


class Unanswered(Exception):
    """An engine did not answer in time; it may do so later."""


class Unreachable(Unanswered):
    """Ray could not reach an engine; that may pass."""


class _Place(NamedTuple):
    """Where an actor's process lives."""

    pid: int
    node: str


def _place(_: Any) -> _Place:
    import ray

    return _Place(os.getpid(), ray.get_runtime_context().get_node_id())


class Replica:
    """An engine actor in ``slot``, from its spawn to its end."""

    def __init__(self, config: Config, index: int, slot: Any, environment: dict[str, str]) -> None:
        import ray

        self._config = config
        self.index, self.name = index, f"engine-{index}"
        options = slot.options() | {
            "max_restarts": 0,
            "max_concurrency": 4096,
            "runtime_env": {"env_vars": environment | engine_environment(config, index)},
        }
        self._actor = ray.remote(Engine).options(**options).remote(config, index)
        self._place: _Place | None = None
        self._gone = False
        """Ray says that the process has ended."""
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outstanding = 0
        self.finished_at = 0.0
        """When a request finished last, on the monotonic clock."""
        self.catching_up = False
        """Takes publications by itself, not together with the others."""
        self.publication: Publication | None = None
        """The one taken last."""
        self.proved = False
        """Whether the weights loaded now are proved."""
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
        return self._end.done()

    async def start(self, timeout_s: float) -> None:
        """Wait until the engine answers. Raises ``EngineFailed``."""
        await self.ask("health", timeout_s=timeout_s)
        self._place = await self.ask("__ray_call__", _place, timeout_s=timeout_s)

    async def generate(self, prompt: Prompt, sampling: Sampling, timeout_s: float) -> tuple[Completion, ...]:
        """Sample one prompt. Raises ``EngineFailed``, ``Unreachable`` or, after ``timeout_s``, ``Unanswered``."""
        arguments = prompt.token_ids, sampling, self.version
        self.outstanding += 1
        try:
            completions: tuple[Completion, ...] = await self.try_ask("generate", *arguments, timeout_s=timeout_s)
        finally:
            self.outstanding -= 1
        self.finished_at = time.monotonic()
        return completions

    async def take(self, publication: Publication) -> TimeSlice:
        """Pause, receive, resume. Raises ``EngineFailed``, or ``WeightProofFailed`` after ``ROUND_TRIES`` refusals."""
        started, self.proved = time.monotonic(), False
        received = await self._receive_round(publication)
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
            raise WeightProofFailed(f"{where}: received {sorted(self._digests)}, sent {digest}")
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
        self.proved = True
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
            self._end.result()
        reference = getattr(self._actor, method).remote(*arguments)
        call = asyncio.ensure_future(reference)
        try:
            await asyncio.wait((call, self._end), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if call.done() and not self.ended:
                return self._result(call, method)
        finally:
            if not call.done() and method == "generate":
                _cancel(reference)
            call.cancel()
            call.add_done_callback(_forget)
        if self.ended:
            self._end.result()
        raise Unanswered(f"did not answer {method} within {timeout_s:g} s")

    def _result(self, call: asyncio.Future[Any], method: str) -> Any:
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        try:
            return call.result()
        except ActorUnavailableError as error:
            raise Unreachable(f"could not be reached for {method}: {one_line(error, 400)}") from None
        except RayActorError as error:
            self._gone = True
            raise EngineFailed(f"{self.name} died in {method}: {one_line(error, 400)}") from error
        except RayTaskError as error:
            if isinstance(error.cause, MillraceError):
                raise error.cause from error
            if type(error.cause).__name__ == "EngineDeadError":
                raise EngineFailed(f"{self.name}: vLLM's engine process died in {method}") from error
            raise

    def settled(self) -> bool:
        """Whether it is known what becomes of results: the weights are proved, or the engine is lost."""
        return self.proved or self.ended

    async def ends_within(self, seconds: float) -> bool:
        """Wait so long, or until it is lost; whether it is."""
        await asyncio.wait((self._end,), timeout=seconds)
        return self.ended

    def end(self, error: Exception) -> None:
        """From now on whoever waits for it, or asks it, gets ``error``."""
        self._end.set_exception(error)
        self._end.exception()  # Nobody may be waiting.

    def release(self) -> None:
        """End a process that is as it should be: Ray knows this end for one that was wanted."""
        import ray

        if self._place is not None and self._place.node == ray.get_runtime_context().get_node_id():
            _kill_children(self._place.pid)
        self._place = None
        ray.kill(self._actor)

    def kill(self) -> None:
        """End its process, and on this node at once: Ray takes five seconds where the process is stopped."""
        import ray

        if self._place is not None and not self._gone and self._place.node == ray.get_runtime_context().get_node_id():
            _kill(self._place.pid)
        self._place = None  # Another process may have the number from now on.
        ray.kill(self._actor)


def _reason(error: Exception) -> str:
    """What the actor's code raised, without Ray's wrapping and traceback."""
    cause = getattr(error, "cause", error)
    return one_line(cause if isinstance(cause, MillraceError) else f"{type(cause).__name__}: {cause}", 400)


def _forget(call: asyncio.Future[Any]) -> None:
    """Nobody looks at what is late, also if it is an error."""
    if not call.cancelled():
        call.exception()


def _cancel(reference: Any) -> None:
    import ray

    if ray.is_initialized():  # Else the call would start another Ray.
        ray.cancel(reference)


def _kill(pid: int) -> None:
    """End a process and its children, which nobody else would end."""
    import psutil

    _kill_children(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()


def _kill_children(pid: int) -> None:
    """vLLM's own processes, where it has some."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
