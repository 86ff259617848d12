"""Built-in reward functions: every value worked by hand, on plain and on conversational completions."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from rollout.reward_loading import load_reward
from rollout.rewards import BUILTINS, SANDBOXED, extract_number, last_boxed, text_of
from shared.config_reward import RewardFunction

DATA = Path(__file__).resolve().parent.parent / "launch" / "data" / "gsm8k" / "sample.jsonl"
TARGET = ["x" * 14, "x" * 20, "x" * 27]
needs_math_verify = pytest.mark.skipif(not find_spec("math_verify"), reason="the math extra is not installed")


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def builtin(name: str, completions: list, args: dict | None = None, **columns) -> list:
    ids = columns.pop("ids", [[0] * len(text_of(c)) for c in completions])
    function = load_reward(RewardFunction(function=name, args=args or {}), "key")
    return function(prompts=[""] * len(completions), completions=completions, completion_ids=ids, **columns)


def both(name: str, completions: list[str], args: dict | None = None, **columns) -> list:
    """The values on plain completions, which those on conversations must equal."""
    plain = builtin(name, completions, args, **columns)
    assert builtin(name, [chat(text) for text in completions], args, **columns) == plain
    return plain


@pytest.mark.parametrize("name", ["exact_match", "final_number", "gsm8k_answer", "boxed_accuracy", "code_tests"])
def test_a_row_without_an_answer_has_no_score(name):
    column = "tests" if name == "code_tests" else "answer"
    assert builtin(name, ["None", "\\boxed{None}"], **{column: [None, None]}) == [None, None]


@needs_math_verify
@pytest.mark.parametrize("name", ["math_accuracy", "reasoning_math_accuracy", "cosine_length"])
def test_a_row_without_a_formula_has_no_score(name):
    column, args = ("answer", {"limit": 9}) if name == "cosine_length" else ("solution", {})
    assert builtin(name, ["None", "</think>1"], args, **{column: [None, None]}) == [None, None]


# --- length ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length_negative_abs", [-6, 0, -7]),
        ("length_reciprocal", [0.142857, 1, 0.125]),
        ("length_exponential", [0.548812, 1, 0.496585]),
    ],
)
def test_length_rewards_at_14_20_and_27_of_20(name, expected):
    assert both(name, TARGET, {"target": 20}) == pytest.approx(expected, abs=1e-6)
    tokens = {"target": 20, "unit": "tokens"}
    lengths = [[0] * 14, [0] * 20, [0] * 27]
    assert both(name, ["", "", ""], tokens, ids=lengths) == pytest.approx(expected, abs=1e-6)


def test_length_exponential_at_another_rate_and_far_away():
    assert both("length_exponential", ["x" * 14, "x" * 9000], {"target": 20, "rate": 0.5})[0] == pytest.approx(
        0.049787, abs=1e-6
    )
    assert builtin("length_exponential", ["x" * 9000], {"target": 20}) == [0.0]


def test_length_counts_characters_or_tokens_up_or_down():
    assert both("length", ["ab", "😀é日"]) == [2, 3]
    assert both("length", ["ab", ""], {"sign": -1}) == [-2, 0]
    assert both("length", ["ab"], {"unit": "tokens"}, ids=[[1, 2, 3, 4, 5]]) == [5]


def test_soft_overlong_at_150_180_200_and_201():
    lengths = [[0] * n for n in (150, 180, 200, 201)]
    values = both("soft_overlong", [""] * 4, {"limit": 200, "buffer": 50}, ids=lengths)
    assert values == pytest.approx([0, -0.6, -1, -1])
    doubled = builtin("soft_overlong", [""] * 4, {"limit": 200, "buffer": 50, "factor": 2.0}, ids=lengths)
    assert doubled == pytest.approx([0, -1.2, -2, -2])
    assert builtin("soft_overlong", [""] * 4, {"limit": 200, "buffer": 0}, ids=lengths) == [0, 0, 0, -1]


@needs_math_verify
def test_cosine_length_at_0_100_400_and_500_of_400():
    lengths = [[0] * n for n in (0, 100, 400, 500)]
    right = both("cosine_length", ["\\boxed{4}"] * 4, {"limit": 400}, ids=lengths, answer=["4"] * 4)
    assert right == pytest.approx([1, 0.926777, 0.5, 0.5], abs=1e-6)
    wrong = both("cosine_length", ["\\boxed{5}"] * 4, {"limit": 400}, ids=lengths, answer=["4"] * 4)
    assert wrong == pytest.approx([-1, -0.926777, -0.5, -0.5], abs=1e-6)
    assert builtin("cosine_length", ["4"], {"limit": 400}, answer=["no formula"]) == [None]
    other = {"limit": 2, "right": (4, 2), "wrong": (-4, -2), "column": "gold"}
    assert builtin("cosine_length", ["4", "5"], other, ids=[[0], [0]], gold=["4", "4"]) == pytest.approx([3, -3])


@pytest.mark.parametrize(
    ("ids", "args", "value"),
    [
        ([7, 8, 7, 8, 7, 9], {"ngram": 2}, -0.4),
        ([7, 8, 7, 8, 7, 9], {"ngram": 2, "worst": -2.0}, -0.8),
        ([7, 8, 7, 8, 7, 9], {}, -0.25),
        ([1, 2, 3, 4], {"ngram": 2}, 0),
        ([1, 1, 1, 1, 1], {"ngram": 1}, -0.8),
        ([1, 2], {}, 0),
        ([], {}, 0),
    ],
)
def test_repetition_over_token_ngrams(ids, args, value):
    assert both("repetition", [""], args, ids=[ids]) == pytest.approx([value])


# --- formats ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("  <think>a\nb</think> \n <answer>c\nd</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
        ("<think>a</think>x<answer>b</answer>", 0),
        ("<think><think>a</think></think><answer>b</answer>", 0),
        ("<think>a<answer>b</answer></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("", 0),
    ],
)
def test_think_answer_format(text, value):
    assert both("think_answer_format", [text]) == [value]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think> so b", 1),
        ("<think>\na\n</think>", 1),
        ("<think>a", 0),
        ("a <think>b</think>", 0),
        ("<think>a</think><think>b</think>", 0),
        ("<think>a<think>b</think>", 0),
        ("</think><think>", 0),
        ("", 0),
    ],
)
def test_think_format(text, value):
    assert both("think_format", [text]) == [value]


def test_regex_searches_anywhere():
    assert both("regex", ["ab1", "abc"], {"pattern": r"\d"}) == [1, 0]


# --- answers ---


@pytest.mark.parametrize(
    ("args", "text", "gold", "value"),
    [
        ({}, " 42\n", "42", 1),
        ({}, "42", 42, 1),
        ({}, "yes", "Yes", 0),
        ({"ignore_case": True}, "yes", "Yes", 1),
        ({"strip": False}, " 42", "42", 0),
        ({}, "420", "42", 0),
    ],
)
def test_exact_match(args, text, gold, value):
    assert both("exact_match", [text], args, answer=[gold]) == [value]


def test_the_gold_column_can_be_chosen():
    assert both("exact_match", ["a", "b"], {"column": "gold"}, gold=["a", "a"]) == [1, 0]
    assert both("final_number", ["it is 3"], {"column": "gold"}, gold=["#### 3"]) == [1]
    assert both("boxed_accuracy", ["\\boxed{3}"], {"column": "gold"}, gold=[3]) == [1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42", 42),
        ("10\n#### 1,234", 1234),
        ("#### 5 apples of 7", 5),
        ("#### 1\n#### 2", 2),
        ("costs $1,000.50.", 1000.5),
        ("minus -3", -3),
        ("a half is .5", 0.5),
        ("#### none", None),
        ("no digits", None),
        ("", None),
    ],
)
def test_the_number_that_is_extracted(text, number):
    assert extract_number(text) == number


def test_final_number_does_not_apply_without_a_gold_number_and_is_0_without_an_answer():
    assert both("final_number", ["3", "none", "3.0"], answer=["x", "#### 3", "#### 3"]) == [None, 0, 1]


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", 1),
        ("\\boxed{ 42 }", " 42", 1),
        ("\\boxed{1} then \\boxed{2}", "2", 1),
        ("\\boxed{1} then \\boxed{2}", "1", 0),
        ("\\boxed{{a}{b{c}}}", "{a}{b{c}}", 1),
        ("\\boxed{}", "", 1),
        ("no box", "", 0),
        ("", "", 0),
        ("\\boxed{3", "3", 0),
        ("3", "3", 0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 0),
    ],
)
def test_boxed_accuracy_compares_the_last_box_as_text(text, gold, value):
    assert both("boxed_accuracy", [text], answer=[gold]) == [value]


def test_the_last_box_is_found_in_linear_time():
    assert last_boxed("\\boxed{" * 3000 + "a" * 3000) is None
    assert last_boxed("\\boxed{a}" * 30000) == "a"


@needs_math_verify
@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("The answer is $\\frac{2}{4}$.", "$\\frac{1}{2}$", 1),
        ("\\boxed{1/2}", "\\boxed{\\frac12}", 1),
        ("\\boxed{x^2-1}", "(x-1)(x+1)", 1),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", 1),
        ("\\boxed{1,000}", "1000", 1),
        ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", 1),
        ("\\boxed{(1,2)}", "(1,2)", 1),
        ("\\boxed{(2,1)}", "(1,2)", 0),
        ("\\boxed{[1,2]}", "[1,2]", 1),
        ("\\boxed{[1,2]}", "(1,2)", 0),
        ("\\boxed{(1,2)}", "[1,2]", 0),
        ("\\boxed{(1,2]}", "[1,2)", 0),
        ("first 3, then 4", "4", 1),
        ("\\boxed{3} no, \\boxed{4}", "4", 1),
        ("\\boxed{4} no, \\boxed{3}", "4", 0),
        ("\\boxed{x}", "y", 0),
        ("no idea", "4", 0),
        ("\\boxed{}", "4", 0),
        ("", "4", 0),
        ("\\boxed{4}", "none of these", None),
        ("\\boxed{4}", "", None),
    ],
)
def test_math_accuracy(text, gold, value):
    assert both("math_accuracy", [text], solution=[gold]) == [value]


@needs_math_verify
def test_reasoning_math_accuracy_reads_what_follows_the_last_delimiter():
    texts = ["<think>3</think> \\boxed{4}", "\\boxed{4}", "a</think>\\boxed{4}</think>\\boxed{5}", "</think>4"]
    assert both("reasoning_math_accuracy", texts, solution=["4", "4", "4", "no formula"]) == [1, 0, 0, None]
    assert both("reasoning_math_accuracy", ["3 ## 4"], {"delimiter": "##", "column": "gold"}, gold=["4"]) == [1]


# --- completions ---


def test_the_last_assistant_message_is_the_completion():
    said = [("assistant", "a"), ("assistant", "b"), ("tool", "c")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert (text_of(messages), text_of([]), text_of("d")) == ("b", "", "d")


EVERY = {
    "regex": {"pattern": "4"},
    "length_negative_abs": {"target": 2},
    "length_reciprocal": {"target": 2},
    "length_exponential": {"target": 2},
    "cosine_length": {"limit": 9},
    "soft_overlong": {"limit": 9, "buffer": 2},
}


@needs_math_verify
@pytest.mark.parametrize("name", sorted(set(BUILTINS) - SANDBOXED))
def test_every_builtin_takes_odd_completions_plain_or_conversational(name):
    texts = ["", " ", "4", "\\boxed{", "\\boxed{4}", "<think>", "日本 😀", "#### ", "-", "}" * 50, "$$", "\x00"]
    columns = {"answer": ["4"] * len(texts), "solution": ["4"] * len(texts)}
    values = both(name, texts, EVERY.get(name), **columns)
    assert len(values) == len(texts)
    assert all(isinstance(value, int | float) for value in values)


@pytest.mark.parametrize("name", ["length", "think_format", "boxed_accuracy", "final_number", "regex"])
def test_an_assistant_message_without_content_is_empty_text(name):
    calling = [[{"role": "assistant", "content": None, "tool_calls": []}]]
    function = load_reward(RewardFunction(function=name, args=EVERY.get(name, {})), "key")
    assert function(prompts=[""], completions=calling, completion_ids=[[]], answer=["4"]) == [0]


# --- GSM8K ---


def check_gsm8k(gold: list[str]) -> None:
    """The reference solutions score 1; with the number changed 0; the number alone, or in the recipe's tags, 1."""
    count = len(gold)
    assert builtin("gsm8k_answer", gold, answer=gold) == [1] * count
    numbers = [text.rsplit("####", 1)[1].strip() for text in gold]
    wrong = [str(int(number.replace(",", "")) + 1) for number in numbers]
    changed = [f"{text.rsplit('####', 1)[0]}#### {number}" for text, number in zip(gold, wrong, strict=True)]
    assert builtin("gsm8k_answer", changed, answer=gold) == [0] * count
    assert builtin("gsm8k_answer", [f"So it is {n}." for n in numbers], answer=gold) == [1] * count
    tagged = [f"<think>9</think><answer>{n}</answer>" for n in numbers]
    assert builtin("gsm8k_answer", tagged, answer=gold) == [1] * count


def answers(path: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_gsm8k_answers_score_1_on_themselves_and_0_with_another_number():
    gold = answers(DATA)
    assert len(gold) == 100
    check_gsm8k(gold)


@pytest.mark.skipif("MILLRACE_GSM8K" not in os.environ, reason="MILLRACE_GSM8K names no folder with the whole set")
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_the_whole_of_gsm8k(name, count):
    gold = answers(Path(os.environ["MILLRACE_GSM8K"]) / f"{name}.jsonl")
    assert len(gold) == count
    check_gsm8k(gold)
