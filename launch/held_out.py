"""Held-out prompts become a score: completions by the run's own engines, scored by its own reward functions.

The controller calls ``evaluate`` between two steps, so that every completion is of one policy version; ``millrace eval``
calls it with an engine of its own. Greedy completions give the mean rewards, sampled ones pass@k.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from launch.failures import FailureBudget
from rollout.engine import Sampling
from rollout.reward_loading import reward_name
from rollout.scores import Scores
from shared.config import Config
from shared.errors import GroupFailed, NothingToLearn
from shared.types import Completion, Prompt

Completions = tuple[Completion, ...]


class Judges(NamedTuple):
    """Who samples and who scores, by the number of a request."""

    generate: Callable[[int, Prompt, Sampling], Awaitable[Completions]]
    score: Callable[[int, Prompt, Completions], Awaitable[Scores]]


async def evaluate(config: Config, held_out: list[Prompt], judges: Judges, failures: FailureBudget) -> dict[str, float]:
    """``eval/...`` metrics of the weights in the engines. Raises ``NothingToLearn`` if not one prompt could be scored.

    A prompt that fails is counted in ``failures`` and left out.
    """

    async def one(number: int, prompt: Prompt, sampling: Sampling) -> tuple[Completions, Scores] | None:
        try:
            completions = await judges.generate(number, prompt, sampling)
            return completions, await judges.score(number, prompt, completions)
        except GroupFailed as failure:
            failures.failed(failure, prompt)
            return None

    rows = len(held_out)
    wanted = [one(-1 - i, prompt, _greedy(config)) for i, prompt in enumerate(held_out)]
    if config.eval.samples:
        wanted += [one(-1 - rows - i, prompt, _sampled(config, i)) for i, prompt in enumerate(held_out)]
    answers = await asyncio.gather(*wanted)
    greedy, sampled = ([answer for answer in part if answer] for part in (answers[:rows], answers[rows:]))
    if not greedy:
        found, fix = (
            f"not one of {rows} held-out prompts generated and scored",
            "see why above, or in failed/ of the run folder",
        )
        raise NothingToLearn("E307", "nothing to evaluate", "data.eval", found, "at least one", fix)
    metrics = _means(config, greedy, "eval")
    if sampled:
        metrics |= _means(config, sampled, "eval/sampled") | _passes(config, [scores for _, scores in sampled])
    if len(greedy) + len(sampled) < len(answers):
        metrics["eval/failed"] = float(len(answers) - len(greedy) - len(sampled))
    metrics["eval/reward"] = metrics.pop("eval/reward")  # Last, where a reader looks.
    return metrics


def pass_at_k(passed: NDArray[np.bool_], k: int) -> float:
    """Chance that one of ``k`` of a row's samples passes: 1 - C(n - c, k) / C(n, k) for c of n that did.

    ``passed [n]``, n >= k. The unbiased estimator of arXiv 2107.03374, equation 1.
    """
    n, right = len(passed), int(passed.sum())
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def pass_reward(config: Config) -> str:
    """Name of the reward function that says whether a row is solved."""
    heaviest = max(config.reward.functions, key=lambda function: function.weight)
    return config.eval.pass_reward or reward_name(heaviest)


def _greedy(config: Config) -> Sampling:
    limit = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return Sampling(1, limit, 0.0, stop=tuple(config.rollout.stop))


def _sampled(config: Config, row: int) -> Sampling:
    """By a seed of the row's own: two evaluations differ by their weights alone."""
    limit, seed = config.eval.max_new_tokens or config.rollout.max_new_tokens, (config.run.seed, row, 1)
    return Sampling(
        config.eval.samples,
        limit,
        config.eval.temperature or config.rollout.temperature,
        int(np.random.SeedSequence(seed).generate_state(1)[0]),
        stop=tuple(config.rollout.stop),
    )


def _means(config: Config, answers: list[tuple[Completions, Scores]], prefix: str) -> dict[str, float]:
    scores = [scores for _, scores in answers]
    completions = [completion for group, _ in answers for completion in group]
    parts = {name: np.concatenate([s.parts[name] for s in scores]) for name in scores[0].parts}
    metrics = {f"{prefix}/rewards/{name}/mean": float(np.nanmean(values)) for name, values in parts.items()}
    metrics[f"{prefix}/mean_length"] = float(np.mean([len(c.token_ids) for c in completions]))
    metrics[f"{prefix}/clipped_ratio"] = float(np.mean([c.finish_reason == "length" for c in completions]))
    combined = np.concatenate([s.combined(config.reward.functions) for s in scores])
    metrics[f"{prefix}/reward"] = float(np.nanmean(combined))
    return metrics


def _passes(config: Config, scores: list[Scores]) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... and all; completions to which the function did not apply are left out."""
    values = [s.parts[pass_reward(config)] for s in scores]
    passed = [row[~np.isnan(row)] >= config.eval.pass_value for row in values]
    most = config.eval.samples
    metrics = {}
    for k in sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most}):
        enough = [pass_at_k(row, k) for row in passed if len(row) >= k]
        if enough:
            metrics[f"eval/pass@{k}"] = float(np.mean(enough))
    return metrics
