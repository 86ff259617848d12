"""The child process of an isolated reward function: reads calls as JSON frames, answers with JSON frames.

``rollout/sandbox.py`` starts it as ``python -c`` with a descriptor for answers; what the function prints goes
elsewhere. Neither side unpickles anything. Kept to the standard library: it must start in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from types import SimpleNamespace
from typing import Any, BinaryIO

from rollout.frames import read_frame, write_frame
from rollout.reward_calls import CallFailed, invoke_now
from rollout.reward_loading import load_reward
from rollout.row_values import plain
from shared.errors import InputError

PR_SET_PDEATHSIG = 1


def main(answers_fd: int) -> None:
    """Serve calls until the parent closes the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(answers_fd, "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    hello = read_frame(requests)
    if hello is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.path[:] = hello["path"]
    _limit(hello["limits"])
    try:
        spec = SimpleNamespace(**hello["spec"])
        function = load_reward(spec, hello["key"])
    except InputError as error:
        _answer(answers, hello, {"refused": list(error.args)})
        return
    _answer(answers, hello, {"ready": True})
    while (payload := read_frame(requests)) is not None:
        _more_cpu(hello["limits"]["cpu_s"])
        try:
            _answer(answers, payload, invoke_now(function, payload, hello["nan_is_none"]))
        except CallFailed as failure:
            _answer(answers, payload, {"failed": _words(failure, hello["limits"])})
        except TypeError as error:  # log_extra was given something that JSON has no form for.
            words = ["E304", "reward raised", str(error), "plain values in log_extra", "log text or numbers"]
            _answer(answers, payload, {"failed": [*words, -1, ""]})


def _words(failure: CallFailed, limits: dict[str, int]) -> list[Any]:
    """The failure's fields; one for want of memory names the limit, which is known here alone."""
    words = list(failure.args)
    if failure.code == "E306":
        words[2:4] = [f"> {limits['memory_mb']} MB", f"<= memory_mb = {limits['memory_mb']}"]
    return words


def _answer(stream: BinaryIO, request: Any, answer: dict[str, Any]) -> None:
    """Send ``answer`` with the request's token, which says which call it belongs to."""
    sys.stdout.flush()
    write_frame(stream, answer | {"token": request["token"]}, plain)


def _limit(limits: dict[str, int]) -> None:
    """Bounds for the whole process; a core file would hold the user's data."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in (
        (resource.RLIMIT_AS, limits["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, limits["files"]),
    ):
        hard = resource.getrlimit(name)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (bound, bound))


def _more_cpu(seconds: int) -> None:
    """Every call gets ``seconds`` of CPU time from now; over them the kernel ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds + 1
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
