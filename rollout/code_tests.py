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
from dataclasses import replace
from typing import Any, Protocol

from rollout.code_answers import same_output, same_value
from rollout.code_forms import CONTEXT_KEYS, Case, Input, Suite, parse_tests
from rollout.code_statements import Statement, UnknownTests
from rollout.reward_calls import CallFailed
from rollout.rewards import text_of
from rollout.sandbox import PROGRAMS, SANDBOX_LIMITS, Child, Limits

TIMEOUT_S = 5.0
"""Seconds of wall clock for one test, beside its CPU limit."""
MOST_LATE = 3
"""Tests over a limit of time after which the program's other tests count as failed."""
START_S, SLACK_S = 2.0, 2.0
"""Seconds allowed for the start of a sandbox, and for its answer beyond a test's own time."""
PARALLEL = os.cpu_count() or 1
_FENCE = re.compile(r"```[^\n`]+```|```([^\n`]*)\n(.*?)```", re.DOTALL)
"""Text in fences: on one line, or with the name of its language and its lines."""
_HARNESS: dict[str, Any] = {"function": None}


class Configured(Protocol):
    """What is read of ``shared.config_reward.RewardFunction``."""

    args: dict[str, Any]
    timeout_s: float | None
    cpu_s: int | None
    memory_mb: int | None


def program_of(text: str) -> str:
    """The last fenced block of Python, else the last of no language, else the whole text."""
    blocks = [(found[1].strip(" \t{.").lower(), found[2]) for found in _FENCE.finditer(text) if found[2] is not None]
    named = [block for language, block in blocks if language.startswith("py")]
    plain = [block for language, block in blocks if not language]
    return (named or plain or [text])[-1]


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


class CodeTests:
    """The reward ``code_tests``: the share of a column's tests that the program of each completion passes."""

    def __init__(self, column: str, limits: Limits = SANDBOX_LIMITS, timeout_s: float = TIMEOUT_S) -> None:
        self._column, self._limits, self._timeout_s = column, limits, timeout_s

    @classmethod
    def configured(cls, spec: Configured) -> CodeTests:
        """Make the one of ``spec``, with its limits for one test."""
        return cls(spec.args.get("column", "tests"), *limits_of_test(spec))

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """One share a completion, None without tests; as many programs run at a time as there are cores."""
        each = {name: values for name, values in columns.items() if isinstance(values, list) and values}
        rows = [{name: values[i] for name, values in each.items()} for i in range(len(completions))]
        read: dict[tuple[Any, ...], Suite | None] = {}
        suites = []
        for given, row in zip(columns[self._column], rows, strict=True):  # Completions of a group share their tests.
            key = (id(given), *(repr(row.get(name)) for name in CONTEXT_KEYS))
            if key not in read:
                read[key] = _suite(given, row)
            suites.append(read[key])
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(self._share, map(text_of, completions), suites, rows))

    def _share(self, text: str, suite: Suite | None, row: Mapping[str, Any]) -> float | None:
        return None if suite is None else _share(text, suite, row, self._limits, self._timeout_s)


def limits_of_test(spec: Configured) -> tuple[Limits, float]:
    """What one test may use as ``spec`` has it, and its seconds of wall clock."""
    limits = replace(
        SANDBOX_LIMITS,
        cpu_s=spec.cpu_s or SANDBOX_LIMITS.cpu_s,
        memory_mb=spec.memory_mb or SANDBOX_LIMITS.memory_mb,
    )
    return limits, spec.timeout_s or TIMEOUT_S + max(0, limits.cpu_s - SANDBOX_LIMITS.cpu_s)


def longest_s(counts: Sequence[int], limits: Limits = SANDBOX_LIMITS, timeout_s: float = TIMEOUT_S) -> float:
    """Return the most seconds that one call may take for programs with ``counts`` tests each."""
    times = [_budget_s(count, limits) + timeout_s + SLACK_S for count in counts]
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


def _budget_s(count: int, limits: Limits) -> float:
    """Seconds after which no further test of a program starts: on average its CPU limit for each."""
    return START_S + count * limits.cpu_s


def _share(text: str, suite: Suite, row: Mapping[str, Any], limits: Limits, timeout_s: float) -> float:
    program, prompt = program_of(text), row.get("prompts")
    # A completion may continue a prompt of Python.
    sources = [program, prompt + program] if isinstance(prompt, str) else [program]
    until = time.monotonic() + _budget_s(len(suite.cases), limits)
    box, passed = _Box(sources, suite.setup, limits, timeout_s), 0
    try:
        for case in suite.cases:
            if box.unreadable or box.late >= MOST_LATE or time.monotonic() > until:
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
        self.unreadable = False
        """True if the program does not compile: it fails every test."""
        self.late = 0
        """Tests that took more wall clock or CPU time than allowed."""

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
            self.late += failure.code in ("E305", "E306")
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
        self.unreadable |= bool(answer.get("unreadable"))
        if "fault" in answer:
            found, fix = str(answer["fault"]), "see the limits of this machine"
            raise CallFailed("E308", "no sandbox", found, "a process for a test", fix)
        said = answer.get("said")
        if answer.get("dirty") and (step != "load" or said is None):
            self.close()
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
