"""Answers as models write them: numbers of every notation, and formulas, against gold answers. A right one has 1, a wrong one 0."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from rollout.number_answers import answer_number
from rollout.rewards import BUILTINS

needs_math_verify = pytest.mark.skipif(not find_spec("math_verify"), reason="the math extra is not installed")


def score(name: str, text: str, gold: object) -> float | None:
    column = {"math_accuracy": "solution"}.get(name, "answer")
    return BUILTINS[name]([text], **{column: [gold]})[0]


# --- numbers: (ending, gold, score) ---

NUMBERS = [
    ("The answer is \u22125.", "-5", 1),
    ("The answer is \u22125.", "5", 0),
    ("The answer is \u20135.", "-5", 1),
    ("The answer is \u20135", "5", 0),
    ("It is \uff0d5", "-5", 1),
    ("It is \uff0d5", "5", 0),
    ("\uff11\uff12", "12", 1),
    ("The total is 10\u202f000.", "10000", 1),
    ("10\xa0000", "10000", 1),
    ("10\u2009000", "10000", 1),
    ("10 000", "10000", 1),
    ("70{,}000", "70000", 1),
    ("70\\,000", "70000", 1),
    ("70\\;000", "70000", 1),
    ("70,\\!000", "70000", 1),
    ("70\\!000", "70000", 1),
    ("1'000'000", "1000000", 1),
    ("1_000_000", "1000000", 1),
    ("1\u2019000", "1000", 1),
    ("10 000", "0", 0),
    ("70{,}000", "0", 0),
    ("3/4", "3/4", 1),
    ("3/4", "0.75", 1),
    ("3/4", "4", 0),
    ("\\frac{3}{4}", "0.75", 1),
    ("\\dfrac34", "3/4", 1),
    ("-\\frac{3}{4}", "-0.75", 1),
    ("\\frac{-3}{4}", "-3/4", 1),
    ("1 1/2", "1.5", 1),
    ("1\\frac{1}{2}", "1.5", 1),
    ("1\xbd", "1.5", 1),
    ("\xbd", "0.5", 1),
    ("1e3", "1000", 1),
    ("1e3", "3", 0),
    ("1E+3", "1000", 1),
    ("1.5e-3", "0.0015", 1),
    ("1.5 \\times 10^3", "1500", 1),
    ("1.5 \xd7 10\xb3", "1500", 1),
    ("2 \\times 10^{-3}", "0.002", 1),
    ("10^3", "1000", 1),
    ("10^3", "3", 0),
    ("50%", "50", 1),
    ("50\\%", "50", 1),
    ("50 percent", "50", 1),
    ("50%", "0.5", 1),
    ("$18.90", "18.90", 1),
    ("\\$18.90", "18.9", 1),
    ("$18.90", "18.9", 1),
    ("-$5", "-5", 1),
    ("$-5", "-5", 1),
    ("-\\$5", "-5", 1),
    ("-$5", "5", 0),
    ("\u20ac5", "5", 1),
    ("5 \u20ac", "5", 1),
    ("US$5", "5", 1),
    ("42 km", "42", 1),
    ("42 cm^2", "42", 1),
    ("42 cm^2", "2", 0),
    ("42 cm\xb2", "42", 1),
    ("42 m2", "42", 1),
    ("42\\text{ cm}^2", "42", 1),
    ("42 \\text{ m}^{2}", "42", 1),
    ("42\xb0", "42", 1),
    ("42^\\circ", "42", 1),
    ("**42**", "42", 1),
    ("**-42**", "-42", 1),
    ("*42*", "42", 1),
    ("__42__", "42", 1),
    ("`42`", "42", 1),
    ("\\boxed{42}", "42", 1),
    ("$\\boxed{-42}$", "-42", 1),
    ("\\boxed{- 42}", "-42", 1),
    ("\\(42\\)", "42", 1),
    ("\\[ x = 42 \\]", "42", 1),
    ("\\boxed{\\$42}", "42", 1),
    ("\\boxed{42\\text{ apples}}", "42", 1),
    ("007", "7", 1),
    (".5", "0.5", 1),
    ("-.5", "-0.5", 1),
    ("$.50", "0.5", 1),
    ("42.", "42", 1),
    ("42...", "42", 1),
    ("42.00", "42", 1),
    ("so ...5", "5", 1),
    ("5,000.50.", "5000.5", 1),
    ("1.234,56", "1234.56", 1),
    ("3,5", "3.5", 1),
    ("3,5", "5", 0),
    ("1,23,456", "123456", 1),
    ("5 million", "5000000", 1),
    ("$5k", "5000", 1),
    ("5 million", "5", 0),
    ("negative 5", "-5", 1),
    ("The answer is minus 5", "-5", 1),
    ("10 minus 5 is 5", "5", 1),
    ("The answer is - 5", "-5", 1),
    ("The answer is - 5", "5", 0),
    ("Answer \u2013 5", "5", 1),
    ("x = \u22125", "-5", 1),
    ("x=-5", "-5", 1),
    ("between 3-5", "5", 0),
    ("6*7", "7", 0),
    ("6*7 = 42", "42", 1),
    ("2+3", "3", 0),
    ("\\sqrt{16}", "16", 0),
    ("2\\pi", "2", 0),
    ("3:4", "4", 0),
    ("52_8", "8", 0),
    ("52_8", "52", 0),
    ("0x10", "10", 0),
    ("0x10", "16", 1),
    ("#### 1,234", "1234", 1),
    ("#### \u22127", "-7", 1),
    ("#### 5 apples of 7", "5", 1),
    ("#### Step 3: x\nThe answer is 42", "42", 1),
    ("#### Final Answer\n42", "42", 1),
    ("<think>9</think><answer>42</answer>", "42", 1),
    ("\\boxed{42}. That took 3 steps", "42", 1),
    ("\\boxed{42}. That took 3 steps", "3", 0),
    ("not 42", "42", 0),
    ("5 or 6", "6", 0),
    ("5/0", "0", 0),
    ("1e999999999", "1", 0),
    ("\u200b4\u200b2", "42", 1),
    ("\u0664\u0662", "42", 1),
    ("\U0001d7d2\U0001d7d0", "42", 1),
    ("+5", "5", 1),
    ("$5/hour", "5", 1),
    ("5!", "5", 1),
    ("the year 2020 100 people", "100", 1),
    ("5-day", "5", 1),
    ("<b>42</b>", "42", 1),
    ("42<|end|>", "42", 1),
    ("The answer is: -7/8", "-0.875", 1),
    ("(-5)", "-5", 1),
    ("(5)", "5", 1),
    ("[5]", "5", 1),
    ("5;", "5", 1),
    ("{5}", "5", 1),
    ("-{5}", "-5", 1),
    ("{-}5", "-5", 1),
    ("= - 5", "-5", 1),
    ("\u2248 5", "5", 1),
    ("\\approx -5", "-5", 1),
    ("-5.0", "-5", 1),
    ("\u22121,000", "-1000", 1),
    ("\u2013$1,000", "-1000", 1),
    ("\u20145", "5", 1),
    ("10 / 2", "5", 1),
    ("12 \xf7 4", "3", 1),
    ("1,000,000", "1000000", 1),
    ("1 000 000", "1000000", 1),
    ("12\\,345", "12345", 1),
    ("1\\ 000", "1000", 1),
    ("1~000", "1000", 1),
    ("The total is 1.500.000", "1500000", 1),
    ("0.\\overline{3}", "1/3", 1),
    ("0.\\overline{3}", "0", 0),
    ("\\boxed {42}", "42", 1),
    ("The answer is \\pm 5", "5", 0),
    ("x \\neq 5", "5", 0),
    ("10:30", "30", 0),
    ("5! = 120", "120", 1),
    ("2^{3}", "8", 1),
    ("2^{3}", "3", 0),
    ("-2/3", "2/3", 0),
    ("2/-3", "-2/3", 1),
    ("1 \u2212 5", "5", 0),
    ("\u2212$18.90", "-18.9", 1),
    ("$\u221218.90", "-18.9", 1),
    ("70 000 000", "70000000", 1),
    ("500%", "5", 1),
    ("7,5", "5", 0),
    ("log_2 8", "8", 0),
    ("8 hours/day", "8", 1),
    ("about 1,200 people.", "1200", 1),
    ("USD 5", "5", 1),
    ("Rs. 5", "5", 1),
    ("5\xb0C", "5", 1),
    ("\u22125\xb0C", "-5", 1),
    ("#### \u22121,234.50", "-1234.5", 1),
    ("#### $3", "3", 1),
    ("#### 1. Add\nThe total is 42", "42", 1),
    ("<answer>42</answer> (100% sure)", "42", 1),
    ("<answer>\\boxed{-42}</answer>", "-42", 1),
    ("1\u20442", "0.5", 1),
    ("2\xb3", "8", 1),
    ("2\xb3", "2", 0),
    ("The answer is 5, not 6.", "5", 1),
    ("The answer is 5, not 6.", "6", 0),
    ("It is 5 (not 6)", "5", 1),
    ("The answer is not 5.", "5", 0),
    ("6 rather than 5", "6", 1),
    ("6 rather than 5", "5", 0),
    ("3*4=12. The answer is not 12", "12", 0),
    ("-CHF 5", "-5", 1),
    ("-CHF 5", "5", 0),
    ("CHF 5", "5", 1),
    ("not 5 but 6", "6", 1),
    ("<<48/2=24>>24", "24", 1),
    ("5 .", "5", 1),
    ("5 (five)", "5", 1),
    ("5,", "5", 1),
    ("Answer:-5", "-5", 1),
    ("\\boxed{\\text{-5}}", "-5", 1),
    ("\\boxed{\\textbf{\u22125}}", "5", 0),
    ("<b>-5</b>", "-5", 1),
    ("\u20b91,00,000", "100000", 1),
    ("10**3", "1000", 1),
    ("**10**", "10", 1),
    ("2**3", "3", 0),
    ("6.02e23", "602000000000000000000000", 1),
    ("100,00", "100", 1),
    ("x = -\\frac12", "-0.5", 1),
    ("\u2212\xbd", "-0.5", 1),
    ("-1 1/2", "-1.5", 1),
    ("\u22121\xbd", "-1.5", 1),
    ("1 \u2013 1/2", "1/2", 0),
    ("70\\ 000", "70000", 1),
    ("70\\,000\\,000", "70000000", 1),
    ("$70{,}000.50$", "70000.5", 1),
    ("7,000 - 8,000", "8000", 0),
    ("$5.50 per hour", "5.5", 1),
    ("5 hours and 30 minutes", "30", 1),
    ("+5.0", "5", 1),
    ("- 5%", "-5", 1),
    ("\u22125 %", "-5", 1),
    ("-5\\%", "-5", 1),
    ("$-\\$5$", "-5", 1),
    ("\\(-5\\)", "-5", 1),
    ("\\[-5\\]", "-5", 1),
    ("$$-5$$", "-5", 1),
    ("__-5__", "-5", 1),
    ("*-5*", "-5", 1),
    ("`-5`", "-5", 1),
    ("'-5'", "-5", 1),
    ('"-5"', "-5", 1),
    ("\u300c-5\u300d", "-5", 1),
    ("\u7b54\u6848\u662f-5\u3002", "-5", 1),
    ("\u7b54\u6848\u662f\u22125\u3002", "-5", 1),
    ("\u7b54\u6848\u662f5\u3002", "5", 1),
    ("\u7b54\u6848\u662f\u22125\u3002", "5", 0),
    ("x\u22125", "5", 0),
    ("2x + 3", "3", 0),
    ("it's -5", "-5", 1),
    ("plan b - 5", "5", 0),
    ("5 000,50", "5000.5", 1),
    ("5.000,50", "5000.5", 1),
    ("5'000.50", "5000.5", 1),
    ("5_000", "5000", 1),
    ("5\u2009000\u2009000", "5000000", 1),
    ("5\u200a000", "5000", 1),
    ("5\u3000000", "5000", 1),
    ("\uff11\uff0c\uff10\uff10\uff10", "1000", 1),
    ("\uff0d\uff15", "-5", 1),
    ("\uff0d\uff15", "5", 0),
    ("+\uff11", "1", 1),
    ("\uff0b1", "1", 1),
    ("\ufe635", "-5", 1),
    ("\ufe635", "5", 0),
    ("\u27965", "5", 0),
    ("\u20115", "-5", 1),
    ("\u20125", "-5", 1),
    ("\u20105", "-5", 1),
    ("5\xadapples", "5", 1),
    ("\ufeff5", "5", 1),
    ("\u2212\u20095", "-5", 1),
    ("\u2212\xa05", "5", 0),
    ("- 5.", "-5", 1),
    ("The result: \u2013 5", "-5", 1),
    ("Total: \u2212$ 5", "-5", 1),
    ("(\u22125)", "-5", 1),
    ("[\u22125]", "-5", 1),
    ("5\u2212", "5", 1),
    ("9" * 5000, "9", 0),
]


BEFORE = ["", "12 * 4 = 48, so ", "\u201cWell\u201d \u2013 7 of them.\n", "<think>It is 9.</think>\n\n"]


@pytest.mark.parametrize(("ending", "gold", "value"), NUMBERS)
def test_the_number_at_the_end_of_an_answer(ending, gold, value):
    # Some would be attached to what precedes them, and a hyphen between spaces is a dash after a word.
    for before in BEFORE[: 1 if ending[0] in "([{+=.<>" or ending.startswith("- ") else None]:
        assert score("gsm8k_answer", before + ending, gold) == value
    assert score("final_number", ending, f"So it is so.\n#### {gold}") == value


@pytest.mark.parametrize("gold", ["five", "", None, "3:4", "2 + 3", "\\sqrt{2}", "52_8", "x", float("nan"), True])
def test_a_gold_answer_that_is_no_number_has_no_score(gold):
    assert score("gsm8k_answer", "The answer is 5.", gold) is None


@pytest.mark.parametrize(
    ("gold", "text"), [(5, "5"), (5.0, "5"), (-0.5, "-1/2"), (1e16, "10000000000000000"), (10**30, str(10**30))]
)
def test_a_gold_answer_may_be_a_number(gold, text):
    assert score("final_number", text, gold) == 1


HOSTILE = [
    "9",
    "-",
    "1 ",
    "1,",
    "1 000 ",
    "{",
    "\\frac{",
    "1/",
    "1 or ",
    "$",
    "* ",
    "\u202f",
    "####",
    "\\boxed{",
    "a.b",
    "(-",
    "1_000",
]
HOSTILE += [
    "\\text{",
    "<answer>",
    "1e",
    "minus ",
    "\\frac{1}",
    "_{",
    "1^",
    "\\!",
    "{,}",
    "\u00b2",
    "\u00bd",
    "not ",
    "\n- 1",
    ".5",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_number_is_read_in_linear_time(piece):
    started = time.process_time()
    answer_number(piece * (40000 // len(piece)))
    answer_number(piece * (40000 // len(piece)) + " is 5")
    assert time.process_time() - started < 1.0


# --- formulas: a gold answer, others that equal it, others that do not ---

FORMULAS = [
    ("\\$5", ["5", "\\$5.00", "\\text{5 dollars}"], ["\\$50", "-5", "\\$5.50"]),
    ("\\$18.90", ["18.9", "\\$18.90", "18.90"], ["18", "1890", "90"]),
    ("a+b", ["b + a", "a + b"], ["a-b", "ab", "a"]),
    ("xy", ["yx", "x \\cdot y"], ["x", "x+y", "xz"]),
    ("-i", ["-1i", "0 - i"], ["i", "-1", "1"]),
    ("p - q", ["-q + p"], ["q - p", "p + q", "p"]),
    ("(a + b)(b + c)", ["(c+b)(a+b)"], ["(a+b)(a+c)", "ab + bc"]),
    ("6m - c", ["-c + 6m"], ["6m", "6", "c"]),
    ("e^x", ["e^{x}"], ["e^{-x}", "x", "e"]),
    ("52_8", ["52_{8}", "52_{\\text{eight}}", "52 \\text{ base } 8"], ["52", "52_9", "42", "152_8"]),
    ("52", ["52"], ["52_8", "5", "2"]),
    ("1\\,000", ["1000", "1{,}000", "1,000", "1\\;000", "10^3"], ["0", "1", "1\\,001"]),
    ("12\\,345", ["12345", "12,\\!345", "12 345", "12\u202f345"], ["357", "12", "345"]),
    ("0", ["0", "0.0", "-0"], ["5\\,000", "1 000", "0.\\overline{3}", "10^{-7}"]),
    ("0.\\overline{3}", ["1/3", "\\frac{1}{3}", "0.333333"], ["0", "0.3", "3"]),
    ("3 \\times 10^{-7}", ["0.0000003"], ["0.0000004", "0"]),
    ("50\\%", ["50", "0.5", "50\\%", "\\frac{1}{2}"], ["5", "0.05", "500"]),
    ("0.5", ["50\\%", "1/2"], ["50", "5"]),
    ("5\\text{ cm}", ["5", "5 \\text{ cm}", "5\\,\\mathrm{cm}", "5 cm"], ["5\\text{ m}", "50", "5\\text{ km}"]),
    ("20 $cm^{2}$", ["20", "20\\text{ cm}^2"], ["2", "202", "20\\text{ m}^2"]),
    ("6:30 \\text{ p.m.}", ["6:30 p.m.", "6:30\\text{ PM}"], ["6", "6:30 a.m.", "7:30 p.m.", "1/5"]),
    ("-5", ["\u22125", "- 5", "x = -5"], ["5", "\u2212 6"]),
    ("(1,2)", ["(1, 2)", "\\left(1,2\\right)"], ["(2,1)", "[1,2]", "\\{1,2\\}", "1", "(1,2,3)"]),
    ("[1,2)", ["\\left[1, 2\\right)"], ["(1,2)", "[1,2]", "(1,2]"]),
    ("\\{1,2\\}", ["\\{2, 1\\}", "1, 2", "1 \\text{ and } 2"], ["(1,2)", "[1,2]", "\\{1,3\\}", "1"]),
    ("3,5", ["5, 3"], ["3.5", "35", "5"]),
    ("(1,234)", ["(1, 234)"], ["1234", "(1,235)"]),
    ("(1000, 2)", ["(1\\,000, 2)"], ["(1,2)", "(0,2)"]),
    ("(-\\infty, 3) \\cup (5, \\infty)", ["(-\\infty,3)\\cup(5,\\infty)"], ["(-\\infty,3]\\cup(5,\\infty)", "(3,5)"]),
    ("3+4i", ["4i + 3", "3 + 4 i"], ["3-4i", "3", "7i"]),
    (
        "\\begin{pmatrix} 1 \\\\ 200 \\end{pmatrix}",
        ["\\begin{pmatrix}1\\\\200\\end{pmatrix}"],
        ["(1,200)", "\\begin{pmatrix}200\\\\1\\end{pmatrix}"],
    ),
    ("(B)", ["B", "\\text{(B)}", "\\textbf{(B)}", "(B) 12", "b"], ["A", "(C)", "12"]),
    ("\\text{(B)}", ["(B)", "B"], ["(A)"]),
    ("\\textbf{(E)}\\ 24", ["(E)", "E", "24", "\\textbf{(E)}\\ 24"], ["(D)", "25", "\\textbf{(D)}\\ 24"]),
    ("\\textbf{(E)}\\ ", ["(E)"], ["(D)", "5"]),
    ("\\text{Evelyn}", ["Evelyn", "\\text{evelyn}", "\\mathrm{Evelyn}"], ["\\text{Eve}", "5", "\\text{not Evelyn}"]),
    ("\\text{June 20}", ["\\text{June 20}", "June 20"], ["20", "\\text{June 21}"]),
]


@needs_math_verify
@pytest.mark.parametrize(("gold", "equal", "other"), FORMULAS)
def test_a_formula_equals_itself_in_every_notation_and_nothing_else(gold, equal, other):
    for form in ("so \\boxed{%s}.", "The answer is $%s$."):
        for answer, value in [(gold, 1), *((one, 1) for one in equal), *((one, 0) for one in other)]:
            if "$" not in answer.replace("\\$", ""):
                assert score("math_accuracy", form % answer, gold) == value, answer
    assert score("math_accuracy", "", gold) == 0
    assert score("math_accuracy", f"\\boxed{{{gold}}}", f"\\boxed{{{gold}}}") == 1
    if "$" not in gold.replace("\\$", ""):
        assert score("math_accuracy", f"\\boxed{{{gold}}}", f"In all, the answer is ${gold}$.") == 1


@needs_math_verify
@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("The answer is a+b.", "a+b", 1),
        ("The answer is \u22125.", "5", 0),
        ("The answer is \u22125.", "-5", 1),
        ("It costs $5 and $7 more, so $12.", "12", 1),
        ("It costs $5 and $7 more, so $12.", "7", 0),
        ("The answer is $3$ because $1+2$ is it.", "3", 1),
        ("The roots are $1$ and $2$.", "2", 0),
        ("The roots are $1$ and $2$.", "\\{1,2\\}", 1),
        ("The answer is (B).", "(B)", 1),
        ("The answer is (C).", "(B)", 0),
        ("The answer is Evelyn.", "\\text{Evelyn}", 1),
        ("so 5", "5", 1),
        ("5 apples of 7", "7", 1),
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right.", 1),
        ("<answer>5</answer>", "5", 1),
    ],
)
def test_where_an_answer_without_a_box_is(text, gold, value):
    assert score("math_accuracy", text, gold) == value


@needs_math_verify
@pytest.mark.parametrize("gold", ["none of these", "Evelyn", "no", "", None, "undefined", "It is so", "True"])
def test_what_is_no_formula_has_no_score_whatever_is_said(gold):
    for text in (f"\\boxed{{{gold}}}", f"The answer is {gold}.", "5", "\\boxed{5}", ""):
        assert score("math_accuracy", text, gold) is None


# --- texts ---


@pytest.mark.parametrize(
    ("name", "text", "gold", "value"),
    [
        ("exact_match", "None", None, None),
        ("exact_match", "nan", float("nan"), None),
        ("exact_match", "['a']", ["a"], None),
        ("exact_match", "42", 42.0, 1),
        ("exact_match", "42.0", 42.0, 1),
        ("exact_match", "42.5", 42.5, 1),
        ("exact_match", "Zoe\u0308", "Zo\xeb", 1),
        ("exact_match", "Zoe", "Zo\xeb", 0),
        ("boxed_accuracy", "\\boxed{None}", None, None),
        ("boxed_accuracy", "\\boxed{42}", 42.0, 1),
        ("boxed_accuracy", "\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right.", 1),
        ("boxed_accuracy", "\\boxed {42}", "42", 1),
        ("boxed_accuracy", "\\boxed{42}", "42.0", 0),
    ],
)
def test_texts_that_are_compared_as_they_are(name, text, gold, value):
    assert score(name, text, gold) == value


def test_case_is_ignored_in_every_alphabet():
    assert BUILTINS["exact_match"](["STRASSE"], ignore_case=True, answer=["Stra\xdfe"]) == [1]


# --- formulas made by chance ---

MINUS, SEPARATORS = "\u2212", [",", "{,}", "\\,", "\\;", ",\\!", " ", "\u202f", "\u2009", "\xa0", "~", "\\ "]


def numbers_by_chance(chance: random.Random) -> Iterator[tuple[str, list[str], list[str]]]:
    """Integers in every notation, and others that differ by a digit, a sign, a base or a unit."""
    n = chance.choice([chance.randrange(2, 1000), chance.randrange(1000, 10**7)])
    other = n + chance.choice([1, 10, 1000])
    equal = [f"{n:,}".replace(",", between) for between in SEPARATORS]
    equal += [f"{n}", f"\\${n:,}", f"{n}.0", f"x={n}", f"{n}\\text{{ apples}}", f"{n} \\text{{ cm}}^2", f"{n}\\%"]
    unequal = [f"{other:,}".replace(",", between) for between in SEPARATORS]
    unequal += [
        f"-{n}",
        f"{MINUS}{n}",
        f"{n}_8",
        f"{n}0",
        f"{n}.5",
        f"\\frac{{{n}}}{{2}}",
        f"{n}i",
        f"({n},{n})",
        f"{n}x",
        f"{n}^2",
    ]
    for gold in chance.sample(equal[:12], 3):
        yield gold, equal, unequal


def formulas_by_chance(chance: random.Random) -> Iterator[tuple[str, list[str], list[str]]]:
    """Letters, pairs, intervals, sets, bases and choices."""
    x, y, z = chance.sample("abcxyzpqnk", 3)
    a = chance.randrange(-20, 20)
    b, c = a + chance.randrange(1, 9), a + chance.randrange(10, 20)
    yield f"{x}+{y}", [f"{y}+{x}"], [f"{x}-{y}", f"{x}+{z}", f"{x} {y}"]
    yield f"{x} - {y}", [f"-{y}+{x}"], [f"{y}-{x}", f"{x}+{y}"]
    yield f"5{x} - {y}", [f"-{y}+5{x}"], [f"5{x}+{y}", f"5{x}", "5"]
    yield (
        f"({a},{b})",
        [f"({a}, {b})", f"\\left({a},{b}\\right)"],
        [f"({b},{a})", f"[{a},{b}]", f"({a},{c})", f"\\{{{a},{b}\\}}"],
    )
    yield f"[{a},{b})", [f"[{a}, {b})"], [f"({a},{b})", f"[{a},{b}]", f"[{a},{c})"]
    yield f"\\{{{a},{b}\\}}", [f"\\{{{b},{a}\\}}", f"{a}, {b}"], [f"\\{{{a},{c}\\}}", f"({a},{b})", f"{a}"]
    digits = "".join(chance.choice("1234567") for _ in range(3))
    yield (
        f"{digits}_8",
        [f"{digits}_{{8}}", f"{digits} \\text{{ base }} 8"],
        [digits, f"{digits}_9", str(int(digits, 8))],
    )
    letter, wrong = chance.sample("ABCDE", 2)
    yield f"({letter})", [letter, f"\\text{{({letter})}}", f"({letter}) 12"], [wrong, f"({wrong})", "12"]


@needs_math_verify
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_formulas_by_chance_equal_themselves_and_nothing_else(seed):
    chance, wrong = random.Random(seed), []
    for gold, equal, unequal in [*numbers_by_chance(chance), *formulas_by_chance(chance)]:
        for answer, value in [(gold, 1), *((one, 1) for one in equal), *((one, 0) for one in unequal)]:
            for text in (f"\\boxed{{{answer}}}", f"The answer is ${answer}$."):
                if score("math_accuracy", text, gold) != value:
                    wrong.append((gold, text, value))
    assert wrong == []
