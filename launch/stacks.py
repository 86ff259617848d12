"""What every process of a run on this machine is doing, for the log of a run that stands still."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

DUMP_LIMIT_S = 10.0


def dump_stacks(folder: Path) -> Path:
    """Write the Python stacks of this process and of all it started to ``folder``/stacks.txt; where.

    Another program looks at them from outside, so that a process that is stopped or stuck in C is in it too.
    """
    import psutil

    spy = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    lines = []
    for process in processes:
        try:
            title = " ".join(process.cmdline()).strip()[:120]
        except psutil.Error:
            continue
        if "ray::" in title or process.pid == os.getpid():
            lines.append(f"=== {process.pid} {title} ({process.status()})\n{_stack(spy, process.pid)}")
    path = folder / "stacks.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _stack(spy: str, pid: int) -> str:
    command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stack: {error}"
    return done.stdout or f"no stack: {done.stderr.strip()}"
