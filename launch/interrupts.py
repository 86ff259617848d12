"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM, and SIGHUP of a terminal that closes.

Every verb ends with exit code 128 plus the signal's number. A run saves what it has learned before it ends; a second signal
ends it at once. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from shared.checkpoints import all_of
from shared.errors import MillraceError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Python raises Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


class Interrupted(MillraceError):
    """A run that a signal has ended, with what it left."""

    def __init__(self, number: int, story: str) -> None:
        super().__init__(number, story)
        self.number, self.story, self.exit_code = number, story, 128 + number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}; {self.story}"


class Caught:
    """The signal that came first; None before."""

    number: int | None = None


@contextmanager
def raised() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGHUP raise ``Ended`` where they would kill the process."""

    def end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    with _handled({number: end for number in SIGNALS[1:] if _main() and signal.getsignal(number) == signal.SIG_DFL}):
        yield


@contextmanager
def cancelling(task: asyncio.Task[None]) -> Iterator[Caught]:
    """Inside the block, the first signal cancels ``task``, and the next one ends the process at once."""
    caught, loop = Caught(), task.get_loop()

    def begin(number: int) -> None:
        name = signal.Signals(number).name
        print(f"{name}: ending the run; a second signal ends it at once", flush=True)
        task.cancel()

    def end(number: int, _: FrameType | None) -> None:
        if caught.number is not None:
            os.write(2, f"interrupted again: ended at once\nexit code {128 + number}\n".encode())
            os._exit(128 + number)
        caught.number = number
        loop.call_soon_threadsafe(begin, number)

    with _handled({number: end for number in SIGNALS if _main() and signal.getsignal(number) != signal.SIG_IGN}):
        yield caught


@contextmanager
def kept() -> Iterator[None]:
    """Keep this process's signal handlers inside the block, in which Ray starts and sets its own.

    The processes that are started inside ignore SIGHUP: a terminal that closes sends it to all of them, and a run could
    not save any more what its learner has learned.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS} if _main() else {}
    if before:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def story(folder: Path, learned: int, replaced: str, resume: str) -> str:
    """Say what an interrupted run in ``folder`` has saved of ``learned`` steps, what is lost, and how it is resumed.

    ``replaced``: the run that it was to replace, which is back in ``folder``; empty if there is none. ``resume``: its setting.
    """
    place = folder / "unfinished" if replaced else folder
    back = f"the {replaced} that it was to replace is back in {folder}, and " if replaced else ""
    newest = [int(path.name.rpartition("-")[2]) for path in all_of(place / "checkpoints")[:1]]
    if not newest:
        lost = f"no checkpoint was written: {_steps(learned)} lost" if learned else "nothing was learned yet"
        return f"{back}{lost}. The same command begins again"
    lost = f", {_steps(learned - newest[0])} after it lost" if learned > newest[0] else ", nothing is lost"
    command = f"millrace resume {shlex.quote(_near(place))}"
    again = "the same command, or " if resume == "auto" else ""
    return f"{back}step {newest[0]}{' of this one' * bool(replaced)} is saved{lost}. To go on: {again}{command}"


def _steps(count: int) -> str:
    return f"{count} step is" if count == 1 else f"{count} steps are"


def _near(place: Path) -> str:
    """Return ``place`` relative to the working directory if it lies below it, else ``place`` itself."""
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _handled(handlers: dict[signal.Signals, object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
