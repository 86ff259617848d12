"""Answers many short commands from one process that has imported what they need: each runs in a fork of it.

A fresh interpreter spends one to two seconds on imports before a verb of ``millrace`` does anything. ``commands(folder)``
writes two programs, ``millrace`` and ``python``, into a folder. Each passes its arguments, environment, working folder and
standard streams to the server, and ends with the exit code of the fork. The server has run no code of torch, so a fork is
as good as a new process.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    *(
        "launch.cli",
        "launch.run",
        "launch.preflight",
        "launch.doctor",
        "launch.score",
        "launch.show",
        "launch.evaluate",
    ),
    *("launch.report.page", "launch.import_trl", "launch.plan", "launch.simulate", "launch.builtin", "launch.api"),
    *(
        "learner.choices",
        "transformers.models.auto.tokenization_auto",
        "pyarrow.parquet",
        "matplotlib.figure",
        "rich.text",
    ),
)
CLIENT = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
request = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
server.sendall(request)
sys.exit(int(server.recv(16) or b"1"))
"""


def commands(folder: Path) -> None:
    """Write ``millrace`` and ``python`` into ``folder``; the first call of this process starts the server."""
    for program in ("millrace", "python"):
        client = CLIENT.format(path=_address(), program=program)
        (folder / f"{program}.py").write_text(client, encoding="utf-8")
        call = f'#!/bin/sh\nexec {sys.executable} -I -S "{folder / program}.py" "$@"\n'
        (folder / program).write_text(call, encoding="utf-8")
        (folder / program).chmod(0o755)


_server: tuple[subprocess.Popen, str] | None = None


def _address() -> str:
    global _server
    if _server is None or _server[0].poll() is not None:
        path = str(Path(tempfile.mkdtemp(prefix="mf-")) / "socket")
        command = [sys.executable, "-m", "tests.fork_server", path]
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        atexit.register(process.kill)
        _server = (process, path)
    return _server[1]


# --- the server ---


def serve(path: str) -> None:
    """Fork for every connection to ``path``, until the parent process ends."""
    import importlib
    import threading

    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        listening.settimeout(1.0)
        print("ready", flush=True)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                if os.fork() == 0:
                    listening.close()
                    _attend(connection)
                connection.close()


def _attend(connection: socket.socket) -> None:
    """Run one command in a second fork, and send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    size, streams, *_ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "little"):
        request += connection.recv(1 << 16)
    worker = os.fork()
    if worker == 0:
        _run(*json.loads(request), streams)
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(worker, 0)
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def _run(program: str, arguments: list[str], folder: str, environment: dict[str, str], streams: array.array) -> None:
    """Take over the streams, folder and environment of the caller, then run ``program``."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        code = _call(program, arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(program: str, arguments: list[str]) -> int:
    if program == "millrace":
        from launch.cli import main

        sys.argv = ["millrace", *arguments]
        return main()
    sys.argv = list(arguments)
    if arguments[:1] == ["-c"]:
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
