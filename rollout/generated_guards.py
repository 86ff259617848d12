"""Rules for answers of generated tasks whose own scorers are satisfied too easily.

Several scorers of reasoning-gym search the answer in whatever text they get: "The answer is not 405" has full credit.
The extracted answer has to *be* an answer, not contain one. Needs the standard library only, and as little of it as it
can: a sandbox imports this for every call.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

CONSOLATION = 0.05
"""Largest score that counts as 0: several scorers give it for any text."""
_FRACTION = r"(?:\\d?frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}|-?\d+\s*/\s*-?\d+)"
SHAPES = {
    "complex_arithmetic": r"[\d\s.+\-*()ij]+",
    "fraction_simplification": rf"\$?\s*{_FRACTION}\s*\$?",
    "kakurasu": r"[01\s]+",
    "knights_knaves": r"\w+ is an? \w+(?:(?:,? and |, |\. )\w+ is an? \w+)*\.?",
    "quantum_lock": r"[A-C](?:\s*(?:\u2192|->|,|\s)\s*[A-C])*",
    "rush_hour": r"(?:[A-Za-z][+-]\d+[\s,]*)+",
    "sokoban": r"[ULDR\s]+",
    "spell_backward": r"\S+",
    "survo": r"[\d\s-]+",
    "time_intervals": r"(?:-?\d+(?: days?)?)?(?:, )?[\d:.]*",
    "tower_of_hanoi": r"(?:Move disk \d+ from Peg \d+ to Peg \d+\s*)+",
}
"""Task -> what the whole answer has to look like: its scorer passes over everything that does not."""
SEVERAL_SOLUTIONS = ("quantum_lock", "sokoban")
"""Tasks where another right answer may contain the row's own."""
_AROUND = re.compile(r"\A[\s*`$]+|[\s*`$.]+\Z")
_BOXED = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)
_DECIMAL = re.compile(r"-?\d{1,400}(?:\.\d{1,400})?")
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
TOLERANCE, SHARE = 1e-4, 0.05
"""Largest distance of a rounded probability, absolute and as a share of the right one."""


def _truth(said: str, gold: str) -> float:
    return float(said.strip().casefold() == gold.strip().casefold())


def _number(said: str, gold: str) -> float:
    from rollout.number_answers import only_quantity, whole_number

    found, wanted = only_quantity(said), whole_number(gold)
    return float(found is not None and wanted is not None and found.value == wanted.value)


def _probability(said: str, gold: str) -> float:
    from rollout.number_answers import whole_number

    found, wanted = whole_number(said), whole_number(gold)
    if found is None or wanted is None:
        return 0.0
    value = found.value / 100 if found.percent else found.value
    distance = abs(float(value - wanted.value))
    return float(distance <= TOLERANCE and distance <= SHARE * abs(float(wanted.value)))


OWN: dict[str, tuple[Callable[[str, str], float], str]] = {
    "game_of_life_halting": (_truth, "the scorer compares whether texts are empty: any text has full credit"),
    "gsm_symbolic": (_number, "the scorer takes the first number of a text, without its sign"),
    "coin_flip": (_probability, "the scorer compares as many digits as the answer has: 0 has full credit"),
}
"""Task -> the comparison that is used in place of its scorer, and why."""


def trimmed(text: str) -> str:
    r"""``text`` without a box, and without white space, final dots and marks of Markdown or LaTeX around it."""
    for _ in range(2):
        text = _AROUND.sub("", text)
        boxed = _BOXED.fullmatch(text)
        text = boxed[1] if boxed else text
    return text


def bare(text: str) -> str:
    """``text`` trimmed, with single spaces inside."""
    return re.sub(r"\s+", " ", trimmed(text))


def is_answer(task: str, said: str, gold: str | None) -> bool:
    """False if ``said`` cannot be an answer, whatever the task's scorer thinks of it."""
    shape = SHAPES.get(task)
    if shape is not None and not re.fullmatch(shape, said):
        return False
    if gold is None or task in SEVERAL_SOLUTIONS:
        return True
    answer, right = bare(said).casefold(), bare(gold).casefold()
    return answer == right or not right or right not in answer


def means_gold(said: str, gold: str | None) -> bool:
    """True if ``said`` is the row's own answer, but for how it is written."""
    if gold is None:
        return False
    if bare(said) == bare(gold):
        return True
    if gold.casefold() in ("true", "false", "yes", "no"):
        return bare(said).casefold() == gold.casefold()
    if not _DECIMAL.fullmatch(gold) or re.match(r"-?0\d", gold):
        return False
    plain = _GROUPS.sub("", trimmed(said).replace("\u2212", "-"))
    return bool(_DECIMAL.fullmatch(plain)) and Fraction(plain) == Fraction(gold)
