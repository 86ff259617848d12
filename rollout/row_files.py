"""Rows of a data file with their numbers as the file counts them: JSONL, JSON, CSV, parquet.

``datasets.read`` asks for them. Whatever is wrong with a file is one line that names it and the row. Values come out as
``row_values.plain_value`` makes them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rollout.row_values import UnusableValue, plain_value
from shared.errors import InputError, one_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Row = dict[str, Any]


def number_rows(file: Path) -> list[tuple[int, Row]]:
    """All rows of a data file with their numbers as it counts them: lines of JSONL, rows of other forms, from 1.

    Raises ``InputError`` E203-E206, naming file and line.
    """
    rows = _read_parquet(file) if file.suffix == ".parquet" else _read_text(file)
    if not rows:
        raise InputError("E203", "no rows", file.name, "0 rows", "at least 1", "check the export")
    rows = [(number, _plain_row(row, file.name, number)) for number, row in rows]
    _check_types(rows, file.name)
    return rows


def _plain_row(row: Row, name: str, number: int) -> Row:
    plain: Row = {}
    for column, value in row.items():
        try:
            plain[column] = plain_value(value)
        except UnusableValue as error:
            found = f"{error.found} in {column}"
            raise InputError(error.code, error.what, f"{name}:{number}", found, error.expected, error.fix) from None
    return plain


def _read_parquet(file: Path) -> list[tuple[int, Row]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        found, expected = one_line(error), "a parquet file"
        raise InputError("E204", "invalid parquet", file.name, found, expected, "export it again") from None
    names = table.column_names
    _check_twice(names, file.name)
    columns = [_column_values(table.column(name), name, file.name) for name in names]
    return [(number, dict(zip(names, row, strict=True))) for number, row in enumerate(zip(*columns, strict=True), 1)]


def _column_values(column: Any, name: str, file: str) -> list[Any]:
    """All values of a parquet column as Python's. Raises ``InputError`` E206 for one that Python has no type for."""
    try:
        return _texts(column.to_pylist())
    except Exception:  # Whatever a type's conversion raises: the loop below finds the row.
        pass
    for number, value in enumerate(column, 1):
        try:
            value.as_py()
        except Exception as error:
            found, fix = f"{column.type} in {name}: {one_line(error, 120)}", "export the column as text"
            place = f"{file}:{number}"
            raise InputError("E206", "value of no usable type", place, found, "text, numbers, lists", fix) from None
    raise InputError("E206", "value of no usable type", f"{file}:{name}", str(column.type), "text", "export it as text")


def _texts(values: list[Any]) -> list[Any]:
    """``values`` as text if they are bytes that are UTF-8, all of them: some writers do not mark text as such."""
    if not any(isinstance(value, bytes) for value in values):
        return values
    try:
        return [value if value is None else value.decode("utf-8") for value in values]
    except UnicodeDecodeError:
        return values


def _check_twice(names: list[str], file: str) -> None:
    twice = [name for i, name in enumerate(names) if name and name in names[:i]]
    if twice:
        raise InputError("E204", "column twice", f"{file}:{twice[0]}", f"{twice[0]} twice", "one", "rename one of them")


def _read_text(file: Path) -> list[tuple[int, Row]]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")  # Spreadsheets begin theirs with a mark.
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = f"byte {error.object[error.start]:#04x}"
        fix = "convert with iconv -f latin1 -t utf-8"
        raise InputError("E205", "not UTF-8", f"{file.name}:{line}", found, "UTF-8", fix) from None
    if file.suffix == ".csv":
        numbered = list(enumerate(_parse_csv(text, file.name), 1))
        for number, row in numbered:
            if None in row:
                found, fix = "more cells than columns", f"repair row {number}"
                raise InputError("E204", "invalid CSV", f"{file.name}:{number}", found, "one cell per column", fix)
        return numbered
    if file.suffix == ".json":
        rows = _parse_json(text, file.name, 1)
        if not isinstance(rows, list):
            raise InputError(
                "E204",
                "invalid JSON",
                file.name,
                type(rows).__name__,
                "a list of objects",
                "use .jsonl for one object per line",
            )
        numbered = list(enumerate(rows, 1))
    else:
        # JSON ends lines with a newline only; splitlines() would also cut at separators inside strings.
        numbered = [(i, _parse_json(line, file.name, i)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            found = type(row).__name__
            raise InputError(
                "E204",
                "invalid JSON",
                f"{file.name}:{number}",
                found,
                "one object per line",
                f"repair or remove line {number}",
            )
    return numbered


def _parse_csv(text: str, name: str) -> list[Row]:
    import csv

    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # Of the process: others read with it too.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_twice(list(reader.fieldnames or []), name)
        return [dict(row) for row in reader]
    except csv.Error as error:
        line = reader.reader.line_num
        place, fix = f"{name}:{line}", f"repair line {line}, or a quote before it"
        raise InputError("E204", "invalid CSV", place, str(error), "cells, quoted as a whole or not", fix) from None


def _parse_json(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number, found = line + error.lineno - 1, f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except RecursionError:
        number, found = line, "brackets nested too deep"
    except ValueError:  # Python limits the digits of an integer that it reads.
        number, found = line, "a number with thousands of digits"
    fix = f"repair or remove line {number}"
    raise InputError("E204", "invalid JSON", f"{name}:{number}", found, "one object per line", fix)


def _check_types(rows: list[tuple[int, Row]], name: str) -> None:
    seen: dict[str, tuple[type, int]] = {}
    for number, row in rows:
        for column, value in row.items():
            if value is None:
                continue
            kind, first = seen.setdefault(column, (type(value), number))
            if type(value) is not kind and {type(value), kind} != {int, float}:
                found = f"{kind.__name__} in row {first} and {type(value).__name__} in row {number}"
                raise InputError(
                    "E206", "mixed types", f"{name}:{column}", found, "one type", f"write all of {column} as strings"
                )
