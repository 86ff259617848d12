"""Built-in reward functions.

A reward function takes keyword lists with one entry per completion (``prompts``, ``completions``,
``completion_ids``, every dataset column) and returns one number per completion, None where it does not apply: a
function written for TRL's GRPOTrainer runs unchanged. Higher is better.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from rollout.generated_scoring import ReasoningGym

Rewards = list[float | None]


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last assistant message."""
    if isinstance(completion, str):
        return completion
    return next((m.get("content") or "" for m in reversed(completion) if m["role"] == "assistant"), "")


def exact_match(
    completions: list[Any], *, column: str = "answer", strip: bool = True, ignore_case: bool = False, **columns: Any
) -> Rewards:
    """1 if the completion equals the column, else 0."""

    def normal(value: Any) -> str:
        text = str(value).strip() if strip else str(value)
        return text.lower() if ignore_case else text

    return [float(normal(text_of(c)) == normal(gold)) for c, gold in zip(completions, columns[column], strict=True)]


# A hyphen after a word, a digit or a bracket is a minus between two numbers, or a dash.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-\$?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")


def extract_number(text: str) -> Decimal | None:
    """The number, exact, after the last ``####`` where present, else the last number; thousands separators removed."""
    tail = text.rsplit("####", 1)[1] if "####" in text else text
    found = _NUMBER.findall(tail)
    if not found:
        return None
    return Decimal((found[0] if "####" in text else found[-1]).replace(",", "").replace("$", ""))


def final_number(completions: list[Any], *, column: str = "answer", **columns: Any) -> Rewards:
    """1 if the final numbers of completion and column agree, else 0; None if the column has none."""
    scores: Rewards = []
    for completion, gold in zip(completions, columns[column], strict=True):
        expected = extract_number(str(gold))
        scores.append(None if expected is None else float(extract_number(text_of(completion)) == expected))
    return scores


_THINK_ANSWER = re.compile(
    r"<think>((?:(?!</?think>|</?answer>).)*)</think>\s*<answer>((?:(?!</?think>|</?answer>).)*)</answer>", re.DOTALL
)


def think_answer_format(completions: list[Any], **_: Any) -> Rewards:
    """1 if the text is exactly one ``<think>...</think>`` followed by one ``<answer>...</answer>``, else 0."""
    return [float(_THINK_ANSWER.fullmatch(text_of(c).strip()) is not None) for c in completions]


