"""The half of ``code_tests`` that lives inside the sandbox and runs a completion's program.

The only place in Millrace that executes text. ``rollout/code_tests.py`` starts it behind bubblewrap and never
imports it.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

_loaded: dict[str, Any] = {}


def harness(
    completions: list[str], log_extra: Any, *, run: Any = exec, read: Any = compile, **columns: Any
) -> list[float]:
    """Inside the sandbox: load the program, then run the tests; the token for each one that passes.

    ``run`` and ``read`` are bound before the program is there: it may replace the built-ins.
    """
    passed: list[str] = []
    if completions[0] == "load":
        run(read(columns["program"], "<program>", "exec"), _loaded)
    elif completions[0] == "run":
        passed.append(_on_input(read(columns["program"], "<program>", "exec"), columns["given"], run))
    else:
        for test in columns["tests"]:
            try:
                run(read(test, "<test>", "exec"), dict(_loaded))
                passed.append(columns["token"])
            except Exception:  # A failing test, whatever it raised.
                passed.append("")
    log_extra("passed", [passed])
    return [0.0]


def _on_input(program: Any, given: str, run: Any) -> str:
    """What the compiled program prints when it reads ``given``."""
    printed, before = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(given)
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            run(program, {"__name__": "__main__"})
    finally:
        sys.stdin = before
    return printed.getvalue()
