"""One whole run of the quickstart, watched from outside, that many tests look at: see the fixture ``quickstart``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "launch/configs/quickstart.toml"
PLANTED = "planted-s3cret-value"
SECRETS = ("HF_TOKEN", "JUDGE_API_KEY", "DB_PASSWORD")
REWARD = """
import os
def accuracy(completions, answer, **kwargs):
    assert os.environ["JUDGE_API_KEY"]  # A function of the user may need it ...
    return [float(a == b) for a, b in zip(completions, answer)]
"""


@dataclass
class WatchedRun:
    """What a run left behind, and what could be seen of its processes while it ran."""

    folder: Path
    """The run folder."""
    code: int
    output: str
    """All that it printed."""
    session: Path
    """Where Ray keeps its files."""
    kept: Path
    """What Ray wrote there: links to its files, for it removes them."""
    listeners: set[tuple[str, str, int]]
    tokens: set[str]
    """Tokens of Ray in the environments of its processes."""
    commands: str
    """All of their command lines."""

    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return metrics_of(self.folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def processes_of(session: str | Path) -> set[psutil.Process]:
    """Those whose Ray lives in ``session``, and their children: some of Ray's overwrite their environment."""
    found = set()
    for process in psutil.process_iter():
        if environment_of(process).get("RAY_TMPDIR") == str(session):
            with contextlib.suppress(psutil.Error):
                found |= {process, *process.children(recursive=True)}
    return found


def listeners_of(processes: set[psutil.Process]) -> set[tuple[str, str, int]]:
    """``(process, address, port)`` of every listening socket of those processes; an actor without its method."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            sockets = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            name = process.name().strip().partition(".")[0]
            found |= {(name, c.laddr.ip, c.laddr.port) for c in sockets}
    return found


def own_environment(session: str, **more: str) -> dict[str, str]:
    """As a user's shell has it: without what tests in this process have set for Ray."""
    users = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return users | {"RAY_TMPDIR": session, "RAY_worker_niceness": "0"} | more


def _keep(folder: Path, kept: Path) -> None:
    """Link every file below ``folder`` that is new into ``kept``: it is there, with all that is written to it, for good."""
    for path in folder.rglob("*"):
        link = kept / path.relative_to(folder)
        with contextlib.suppress(OSError):  # Removed meanwhile.
            if path.is_file() and not path.is_symlink() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(path)


def watched_run(place: Path) -> Iterator[WatchedRun]:
    """Train 40 steps at ``max_staleness = 2`` with a reward of the user's own and secrets in the environment."""
    session, folder, kept = tempfile.mkdtemp(prefix="ms-"), place / "run", place / "kept"
    (place / "reward.py").write_text(REWARD)
    (place / "own.toml").write_text(f'[[reward.functions]]\nfunction = "{place}/reward.py:accuracy"\n')
    settings = {"run.output_dir": folder, "run.steps": 40, "eval.every_steps": 20, "run.samples_every": 20}
    changes = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "launch/run.py", QUICKSTART, str(place / "own.toml"), *changes]
    environment = own_environment(session, MILLRACE_WORKER_LOGS="1", **dict.fromkeys(SECRETS, PLANTED))
    found, tokens, commands = set(), set(), set()
    with (place / "output").open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + scaled(240)
        while process.poll() is None and time.monotonic() < deadline:
            alive = processes_of(session)
            found |= listeners_of(alive)
            _keep(Path(session), kept)
            for one in alive:
                tokens |= {environment_of(one).get("RAY_AUTH_TOKEN", "")} - {""}
                with contextlib.suppress(psutil.Error):
                    commands |= set(one.cmdline())
            time.sleep(1.0)
        process.kill()
        process.wait()
    output = (place / "output").read_text()
    yield WatchedRun(folder, process.returncode, output, Path(session), kept, found, tokens, " ".join(commands))
    shutil.rmtree(session, ignore_errors=True)
