"""Ray's side of ``shared/actors.py``: actors in the bundles of placement groups, and Ray's exceptions in our own words."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from shared.actors import LOGS, NAME, ActorDied, ActorUnreachable, ArgumentLost, Call
from shared.errors import last_raised, one_line


class _Process(NamedTuple):
    """Where an actor lives."""

    pid: int
    node: str


class RayActor:
    """An actor of Ray's; on this node its process is known by number, so that it can be ended at once."""

    def __init__(self, handle: Any, log: Path | None = None) -> None:
        """``log``: where it writes what it prints."""
        self._handle, self._log = handle, log
        self._gone = False
        """Ray says that the process has ended: another may have its number."""
        self._process = self.call("__ray_call__", _process).answer

    def call(self, method: str, *arguments: Any) -> Call:
        """See ``Actor``."""
        reference = getattr(self._handle, method).remote(*arguments)
        answer = asyncio.ensure_future(self._answer(reference))
        answer.add_done_callback(_forget)
        return Call(answer, partial(_cancel, reference))

    def offer(self, method: str, *arguments: Any) -> Any:
        """See ``Actor``: a reference, which Ray resolves where the call is."""
        return getattr(self._handle, method).remote(*arguments)

    async def node(self) -> str:
        """See ``Actor``."""
        process: _Process = await asyncio.shield(self._process)
        return process.node

    def kill(self) -> None:
        """See ``Actor``; Ray alone takes five seconds where the process is stopped."""
        import ray

        if (pid := self._pid_here()) is not None:
            kill_process(pid)
        ray.kill(self._handle)

    def release(self) -> None:
        """See ``Actor``: Ray knows this end for one that was wanted."""
        import ray

        if (pid := self._pid_here()) is not None:
            kill_children(pid)
        ray.kill(self._handle)

    async def _answer(self, reference: Any) -> Any:
        from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

        try:
            return await reference
        except ActorUnavailableError as error:
            raise ActorUnreachable(one_line(error, 400)) from None
        except RayTaskError as error:
            if isinstance(error.cause, RayError):
                raise ArgumentLost(one_line(error.cause, 400)) from None
            raise error.cause from error
        except RayError as error:  # It died, or its place is gone before it came up.
            self._gone = True
            where = f" (log: {self._log})" if self._log else ""
            raise ActorDied(_brief(error) + where) from None

    def _pid_here(self) -> int | None:
        import ray

        known = self._process.done() and not self._process.cancelled() and not self._process.exception()
        if self._gone or not known:
            return None
        process, self._gone = self._process.result(), True
        return process.pid if process.node == ray.get_runtime_context().get_node_id() else None


@dataclass(frozen=True)
class RaySlot:
    """Resources in a bundle of a placement group; without a group, on ``node``, or else where Ray has least to do."""

    resources: dict[str, float]
    group: Any = None
    bundle: int = 0
    node: str = ""

    async def ready(self) -> None:
        """See ``Slot``."""
        if self.group is not None:
            await self.group.ready()

    def spawn(self, kind: type, *arguments: Any, environment: dict[str, str], concurrency: int = 1) -> RayActor:
        """See ``Slot``."""
        import ray

        options = self._options(self.resources) | {
            "max_restarts": 0,
            "max_concurrency": concurrency,
            "runtime_env": {"env_vars": environment},
        }
        log = log_file(environment)
        return RayActor(ray.remote(_logged(kind) if log else kind).options(**options).remote(*arguments), log)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        """See ``Slot``; takes none of its resources."""
        import ray

        answer: Awaitable[Any] = ray.remote(function).options(**self._options({})).remote(*arguments)
        return answer

    def share(self, value: Any) -> Any:
        """See ``Slot``: in the object store."""
        import ray

        return ray.put(value)

    def free(self) -> None:
        """See ``Slot``."""
        from ray.util import remove_placement_group

        if self.group is not None:
            remove_placement_group(self.group)

    def _options(self, resources: dict[str, float]) -> dict[str, Any]:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        where: Any = "SPREAD"
        if self.group is not None:
            where = PlacementGroupSchedulingStrategy(self.group, self.bundle)
        elif self.node:
            where = NodeAffinitySchedulingStrategy(self.node, soft=False)
        taken = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
        return taken | {"scheduling_strategy": where}


def slots_of(bundle: dict[str, float], count: int) -> list[RaySlot]:
    """Return ``count`` places of a ``bundle`` each, reserved together; an empty bundle reserves nothing."""
    from ray.util import placement_group

    if not bundle:
        return [RaySlot({})] * count
    group = placement_group([bundle] * count, strategy="PACK")
    return [RaySlot(bundle, group, i) for i in range(count)]


def log_file(environment: Mapping[str, str]) -> Path | None:
    """The log of a process with this environment, if it has one."""
    folder, name = environment.get(LOGS), environment.get(NAME)
    return Path(folder) / f"{name}.log" if folder and name else None


def _logged(kind: type) -> type:
    """``kind``, but what its process prints, libraries and children included, goes to its own log."""

    class Logged(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            _print_into(log_file(os.environ))
            super().__init__(*arguments)

    Logged.__name__ = Logged.__qualname__ = kind.__name__
    return Logged


def _print_into(log: Path | None) -> None:
    if log is None or not log.parent.is_dir():  # A host without the run folder keeps Ray's own log.
        return
    with log.open("ab", buffering=0) as file:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def kill_process(pid: int) -> None:
    """End a process and its children, which nobody else would end."""
    import psutil

    kill_children(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()


def kill_children(pid: int) -> None:
    """End vLLM's own processes, where it has some.

    Python's tracker of shared memory is spared: it removes what the others leave in /dev/shm, and ends by itself.
    """
    import psutil

    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any("multiprocessing.resource_tracker" in part for part in child.cmdline()):
                child.kill()


def _brief(error: Exception) -> str:
    """How Ray's text begins, and what was raised in the actor; without a traceback, how the text ends."""
    text = str(error).strip()
    first, *rest = text.splitlines() or [type(error).__name__]
    heading = one_line(first.partition("ray::")[0]).rstrip(" ,")
    return f"{heading} … {one_line(last_raised(text) or rest[-1], 500)}" if rest else heading


def _process(_: Any) -> _Process:
    import ray

    return _Process(os.getpid(), ray.get_runtime_context().get_node_id())


def _forget(answer: asyncio.Future[Any]) -> None:
    """Who made the call may have gone away: nobody looks at what is late, also if it is an error."""
    if not answer.cancelled():
        answer.exception()


def _cancel(reference: Any) -> None:
    import ray

    if ray.is_initialized():  # Else the call would start another Ray.
        ray.cancel(reference)
