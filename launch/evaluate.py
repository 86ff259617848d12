"""``millrace eval CONFIG | RUN``: score a model on held-out rows, greedy and, with ``--eval.samples N``, pass@k.

Give a configuration, to score the model that it starts from, or a run folder, to score its best checkpoint. vLLM loads the
weights from the disk; neither Ray nor a learner is started. The last line is one JSON object with all numbers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.options import ConfigOptions, guarded
from shared.config import Config
from shared.config_loader import config_file, load_config
from shared.config_reward import Reward
from shared.errors import GroupFailed, InputError, RewardFailed, visible
from shared.types import Completion, Prompt

if TYPE_CHECKING:
    from rollout.reward_worker import Group
from rollout.scores import Scores

NO_STEPS = {"global_step": 0, "epoch": 0, "max_steps": 0, "log_history": []}
"""What reward functions hear of the training: there is none."""


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
    options.add_argument("--checkpoint", metavar="WHICH", help=f"{text} (default: best)")
    return options


def _evaluate(arguments: list[str]) -> None:
    from launch.preflight import prepare

    options, files, settings = parser().parse_config(arguments)
    if (Path(files[0]) / "config.toml").is_file():
        settings = {"model.path": str(_checkpoint(Path(files[0]), options.checkpoint or "best"))} | settings
        files = [str(Path(files[0]) / "config.toml"), *files[1:]]
    elif options.checkpoint:
        place, expected = "command line:--checkpoint", "a run folder, whose checkpoint it is"
        raise InputError("E106", "bad option", place, files[0], expected, f"--model.path DIR, or {parser().prog} RUN")
    source = config_file(files[-1])
    if not source.is_file() and source.suffix != ".toml":
        place, expected = f"command line:{files[-1]}", "a run folder, a TOML file, or the name of a shipped one"
        raise InputError("E603", "nothing to evaluate", place, "no config.toml there", expected, "check the path")
    prepared = prepare(load_config(files, settings), source.name, source.parent)
    if not prepared.held_out:
        place = f"{source.name}:data.eval"
        raise InputError("E201", "no evaluation rows", place, "nothing", "held-out rows", "set data.eval")
    scores = asyncio.run(score(prepared.config, prepared.held_out))
    named = {visible(name): value for name, value in scores.items()}
    width = max(map(len, named))
    for name, value in named.items():
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
    steps = [int(path.name.rpartition("-")[2]) for path in all_of(parent)]
    found = of_step(parent, int(which)) if which.isdigit() and int(which) in steps else None
    if not which.isdigit():
        found = newest(parent)
    if found is not None and which == "best":
        best = Point.at(*found).state["stopping"].get("best_version", -1)
        found = of_step(parent, best) if best > 0 else found
    if found is None:
        there = f"steps {', '.join(map(str, steps))}" if steps else "none"
        place, fix = f"command line:--checkpoint {which}", "train first, or choose one of these"
        raise InputError("E603", "no such checkpoint", place, there, "a good checkpoint", fix)
    return found[0] / "hf"


async def score(config: Config, prompts: list[Prompt]) -> dict[str, float]:
    """``eval/...`` metrics of the model at ``config.model.path`` on ``prompts``, in a fresh engine."""
    from launch.failures import FailureBudget
    from launch.held_out import Judges, evaluate
    from rollout.engine import Engine, Sampling

    engine, scorer = Engine(config, load_format="safetensors"), Scorer(config.reward)

    async def generate(_: int, prompt: Prompt, sampling: Sampling) -> tuple[Completion, ...]:
        return await engine.generate(prompt.token_ids, sampling, 0)

    try:
        failures = FailureBudget(config.reward, lambda failure, _: print(f"left out: {failure}", file=sys.stderr))
        return await evaluate(config, prompts, Judges(generate, scorer.score), failures)
    finally:
        await engine.close()
        scorer.close()


class Scorer:
    """One reward worker in this process, called as a pool calls its own: some groups at a time, what failed again and alone."""

    def __init__(self, settings: Reward) -> None:
        from rollout.reward_worker import RewardWorker

        self._settings, self._worker = settings, RewardWorker(settings)
        self._waiting: dict[int, Group] = {}
        self._answers: dict[int, Scores | GroupFailed] = {}
        self._turn = asyncio.Lock()

    async def score(self, number: int, prompt: Prompt, completions: tuple[Completion, ...]) -> Scores:
        """Scores of one group. Raises ``GroupFailed`` when every try failed."""
        self._waiting[number] = (number, prompt, completions)
        async with self._turn:
            if number in self._waiting:
                await self._call([*self._waiting][: self._settings.groups_per_call])
        answer = self._answers.pop(number)
        if isinstance(answer, GroupFailed):
            raise answer
        return answer

    def close(self) -> None:
        """End what it started."""
        self._worker.close()

    async def _call(self, numbers: list[int]) -> None:
        groups = [self._waiting.pop(number) for number in numbers]
        try:
            scores = await asyncio.to_thread(self._worker.score, groups, NO_STEPS)
            self._answers.update(zip(numbers, scores, strict=True))
        except RewardFailed as failure:
            for group in groups:
                alone = len(groups) == 1
                self._answers[group[0]] = await self._again(group, failure, self._settings.retries + (not alone))

    async def _again(self, group: Group, failure: RewardFailed, tries: int) -> Scores | GroupFailed:
        for _ in range(tries):
            try:
                (scores,) = await asyncio.to_thread(self._worker.score, [group], NO_STEPS)
                return scores
            except RewardFailed as error:
                failure = error
        cause = "timeout" if failure.code == "E305" else failure.code
        return GroupFailed(group[0], cause, str(failure), failure.sample, failure.text, failure.trace)


if __name__ == "__main__":
    sys.exit(main())