def think_format(completions: list[Any], **_: Any) -> Rewards:
    """1 if the text starts with ``<think>``, opens no second one, and a ``</think>`` follows, else 0."""
    return [
        float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t)
        for t in (text_of(c).lstrip() for c in completions)
    ]


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` with balanced braces, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i]
    return None


def boxed_accuracy(completions: list[Any], *, column: str = "answer", **columns: Any) -> Rewards:
    r"""1 if the last ``\boxed{...}`` equals the column after trimming, else 0; without a box 0."""
    boxes = [last_boxed(text_of(completion)) for completion in completions]
    return [
        float(box is not None and box.strip() == str(gold).strip())
        for box, gold in zip(boxes, columns[column], strict=True)
    ]


def regex(completions: list[Any], *, pattern: str, **_: Any) -> Rewards:
    """1 if the pattern is found, else 0."""
    compiled = re.compile(pattern)
    return [float(compiled.search(text_of(c)) is not None) for c in completions]


def _distances(completions: list[Any], completion_ids: list[Any], target: float, unit: str) -> list[float]:
    if unit == "tokens":
        return [abs(len(ids) - target) for ids in completion_ids]
    return [abs(len(text_of(c)) - target) for c in completions]


def length_negative_abs(
    completions: list[Any], completion_ids: list[Any], *, target: float, unit: str = "characters", **_: Any
) -> Rewards:
    """``-D`` with D the distance to the target length."""
    return [-d for d in _distances(completions, completion_ids, target, unit)]


def length_reciprocal(
    completions: list[Any], completion_ids: list[Any], *, target: float, unit: str = "characters", **_: Any
) -> Rewards:
    """``1 / (1 + D)``: steep near the target, flat far away."""
    return [1 / (1 + d) for d in _distances(completions, completion_ids, target, unit)]


def length_exponential(
    completions: list[Any],
    completion_ids: list[Any],
    *,
    target: float,
    rate: float = 0.1,
    unit: str = "characters",
    **_: Any,
) -> Rewards:
    """``exp(-rate D)``: smooth, in (0, 1]."""
    return [math.exp(-rate * d) for d in _distances(completions, completion_ids, target, unit)]


def length(
    completions: list[Any], completion_ids: list[Any], *, sign: float = 1.0, unit: str = "characters", **_: Any
) -> Rewards:
    """``sign * length``: longer (or, with -1, shorter) is better, without end."""
    return [sign * d for d in _distances(completions, completion_ids, 0, unit)]


def repetition(completion_ids: list[Any], *, ngram: int = 3, worst: float = -1.0, **_: Any) -> Rewards:
    """``worst * (1 - unique/total)`` over token n-grams; 0 for fewer tokens than one n-gram."""

    def penalty(ids: list[int]) -> float:
        grams = list(zip(*(ids[i:] for i in range(ngram)), strict=False))
        return worst * (1 - len(set(grams)) / len(grams)) if grams else 0.0

    return [penalty(list(ids)) for ids in completion_ids]


def cosine_length(
    completions: list[Any],
    completion_ids: list[Any],
    *,
    limit: int,
    column: str = "answer",
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    **columns: Any,
) -> Rewards:
    """From the first value (short) to the second (``limit`` tokens) on half a cosine, by right or wrong answers.

    Short right answers are best, short wrong ones worst (arXiv 2502.03373). None where the gold answer is no formula.
    """
    verdicts = math_accuracy(completions, column=column, **columns)

    def value(verdict: float | None, n: int) -> float | None:
        if verdict is None:
            return None
        short, long = right if verdict else wrong
        return long + (short - long) * (1 + math.cos(math.pi * min(n / limit, 1.0))) / 2

    return [value(verdict, len(ids)) for verdict, ids in zip(verdicts, completion_ids, strict=True)]


def soft_overlong(completion_ids: list[Any], *, limit: int, buffer: int, factor: float = 1.0, **_: Any) -> Rewards:
    """0 up to ``limit - buffer`` tokens, then linear down to ``-factor`` at ``limit`` (DAPO, arXiv 2503.14476)."""

    def penalty(n: int) -> float:
        if n <= limit - buffer:
            return 0.0
        return -factor if n > limit or buffer == 0 else factor * (limit - buffer - n) / buffer

    return [penalty(len(ids)) for ids in completion_ids]


def math_accuracy(completions: list[Any], *, column: str = "solution", **columns: Any) -> Rewards:
    """1 if the answer equals the column's, symbolically or numerically, else 0; None if the column has no formula.

    Needs the ``math`` extra (math-verify). Its own time limits work on a process's main thread alone, so this runs in
    a reward subprocess.
    """
    return [_same(text_of(c), str(gold)) for c, gold in zip(completions, columns[column], strict=True)]


def reasoning_math_accuracy(
    completions: list[Any], *, column: str = "solution", delimiter: str = "</think>", **columns: Any
) -> Rewards:
    """``math_accuracy`` of the text after the last ``delimiter``; 0 if there is none."""
    texts = [text_of(c) for c in completions]
    answers = [text.rpartition(delimiter)[2] if delimiter in text else "" for text in texts]
    scores = math_accuracy(answers, column=column, **columns)
    return [s if s is None or delimiter in text else 0.0 for s, text in zip(scores, texts, strict=True)]


def _same(text: str, gold: str) -> float | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    both = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    boxed = last_boxed(gold)
    # A bare formula is meant as one; only a box or dollars make the parser read LaTeX. Plain words are no formula.
    bare = boxed is None and "$" not in gold and re.search(r"[\d\\]|^\s*\w\s*$", gold)
    wanted = parse(f"${gold}$" if bare else gold, extraction_config=both) or parse(gold)
    if not wanted:
        return None
    box = last_boxed(text)
    found = parse(text if box is None else f"${box}$", extraction_config=both)
    return float(bool(found) and verify(wanted, found))


def code_tests(completions: list[Any], *, column: str = "tests", **columns: Any) -> Rewards:
    """Share of the column's tests that the completion's program passes, run in a sandbox; None without tests."""
    from rollout.code_tests import CodeTests

    return CodeTests(column)(completions, **columns)


BUILTINS: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "final_number": final_number,
    "gsm8k_answer": final_number,
    "boxed_accuracy": boxed_accuracy,
    "math_accuracy": math_accuracy,
    "reasoning_math_accuracy": reasoning_math_accuracy,
    "think_answer_format": think_answer_format,
    "think_format": think_format,
    "regex": regex,
    "length": length,
    "length_negative_abs": length_negative_abs,
    "length_reciprocal": length_reciprocal,
    "length_exponential": length_exponential,
    "cosine_length": cosine_length,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
    "code_tests": code_tests,
    "reasoning_gym": ReasoningGym,
}
ISOLATED = {"regex", "math_accuracy", "reasoning_math_accuracy", "cosine_length"}
"""Built-ins whose time depends on the text so much that they run in a subprocess; the others run in the pool's actor."""
SANDBOXED = {"code_tests", "reasoning_gym"}
"""Built-ins that run in a sandbox, whatever is configured."""
