"""Fault points: off unless armed, each in the code exactly once, and every action does what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import faults

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for package in ("rollout", "learner", "shared", "launch") for path in (ROOT / package).rglob("*.py")]


def test_every_point_stands_in_the_code_exactly_once():
    used = [name for path in SOURCES for name in re.findall(r'faults\.point\("([\w.]+)"', path.read_text())]
    assert sorted(used) == sorted(faults.POINTS)


def test_nothing_is_armed_without_the_variable():
    assert faults.VARIABLE not in os.environ
    assert faults.point.__name__ == "_nothing"
    data = bytearray(8)
    for name in faults.POINTS:
        assert faults.point(name, data) is None
    assert data == bytearray(8)


def hit(value: str, times: int = 3) -> subprocess.CompletedProcess:
    code = f"from shared import faults\nfor i in range({times}):\n    print(i, flush=True)\n    faults.point('learner.before_step')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), faults.VARIABLE: value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("action", "code"), [("raise", 1), ("exit", 1), ("kill", -signal.SIGKILL)], ids=["raise", "exit", "kill"]
)
def test_an_armed_point_acts_at_its_hit(action, code):
    process = hit(f"learner.before_step:2:{action}")
    assert (process.returncode, process.stdout.split()) == (code, ["0", "1"])
    assert ("InjectedFault: learner.before_step" in process.stderr) == (action == "raise")
    assert hit(f"learner.after_step:2:{action}").returncode == 0


def test_a_byte_is_flipped_in_what_the_point_is_given():
    data = bytearray(9)
    armed = faults.Armed(faults.parse("sync.after_hash:1:flip"))
    armed.point("sync.after_hash", data)
    armed.point("sync.after_hash", data)
    assert data == bytearray([0, 0, 0, 0, 255, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "value", ["nowhere:1:kill", "sync.after_hash:1:melt", "sync.after_hash", "sync.after_hash:x:kill"]
)
def test_a_wrong_value_is_refused_at_once(value):
    with pytest.raises(ValueError, match=r"."):
        faults.parse(value)
    assert hit(value).returncode == 1
