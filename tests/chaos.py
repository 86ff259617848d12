"""A real run as a process, and real faults for its parts: what ``make chaos`` and ``make soak`` share."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "engine": "ray::Engine",
    "learner": "ray::Learner",
    "reward": "ray::RewardWorker",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}
"""What the command line of each kind of process contains."""


class Run:
    """``python launch/run.py ...`` in a session of its own, with everything it says."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.said: list[tuple[float, str]] = []
        """(Seconds since the start, line)."""
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-u", "launch/run.py", *arguments],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._seen: dict[int, psutil.Process] = {}

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.said.append((time.monotonic() - self.started, line.rstrip()))

    @property
    def text(self) -> str:
        """Everything said so far."""
        return "\n".join(line for _, line in list(self.said))

    def until(self, words: str, timeout_s: float = 120.0, after: int = 0) -> int:
        """Wait until a line after the first ``after`` holds ``words``; how many lines there were then."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for number, (_, line) in enumerate(list(self.said)[after:], after + 1):
                if words in line:
                    return number
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text[-3000:]}"
            time.sleep(0.02)
        raise AssertionError(f"nothing said of {words!r} within {timeout_s:g} s:\n{self.text[-3000:]}")

    def wait(self, timeout_s: float) -> int:
        """The exit code; one that does not end in time is shown with what it does."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            spy = [str(Path(sys.executable).with_name("py-spy")), "dump", "--pid", str(self.process.pid)]
            stacks = subprocess.run(spy, capture_output=True, text=True, timeout=30, check=False).stdout
            raise AssertionError(f"still there after {timeout_s:g} s:\n{self.text[-3000:]}\n{stacks}") from None
        self._listener.join(5)
        return code

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of ``kind`` that live; the oldest first."""
        found = []
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                if KINDS[kind] in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def left(self) -> list[str]:
        """Command lines of its processes that still live.

        After a killed driver two agents of Ray's own look for their control plane for a minute, in vain, before they
        end by themselves (measured: 61 s); they hold nothing and are not counted.
        """
        lines = []
        for process in [*self._seen.values()]:
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    lines.append(" ".join(process.cmdline()).strip())
        return [line for line in lines if line not in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]

    def end(self) -> None:
        """Kill it and everything it started."""
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, 10)

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            self._seen |= {p.pid: p for p in [parent, *parent.children(recursive=True)]}
        return list(self._seen.values())


def inflict(run: Run, fault: str, chance: random.Random) -> bool:
    """``engine kill``, ``learner stop``, ...: one process of the kind, by chance; False if there is none."""
    kind, action = fault.split()
    victims = run.processes(kind)
    if not victims:
        return False
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action]
    with contextlib.suppress(psutil.Error):
        chance.choice(victims).send_signal(number)
        return True
    return False


def pause(run: Run, kind: str, seconds: float) -> None:
    """Stop every process of ``kind`` for a while."""
    victims = run.processes(kind)
    assert victims, f"no {kind}"
    for victim in victims:
        victim.suspend()
    time.sleep(seconds)
    for victim in victims:
        victim.resume()
