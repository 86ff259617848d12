"""Running a completion's program against tests, each program in a sandbox of its own.

The program is loaded first; only then do the tests arrive, with a token that says they ran to the end. A program
that exits early, prints a verdict or raises ``SystemExit`` therefore passes nothing. A program that searches the
memory of its own process for the token is beyond this wall: give such tasks tests on input and output instead.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rollout.reward_calls import CallFailed
from rollout.sandbox import SANDBOX_LIMITS, Child, Limits

TIMEOUT_S = 5.0
"""Wall clock of one program, beyond its CPU limit."""
PARALLEL = os.cpu_count() or 1
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
HARNESS: dict[str, Any] = {
    "function": "rollout.sandboxed_program:harness",
    "model": None,
    "url": None,
    "name": None,
    "args": {},
    "factory": False,
    "isolation": "sandbox",
}


def program_of(text: str) -> str:
    """The last fenced block of Python, else the whole text."""
    blocks: list[str] = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def passed_share(text: str, tests: Any, limits: Limits = SANDBOX_LIMITS, timeout_s: float = TIMEOUT_S) -> float:
    """Share in [0, 1] of ``tests`` that the program in ``text`` passes; 0 if it does not load.

    ``tests``: a list of Python statements (usually asserts), of ``{"input": ..., "output": ...}`` for standard input
    and output, or one string with a statement a line or JSON. A *sandbox* that fails raises; a failing program is 0.
    """
    cases = _cases(tests)
    if not cases:
        return 0.0
    program, passed = program_of(text), 0
    statements = [case for case in cases if isinstance(case, str)]
    if statements:
        passed += _run(program, statements, limits, timeout_s)
    for case in cases:
        if isinstance(case, dict):
            passed += _run(program, [case], limits, timeout_s)
    return passed / len(cases)


def passed_shares(texts: list[str], tests: list[Any]) -> list[float]:
    """``passed_share`` of every text, as many at a time as there are cores."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(passed_share, texts, tests))


def longest_s(programs: int) -> float:
    """Seconds that ``passed_shares`` of so many programs may take, all of them hanging."""
    return -(-programs // PARALLEL) * (TIMEOUT_S + 2.0)


def _cases(tests: Any) -> list[str | dict[str, Any]]:
    if isinstance(tests, str):
        lines = [line for line in tests.splitlines() if line.strip()]
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError:
            tests = lines
        tests = tests if isinstance(tests, list | dict) else lines
    if isinstance(tests, dict) and isinstance(tests.get("inputs"), list):
        tests = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
    return list(tests)


def _run(program: str, cases: list[Any], limits: Limits, timeout_s: float) -> int:
    """How many of ``cases`` pass, in one fresh sandbox."""
    child = Child(HARNESS, "code_tests", limits, sandboxed=True)
    token = secrets.token_hex(16)

    def ask(step: str, **columns: Any) -> list[str]:
        payload = {"prompts": [""], "completions": [step], "completion_ids": [[]], "columns": columns, "state": {}}
        answer = child.call(payload, timeout_s)
        try:
            return [str(value) for value in answer["extra"]["passed"][0]]
        except (KeyError, IndexError, TypeError):  # The program answered in the harness's place.
            return []

    try:
        if isinstance(cases[0], dict):
            said = ask("run", program=program, given=str(cases[0]["input"]))
            wanted = str(cases[0]["output"])
            return int(bool(said) and said[0].split() == wanted.split())
        ask("load", program=program)
        return ask("test", tests=cases, token=token).count(token)
    except CallFailed as failure:
        if failure.code in ("E304", "E305", "E306"):
            return 0  # The program hung, crashed or broke a limit.
        raise
    finally:
        child.kill()
