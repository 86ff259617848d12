"""An asyncio loop whose clock jumps to the next timer whenever nothing is left to do: hours of waiting in seconds.

``millrace simulate`` runs the real controller in it. Nothing in it may wait for another thread or process.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class _Impatient(selectors.SelectSelector):
    """Never waits: it passes the time instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop in virtual time, in seconds from its beginning."""

    def __init__(self) -> None:
        self._virtual = _Impatient()
        super().__init__(self._virtual)
        # Timers closer together than this run in one turn; below it, adding to the clock might change nothing.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.now

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> Any:  # type: ignore[override]
        """At once, in this thread: another would not know what time it is."""
        future = self.create_future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _clock(loop: VirtualLoop) -> Iterator[None]:
    """``time.monotonic`` tells the loop's time."""
    real, time.monotonic = time.monotonic, loop.time
    try:
        yield
    finally:
        time.monotonic = real


def run(main: Coroutine[Any, Any, T]) -> T:
    """What ``main`` returns, run in virtual time; ``time.monotonic`` is virtual too, ``time.perf_counter`` is not."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        with _clock(loop):
            return runner.run(main)
