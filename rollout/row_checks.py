"""What the rows of a data set must hold for the built-in rewards that read them: checked for every row before a start.

Nothing is run. Custom functions check their own columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollout.code_forms import parse_tests
from rollout.code_statements import UnknownTests
from rollout.datasets import Rows, read
from rollout.reward_loading import Spec, default_column
from shared.config import Config
from shared.config_data import Source
from shared.errors import InputError, raise_all

CODE_TESTS = "code_tests"
KNOWN_FORMS = "statements that compile, check(candidate), inputs and outputs, or fn_name with both"


def read_checked(config: Config, source: Source, split: str, key: str) -> Rows:
    """Read the rows of ``source`` as ``datasets.read`` does, and check them. Raises ``InputErrors`` E206 too."""
    rows = read(source, split, key)
    raise_all(check_code_rows(config.reward.functions, rows.rows))
    return rows


def check_code_rows(functions: Sequence[Spec], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[InputError]:
    """Find the ``(place, row)`` whose tests no ``code_tests`` of ``functions`` could use: one E206 a column.

    A row without tests is one of them if the rows around it have tests and no other function could score it.
    """
    columns = dict.fromkeys(code_column(spec) for spec in functions if spec.function == CODE_TESTS)
    alone = all(spec.function == CODE_TESTS for spec in functions)
    problems = (_unknown_tests(column, rows, alone) for column in columns)
    return [problem for problem in problems if problem is not None]


def code_column(spec: Spec) -> str:
    """The column that a ``code_tests`` reads its tests from."""
    return str(spec.args.get("column", default_column(CODE_TESTS)))


def _unknown_tests(column: str, rows: Sequence[tuple[str, Mapping[str, Any]]], alone: bool) -> InputError | None:
    needed = alone and any(row.get(column) is not None for _, row in rows)
    wrong: list[tuple[str, UnknownTests]] = []
    for place, row in rows:
        try:
            if parse_tests(row.get(column), row) is None and needed:
                raise UnknownTests("no tests")
        except UnknownTests as unknown:
            wrong.append((f"{place}:{column}", unknown))
    if not wrong:
        return None
    place, first = wrong[0]
    place += f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return InputError("E206", "tests not understood", place, first.found, KNOWN_FORMS, first.fix)
