"""The forms in which public data sets write tests of programs, read into cases of three kinds.

Reading runs nothing, so the dry run reads every row. What has no known form raises ``UnknownTests``: a test that is not
understood must never count as a test that failed.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.code_statements import Statement, UnknownTests, parse, parse_statement
from shared.errors import one_line

INPUT_KEYS, OUTPUT_KEYS = ("input", "stdin"), ("output", "expected_output", "stdout")
NESTED_KEYS = ("functional", "assert_case", "test_cases", "test_list", "tests", "test", "unit_tests", "asserts")
"""Keys of an object under which other forms lie."""
CONTEXT_KEYS = ("entry_point", "fn_name", "func_name", "metadata", "test_imports", "test_setup_code")
"""Columns of a row, or keys of an object, that belong to its tests."""
STDIN, CALL = ("stdin", "stdin_stdout", "standard_input"), ("functional", "function_call", "call_based")
"""What ``testtype`` or ``type`` of a case says."""


@dataclass(frozen=True)
class Input:
    """A test of standard input and output."""

    given: str
    wanted: str


@dataclass(frozen=True)
class Call:
    """A test that calls a function and compares what it returns."""

    function: str
    arguments: list[Any] | dict[str, Any]
    """Positional arguments, or keyword arguments by name."""
    wanted: Any


Case = Statement | Input | Call


@dataclass
class Suite:
    """The tests of one row."""

    cases: list[Case]
    setup: list[str] = field(default_factory=list)
    """Python text that runs before each ``Statement`` and ``Call``."""


def parse_tests(tests: Any, row: Mapping[str, Any]) -> Suite | None:
    """Read ``tests`` with the other columns of their ``row``; None if the row has no tests at all.

    Raises ``UnknownTests``.
    """
    if tests is None:
        return None
    context = {key: row[key] for key in CONTEXT_KEYS if row.get(key)}
    suite = Suite([], _setup(context))
    suite.cases += _read(tests, context, suite.setup)
    if not suite.cases:
        raise UnknownTests("no tests")
    return suite


def _read(tests: Any, context: dict[str, Any], setup: list[str]) -> Iterator[Case]:
    """The cases of ``tests``; imports and definitions that stand alone in a list go to ``setup``."""
    tests = tests.tolist() if hasattr(tests, "tolist") else tests
    if isinstance(tests, str):
        data = _data(tests)
        if data is None:
            statement = parse_statement(tests, _entry_point(context), whole=True)
            if statement is None:
                raise UnknownTests(f'text that tests nothing: "{one_line(tests, 60)}"' if tests.strip() else "no tests")
            yield statement
        else:
            yield from _read(data, context, setup)
    elif isinstance(tests, dict):
        yield from _read_table(tests, context, setup)
    elif isinstance(tests, list | tuple):
        for test in tests:
            yield from _read_element(test, context, setup)
    else:
        raise UnknownTests(f"{type(tests).__name__} {one_line(tests, 60)}")


def _read_element(test: Any, context: dict[str, Any], setup: list[str]) -> Iterator[Case]:
    """The cases of one element of a list."""
    data = _data(test) if isinstance(test, str) else test
    if isinstance(data, dict):
        both = _both(data)
        yield from [_case(*both, _function(data, context))] if both else _read_table(data, context, setup)
    elif data is None and isinstance(test, str):
        statement = parse_statement(test, _entry_point(context))
        if statement is None:
            setup.append(textwrap.dedent(test))
        else:
            yield statement
    else:
        raise UnknownTests(f"a list with {type(test).__name__} {one_line(test, 60)}")


def _read_table(table: dict[str, Any], context: dict[str, Any], setup: list[str]) -> Iterator[Case]:
    """The cases of an object: one input and output, several, or another form under one of ``NESTED_KEYS``."""
    inner = context | {key: table[key] for key in CONTEXT_KEYS if table.get(key)}
    setup += [text for text in _setup(inner) if text not in setup]
    pairs = _pairs(table)
    if pairs is not None:
        function = _function(table, inner)
        yield from (_case(given, wanted, function) for given, wanted in pairs)
    nested = [table[key] for key in NESTED_KEYS if table.get(key)]
    for tests in nested:
        yield from _read(tests, inner, setup)
    if pairs is None and not nested:
        keys = ", ".join(map(str, table)) or "no keys"
        raise UnknownTests(f"an object with {one_line(keys, 80)}")


def _pairs(table: dict[str, Any]) -> list[tuple[Any, Any]] | None:
    """Inputs and outputs of several cases, or of one; None if there are none."""
    if "inputs" in table or "outputs" in table:
        inputs, outputs = _listed(table.get("inputs")), _listed(table.get("outputs"))
    elif both := _both(table):
        inputs, outputs = both
        if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
            inputs, outputs = [inputs], [outputs]
    else:
        return None
    if not (isinstance(inputs, list) and isinstance(outputs, list)):
        raise UnknownTests(f"inputs: {type(inputs).__name__}, outputs: {type(outputs).__name__}", "make both lists")
    if len(inputs) != len(outputs):
        raise UnknownTests(f"{len(inputs)} inputs and {len(outputs)} outputs")
    return list(zip(inputs, outputs, strict=True))


def _listed(value: Any) -> Any:
    """``value`` as a list: itself, that of its JSON text, or a single text in one."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str):
        data = _data(value)
        return data if isinstance(data, list) else [value]
    return value


