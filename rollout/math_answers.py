r"""Compare an answer with a gold formula: as numbers, choices, words, or by math-verify as expressions.

math-verify 0.9.0 reads several usual notations as other values: ``1\,000`` as 0, ``0.\overline{3}`` as 0, ``52_8`` as 52,
``6:30 p.m.`` as 6, ``6m`` as 6 metres. They are told apart, or written out, before it sees them. It is imported inside functions only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from rollout import answer_forms as forms
from rollout.answer_text import declared_answer, in_ascii, last_box, without_groups, without_repeating
from rollout.number_answers import Quantity, last_quantity, nearest_quantity

CLOSE, CLOSE_SHARE = Fraction(1, 2_000_000), Fraction(1, 100_000)
"""Largest distance, absolute and as a share of the gold number, of a rounded decimal: 0.333333 is one third."""
MOST_SEARCHED = 4000
"""Characters at the end of a text without a box or tags in which formulas are searched."""
_OUTER = re.compile(r"\s*(?:\$\$?(?P<a>(?:[^$\\]|\\.)*)\$\$?|\\\((?P<b>.*)\\\)|\\\[(?P<c>.*)\\\])\s*\.?\s*", re.DOTALL)
_END = re.compile(r"(?:\s|(?<!\\)\\[,;: ]|~|\.|(?<!\\)\\\Z)+\Z")
_LAST_MATH = re.compile(r"\$\$?((?:[^$\\]|\\.)+)\$\$?|\\\(((?:[^\\]|\\(?!\)))+)\\\)|\\\[((?:[^\\]|\\(?!\]))+)\\\]")
_JOINED = re.compile(r"\s*(?:,|,?\s*and|,?\s*or)\s*")


@dataclass(frozen=True)
class _Gold:
    """What a gold answer is. One of the fields is set."""

    number: Quantity | None = None
    based: tuple[str, int] | None = None
    """Digits, and the base that they are written in."""
    clock: str | None = None
    choice: str | None = None
    """A capital letter."""
    words: str | None = None
    formula: list[Any] | None = None
    """What math-verify made of it."""


def same(text: str, gold: str) -> float | None:
    """1 if the answer in ``text`` equals ``gold``, else 0; None if ``gold`` is nothing that can be compared."""
    body = formula_of(gold)
    if labelled := forms.labelled(body):
        scores = [score for score in (same(text, part) for part in labelled) if score is not None]
        return max(scores)
    wanted = _read_gold(gold, body)
    if wanted is None:
        return None
    declared = declared_answer(text)
    said = _last_formula(text[-MOST_SEARCHED:]) if declared is None else _inside(declared)
    if wanted.choice:
        return float(forms.chosen(said, text) == wanted.choice)
    if wanted.words:
        return float(forms.words(said if said is not None else forms.stated(text)) == wanted.words)
    if said is None:
        return _in_prose(text, wanted, body)
    return float(_equals(wanted, said, body))


def _equals(wanted: _Gold, said: str, gold: str) -> bool:
    based, clock = forms.based(said), forms.clock(said)
    if wanted.based or based:
        return wanted.based == based
    if wanted.clock or clock:
        return wanted.clock == clock
    if forms.unit(gold) and forms.unit(said) and forms.unit(gold) != forms.unit(said):
        return False
    number = forms.number(said)
    if wanted.number and number:
        return _close(wanted.number, number)
    if {forms.brackets(gold), forms.brackets(said)} == {"{", "("}:
        return False
    formula = wanted.formula if wanted.formula is not None else _parsed(f"${written_out(gold)}$")
    return bool(formula) and _verified(formula, _parsed(f"${written_out(said)}$"))


def _in_prose(text: str, wanted: _Gold, gold: str) -> float:
    """The score of a text without a box and without dollars."""
    stated = _inside(forms.stated(text))
    if forms.is_formula(stated):
        return float(_equals(wanted, stated, gold))
    if wanted.number:
        found = nearest_quantity(text, "answer") or last_quantity(text)
        return float(found is not None and _close(wanted.number, found))
    if wanted.formula is None:
        return 0.0
    return float(_verified(wanted.formula, _parsed(written_out(text, prose=True))))


def _close(gold: Quantity, said: Quantity) -> bool:
    if gold.equals(said):
        return True
    if gold.value.denominator == said.value.denominator == 1:
        return False
    distance = abs(gold.value - said.value)
    return distance < CLOSE and distance <= abs(gold.value) * CLOSE_SHARE


# --- gold answers ---


def formula_of(gold: str) -> str:
    r"""The gold answer itself: what is in its last box, after its ``####``, between its last dollars, or all of it."""
    box = last_box(gold)[0]
    if box is None and "####" in gold:
        box = gold.rpartition("####")[2]
    body = _inside(gold if box is None else box)
    return body if forms.is_formula(body) else _last_formula(body) or body


