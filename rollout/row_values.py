"""Values of data files become values that every later library can take: text, numbers, lists and tables of them.

``row_files`` asks for it once a file is read, ``reward_child`` for what rewards log. Kept to the standard library. Rules:
a NaN is no value (None); a Decimal is a number; dates, times, durations and UUIDs are text.
"""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID


class UnusableValue(ValueError):
    """A value that no rule turns into a plain one: ``found``, ``expected`` and ``fix`` of the message."""

    def __init__(self, code: str, what: str, found: str, expected: str, fix: str) -> None:
        super().__init__(code, what, found, expected, fix)
        self.code, self.what, self.found, self.expected, self.fix = code, what, found, expected, fix


def plain_value(value: Any) -> Any:
    """``value`` as text, number, bool, None, bytes, or lists and tables of these. Raises ``UnusableValue``."""
    if isinstance(value, str):
        return _whole(value)
    if value is None or isinstance(value, int):
        return value
    if type(value) is float:
        return None if math.isnan(value) else value
    if isinstance(value, bytes):
        return value
    if isinstance(value, Decimal):
        return _number(value)
    if isinstance(value, dict):
        return {_whole(str(name)): plain_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(inner) for inner in value]
    try:
        return plain_value(plain(value))
    except TypeError:
        found, fix = f"a value of type {type(value).__name__}", "write it as text or a number"
        raise UnusableValue("E206", "value of no usable type", found, "text, numbers, lists, tables", fix) from None


def plain(value: Any) -> Any:
    """JSON's form of one value that JSON does not know. Raises ``TypeError`` if there is none."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, timedelta | UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _number(value: Decimal) -> int | float | None:
    """An integer where ``value`` is one, else the float that is written with the same digits.

    Raises ``UnusableValue`` if no float is.
    """
    if not value.is_finite():
        return None if value.is_nan() else float(value)
    if value == value.to_integral_value():
        return int(value)
    number = float(value)
    if Decimal(repr(number)) != value:
        found = f"the decimal {value}"
        raise UnusableValue("E206", "number with too many digits", found, "at most 15 digits", "write it as text")
    return number


def _whole(text: str) -> str:
    """``text`` itself. Raises ``UnusableValue`` for half of a surrogate pair, which no encoding can hold."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"half a character (\\u{ord(text[error.start]):04x})"
        raise UnusableValue("E205", "not UTF-8", found, "whole characters", "write both halves, or none") from None
    return text