def _both(table: dict[str, Any]) -> tuple[Any, Any] | None:
    """Input and output of a single case."""
    given = next((key for key in INPUT_KEYS if key in table), None)
    wanted = next((key for key in OUTPUT_KEYS if key in table), None)
    return (table[given], table[wanted]) if given and wanted else None


def _case(given: Any, wanted: Any, function: str) -> Case:
    if not function:
        return Input(_lines(given, "input"), _lines(wanted, "output"))
    if not isinstance(given, str):
        return Call(function, given if isinstance(given, list | dict) else [given], wanted)
    # A call as text: one JSON value a line, an argument each, and the result as JSON too.
    try:
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return Call(function, [given], wanted)
    try:
        return Call(function, arguments, json.loads(wanted) if isinstance(wanted, str) else wanted)
    except (ValueError, RecursionError):
        return Call(function, arguments, wanted)


def _lines(value: Any, what: str) -> str:
    """Standard input or output as text, from text, a number, or a list of lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(line, str | int | float) for line in value):
        return "".join(line if str(line).endswith("\n") else f"{line}\n" for line in value)
    fix = "write text or a list of lines, or name the function (fn_name)"
    raise UnknownTests(f"{what} {one_line(repr(value), 60)}", fix)


def _function(table: dict[str, Any], context: dict[str, Any]) -> str:
    """The function that a case calls; empty if it is about standard input."""
    kind = str(table.get("testtype") or table.get("type") or "").lower()
    if kind in STDIN:
        return ""
    places = (table, _table(table.get("metadata")), context, _table(context.get("metadata")))
    names = [place.get(key) for place in places for key in ("fn_name", "func_name")]
    if kind in CALL:
        names.append(context.get("entry_point"))
    name = next((name.strip() for name in names if isinstance(name, str) and name.strip()), "")
    if kind in CALL and not name:
        raise UnknownTests(f"testtype {kind} without a function's name", "add fn_name")
    return name


def _entry_point(context: dict[str, Any]) -> str:
    entry = context.get("entry_point")
    return entry.strip() if isinstance(entry, str) else ""


def _table(value: Any) -> dict[str, Any]:
    data = _data(value) if isinstance(value, str) else value
    return data if isinstance(data, dict) else {}


def _setup(context: dict[str, Any]) -> list[str]:
    """Imports and code that belong to the tests."""
    imports = context.get("test_imports") or []
    texts = [imports] if isinstance(imports, str) else [text for text in imports if isinstance(text, str)]
    texts += [code] if isinstance(code := context.get("test_setup_code"), str) else []
    for text in texts:
        parse(text)
    return [text for text in texts if text.strip()]


def _data(text: str) -> Any:
    """The list, object or text that ``text`` holds as JSON or as a literal of Python; None if it is neither."""
    start = text.lstrip()[:1]
    if not start or start not in '[{"':
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        try:
            data = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return data if isinstance(data, list | dict | str) else None
