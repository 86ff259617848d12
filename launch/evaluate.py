"""``millrace evaluate CONFIG.toml [--model.path DIR]``: score a model directory on the configuration's held-out rows.

Loads the weights from disk into a fresh vLLM of its own, without Ray and without a learner, so it also proves that
a checkpoint stands alone. Prints one JSON object last.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np

from launch.run import guarded, parse
from shared.config import Config
from shared.config_loader import load_config
from shared.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(sys.argv[1:] if arguments is None else arguments, _evaluate)


def _evaluate(arguments: list[str]) -> None:
    from launch.preflight import prepare

    files, overrides = parse(arguments)
    prepared = prepare(load_config(files, overrides), Path(files[-1]).name, Path(files[-1]).parent)
    if not prepared.held_out:
        place = f"{Path(files[-1]).name}:data.eval"
        raise InputError("E201", "no evaluation rows", place, "nothing", "held-out rows", "set data.eval")
    scores = asyncio.run(score(prepared.config, prepared.held_out))
    print(json.dumps({"model": prepared.config.model.path, "rows": len(prepared.held_out), **scores}), flush=True)


async def score(config: Config, prompts: list) -> dict[str, float]:
    """Mean of every reward function over greedy completions of ``prompts``, in a fresh engine."""
    from rollout.engine import Engine, Sampling
    from rollout.reward_worker import RewardWorker

    engine = Engine(config, load_format="safetensors")
    try:
        limit = config.eval.max_new_tokens or config.rollout.max_new_tokens
        sampling = Sampling(1, limit, 0.0, stop=tuple(config.rollout.stop))
        answers = await asyncio.gather(*(engine.generate(prompt.token_ids, sampling, 0) for prompt in prompts))
    finally:
        await engine.close()
    worker = RewardWorker(config.reward)
    groups = [(i, prompt, answer) for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]
    results = await asyncio.to_thread(worker.score, groups, {"global_step": 0, "epoch": 0, "max_steps": 0})
    worker.close()
    return {name: float(np.nanmean([r.parts[name][0] for r in results])) for name in results[0].parts}


if __name__ == "__main__":
    sys.exit(main())
