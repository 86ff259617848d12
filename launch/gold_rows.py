"""Count the rows whose gold answer no completion can match, before a run samples from them in vain.

A built-in reward returns None for them, so they cost samples and teach nothing. Numbers and texts are read here. Formulas
that only math-verify can read are tried as their own answers, in the reward's own process and within a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rollout.math_answers import formula_of
from rollout.reward_loading import default_column
from rollout.reward_worker import RewardWorker
from rollout.rewards import GOLDS
from shared.config import Config
from shared.config_reward import RewardFunction
from shared.errors import InputError, RewardFailed
from shared.types import Completion, Prompt

MOST_READ, MOST_TRIED, TOGETHER, LIMIT_S = 20_000, 200, 20, 4.0
"""Rows that are read, formulas that are tried, formulas of one call, and seconds after which no more are tried."""


def rows_without_score(config: Config, origin: str, prompts: Sequence[Prompt]) -> list[str]:
    """Return a warning W309 for each built-in reward that some rows of ``prompts`` can never satisfy."""
    lines = []
    for i, spec in enumerate(config.reward.functions):
        column = spec.args.get("column") or default_column(spec.function or "")
        if spec.function not in GOLDS or not column or not prompts:
            continue
        read = _spread(prompts, MOST_READ)
        known = [GOLDS[str(spec.function)](prompt.columns.get(column)) for prompt in read]
        bad = [prompt for prompt, fits in zip(read, known, strict=True) if fits is False]
        unknown = _spread([prompt for prompt, fits in zip(read, known, strict=True) if fits is None], MOST_TRIED)
        tried, unequal = _tried(config, spec, column, unknown) if unknown else ([], [])
        bad = sorted(bad + unequal, key=lambda prompt: prompt.prompt_id)
        if bad:
            count = len(read) - known.count(None) + len(tried)
            asked = f"{count} rows" if count == len(prompts) else f"{count} rows looked at (of {len(prompts)})"
            names = " + ".join(Path(source.path).name for source in config.data.train)
            lines.append(
                f"warning[W309] rows that never score — {origin}:reward.functions[{i}], {spec.function}. Found "
                f"{len(bad)} of {asked} whose {column} it cannot read, the first {names}:{bad[0].prompt_id + 1} "
                f"({str(bad[0].columns.get(column))[:40]!r}), expected none. Fix: correct {column}, or leave these rows out"
            )
    return lines


def _spread(prompts: Sequence[Prompt], most: int) -> Sequence[Prompt]:
    """Return at most ``most`` of ``prompts``, evenly spaced."""
    if len(prompts) <= most:
        return prompts
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, most).round().astype(int)]


def _tried(
    config: Config, spec: RewardFunction, column: str, prompts: Sequence[Prompt]
) -> tuple[list[Prompt], list[Prompt]]:
    """Score the golds of ``prompts`` as their own answers; returns ``(prompts scored, those of them that did not get 1)``."""
    function = RewardFunction(function="math_accuracy", args={"column": column}, timeout_s=spec.timeout_s)
    try:
        worker = RewardWorker(config.reward.model_copy(update={"functions": [function]}), isolate=True)
    except InputError:
        return [], []
    tried: list[Prompt] = []
    bad: list[Prompt] = []
    started = time.monotonic()
    try:
        for first in range(0, len(prompts), TOGETHER):
            if time.monotonic() - started > LIMIT_S:
                break
            part = prompts[first : first + TOGETHER]
            try:
                scores = worker.score([(i, prompt, (_itself(prompt, column),)) for i, prompt in enumerate(part)], {})
            except RewardFailed:  # A formula that takes longer than a call may: the run will tell.
                continue
            tried += part
            bad += [p for p, score in zip(part, scores, strict=True) if score.parts["math_accuracy"][0] != 1]
    finally:
        worker.close()
    return tried, bad


def _itself(prompt: Prompt, column: str) -> Completion:
    text = f"\\boxed{{{formula_of(str(prompt.columns.get(column)))}}}"
    return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop")
