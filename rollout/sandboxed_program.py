"""The half of ``code_tests`` that lives inside the sandbox: it starts a fresh process for each test of a program.

The only place in Millrace that executes text. ``rollout/code_tests.py`` starts it behind bubblewrap and never imports
it. ``main`` serves as ``program_harness`` says; what is below it runs in the process of one test.
"""

from __future__ import annotations
import __future__

import atexit
import bisect
import builtins
import collections
import contextlib
import functools
import heapq
import importlib
import itertools
import json
import math
import operator
import os
import random
import re
import string
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable
from typing import Any

from rollout.frames import read_frame, write_frame
from rollout.program_harness import GO, JOB, UNREADABLE, VERDICT, Harness

HEAVY = ("numpy",)
"""Installed modules that the harness imports for a program that names them, so that not every test imports them anew."""
RECURSION = 50_000
"""Depth of recursion that judges give to a class ``Solution``."""
_MODULES = (typing, collections, itertools, functools, heapq, bisect, math, string, operator, random, re, sys)
_EXECUTE: Callable[..., Any] = exec
_READ: Callable[..., Any] = functools.partial(compile, dont_inherit=True)
_LATE_ANNOTATIONS = __future__.annotations.compiler_flag


class ListNode:
    """A node of a linked list, as judges of a class ``Solution`` define it."""

    def __init__(self, val: Any = 0, next: Any = None) -> None:
        self.val, self.next = val, next


class TreeNode:
    """A node of a binary tree, as judges of a class ``Solution`` define it."""

    def __init__(self, val: Any = 0, left: Any = None, right: Any = None) -> None:
        self.val, self.left, self.right = val, left, right


def main(answers_fd: int) -> None:
    """Serve calls until the parent closes the pipe."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(answers_fd, "wb")
    hello = read_frame(requests)
    if hello is None:
        return
    sys.path[:] = hello["path"]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Each thread's buffer counts against the memory limit.
    harness = Harness(hello["limits"], _run_program, _test_program)
    steps = {"run": harness.run, "load": harness.load, "test": harness.test}
    before = _left_behind()
    write_frame(answers, {"token": hello["token"], "ready": True})
    while (call := read_frame(requests)) is not None:
        try:
            _import_heavy(call.get("sources", []))
            answer = steps[call["step"]](call)
        except OSError as error:  # This machine's fault, and no program's.
            answer = {"said": None, "fault": str(error)}
        write_frame(answers, answer | {"token": call["token"], "dirty": _left_behind() != before})


def _import_heavy(sources: list[str]) -> None:
    for name in HEAVY:
        if any(name in source for source in sources):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def _left_behind() -> tuple[Any, ...] | None:
    """What the only folder that a program can write to shows of it: names, rights, files and blocks in use."""
    try:
        room = os.statvfs("/tmp")
        return sorted(os.listdir("/tmp")), os.stat("/tmp").st_mode, room.f_ffree, room.f_bfree
    except OSError:  # Its rights were taken away.
        return None


def _compiled(sources: list[str], flags: int = 0, read: Any = _READ) -> Any:
    """The first of ``sources`` that compiles; without one the process ends."""
    for source in sources:
        with contextlib.suppress(SyntaxError, ValueError):
            return read(source, "<program>", "exec", flags)
    return os._exit(UNREADABLE)


def _run_program(sources: list[str], run: Any = _EXECUTE) -> None:
    """Run the program as the main one, to its end as an interpreter does it."""
    module, status = types.ModuleType("__main__"), 0
    sys.modules["__main__"] = module
    try:
        run(_compiled(sources), vars(module))
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # Waits for threads.
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.__stdout__)):
        with contextlib.suppress(ValueError):  # Closed.
            stream.flush()
    os._exit(status)


def _test_program(sources: list[str], setup: list[str], run: Any = _EXECUTE, read: Any = _READ) -> None:
    """Load the program, wait for its test, and answer; what is used then is bound before the program is there."""
    take, put, pread, end = os.read, os.write, os.pread, os._exit
    parse, write, check, find, plain = json.loads, json.dumps, _check, _function, _plain
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = vars(module)
    if any("class Solution" in source for source in sources):
        names["__builtins__"] = _judges_names()
        sys.setrecursionlimit(RECURSION)
    for code in setup:  # What a program may use; what needs the program comes with the test.
        with contextlib.suppress(Exception):
            run(read(code, "<setup>", "exec"), names)
    run(_compiled(sources, _LATE_ANNOTATIONS), names)  # Judges do not mind types that are not imported.
    put(VERDICT, b"\n")
    take(GO, 1)
    text = b""
    while part := pread(JOB, 1 << 24, len(text)):
        text += part
    job = parse(text)
    for code in job["setup"]:
        run(read(code, "<setup>", "exec"), names)
    value = None
    if "source" in job:
        check(job, names, run, read)
    else:
        function, given = find(names, job["function"], run, read), job["arguments"]
        value = function(**given) if isinstance(given, dict) else function(*given)
    answer = write({"token": job["token"], "value": value}, default=plain).encode()
    while answer:
        answer = answer[put(VERDICT, answer) :]
    end(0)


def _check(job: dict[str, Any], names: dict[str, Any], run: Any, read: Any) -> None:
    """Run a statement and the checks it defines. Raises whatever fails."""
    candidate = None
    if any(count for _, count in job["calls"]):
        candidate = _function(names, job["entry_point"], run, read)
    run(read(job["source"], "<test>", "exec"), names)
    for name, count in job["calls"]:
        names[name](*[candidate][:count])
    for name in job["suites"]:
        import unittest

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(names[name]).run(result)
        if not result.wasSuccessful() or not result.testsRun:
            raise AssertionError(name)


def _function(names: dict[str, Any], name: str, run: Any, read: Any) -> Any:
    """The function ``name`` of the program, a method of its class, an expression; without a name its last one."""
    classes = [kind for kind in names.values() if isinstance(kind, type) and kind.__module__ == "solution"]
    if name and not name.isidentifier():
        scope = {**names}
        run(read(f"_candidate = ({name})", "<entry point>", "exec"), scope)
        return scope["_candidate"]
    if name:
        if name in names:
            return names[name]
        return getattr(next(kind for kind in reversed(classes) if hasattr(kind, name))(), name)
    defined = [f for f in names.values() if isinstance(f, types.FunctionType) and f.__globals__ is names]
    functions = [function for function in defined if function.__name__ != "main"]
    if "Solution" not in names and functions:
        return functions[-1]
    kind = names.get("Solution") or classes[-1]
    methods = [key for key, value in vars(kind).items() if isinstance(value, types.FunctionType) and key[0] != "_"]
    return getattr(kind(), methods[-1])


def _judges_names() -> dict[str, Any]:
    """The built-in names and those that judges of a class ``Solution`` import beforehand."""
    names: dict[str, Any] = {module.__name__: module for module in _MODULES}
    for module in (typing, collections, itertools, functools, heapq, bisect, math):
        public = getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]
        names |= {name: getattr(module, name) for name in public}
    return names | {"ListNode": ListNode, "TreeNode": TreeNode} | vars(builtins)


def _plain(value: Any) -> Any:
    """JSON's form of returned values that are much like lists."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, collections.deque | range | type({}.keys()) | type({}.values())):
        return list(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)
