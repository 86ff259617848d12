"""Held-out prompts become a score: greedy completions by the run's own engines, scored by its own reward functions."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from launch.failures import FailureBudget
from launch.partners import Engines, Rewards
from rollout.engine import Sampling
from shared.config import Config
from shared.errors import GroupFailed, NothingToLearn
from shared.types import Prompt


async def evaluate(
    config: Config, held_out: list[Prompt], engines: Engines, rewards: Rewards, failures: FailureBudget
) -> dict[str, float]:
    """``eval/...`` metrics of the weights in the engines. Raises ``NothingToLearn`` if not one prompt could be scored.

    A prompt that fails is counted in ``failures`` and left out.
    """
    limit = config.eval.max_new_tokens or config.rollout.max_new_tokens
    sampling = Sampling(1, limit, 0.0, stop=tuple(config.rollout.stop))

    async def one(index: int, prompt: Prompt) -> Any:
        try:
            completions = await engines.generate(-1 - index, prompt, sampling)
            return await rewards.score(-1 - index, prompt, completions)
        except GroupFailed as failure:
            failures.failed(failure, prompt)
            return None

    answers = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(held_out)))
    scores = [score for score in answers if score is not None]
    if not scores:
        raise NothingToLearn(f"not one of {len(answers)} held-out prompts could be generated and scored")
    parts = {name: np.concatenate([s.parts[name] for s in scores]) for name in scores[0].parts}
    combined = np.concatenate([s.combined(config.reward.functions) for s in scores])
    metrics = {f"eval/rewards/{name}/mean": float(np.nanmean(values)) for name, values in parts.items()}
    if len(scores) < len(answers):
        metrics["eval/failed"] = float(len(answers) - len(scores))
    metrics["eval/reward"] = float(np.nanmean(combined))
    return metrics
