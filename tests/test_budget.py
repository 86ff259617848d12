"""The budget of time for unmarked tests, on small suites of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.pace import VARIABLE

pytestmark = pytest.mark.process

CONFTEST = """
from tests import budget
budget.BUDGET_S = 0.2
def pytest_addoption(parser):
    budget.add_options(parser)
def pytest_configure(config):
    config.pluginmanager.register(budget, "budget")
"""
QUICK = "def test_quick(): pass\n"
SLEEPS = "import time\ndef test_sleeps(): time.sleep(0.5)\n"
MARKED = "import pytest, time\n@pytest.mark.process\ndef test_marked(): time.sleep(0.5)\n"
SHARED = """
import pytest, time
@pytest.fixture(scope="module")
def engine(): time.sleep(0.5)
def test_first(engine): pass
def test_second(engine): pass
"""
OWN = SHARED.replace('(scope="module")', "")


def run(folder, code: str, *options: str, pace: str = "1") -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(code)
    markers = "".join(f"\n    {name}: x" for name in ("stack", "process", "slow", "chaos"))
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), VARIABLE: pace}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("code", "over"),
    [
        (QUICK, []),
        (SLEEPS, ["test_it.py::test_sleeps"]),
        (MARKED, []),
        (SHARED, []),
        (OWN, ["test_it.py::test_first", "test_it.py::test_second"]),
    ],
)
def test_an_unmarked_test_that_takes_too_long_fails_the_run(tmp_path, code, over):
    done = run(tmp_path, code)
    told = [line.split()[2].rstrip(":") for line in done.stdout.splitlines() if line.startswith("OVER BUDGET")]
    assert told == over, done.stdout + done.stderr
    assert done.returncode == bool(over)
    assert " passed" in done.stdout


def test_a_slow_machine_has_more_time(tmp_path):
    done = run(tmp_path, SLEEPS, pace="4")
    assert done.returncode == 0, done.stdout


def test_the_budget_holds_in_the_workers_of_xdist_too(tmp_path):
    done = run(tmp_path, SLEEPS + MARKED + OWN.replace("time.sleep(0.5)", "pass"), "-n", "2", "--dist", "loadscope")
    assert "OVER BUDGET test_it.py::test_sleeps" in done.stdout
    assert done.stdout.count("OVER BUDGET") == 1
    assert done.returncode == 1


def test_seconds_are_shown_by_file_and_by_fixture(tmp_path):
    done = run(tmp_path, SHARED, "--times")
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    seconds = {row[1]: float(row[0]) for row in rows if len(row) == 2 and row[0].replace(".", "").isdigit()}
    assert seconds["test_it.py"] >= 0.5
    assert seconds["1 x engine (test_it.py)"] >= 0.5


def test_files_that_share_a_fixture_run_in_one_process():
    from tests.budget import APART, TOGETHER

    there = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert APART | TOGETHER.keys() <= there
    assert APART.isdisjoint(TOGETHER)
    for name, fixture in (("quickstart", "quickstart"), ("ranks", "ranks_of"), ("ray", "private_ray")):
        using = {
            path.stem
            for path in (ROOT / "tests").glob("test_*.py")
            if f"{fixture}," in (text := path.read_text()) or f"{fixture})" in text
        }
        assert {file for file, group in TOGETHER.items() if group == name} >= using - {"test_budget"}
