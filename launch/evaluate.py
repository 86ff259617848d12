"""``millrace eval CONFIG | RUN``: score a model on held-out rows, greedy and, with ``--eval.samples N``, pass@k.

Of a run folder it takes the configuration and the best checkpoint. The weights are loaded from disk into a fresh vLLM of
its own, without Ray and without a learner, so it also proves that a checkpoint stands alone. One JSON object comes last.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from launch.options import ConfigOptions, guarded
from shared.config import Config
from shared.config_loader import config_file, load_config
from shared.errors import InputError
from shared.types import Prompt


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _evaluate, parser())


def parser() -> ConfigOptions:
    """The verb's options."""
    examples = """
        millrace eval runs/my                              # the best checkpoint of a run
        millrace eval runs/my --checkpoint 120             # that of a step
        millrace eval my.toml --model.path DIR             # any model directory
        millrace eval runs/my --eval.samples 8             # pass@1, 2, 4, 8 beside the greedy score
        """
    options = ConfigOptions("eval", __doc__, examples)
    text = "of a run folder: best, newest, or a step"
    options.add_argument("--checkpoint", default="best", metavar="WHICH", help=text)
    return options


def _evaluate(arguments: list[str]) -> None:
    from launch.preflight import prepare

    options, files, settings = parser().parse_config(arguments)
    if (Path(files[0]) / "config.toml").is_file():
        settings = {"model.path": str(_checkpoint(Path(files[0]), options.checkpoint))} | settings
        files = [str(Path(files[0]) / "config.toml")]
    source = config_file(files[-1])
    if not source.is_file() and source.suffix != ".toml":
        place, expected = f"command line:{files[-1]}", "a run folder, a TOML file, or the name of a shipped one"
        raise InputError("E603", "nothing to evaluate", place, "no config.toml there", expected, "check the path")
    prepared = prepare(load_config(files, settings), source.name, source.parent)
    if not prepared.held_out:
        place = f"{source.name}:data.eval"
        raise InputError("E201", "no evaluation rows", place, "nothing", "held-out rows", "set data.eval")
    scores = asyncio.run(score(prepared.config, prepared.held_out))
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:{width}}  {value:.4f}")
    print(json.dumps({"model": prepared.config.model.path, "rows": len(prepared.held_out), **scores}), flush=True)


def _checkpoint(run: Path, which: str) -> Path:
    """The model of a run's checkpoint. Raises ``InputError`` E603 if there is none such."""
    from launch.resume import Point
    from shared.checkpoints import all_of, newest, of_step

    parent = run / "checkpoints"
    if which not in ("best", "newest") and not which.isdigit():
        place, expected = f"command line:--checkpoint {which}", "best, newest, or a step"
        raise InputError("E106", "bad option", place, which, expected, "--checkpoint best")
    found = newest(parent) if not which.isdigit() else of_step(parent, int(which))
    if found is not None and which == "best":
        best = Point.at(*found).state["stopping"].get("best_version", -1)
        found = of_step(parent, best) if best > 0 else found
    if found is None:
        there = ", ".join(path.name for path in all_of(parent)) or "none"
        place, fix = f"command line:--checkpoint {which}", "train first, or choose one of these"
        raise InputError("E603", "no such checkpoint", place, there, "a good checkpoint", fix)
    return found[0] / "hf"


async def score(config: Config, prompts: list[Prompt]) -> dict[str, float]:
    """``eval/...`` metrics of the model at ``config.model.path`` on ``prompts``, in a fresh engine."""
    from launch.failures import FailureBudget
    from launch.held_out import Judges, evaluate
    from rollout.engine import Engine, Sampling
    from rollout.reward_worker import Group, RewardWorker, Scores
    from shared.types import Completion

    engine, worker = Engine(config, load_format="safetensors"), RewardWorker(config.reward)
    state = {"global_step": 0, "epoch": 0, "max_steps": 0, "log_history": []}
    waiting: dict[int, Group] = {}
    scored: dict[int, Scores] = {}
    scoring = asyncio.Lock()  # A worker takes one call at a time: who waited meanwhile goes together.

    async def generate(_: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        return await engine.generate(prompt.token_ids, sampling, 0)

    async def judge(number: int, prompt: Prompt, completions: tuple[Completion, ...]) -> Scores:
        waiting[number] = (number, prompt, completions)
        async with scoring:
            if number in waiting:
                groups = list(waiting.values())
                waiting.clear()
                answers = await asyncio.to_thread(worker.score, groups, state)
                scored.update(zip((group[0] for group in groups), answers, strict=True))
        return scored.pop(number)

    try:
        failures = FailureBudget(config.reward, lambda *_: None)
        return await evaluate(config, prompts, Judges(generate, judge), failures)
    finally:
        await engine.close()
        worker.close()


if __name__ == "__main__":
    sys.exit(main())
