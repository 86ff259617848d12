"""The doctor's canned completions: right, wrong, empty, long, broken and hostile ones, made from a dataset row."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollout.reward_loading import default_column
from shared.config_reward import RewardFunction
from shared.types import Completion, Prompt

ANSWER_COLUMNS = ("answer", "solution", "target", "ground_truth", "gold", "label")
DEFAULT_TARGET = 32


@dataclass(frozen=True)
class Sample:
    """One canned completion."""

    kind: str
    """``gold``, ``wrong``, ``empty``, ``length``, ``odd`` or ``given``."""
    text: str

    def completion(self) -> Completion:
        """As an engine would have sampled it, a token per character."""
        ids = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.int32) % 1000
        return Completion(ids, np.zeros(len(ids), np.float32), self.text, "stop")


def answer_column(spec: RewardFunction, prompt: Prompt) -> str | None:
    """The column with the right answer, as far as it can be told."""
    named = spec.args.get("column") or (default_column(spec.function) if spec.function else None)
    candidates = [named] if named else [name for name in ANSWER_COLUMNS if name in prompt.columns]
    return next((name for name in candidates if prompt.columns.get(name) is not None), None)


def target_length(spec: RewardFunction) -> int:
    """The length, in characters or tokens, around which the length sweep goes."""
    objective = spec.objective or {}
    for value in (objective.get("value"), spec.args.get("target"), spec.args.get("limit")):
        if isinstance(value, int | float) and value > 0:
            return int(value)
    return DEFAULT_TARGET


def samples_for(prompt: Prompt, prompts: list[Prompt], spec: RewardFunction, small: bool) -> list[Sample]:
    """Completions of ``prompt``; ``small`` leaves out the sweep's fine steps and the very long text."""
    samples: list[Sample] = []
    column = answer_column(spec, prompt)
    if column is not None:
        gold = str(prompt.columns[column])
        others = (str(value) for p in prompts if (value := p.columns.get(column)) is not None)
        other = next((text for text in others if text != gold), None)
        samples += [Sample("gold", text) for text in forms(gold)]
        samples += [Sample("wrong", text) for text in forms(_changed(gold))]
        samples += [Sample("other", other)] if other is not None else []
        samples += [Sample("odd", text) for text in json_forms(column, gold)]
    samples += [Sample("empty", ""), Sample("empty", "  \n ")]
    samples += [Sample("length", ("abcde " * (n // 6 + 1))[:n]) for n in sweep(target_length(spec), small)]
    samples += [
        Sample("odd", text)
        for text in (
            "word " * 40,
            "<think>and then",
            "Ответ: сорок два 四十二 😀🚀",
            "{{{ ((( <answer></think> \\boxed{1",
            "x = \x00\\u0000",
        )
    ]
    if not small:
        samples.append(Sample("long", "A long answer without an end. " * 700))
    return samples


def json_forms(column: str, answer: str) -> list[str]:
    """An answer under the name of its column in a JSON object: as a number, if it is one, and as text; alone and in a list."""
    short = _short(answer)
    values: list[Any] = [short]
    with contextlib.suppress(ValueError):
        values.insert(0, int(short))
    return [json.dumps(one) for value in values for one in ({column: value}, [{column: value}])]


def _short(answer: str) -> str:
    return answer.rsplit("####", 1)[-1].strip() if "####" in answer else answer


def forms(answer: str) -> list[str]:
    """An answer bare, boxed, and in think/answer tags."""
    short = _short(answer)
    return [answer, f"\\boxed{{{short}}}", f"<think>Let me see.</think><answer>{short}</answer>"]


def _changed(answer: str) -> str:
    """A wrong answer of the same form: another last digit, or another word."""
    for i in range(len(answer) - 1, -1, -1):
        if answer[i].isdigit():
            return f"{answer[:i]}{(int(answer[i]) + 1) % 10}{answer[i + 1 :]}"
    return answer + " not"


def sweep(target: int, small: bool) -> list[int]:
    """Lengths from 0 to twice the target, single steps around the target."""
    coarse = sorted({round(2 * target * i / 12) for i in range(13)})
    if small:
        return [n for n in coarse if n > 0]
    fine = [n for n in range(target - 4, target + 5) if n > 0]
    return sorted({n for n in [1, *coarse, *fine] if n > 0})


def canary_samples(canary: Path) -> list[Sample]:
    """Completions that make the file ``canary`` when they are evaluated, executed or given to a shell."""
    expression = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    shell = f"touch {canary}"
    wrapped: list[Any] = [
        expression,
        f"```python\n{expression}\n```",
        f"<answer>{expression}</answer>",
        f"\\boxed{{{expression}}}",
        f"#### {expression}",
        f"$({shell})",
        f"; {shell} #",
        f"'); {expression}; ('",
    ]
    return [Sample("canary", text) for text in wrapped]
