"""Points at which a test makes a process fail, on purpose and repeatably; in any other run they do nothing.

``MILLRACE_FAULTS`` is read once, at import: ``point:hit:action`` entries joined by commas, for example
``checkpoint.before_rename:2:kill``. Without it ``point`` is an empty function. Invariant: ``POINTS`` names every point
there is, and each stands in the code exactly once.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

VARIABLE = "MILLRACE_FAULTS"
POINTS = (
    "engine.before_generate",
    "engine.after_generate",
    "sync.after_hash",
    "sync.after_pause",
    "sync.before_version",
    "reward.before_call",
    "learner.before_step",
    "learner.after_step",
    "checkpoint.after_write",
    "checkpoint.after_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "controller.before_record",
)
ACTIONS = ("raise", "exit", "kill", "stop", "sleep", "flip")
"""Raise ``InjectedFault``; leave with status 1; SIGKILL and SIGSTOP to oneself; sleep for an hour; flip a byte."""


class InjectedFault(Exception):
    """What ``raise`` raises; no code of ours expects it."""


def parse(value: str) -> dict[tuple[str, int], str]:
    """(Point, hit from 1) -> action. Raises ``ValueError`` for a name that does not exist."""
    armed = {}
    for entry in value.split(","):
        name, hit, action = entry.split(":")
        if name not in POINTS or action not in ACTIONS:
            raise ValueError(f"{VARIABLE}: {entry}: points are {', '.join(POINTS)}; actions {', '.join(ACTIONS)}")
        armed[name, int(hit)] = action
    return armed


class Armed:
    """Counts the hits of each point and acts at those that are armed."""

    def __init__(self, armed: dict[tuple[str, int], str]) -> None:
        self._armed, self._hits = armed, Counter[str]()

    def point(self, name: str, data: Any = None) -> None:
        """Act if this hit of ``name`` is armed; ``data`` is a byte array that ``flip`` damages."""
        assert name in POINTS, name
        self._hits[name] += 1
        action = self._armed.get((name, self._hits[name]))
        if action == "raise":
            raise InjectedFault(name)
        if action == "exit":
            os._exit(1)
        if action in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        if action == "sleep":
            time.sleep(3600)
        if action == "flip":
            data[len(data) // 2] ^= 0xFF


def _nothing(name: str, data: Any = None) -> None:
    """No fault is armed in this process."""


point = Armed(parse(os.environ[VARIABLE])).point if os.environ.get(VARIABLE) else _nothing
