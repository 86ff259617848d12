"""Forms of answers that are told apart before a parser of formulas sees them: bases, clocks, choices, words, units."""

from __future__ import annotations

import re

from rollout.answer_text import without_groups
from rollout.number_answers import Quantity, whole_number

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox)\s?\{([^{}]*)\}")
_BASES = {
    **{"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10},
    **{"eleven": 11, "twelve": 12, "sixteen": 16},
}
_BASE = re.compile(
    r"\(?([0-9A-Fa-f](?:[0-9A-Fa-f ,]*[0-9A-Fa-f])?)\)?\s*(?:_\s*\{?\s*\(?(\w+)\)?\s*\}?|,?\s*\(?(?:in\s*)?base[-\s]*(\w+)\)?)\s*\.?"
)
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::\d{2})?\s*([ap])\.?\s?m\b\.?", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-Z])\)?[.)]?")
_LABELLED = re.compile(
    r"\\(?:text|textbf|textrm|mathrm)\s?\{\s*\(([A-Z])\)\s*\}(?:\s|\\[,;: ]|~|\\quad)*([^\s}].*)", re.DOTALL
)
_CHOSEN = re.compile(r"\(([A-Za-z])\).*|([A-Za-z])(?:[.):].*)?", re.DOTALL)
_CHOSEN_IN_TEXT = re.compile(r"\(([A-Z])\)|\b([A-Z])\b[.)*\s]*$")
_UNIT = re.compile(
    r"(?<=[\d}\s)])(?:\s|\\[,;: ]|~)*(?:\\(?:text|mbox|mathrm|textrm)\s*\{([^{}\d]+)\}|(?<![\\a-zA-Z])([a-zA-Z]{2,}))\s*(?:\^\s*\{?\s*\d\s*\}?)?\s*\.?$"
)
_FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp max min gcd lcm mod sqrt det dim ker deg"
)
_KNOWN = frozenset(_FUNCTIONS.split())
_SHORT_WORDS = ("no", "yes", "so", "on", "if", "is", "it", "to", "of", "true", "false", "none", "not")
_PRODUCT = re.compile(r"[A-Z]{3,4}|abc|abcd|xyz|pqr|uvw|[b-df-hj-np-tv-z]{3,}")
_UNIT_NAMES = """
mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre, in inch inche, ft foot feet,
yd yard, mi mile, mg milligram, g gram, kg kilogram, s sec second, min minute, h hr hour, cent, dollar, day, week, month, year
"""
UNITS = {name: names.split()[0] for names in _UNIT_NAMES.split(",") for name in names.split()}
"""Short names of units, by every name in the singular. Two different ones are never equal."""


def is_formula(body: str) -> bool:
    """True if ``body`` is a formula by itself, not a sentence: no word but names of functions stands outside of text."""
    outside = re.sub(r"\\(?:begin|end)\s*\{\w+\}|\\[a-zA-Z]+", " ", _TEXT.sub(" ", body))
    words = re.findall(r"[A-Za-z]{2,}", outside)
    alone = not re.search(r"\d", outside)
    if any(word.lower() in _SHORT_WORDS or (alone and word in ("or", "in")) for word in words):
        return False
    long = [
        word
        for word in words
        if len(word) > 2 and word not in _KNOWN and word != "and" and not _PRODUCT.fullmatch(word)
    ]
    units = [word for word in long if word.lower().removesuffix("s") not in UNITS]
    return bool(body) and not units


def based(body: str) -> tuple[str, int] | None:
    """Digits and base of a number such as ``52_8``."""
    found = _BASE.fullmatch(_TEXT.sub(r"\1", without_groups(body)).strip())
    if not found:
        return None
    name = (found[2] or found[3]).lower()
    base = int(name) if name.isdecimal() else _BASES.get(name)
    digits = re.sub(r"[ ,]", "", found[1]).lower()
    if base is None or not 2 <= base <= 36 or (not digits.isdecimal() and base < 11):
        return None
    return digits.lstrip("0") or "0", base


def clock(body: str) -> str | None:
    """The time of day that ``body`` is, such as ``6:30 p``. Without a.m. or p.m. it is none."""
    found = _CLOCK.fullmatch(re.sub(r"\\[,;: ]|~", " ", _TEXT.sub(r"\1", body)).strip())
    return None if found is None else f"{int(found[1])}:{found[2]} {found[3].lower()}"


def choice(body: str) -> str | None:
    """The capital letter that ``body`` is, with or without brackets: a choice, or the name of a quantity."""
    found = _CHOICE.fullmatch(_TEXT.sub(r"\1", body).strip())
    return None if found is None else found[1]


def labelled(body: str) -> tuple[str, str] | None:
    r"""The letter of a choice and its value, if ``body`` has both: ``\textbf{(E)}\ 24``."""
    found = _LABELLED.fullmatch(body)
    return None if found is None else (found[1], found[2])


def chosen(said: str | None, text: str) -> str | None:
    """The letter of the answer ``said``, such as ``(B) 12``; if there is none, that at the end of ``text``."""
    if said is not None:
        found = _CHOSEN.fullmatch(_TEXT.sub(r"\1", said).strip())
    else:
        found = next(reversed(list(_CHOSEN_IN_TEXT.finditer(text.strip().rpartition("\n")[2]))), None)
    return None if found is None else (found[1] or found[2]).upper()


def wording(body: str) -> str | None:
    r"""The words of ``body`` if all of it is in ``\text{...}``; else None."""
    bare = _TEXT.sub(r"\1", body).strip()
    inside = body != bare and not _TEXT.sub("", body).strip() and re.fullmatch(r"[A-Za-z][A-Za-z0-9 ,.'-]*", bare)
    return words(bare) if inside else None


def stated(text: str) -> str:
    """What the last line says the answer is, else that line."""
    line = text.strip().rpartition("\n")[2]
    return re.split(r"(?i)\banswer(?:\s+is)?\b\s*:?", line)[-1]


def words(text: str) -> str:
    """The words of ``text`` in small letters, without punctuation and commands of LaTeX."""
    text = re.sub(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)(?![a-zA-Z])", " ", text)
    return " ".join(re.findall(r"[a-z0-9]+", text.casefold()))


def unit(body: str) -> str | None:
    """The unit after a number, by its short name, if it is one of ``UNITS``."""
    found = _UNIT.search(body.replace("$", ""))
    if found is None:
        return None
    name = (found[1] or found[2]).strip().lower()
    return UNITS.get(name) or UNITS.get(name.removesuffix("s"))


def without_unit(body: str) -> str:
    """``body`` without the unit at its end, if there is something before it."""
    found = _UNIT.search(body)
    if found is None or (found[1] is None and unit(body) is None) or re.search(r"\b(?:and|or)\b", found[0]):
        return body
    return body[: found.start()].rstrip()


def number(body: str) -> Quantity | None:
    """The number that ``body`` is, with or without a unit; None if it is none."""
    inner = _TEXT.fullmatch(body)
    body = inner[1] if inner else body
    whole = whole_number(body)
    if whole is not None:
        return whole
    return whole_number(without_unit(body.replace("$", "")))


def brackets(body: str) -> str:
    r"""``{`` of a set and ``(`` of a pair or an interval, if the whole of ``body`` is in one pair of them; else nothing."""
    clean = without_groups(body).strip()
    if clean.startswith("\\{") and clean.endswith("\\}"):
        return "{"
    if (
        clean[:1] in ("(", "[")
        and clean[-1:] in (")", "]")
        and "," in clean
        and clean.count("(") + clean.count("[") == 1
    ):
        return "("
    return ""
