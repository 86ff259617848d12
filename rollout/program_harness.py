"""The harness inside the sandbox of ``code_tests``: it starts, watches and ends the processes of single tests.

Its own process runs no program. It forks; the new process gives up the right to fork, takes its limits and works.
Invariants: a program's process holds no expected output, no descriptor of the harness, and can neither signal the
harness nor read its memory; after its test it is dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from rollout.seccomp import deny_calls, seccomp_filter, set_dumpable

MOST_PRINTED = 8 << 20
"""Bytes that a program may print in one test."""
FILES = 256
"""Descriptors of the harness; a program gets fewer."""
VERDICT, JOB, GO = 3, 4, 5
"""Descriptors in a process that runs statements or calls: where its answer goes, the test, and its arrival."""
UNREADABLE = 97
"""Exit code of a process whose program does not compile."""
_Fork = tuple[int, int]
"""A process, and the descriptor that its answer is read from."""


class Harness:
    """Starts the processes of tests, watches them, and ends them."""

    def __init__(
        self, limits: dict[str, int], run: Callable[[list[str]], None], test: Callable[[list[str], list[str]], None]
    ) -> None:
        """Close this process to others. ``run`` and ``test`` are what a new process does with sources, and with setup."""
        self._limits, self._run, self._test, self._filter = limits, run, test, seccomp_filter()
        set_dumpable(False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
        self._nothing = os.open(os.devnull, os.O_RDWR)
        self._loaded: _Fork | None = None
        self._job = self._go = -1
        self._until = 0.0

    def run(self, call: dict[str, Any]) -> dict[str, Any]:
        """Run a program on standard input; answer what it printed, None if it did not end well."""
        self._until = time.monotonic() + call["timeout_s"]
        given = os.memfd_create("input")
        _write_all(given, call["given"].encode("utf-8", "replace"))
        os.lseek(given, 0, os.SEEK_SET)
        read, write = os.pipe()
        process = self._fork({0: given, 1: write}, lambda: self._run(call["sources"]))
        os.close(given)
        os.close(write)
        printed, late = self._watch((process, read))
        code = _end((process, read))
        said = printed.decode("utf-8", "replace") if printed is not None and code == 0 and not late else None
        return {"said": said, "late": late or code == -signal.SIGXCPU, "unreadable": code == UNREADABLE}

    def load(self, call: dict[str, Any]) -> dict[str, Any]:
        """Load a program for ``test``; answer whether it is there."""
        self._until = time.monotonic() + call["timeout_s"]
        self._job = os.memfd_create("job")
        read, write = os.pipe()
        waits, self._go = os.pipe()
        given = {0: self._nothing, 1: self._nothing, VERDICT: write, JOB: self._job, GO: waits}
        process = self._fork(given, lambda: self._test(call["sources"], call["setup"]))
        os.close(write)
        os.close(waits)
        self._loaded = process, read
        said, late = self._watch(self._loaded, line=True)
        if said == b"\n":
            return {"said": "", "late": False}
        return self._answer(None, late)

    def test(self, call: dict[str, Any]) -> dict[str, Any]:
        """Give the loaded program its test; answer what it says."""
        if self._loaded is None:
            return {"said": None, "late": False}
        _write_all(self._job, json.dumps(call["job"]).encode())
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"\n")
        said, late = self._watch(self._loaded)
        return self._answer(said, late)

    def _answer(self, said: bytes | None, late: bool) -> dict[str, Any]:
        """End the loaded program."""
        assert self._loaded is not None
        code = _end(self._loaded)
        late |= code == -signal.SIGXCPU
        os.close(self._job)
        os.close(self._go)
        self._loaded = None
        text = None if said is None or late else said.decode("utf-8", "replace")
        return {"said": text, "late": late, "unreadable": code == UNREADABLE}

    def _fork(self, given: dict[int, int], work: Callable[[], None]) -> int:
        """Start a process that does ``work`` and ends; ``given`` holds its descriptors by number."""
        process = os.fork()
        if process:
            return process
        try:
            self._settle(given)
            work()
        except BaseException:  # Whatever it is, this process must not go on as a second harness.
            traceback.print_exc()
        finally:
            os._exit(1)

    def _settle(self, given: dict[int, int]) -> None:
        """Take the descriptors, the limits and the filter of a process that runs a program."""
        aside = {target: os.dup2(source, FILES // 2 + target) for target, source in given.items()}
        for target, source in aside.items():
            os.dup2(source, target)
        os.closerange(max(2, *given) + 1, FILES)
        set_dumpable(True)
        cpu, memory, size = self._limits["cpu_s"], self._limits["memory_mb"] << 20, self._limits["file_mb"] << 20
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._limits["files"],) * 2)
        deny_calls(self._filter)
        text: dict[str, Any] = {"encoding": "utf-8", "closefd": False}
        streams = {
            "stdin": os.fdopen(0, errors="surrogateescape", **text),
            "stdout": os.fdopen(1, "w", errors="surrogateescape", **text),
            "stderr": os.fdopen(2, "w", errors="backslashreplace", **text),
        }
        vars(sys).update(streams | {f"__{name}__": stream for name, stream in streams.items()})
        sys.argv = ["program.py"]

    def _watch(self, fork: _Fork, line: bool = False) -> tuple[bytes | None, bool]:
        """Read until the process ends, or a ``line`` of it; (its bytes, or None if too many; True if it is late)."""
        process, read = fork
        ended, poll = os.pidfd_open(process), select.poll()
        poll.register(read, select.POLLIN)
        poll.register(ended, select.POLLIN)
        try:
            return self._read(poll, read, line)
        finally:
            os.close(ended)

    def _read(self, poll: select.poll, read: int, line: bool) -> tuple[bytes | None, bool]:
        said = bytearray()
        while (left := self._until - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if read in ready:
                part = os.read(read, 1 << 16)
                said += part
                if not part:  # Its end is closed; the process may still be there.
                    poll.unregister(read)
                if len(said) > MOST_PRINTED:
                    return None, False
            if (line and b"\n" in said) or (ready and read not in ready):
                return bytes(said), False
        return None, True


def _end(fork: _Fork) -> int:
    """Kill the process if it is still there; its exit code, negative for a signal."""
    process, read = fork
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
