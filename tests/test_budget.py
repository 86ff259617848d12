"""The budget of time for unmarked tests, on small suites of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.pace import VARIABLE, scaled

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


def run(folder, codes: dict[str, str], *options: str, pace: str = "1") -> subprocess.CompletedProcess:
    """Run pytest on files ``test_<name>.py``, without plugins that it does not need."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name, code in codes.items():
        (folder / f"test_{name}.py").write_text(code)
    markers = "".join(f"\n    {name}: x" for name in ("stack", "process", "slow", "chaos", "timeout"))
    (folder / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "xdist.plugin",
        str(folder),
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), VARIABLE: pace, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=scaled(120), check=False
    )


def told(done: subprocess.CompletedProcess) -> list[str]:
    lines = done.stdout.splitlines()
    return sorted(line.split()[2].rstrip(":") for line in lines if line.startswith("OVER BUDGET"))


def test_an_unmarked_test_that_takes_too_long_fails_the_run_and_a_table_shows_where_seconds_went(tmp_path):
    done = run(tmp_path, {"quick": QUICK, "sleeps": SLEEPS, "marked": MARKED, "shared": SHARED, "own": OWN}, "--times")
    over = ["test_own.py::test_first", "test_own.py::test_second", "test_sleeps.py::test_sleeps"]
    assert told(done) == over, done.stdout + done.stderr
    assert done.returncode == 1
    assert "7 passed" in done.stdout
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    seconds = {row[1]: float(row[0]) for row in rows if len(row) == 2 and row[0].replace(".", "").isdigit()}
    assert seconds["test_shared.py"] >= 0.5
    assert seconds["1 x engine (test_shared.py)"] >= 0.5


def test_tests_within_the_budget_pass_and_a_slow_machine_has_more_time(tmp_path):
    done = run(tmp_path, {"sleeps": SLEEPS, "own": OWN}, pace="4")
    assert (done.returncode, told(done)) == (0, []), done.stdout


def test_the_budget_holds_in_the_workers_of_xdist_too(tmp_path):
    codes = {"sleeps": SLEEPS, "marked": MARKED, "own": OWN.replace("time.sleep(0.5)", "pass")}
    done = run(tmp_path, codes, "-n", "2", "--dist", "loadscope")
    assert told(done) == ["test_sleeps.py::test_sleeps"], done.stdout
    assert done.returncode == 1


def test_files_that_share_a_fixture_run_in_one_process():
    from tests.budget import APART, TOGETHER

    there = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert APART | TOGETHER.keys() <= there
    assert APART.isdisjoint(TOGETHER)
    for name, fixture in (("quickstart", "quickstart"), ("ranks", "ranks_of"), ("ray", "private_ray")):
        using = {
            path.stem
            for path in (ROOT / "tests").glob("test_*.py")
            if re.search(rf"def \w+\([^)]*\b{fixture}\b", path.read_text())
        }
        assert {file for file, group in TOGETHER.items() if group == name} >= using - {"test_budget"}


def test_every_breakage_of_the_table_can_still_be_made():
    from tests.break_check import rows

    lost = [row.name for row in rows() if (ROOT / row.file).read_text(encoding="utf-8").count(row.old) != 1]
    assert lost == []
    assert [name for row in rows() for name in row.tests if not (ROOT / name).is_file()] == []
