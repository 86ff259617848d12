"""Hooks of pytest that keep the suite fast: a budget for every unmarked test, scaled timeouts, and tables of seconds.

A test without a marker must take at most ``BUDGET_S``, its fixtures of function scope included; one that takes longer
fails the whole run. Seconds for which the test waited for a core, and the first import of a heavy library, are not its
own. ``tests/conftest.py`` registers this module as a plugin.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Iterable

import pytest

from tests.pace import PACE, scaled, waited_s

BUDGET_S = 2.0
COSTLY = ("stack", "process", "slow", "chaos")
"""Markers of tests to which the budget does not apply."""
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "ray",
    "deepspeed",
    "pyarrow",
    "matplotlib",
    "tokenizers",
    "reasoning_gym",
    "httpx",
)
"""Libraries whose first import is not charged to the test in which it happens."""
CROWDED = 2.0 if "PYTEST_XDIST_WORKER" in os.environ else 1.0
"""Processes that share cores, caches and memory slow each other down, beside what the waiting for a core explains."""
UNLIMITED = ("usepdb", "--hypothesis-profile")
"""Options of a session that has no budget."""
IMPORT_S = 20.0
TIMEOUT_S = 300.0
"""Timeout of a test without a marker of its own; the same as in pyproject.toml."""

seconds_of_file: dict[str, float] = defaultdict(float)
seconds_of_fixture: dict[str, float] = defaultdict(float)
starts_of_fixture: dict[str, int] = defaultdict(int)
over_budget: list[tuple[str, float]] = []
_shared_s = 0.0
"""Seconds spent since the session began in fixtures that several tests share."""


def add_options(parser: pytest.Parser) -> None:
    """The options of this module; pytest asks for them before a plugin can be registered."""
    parser.addoption("--times", action="store_true", help="print seconds by file and by fixture")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Scale timeouts, and begin with what takes longest."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit = marker.args[0] if marker else TIMEOUT_S
        item.add_marker(pytest.mark.timeout(scaled(limit)), append=False)
    items.sort(key=_rank)


FIRST = ("test_memory",)
"""Test files that begin, each in a process that has done nothing: a process group that was ended leaves DeepSpeed unusable."""


def _rank(item: pytest.Item) -> int:
    if item.path.stem in FIRST:
        return -1
    if "quickstart" in getattr(item, "fixturenames", ()):
        return 0
    return next((rank for rank, name in enumerate(("stack", "process"), 1) if item.get_closest_marker(name)), 3)


TOGETHER = {
    **dict.fromkeys(("test_end_to_end", "test_security_stack"), "quickstart"),
    **dict.fromkeys(("test_learner_stack", "test_learner_state", "test_sharded_loading"), "ranks"),
    **dict.fromkeys(("test_placement_stack", "test_hosts_stack", "test_reward_pool"), "ray"),
}
"""Test file -> the name of a group that runs in one process: its files share a fixture that takes long to make."""
APART = {"test_generated_security", "test_generated_guards"}
"""Test files without a shared fixture, whose tests may run anywhere."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hand out tests by file, or by group of files.

    The marker ``xdist_group`` has no effect: pytest-xdist 3.8 writes it into an attribute that pytest 9.2 lacks.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
            return nodeid if stem in APART else TOGETHER.get(stem, stem)

    return ByGroup(config, log)


# --- in the process that runs a test ---


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    global _shared_s
    begun, inner = time.perf_counter(), _shared_s
    try:
        return (yield)
    finally:
        spent = time.perf_counter() - begun
        if fixturedef.scope != "function":
            _shared_s = inner + spent
            name = f"{fixturedef.argname} ({request.node.name or 'session'})"
            request.node.config.stash.setdefault(FIXTURES, []).append((name, spent))


FIXTURES = pytest.StashKey[list]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[BEGUN] = (time.perf_counter(), waited_s(), _shared_s, _heavy())
    return (yield)


BEGUN = pytest.StashKey[tuple]()


def _heavy() -> int:
    return sum(name in sys.modules for name in HEAVY)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note, at the end of a test, what it and the fixtures before it took; xdist carries the notes to the main process."""
    report = yield
    if call.when == "teardown":
        begun, waited, shared, heavy = item.stash[BEGUN]
        whole = time.perf_counter() - begun
        own = whole - (waited_s() - waited) - (_shared_s - shared)
        limit = CROWDED * scaled(BUDGET_S) + (scaled(IMPORT_S) if _heavy() > heavy else 0)
        free = any(item.get_closest_marker(name) for name in COSTLY) or any(
            item.config.getoption(name, None) for name in UNLIMITED
        )
        started = item.config.stash.get(FIXTURES, [])
        report.cost = {"whole": whole, "over": None if free or own <= limit else own, "fixtures": list(started)}
        started.clear()
    return report


# --- in the main process ---


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cost = getattr(report, "cost", None)
    if cost is None:
        return
    seconds_of_file[report.nodeid.partition("::")[0]] += cost["whole"]
    for name, spent in cost["fixtures"]:
        seconds_of_fixture[name] += spent
        starts_of_fixture[name] += 1
    if cost["over"] is not None:
        over_budget.append((report.nodeid, cost["over"]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if over_budget and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    for nodeid, spent in over_budget:
        write(
            f"OVER BUDGET {nodeid}: {spent:.1f} s, expected at most {scaled(BUDGET_S):.1f} s. Fix: make it faster, or mark it {', '.join(COSTLY[:3])}"
        )
    if config.getoption("times"):
        write(f"pace of this machine: {PACE:.2f} (limits of time are multiplied by it)")
        _table(write, "seconds by file, shared fixtures included", seconds_of_file.items())
        named = ((f"{starts_of_fixture[name]} x {name}", spent) for name, spent in seconds_of_fixture.items())
        _table(write, "seconds by shared fixture", named)


def _table(write, title: str, rows: Iterable[tuple[str, float]]) -> None:
    write(f"--- {title}")
    for name, spent in sorted(rows, key=lambda row: -row[1]):
        if spent >= 0.05:
            write(f"{spent:8.2f}  {name}")