def _inside(body: str) -> str:
    """``body`` in ASCII, without dollars around it, and without spaces and dots at its end."""
    body = in_ascii(body).strip()
    outer = _OUTER.fullmatch(body)
    if outer:
        body = next(part for part in outer.groups() if part is not None)
    return body.strip() if body.endswith("...") else _END.sub("", body).strip()


def readable(gold: str) -> bool | None:
    """True if ``gold`` can be compared, false if it cannot, None if only math-verify can tell."""
    body = formula_of(gold)
    if _plain_gold(body) is not None or forms.labelled(body):
        return True
    return None if forms.is_formula(body) or "$" in gold.replace("\\$", "") or re.search(r"\d", gold) else False


def _read_gold(gold: str, body: str) -> _Gold | None:
    wanted = _plain_gold(body)
    if wanted is not None:
        return wanted
    if forms.is_formula(body):
        formula = _parsed(f"${written_out(body)}$") or _parsed(written_out(gold, prose=True))
    else:
        formula = _parsed(gold) if "$" in gold.replace("\\$", "") or re.search(r"\d", gold) else []
    return _Gold(formula=formula) if formula else None


def _plain_gold(body: str) -> _Gold | None:
    """What ``body`` is, if that can be told without math-verify."""
    number = forms.number(body)
    if number is not None:
        return _Gold(number=number)
    if based := forms.based(body):
        return _Gold(based=based)
    if clock := forms.clock(body):
        return _Gold(clock=clock)
    if choice := forms.choice(body):
        return _Gold(choice=choice)
    if words := forms.wording(body):
        return _Gold(words=words)
    return None


# --- answers ---


def _last_formula(text: str) -> str | None:
    """What stands between the last dollars (or other delimiters) of ``text``, those after "answer" first; else None.

    Formulas with a comma, "and" or "or" between them are one list.
    """
    chosen: list[str] = []
    end, anchored = -1, False
    for found in _LAST_MATH.finditer(text):
        inside = _inside(found[0])
        if _is_money(found[1], inside):
            continue
        named = "answer" in text[max(0, found.start() - 50) : found.start()].lower()
        if end >= 0 and _JOINED.fullmatch(text, end, found.start()):
            chosen.append(inside)
        elif named or not anchored:
            chosen, anchored = [inside], anchored or named
        else:
            continue
        end = found.end()
    return ", ".join(chosen) if chosen else None


def _is_money(between: str | None, inside: str) -> bool:
    """True if what is between two dollars is no formula: they are signs of currency."""
    if between is None or "\\" in between:
        return False
    return (between[:1].isdigit() and between[-1:].isspace()) or (" " in inside and not forms.is_formula(inside))


def written_out(body: str, prose: bool = False) -> str:
    r"""``body`` in notations that math-verify reads rightly: no digit groups, no ``\$``, no repeating decimals."""
    text = in_ascii(body).replace("\\$", "")
    text = without_repeating(text)
    if prose:
        return text
    text = re.sub(r"(?<=[\d}])\s+i(?![a-zA-Z])", "i", forms.without_unit(text))
    text = re.sub(r"(?<![\w\\}{^])i(?![a-zA-Z])", "1i", text)  # An i without a number would be a real quantity.
    listed = re.match(r"\s*(?:\\left)?\s*(?:[(\[]|\\\{)", text)
    return (_spaced(text) if listed else without_groups(text)).replace("$", "")


def _spaced(text: str) -> str:
    """``text``, a list in brackets, without groups of digits but those by commas, which separate its elements."""
    return re.sub(r"\x00", ",", without_groups(re.sub(r"(?<!\\),", "\x00", text.replace("{,}", ""))))


def _parsed(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    standard = LatexExtractionConfig(boxed_match_priority=0)
    # Its list of units has m, s, g, d and c, which are names of quantities: our own list is applied before.
    latex = replace(standard, normalization_config=replace(standard.normalization_config, units=False))
    return list(parse(text, extraction_config=(latex, ExprExtractionConfig())))


def _verified(gold: list[Any], said: list[Any]) -> bool:
    from math_verify import verify

    return bool(said) and bool(verify(gold, said))
