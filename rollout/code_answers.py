"""Whether a program's answer is the wanted one: printed text by lines and words, returned values by their parts.

Numbers with a fraction agree within ``TOLERANCE``, absolute below 1 and relative above; whole numbers agree exactly.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

TOLERANCE = 1e-6
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)


def same_output(said: str, wanted: str) -> bool:
    """Compare printed text: blank lines and the width of spaces do not count, everything else does."""
    ours, theirs = _words(said), _words(wanted)
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def same_value(value: Any, wanted: Any) -> bool:
    """Compare a returned value, as JSON has it; ``wanted`` may also be a list of one that holds the value."""
    try:
        return _equal(value, wanted) or (isinstance(wanted, list) and len(wanted) == 1 and _equal(value, wanted[0]))
    except RecursionError:  # Nested deeper than anything that was asked for.
        return False


def _words(text: str) -> list[list[str]]:
    return [words for line in text.split("\n") if (words := line.split())]


def _same_word(said: str, wanted: str) -> bool:
    if said == wanted:
        return True
    if not (_NUMBER.fullmatch(said) and _NUMBER.fullmatch(wanted)):
        return False
    if _WHOLE.fullmatch(wanted):  # 3.0 is 3, but 8 is not 7, however large both are.
        return not _WHOLE.fullmatch(said) and abs(Decimal(said) - Decimal(wanted)) <= TOLERANCE
    return _close(float(said), float(wanted))


def _close(value: float, wanted: float) -> bool:
    return math.isfinite(wanted) and abs(value - wanted) <= TOLERANCE * max(1.0, abs(wanted))


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(map(_equal, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        ours, theirs = ({str(key): item for key, item in table.items()} for table in (value, wanted))
        return ours.keys() == theirs.keys() and all(_equal(item, theirs[key]) for key, item in ours.items())
    if value == wanted:
        return True
    if not all(isinstance(number, int | float) for number in (value, wanted)) or isinstance(value, bool):
        return False
    if isinstance(wanted, int):
        return isinstance(value, float) and math.isfinite(value) and abs(Decimal(value) - wanted) <= TOLERANCE
    if math.isnan(wanted):
        return isinstance(value, float) and math.isnan(value)
    try:
        return _close(float(value), wanted)
    except OverflowError:  # An integer beyond all floats.
        return False
