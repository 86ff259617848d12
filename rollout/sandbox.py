"""Child processes for code that may hang, crash or attack: started, limited, killed with everything they started.

``subprocess`` is a child in a session of its own under resource limits; ``sandbox`` puts bubblewrap around it: no
network, no host files, no environment, no capabilities, no new processes. Invariant: at a deadline the whole
process group is dead, whatever it was doing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.reward_calls import CallFailed
from rollout.reward_child import plain
from rollout.reward_loading import visible_files
from rollout.seccomp import seccomp_filter
from shared.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_LIMIT = 64 << 10
ANSWER_LIMIT = 64 << 20
FAILURES = {"E302", "E303", "E304", "E305", "E306"}
START_LIMIT_S = 60.0
PROGRAMS = "rollout.sandboxed_program"
"""The module that starts a process for each test of a program."""


@dataclass(frozen=True)
class Limits:
    """What one child may use."""

    cpu_s: int
    """CPU seconds of one call."""
    memory_mb: int
    """Address space."""
    file_mb: int = 1
    """Largest file it may write."""
    files: int = 64
    """Open files."""


SANDBOX_LIMITS = Limits(cpu_s=2, memory_mb=512)
CHILD_LIMITS = Limits(cpu_s=10, memory_mb=8192, file_mb=1024, files=1024)


class Child:
    """One isolated process that serves calls of one reward function, one at a time."""

    def __init__(
        self,
        spec: dict[str, Any],
        key: str,
        limits: Limits,
        sandboxed: bool,
        nan_is_none: bool = False,
        main: str = "rollout.reward_child",
    ) -> None:
        """Start it and wait until the function is imported. Raises ``InputError`` E301 or E308.

        ``main``: the module of the process; ``PROGRAMS`` may fork, all others may not.
        """
        self._limits, self.output, self.cut = limits, bytearray(), False
        answers, answers_end = os.pipe()
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {main} import main; main({answers_end})"
        command = [sys.executable, "-B", "-c", code]
        self._seccomp = None
        if sandboxed:
            self._seccomp = tempfile.TemporaryFile()  # noqa: SIM115 - closed in kill()
            self._seccomp.write(seccomp_filter(processes=main == PROGRAMS))
            self._seccomp.seek(0)
            command = [*wall(_source_of(spec), self._seccomp.fileno(), first=main == PROGRAMS), *command]
        passed = (answers_end, self._seccomp.fileno()) if self._seccomp else (answers_end,)
        # The parent is killed as a whole at times; then the kernel ends the child too (see reward_child).
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            start_new_session=True,
            close_fds=True,
            env={} if sandboxed else None,
            bufsize=0,
        )
        os.close(answers_end)
        self._answers = answers
        os.set_blocking(self._answers, False)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._drain = threading.Thread(target=self._read_output, daemon=True)
        self._drain.start()
        path = [entry for entry in sys.path if entry]
        hello = {"spec": spec, "key": key, "path": [str(ROOT), *path], "limits": asdict(limits)}
        try:
            answer = self._exchange(hello | {"nan_is_none": nan_is_none}, START_LIMIT_S)
        except CallFailed as failure:
            self.kill()
            said = self.output.decode(errors="replace").strip().rpartition("\n")[2]
            found = f"{failure.found} {said}".strip()
            raise InputError(
                "E301", "reward import failed", key, found, "a child that starts", "see its output"
            ) from None
        if "refused" in answer:
            self.kill()
            raise InputError(*answer["refused"])

    def call(self, payload: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One call, as ``reward_calls.invoke`` answers it. Raises ``CallFailed``; after E304-E306 it may be dead."""
        self.cut = False
        del self.output[:]
        answer = self._exchange(payload, timeout_s)
        if "failed" in answer:
            raise CallFailed(*answer["failed"])
        return answer

    @property
    def alive(self) -> bool:
        """True while it can take a call."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._drain.join(timeout=1.0)
        for stream in (self._process.stdin, self._process.stdout, self._seccomp):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1

    def _exchange(self, value: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        deadline, token = time.monotonic() + timeout_s, secrets.token_hex(8)
        data = json.dumps(value | {"token": token}, default=plain).encode()
        self._send(len(data).to_bytes(4, "big") + data, deadline, timeout_s)
        size = int.from_bytes(self._receive(4, deadline, timeout_s), "big")
        if size > ANSWER_LIMIT:
            raise self._nonsense(f"an answer of {size} bytes")
        # What runs in the child may write answers of its own: nothing in them is believed before it is checked.
        try:
            answer = json.loads(self._receive(size, deadline, timeout_s))
            if answer["token"] != token:
                raise ValueError("an answer to another call")
            if answer.get("failed", None) is not None:
                code, what, found, expected, fix, sample, trace = answer["failed"]
                if code not in FAILURES:
                    raise ValueError(code)
                answer["failed"] = [code, str(what), str(found), str(expected), str(fix), int(sample), str(trace)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self._nonsense("an answer that is none") from None
        checked: dict[str, Any] = answer
        return checked

    def _send(self, data: bytes, deadline: float, timeout_s: float) -> None:
        assert self._process.stdin is not None
        fd, view = self._process.stdin.fileno(), memoryview(data)
        while view:
            _, ready, _ = select.select([], [fd], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._too_slow(timeout_s)
            try:
                view = view[os.write(fd, view) :]
            except (BrokenPipeError, ConnectionError):
                raise self._ended() from None

    def _receive(self, size: int, deadline: float, timeout_s: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._too_slow(timeout_s)
            part = os.read(self._answers, size - len(parts))
            if not part:
                raise self._ended()
            parts += part
        return bytes(parts)

    def _nonsense(self, found: str) -> CallFailed:
        self.kill()
        return CallFailed("E304", "reward raised", found, "numbers", "see the saved sample (worker replaced)")

    def _too_slow(self, timeout_s: float) -> CallFailed:
        self.kill()
        expected, fix = f"<= timeout_s = {timeout_s:g}", "speed it up or raise the limit (worker replaced)"
        return CallFailed("E305", "reward too slow", f"> {timeout_s:g} s", expected, fix)

    def _ended(self) -> CallFailed:
        """Why the process is gone."""
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            code = 0
        self.kill()
        number = -code if code < 0 else code - 128 if code > 128 else 0
        if number == signal.SIGXCPU or (number == signal.SIGKILL and "Killed" in self.output.decode(errors="replace")):
            found, expected = f"> {self._limits.cpu_s} s of CPU", f"<= cpu_s = {self._limits.cpu_s}"
            return CallFailed("E306", "reward over limit", found, expected, "compute less or raise cpu_s")
        found = f"worker ended by signal {number}" if number else f"worker ended with exit code {code}"
        return CallFailed("E304", "reward raised", found, "a number", "see the saved sample (worker replaced)")

    def _read_output(self) -> None:
        """Keep the first 64 KB of what the function prints; take the rest away, so that it never blocks."""
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                room = OUTPUT_LIMIT - len(self.output)
                self.output += part[: max(room, 0)]
                self.cut |= len(part) > room


def wall(visible: list[Path], seccomp_fd: int, first: bool = False) -> list[str]:
    """bubblewrap's command line: everything unshared, the interpreter and ``visible`` read-only, nothing else.

    ``first``: the command is process 1 of the sandbox, which no other process in there can signal.
    """
    command = ["bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv", "--seccomp", str(seccomp_fd)]
    command += ["--as-pid-1"] if first else []
    command += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        link = Path("/") / name
        if link.is_symlink():
            command += ["--symlink", f"usr/{name}", f"/{name}"]
        elif link.is_dir():
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(16 << 20), "--tmpfs", "/tmp"]
    ours = [Path(sys.prefix), Path(sys.base_prefix), ROOT / "rollout", ROOT / "shared", *visible]
    for path in dict.fromkeys(ours):
        if not path.is_relative_to("/usr"):
            command += ["--ro-bind", str(path), str(path)]
    # Run by root, the sandbox's user is root to the kernel: what is not bound read-only has to be made so.
    for mount in ("/proc", "/dev", "/"):
        command += ["--remount-ro", mount]
    return [*command, "--chdir", "/tmp", "--"]


def _source_of(spec: dict[str, Any]) -> list[Path]:
    """The file of a function given as a path, with what it imports; an installed module is visible with its interpreter."""
    source = (spec.get("function") or "").rpartition(":")[0]
    if source.endswith(".py"):
        return visible_files(Path(source).resolve())
    if source and (ROOT / source.partition(".")[0]).is_dir():
        return [ROOT / source.partition(".")[0]]
    return []


@functools.cache
def sandbox_problem() -> str | None:
    """Why sandboxes cannot be built here, or None: tried once, with a real one."""
    if shutil.which("bwrap") is None:
        return "no bubblewrap"
    try:
        with tempfile.TemporaryFile() as program:
            program.write(seccomp_filter())
            program.seek(0)
            command = [*wall([], program.fileno()), sys.executable, "-S", "-c", "print(6 * 7)"]
            tried = subprocess.run(command, pass_fds=(program.fileno(),), capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired, NotImplementedError) as error:
        return str(error)
    if tried.stdout.strip() == b"42":
        return None
    return f"bubblewrap fails ({' '.join(tried.stderr.decode(errors='replace').split())[:120]})"


def require_sandbox(key: str) -> None:
    """Raises ``InputError`` E308 where no sandbox can be built."""
    problem = sandbox_problem()
    if problem:
        fix = "install bubblewrap (and allow user namespaces), or use a non-code reward"
        raise InputError("E308", "no sandbox", key, problem, "bubblewrap and user namespaces", fix)
