"""Running a completion's program against tests: one sandbox for a program, a fresh process in it for each test.

For statements the program is loaded first; only then does the test arrive, with a token that says it ran to the end. A
program that exits early, prints a verdict or raises ``SystemExit`` therefore passes nothing. A program that searches the
memory of its own process for the token, or returns an object that equals everything, is beyond this wall. Tests on input
and output, and tests that call a function, are compared outside: their processes hold no expected answer.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rollout.code_answers import same_output, same_value
from rollout.code_forms import CONTEXT_KEYS, Case, Input, Suite, parse_tests
from rollout.code_statements import Statement, UnknownTests
from rollout.reward_calls import CallFailed
from rollout.sandbox import PROGRAMS, SANDBOX_LIMITS, Child, Limits

TIMEOUT_S = 5.0
"""Seconds of wall clock for one test, beside its CPU limit."""
MOST_LATE = 3
"""Tests over the wall clock after which the program's other tests count as failed."""
START_S, SLACK_S = 2.0, 2.0
"""Seconds allowed for the start of a sandbox, and for its answer beyond a test's own time."""
PARALLEL = os.cpu_count() or 1
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_HARNESS: dict[str, Any] = {"function": None}


def program_of(text: str) -> str:
    """The last fenced block of Python, else the whole text."""
    blocks: list[str] = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def passed_share(
    text: str,
    tests: Any,
    limits: Limits = SANDBOX_LIMITS,
    timeout_s: float = TIMEOUT_S,
    row: Mapping[str, Any] | None = None,
) -> float | None:
    """Share in [0, 1] of ``tests`` that the program in ``text`` passes; 0 if it does not load.

    ``tests``: any form that ``code_forms`` reads, with the other columns of their ``row``; None if there are none or they
    have no known form. A *sandbox* that fails raises; a failing program is 0.
    """
    suite = _suite(tests, row or {})
    return None if suite is None else _share(text, suite, row or {}, limits, timeout_s)


def passed_shares(
    texts: Sequence[str], tests: Sequence[Any], rows: Sequence[Mapping[str, Any]] | None = None
) -> list[float | None]:
    """``passed_share`` of every text, as many at a time as there are cores."""
    rows = rows or [{}] * len(texts)
    read: dict[tuple[Any, ...], Suite | None] = {}
    suites = []
    for given, row in zip(tests, rows, strict=True):  # The completions of a group share their tests.
        key = (id(given), *(repr(row.get(name)) for name in CONTEXT_KEYS))
        if key not in read:
            read[key] = _suite(given, row)
        suites.append(read[key])

    def share(text: str, suite: Suite | None, row: Mapping[str, Any]) -> float | None:
        return None if suite is None else _share(text, suite, row, SANDBOX_LIMITS, TIMEOUT_S)

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(share, texts, suites, rows))


def longest_s(counts: Sequence[int]) -> float:
    """Seconds that ``passed_shares`` may take for programs with so many tests each, whatever the programs do."""
    times = [_limit_s(count, SANDBOX_LIMITS, TIMEOUT_S) for count in counts]
    return sum(times) / PARALLEL + max(times, default=0.0)


def count_tests(tests: Any, row: Mapping[str, Any]) -> int:
    """Number of ``tests`` of a row; 0 where they have no known form."""
    suite = _suite(tests, row)
    return 0 if suite is None else len(suite.cases)


def _suite(tests: Any, row: Mapping[str, Any]) -> Suite | None:
    try:
        return parse_tests(tests, row)
    except UnknownTests:
        return None


def _limit_s(count: int, limits: Limits, timeout_s: float) -> float:
    """Seconds after which the tests that are left count as failed: on average their CPU limit for each."""
    return START_S + timeout_s + SLACK_S + count * limits.cpu_s


def _share(text: str, suite: Suite, row: Mapping[str, Any], limits: Limits, timeout_s: float) -> float:
    program, prompt = program_of(text), row.get("prompts")
    # A completion may go on where a prompt of Python ends.
    sources = [program, prompt + program] if isinstance(prompt, str) else [program]
    until = time.monotonic() + _limit_s(len(suite.cases), limits, timeout_s)
    box, passed = _Box(sources, suite.setup, limits, timeout_s), 0
    try:
        for case in suite.cases:
            if box.late >= MOST_LATE or time.monotonic() > until:
                break
            passed += box.passes(case)
    finally:
        box.close()
    return passed / len(suite.cases)


class _Box:
    """The sandbox of one program; a new one where a test left something behind in it."""

    def __init__(self, sources: list[str], setup: list[str], limits: Limits, timeout_s: float) -> None:
        self._sources, self._setup, self._limits, self._timeout_s = sources, setup, limits, timeout_s
        self._child: Child | None = None
        self.late = 0
        """Tests that took longer than the wall clock allows."""

    def passes(self, case: Case) -> bool:
        """Run the program on ``case`` in a process of its own. A program that breaks the sandbox fails."""
        if self._child is None:
            self._child = Child(_HARNESS, "code_tests", self._limits, sandboxed=True, main=PROGRAMS)
        try:
            if isinstance(case, Input):
                said = self._ask("run", given=case.given)
                return said is not None and same_output(said, case.wanted)
            if self._ask("load", setup=self._setup) is None:
                return False
            token = secrets.token_hex(16)
            value = self._value(self._ask("test", job=self._job(case, token)), token)
            return bool(value) and (isinstance(case, Statement) or same_value(value[0], case.wanted))
        except CallFailed as failure:
            self.late += failure.code == "E305"
            self.close()
            if failure.code in ("E304", "E305", "E306"):
                return False
            raise

    def close(self) -> None:
        """End the sandbox."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _ask(self, step: str, **more: Any) -> str | None:
        """What the process of a test says, None if it failed; the sandbox is left if something stays in it."""
        if self._child is None:
            return None
        call = {"step": step, "sources": self._sources, "timeout_s": self._timeout_s, **more}
        answer = self._child.call(call, self._timeout_s + SLACK_S)
        self.late += bool(answer.get("late"))
        if answer.get("dirty") and step != "load":
            self.close()
        said = answer.get("said")
        return said if isinstance(said, str) else None

    def _job(self, case: Case, token: str) -> dict[str, Any]:
        job: dict[str, Any] = {"token": token, "setup": self._setup}
        if isinstance(case, Statement):
            more = {"source": case.source, "calls": case.calls, "suites": case.suites, "entry_point": case.entry_point}
            return job | more
        assert not isinstance(case, Input)
        return job | {"function": case.function, "arguments": case.arguments}

    def _value(self, said: str | None, token: str) -> list[Any]:
        """The value in an answer that knows the token, in a list; empty if there is none."""
        try:
            answer = json.loads(said or "null")
            return [answer["value"]] if answer["token"] == token else []
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
