"""Read the number that an answer ends with, and compare two such numbers exactly.

Text is first rewritten by ``answer_text.plain``. Then the last *quantity* is read: a number with everything that is attached to it by a slash, a power or an operator.
A quantity that is no single number (an unfinished sum, a range, a root, a number in another base) has no value.
Invariant: the time is linear in the length of the text, whatever it holds. Needs the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from rollout.answer_text import MOST_DIGITS, declared_answer, in_ascii, plain

MOST_EXPONENT = 400
"""Size of an exponent beyond which nothing is computed."""
WINDOW, CONTEXT = 600, 120
"""Characters at the end of a text that are searched first, and those of them that only give context."""


@dataclass(frozen=True)
class Quantity:
    """A number that was read from a text."""

    value: Fraction
    percent: bool = False
    """True if a percent sign follows it."""

    def equals(self, other: Quantity) -> bool:
        """True if both are the same number. ``50%`` equals 50, its convention in word problems, and 0.5."""
        forms = [{q.value, q.value / 100} if q.percent else {q.value} for q in (self, other)]
        return self.value == other.value if self.percent and other.percent else bool(forms[0] & forms[1])


_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+\b|(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d+(?!\w))?")
_CURRENCY = r"(?:(?:US|CA|AU|HK|NZ|S|A|C|R)?[$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd]|(?:USD|EUR|GBP|CAD|AUD|INR|CHF|JPY|CNY|SEK|NOK|DKK|PLN|BRL|Rs\.?)(?=\s?\Z))"
_MONEY = re.compile(rf"{_CURRENCY}\s?\Z")
_MINUS = re.compile(rf"-[*_`]*(?:\s?{_CURRENCY})?\s?\Z")
_BOUND = re.compile(rf"-(?:{_CURRENCY}\s?)?\Z")
_STATED = re.compile(r"(?:[=:{($#\[>\u2248]|\b(?:is|are|be|was|equals?|to|of|by)|^)[ \t*_`$]*\Z")
_NEGATIVE = re.compile(r"\b(negative|minus)\s+[$*]*\Z", re.IGNORECASE)
_DENIED = re.compile(r"(?:\bnot|n't|\\neq?|!=)[\s*_$({:]*\Z", re.IGNORECASE)
_OTHER_THAN = re.compile(r"(?:[,;(]|\b(?:and|instead|rather))[ \t]*(?:not|than)[ \t*$]*\Z", re.IGNORECASE)
_UNREADABLE_BEFORE = re.compile(
    r"(?:(?<![a-zA-Z'])[b-hj-z]\s?[-+*/]\s?|\\sqrt\s?[\[{(]?|\\pm\s?|\+/-\s?|[)\]}]\s?\^\s?[{(]?-?|\)\s?[/*]\s?|\b[fglm]?log_?(?:\{?\d+\}?\s?[({]?|\{?))\Z"
)
_UNREADABLE_AFTER = re.compile(
    r"\s?(?:\\(?:pi|sqrt|pm|log|ln|sin|cos|tan|infty)|\^\s?\{?[a-zA-Z(]|[*/]\s?[(\\]|!(?=[*/+)]))"
)
_POWER_OF_UNIT = re.compile(r"(?:[a-zA-Z)\]}]\s?\^\s?\{?-?|(?<![a-zA-Z])(?:mm|cm|dm|m|km|in|ft|yd|mi))\Z")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(r"[\s*$]{0,3}(thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_SHORT_SCALE = {"k": 10**3, "m": 10**6, "b": 10**9}
_PERCENT = re.compile(r"[\s$*]{0,3}(?:%|percent\b|per cent\b|pct\b)", re.IGNORECASE)
# What may stand between two numbers of one quantity, and what it is.
_GAPS = {
    "/": re.compile(r"[ \t]?/[ \t]?-?[ \t]?"),
    "^": re.compile(r"[ \t]?(?:\^[ \t]?[{(]?|\*\*(?!\d+\*\*))[ \t]?[+-]?"),
    "*": re.compile(r"[ \t]?[*x][ \t]?-?"),
    " ": re.compile(r"[ \t](?=\d+[ \t]?/)"),
    "none": re.compile(
        r"[ \t]{0,2}[+-][ \t]{0,2}[$]?|[:_][{]?|\s?\\sqrt[ {]*|(?<=\d)%?[ \t]?(?:\bor\b)[ \t$]*|\.(?=\d)|[ \t]?\\pm[ \t]?"
    ),
}


@dataclass(frozen=True)
class _Found:
    """Numbers that belong together: the first and last position in the text, and what is between the numbers."""

    tokens: list[re.Match[str]]
    gaps: list[tuple[str, str]]


def _chains(text: str) -> Iterator[_Found]:
    """The quantities of ``text`` in their order."""
    tokens: list[re.Match[str]] = []
    gaps: list[tuple[str, str]] = []
    for token in _NUMBER.finditer(text):
        if tokens:
            between = text[tokens[-1].end() : token.start()]
            kind = _kind(text, tokens[-1].end(), token.start()) if len(between) < 12 else None
            if kind is not None:
                tokens.append(token)
                gaps.append((kind, between))
                continue
        if _POWER_OF_UNIT.search(text, max(0, token.start() - 6), token.start()) and _is_power(text, token):
            continue
        if tokens:
            yield _Found(tokens, gaps)
        tokens, gaps = [token], []
    if tokens:
        yield _Found(tokens, gaps)


def _kind(text: str, start: int, end: int) -> str | None:
    """How the numbers on both sides of ``text[start:end]`` are connected; None if they are not."""
    for name, pattern in _GAPS.items():
        found = pattern.match(text, start)
        if found and found.end() == end:
            return name
    return None


def _is_power(text: str, token: re.Match[str]) -> bool:
    """True for the 2 of ``cm^2``, ``x^{2}`` and ``cm2``; false for the 5 of ``USD5``."""
    before = text[max(0, token.start() - 4) : token.start()]
    if ")" in before[-3:] or "]" in before[-3:]:
        return False
    return "^" in before or (token[0] in ("2", "3") and bool(re.match(r"\W|$", text[token.end() : token.end() + 1])))


def _value(token: str) -> Fraction | None:
    if len(token) > MOST_DIGITS:
        return None
    if token[:2] in ("0x", "0X"):
        return Fraction(int(token, 16))
    digits, _, exponent = token.lower().partition("e")
    if exponent and abs(int(exponent)) > MOST_EXPONENT:
        return None
    return Fraction(digits) * Fraction(10) ** int(exponent or 0)


def _worth(found: _Found) -> Fraction | None:
    """The number that a chain stands for, without its sign; None if it stands for none."""
    kinds = [kind for kind, _ in found.gaps]
    if len(kinds) > 2:
        return None
    values = [_value(token[0]) for token in found.tokens]
    signs = [-1 if "-" in between else 1 for _, between in found.gaps]
    if any(value is None for value in values):
        return None
    numbers = [value for value in values if value is not None]
    if not kinds:
        return numbers[0]
    if kinds == ["/"]:
        return signs[0] * numbers[0] / numbers[1] if numbers[1] else None
    if kinds == [" ", "/"]:
        return numbers[0] + numbers[1] / numbers[2] if numbers[2] > numbers[1] else None
    if kinds == ["^"]:
        return _power(numbers[0], signs[0] * numbers[1])
    if kinds == ["*", "^"] and numbers[1] == 10:
        power = _power(numbers[1], signs[1] * numbers[2])
        return None if power is None else numbers[0] * power
    return None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if (
        exponent.denominator != 1
        or abs(exponent) * max(len(str(base)), 1) > MOST_EXPONENT
        or (not base and exponent <= 0)
    ):
        return None
    return base ** int(exponent)


def _sign(text: str, start: int) -> int:
    """-1 if what precedes the number at ``start`` makes it negative. A dash after a word is no minus."""
    before = text[max(0, start - 40) : start]
    word = _NEGATIVE.search(before)
    if word:
        return -1 if word[1].lower() == "negative" or _STATED.search(before[: word.start()]) else 1
    minus = _MINUS.search(before)
    if not minus:
        return 1
    ahead = before[: minus.start()]
    if _BOUND.search(before):
        return 1 if re.search(r"(?:[0-9A-Za-z\u00c0-\u024f]|[.)\]\-])[*`]*\Z|\d[*_`]+\Z", ahead) else -1
    if "\n" in minus[0] or ahead.endswith("-"):
        return 1
    return -1 if _STATED.search(ahead) else 1


def _read(text: str, found: _Found) -> Quantity | None:
    start, end = found.tokens[0].start(), found.tokens[-1].end()
    before, after = text[max(0, start - 24) : start], text[end : end + 24]
    if _UNREADABLE_BEFORE.search(before) or _UNREADABLE_AFTER.match(after) or _DENIED.search(before):
        return None
    value = _worth(found)
    if value is None:
        return None
    if after[:1] in ("}", ")") and found.gaps:
        after = after[1:]
    scale = _SCALE.match(after)
    if scale:
        value *= _SCALES[scale[1].lower()]
    elif _MONEY.search(before) and re.match(r"[kKmMbB](?!\w)", after):
        value *= _SHORT_SCALE[after[0].lower()]
    return Quantity(value * _sign(text, start), bool(_PERCENT.match(after)))


def last_quantity(text: str) -> Quantity | None:
    """The last quantity of ``text``; None if there is none, or if it is no single number."""
    for part in (text[-WINDOW:], text) if len(text) > WINDOW else (text,):
        clean = plain(part)
        found = list(_chains(clean))
        while len(found) > 1 and _is_excluded(clean, found[-1].tokens[0].start()):
            found.pop()
        if found and (part is text or found[-1].tokens[0].start() > CONTEXT):
            return _read(clean, found[-1])
    return None


def _is_excluded(text: str, start: int) -> bool:
    """True for the 6 of "5, not 6" and of "5 rather than 6"."""
    return bool(_OTHER_THAN.search(text, max(0, start - 20), start))


def nearest_quantity(text: str, word: str, within: int = 60) -> Quantity | None:
    """Return the first quantity after the last ``word`` if a digit follows within ``within`` characters, else None."""
    at = text.lower().rfind(word)
    return None if at < 0 or not re.search(r"\d", in_ascii(text[at : at + within])) else _first_quantity(text[at:])


def _first_quantity(text: str) -> Quantity | None:
    clean = plain(text[:WINDOW])
    found = next(_chains(clean), None)
    return None if found is None else _read(clean, found)


def only_quantity(text: str) -> Quantity | None:
    """The quantity of ``text`` if it holds one; None if it holds several, none, or one that is no single number."""
    clean = plain(text)
    found = list(_chains(clean)) if len(clean) <= WINDOW else []
    return _read(clean, found[0]) if len(found) == 1 else None


_WHOLE_BEFORE = re.compile(rf"[\s*`]*(?:[+-]\s?)?(?:\\?{_CURRENCY}\s?)?(?:[+-]\s?)?[$]*")
_WHOLE_AFTER = re.compile(
    r"[})]?(?:\s?(?:thousand|million|billion|trillion)s?)?[\s$*`]*%?[\s$*`\u20ac\u00a3\u00a5]*[.]?[\s$]*"
)


def whole_number(text: str) -> Quantity | None:
    """The number that ``text`` is, with nothing beside it but signs of currency and percent; None if it is no number.

    A comma between two digits is no decimal point here: in formulas ``3,5`` is a list.
    """
    clean = plain(text, decimal_comma=False).strip()
    chains = list(_chains(clean)) if len(clean) <= WINDOW else []
    if len(chains) != 1:
        return None
    before, after = clean[: chains[0].tokens[0].start()], clean[chains[0].tokens[-1].end() :]
    closed = "}" not in after[:1] and ")" not in after[:1]
    if not _WHOLE_BEFORE.fullmatch(before) or not _WHOLE_AFTER.fullmatch(after) or not (closed or chains[0].gaps):
        return None
    return _read(clean, chains[0])


# --- the answer in a text ---

_HEADING = re.compile(
    r"\s*[*_]*(?:(?:step|part|case|method|option|section|problem|question|phase)\b|\d+[.)]\s+[A-Za-z])", re.I
)


def answer_number(text: str) -> Quantity | None:
    r"""The number of an answer: the first one after the last ``####``; without it that of the last ``\boxed{...}`` or
    ``<answer>...</answer>``, whichever comes later; else the last one of the text."""
    _, mark, tail = text.rpartition("####")
    if mark and not _is_heading(tail):
        return _first_quantity(tail)
    declared = declared_answer(text)
    if declared is not None and re.search(r"\d", in_ascii(declared)):
        return last_quantity(declared)
    return last_quantity(text)


def _is_heading(tail: str) -> bool:
    """True if ``####`` begins a heading of Markdown (``#### Step 2``) that is followed by more numbers."""
    line, _, rest = tail.partition("\n")
    return bool(_HEADING.match(line)) and bool(re.search(r"\d", rest))
