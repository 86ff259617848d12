"""Built-in reward functions.

A reward function takes keyword lists with one entry per completion (``prompts``, ``completions``,
``completion_ids``, every dataset column) and returns one number per completion, None where it does not apply: a
function written for TRL's GRPOTrainer runs unchanged. Higher is better. Parsers of answers are imported inside functions:
every sandbox imports this module.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rollout.generated_scoring import ReasoningGym

if TYPE_CHECKING:
    from fractions import Fraction

Rewards = list[float | None]


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last assistant message."""
    if isinstance(completion, str):
        return completion
    return next((m.get("content") or "" for m in reversed(completion) if m["role"] == "assistant"), "")


def exact_match(
    completions: list[Any], *, column: str = "answer", strip: bool = True, ignore_case: bool = False, **columns: Any
) -> Rewards:
    """1 if the completion equals the column, else 0; None if the column holds no text, number or truth value."""

    def normal(text: str) -> str:
        text = unicodedata.normalize("NFC", text.strip() if strip else text)
        return text.casefold() if ignore_case else text

    return [
        _among(normal(text_of(completion)), [normal(text) for text in texts_of(gold)])
        for completion, gold in zip(completions, columns[column], strict=True)
    ]


def texts_of(gold: Any) -> list[str]:
    """The texts that mean ``gold``: of a number that became a float in a file (``42.0``) the integer too. Empty for others."""
    gold = gold.tolist() if hasattr(gold, "tolist") else gold
    if isinstance(gold, float):
        if math.isnan(gold):  # What a file has for no value.
            return []
        return [str(gold), str(int(gold))] if gold.is_integer() else [str(gold)]
    return [str(gold)] if isinstance(gold, str | int) else []


def _among(text: str | None, golds: list[str]) -> float | None:
    return float(text in golds) if golds else None


def extract_number(text: str) -> Fraction | None:
    r"""The number, exact, after the last ``####`` where present; else of the last box or answer tag; else the last one."""
    from rollout.number_answers import answer_number

    found = answer_number(text)
    return None if found is None else found.value


def final_number(completions: list[Any], *, column: str = "answer", **columns: Any) -> Rewards:
    """1 if the final numbers of completion and column agree, else 0; None if the column has none.

    ``50%`` is 50, and 0.5. Units and currencies are ignored. A sum that was not worked out is no number.
    """
    from rollout.number_answers import answer_number

    scores: Rewards = []
    for completion, gold in zip(completions, columns[column], strict=True):
        expected, found = answer_number(str(gold)), answer_number(text_of(completion))
        scores.append(None if expected is None else float(found is not None and found.equals(expected)))
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
    from rollout.answer_text import last_box

    return last_box(text)[0]


def boxed_accuracy(completions: list[Any], *, column: str = "answer", **columns: Any) -> Rewards:
    r"""1 if the last ``\boxed{...}`` equals the column after trimming, else 0; without a box 0.

    None if the column holds no text, number or truth value.
    """
    boxes = [last_boxed(text_of(completion)) for completion in completions]
    return [
        _among(None if box is None else box.strip(), [text.strip() for text in texts_of(gold)])
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

    The answer is in the last box, else between the last dollars, else the last number or what follows "answer is".
    Units are ignored unless both sides name different ones; ``50%`` is 50, and 0.5; ``52_8`` is only ``52_8``. Letters
    of choices and text in ``\\text{}`` are compared as such. Needs the ``math`` extra (math-verify). Its own time limits work on a process's main thread alone, so this runs in
    a reward subprocess.
    """
    from rollout.math_answers import same

    return [same(text_of(c), str(gold)) for c, gold in zip(completions, columns[column], strict=True)]


def reasoning_math_accuracy(
    completions: list[Any], *, column: str = "solution", delimiter: str = "</think>", **columns: Any
) -> Rewards:
    """``math_accuracy`` of the text after the last ``delimiter``; 0 if there is none."""
    texts = [text_of(c) for c in completions]
    answers = [text.rpartition(delimiter)[2] if delimiter in text else "" for text in texts]
    scores = math_accuracy(answers, column=column, **columns)
    return [s if s is None or delimiter in text else 0.0 for s, text in zip(scores, texts, strict=True)]


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


def _has_number(gold: Any) -> bool | None:
    return extract_number(str(gold)) is not None


def _has_text(gold: Any) -> bool | None:
    return bool(texts_of(gold))


def _has_formula(gold: Any) -> bool | None:
    from rollout.math_answers import readable

    return readable(str(gold))


GOLDS: dict[str, Callable[[Any], bool | None]] = {
    **dict.fromkeys(("final_number", "gsm8k_answer"), _has_number),
    **dict.fromkeys(("exact_match", "boxed_accuracy"), _has_text),
    **dict.fromkeys(("math_accuracy", "reasoning_math_accuracy", "cosine_length"), _has_formula),
}
"""Built-in function -> whether it can ever pay for a gold answer; None where only math-verify knows."""
