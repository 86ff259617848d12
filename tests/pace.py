"""How fast this machine is, so that limits of time in tests scale with it.

A fixed piece of work is timed once, when a test session begins. ``PACE`` is the time that it took, divided by the time
that it takes on the machine on which the limits were chosen (two cores of an AMD EPYC, 2.6 GHz); it is never below 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

REFERENCE_S = 0.0135
VARIABLE = "MILLRACE_TEST_PACE"
SCHEDSTAT = Path("/proc/thread-self/schedstat")


def work() -> None:
    """Do what tests do most: interpreted Python, JSON, hashing."""
    table = {str(i): [i, i / 7, str(i) * 3] for i in range(2000)}
    for _ in range(4):
        text = json.dumps(table)
        table = {key: value[::-1] for key, value in json.loads(text).items()}
        hashlib.sha256(text.encode()).hexdigest()
        sorted(table, key=lambda key: str(table[key]))


def measure() -> float:
    """CPU seconds of ``work``, the best of five: other processes cost no CPU seconds of this one."""
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    return min(seconds)


def session_pace() -> float:
    """``PACE`` of this session; processes that it starts inherit the value."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = f"{max(1.0, measure() / REFERENCE_S):.2f}"
    return float(os.environ[VARIABLE])


PACE = session_pace()


def scaled(seconds: float) -> float:
    """``seconds`` of the reference machine on this one."""
    return seconds * PACE


def waited_s() -> float:
    """Seconds for which this thread was ready to run but had no core; 0 where the system does not count them."""
    try:
        return int(SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
