"""Work in processes of their own, as the pools see it: an actor answers calls, and a slot is the place that it lives in.

The pools are given slots and know nothing of what is behind them. ``launch/ray_actors.py`` has those of a cluster,
``launch/simulated.py`` some that only let time pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

NAME, LOGS = "MILLRACE_ACTOR", "MILLRACE_LOGS"
"""Environment of an actor's process: what it is called, and the folder for what it prints."""


def named(name: str) -> dict[str, str]:
    """Environment of a process that is called ``name``."""
    return {NAME: name}


class ActorDied(Exception):
    """The actor's process has ended, for good."""


class ActorUnreachable(Exception):
    """The actor could not be reached; it may be again."""


class ArgumentLost(ActorUnreachable):
    """What another actor had offered for the call is lost, most often with that actor; the one that was called is well."""


class Call(NamedTuple):
    """A call under way."""

    answer: asyncio.Future[Any]
    """What the method returned or raised; or ``ActorDied``, ``ActorUnreachable``, ``ArgumentLost``.

    Cancelling it leaves the call as it is.
    """
    abort: Callable[[], None]
    """Nobody waits any more: the actor need not go on with it."""


class Actor(Protocol):
    """An object in a process of its own."""

    def call(self, method: str, *arguments: Any) -> Call:
        """Begin a call."""

    def offer(self, method: str, *arguments: Any) -> Any:
        """What a call returns, as an argument for calls of other actors: it does not come here."""

    async def node(self) -> str:
        """Where in the cluster it lives. Raises ``ActorDied``."""

    def kill(self) -> None:
        """End the process and its children, at once."""

    def release(self) -> None:
        """End a process that is as it should be."""


class Slot(Protocol):
    """A place in the cluster for one actor at a time."""

    async def ready(self) -> None:
        """Wait until the place is there; a node that is lost takes it away, and another may bring it back."""

    def spawn(self, kind: type, *arguments: Any, environment: dict[str, str], concurrency: int = 1) -> Actor:
        """``kind(*arguments)`` in a new process here, with ``environment`` beside what it inherits.

        At most ``concurrency`` of its calls run at the same time.
        """

    def run(self, function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        """What ``function(*arguments)`` returns here."""

    def share(self, value: Any) -> Any:
        """``value`` as an argument for calls of several actors, stored once."""

    def free(self) -> None:
        """Give the place back."""


class Places(Protocol):
    """Where a run's actors may live."""

    @property
    def engines(self) -> Sequence[Slot]:
        """A slot for each engine that is there from the start."""

    def another_engine(self) -> Slot:
        """A slot for one more: ready as soon as the cluster has the room."""

    def on(self, node: str) -> Slot:
        """A slot for something light on ``node``."""
