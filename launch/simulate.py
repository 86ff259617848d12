"""``millrace simulate [CONFIG.toml] --engines N``: try a run with N simulated engines.

It answers how fast a run would be with more engines, and how much CPU time its control takes on this machine, without any
GPU. How long the simulated engines, learner and rewards take is read from ``--timings`` (see ``millrace plan --save``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from launch.options import Options, check_number, guarded
from launch.plan_model import check_devices
from launch.timings import Timings
from shared.config import Config
from shared.config_loader import config_file, load_config
from shared.errors import InputError

WARM_UP = 0.2
"""Share of the steps that is left out of the rates."""
LEAST_STEPS = 2
"""One that is left out, and one to measure."""


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _simulate, parser())


def parser() -> Options:
    """The verb's options."""
    options = Options(
        "simulate",
        __doc__,
        """
        millrace simulate --engines 1000                 # the control plane's cost
        millrace simulate my.toml --timings t.json --json  # a run of one's own
        """,
    )
    options.add_argument("config", nargs="?", help="a run's configuration; by default groups of 8, a few per engine")
    options.add_argument("--engines", type=int, help="engines (default: the configuration's, or 8)")
    options.add_argument(
        "--ranks", type=int, help="learner ranks (default: the configuration's, or as many as keep up)"
    )
    options.add_argument("--steps", type=int, default=20, help="batches to train")
    options.add_argument("--groups-per-engine", type=int, default=4, help="without a configuration: prompts in a step")
    options.add_argument("--timings", type=Path, help="JSON of launch/timings.py, as millrace plan --save writes it")
    options.add_argument("--json", action="store_true", help="print one JSON line last")
    return options


def _simulate(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    for name, least in (("engines", 1), ("ranks", 1), ("steps", LEAST_STEPS), ("groups_per_engine", 1)):
        check_number(f"--{name.replace('_', '-')}", getattr(options, name), least)
    timings = Timings.load(options.timings) if options.timings else Timings()
    result = simulate(_config(options, timings), timings)
    for name, value in result.items():
        print(f"{name:32} {value:,.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if options.json:
        print(json.dumps(result), flush=True)


def _config(options: argparse.Namespace, timings: Timings) -> Config:
    """The run to simulate. Raises what ``load_config`` does, and ``InputError`` E104 or E108."""
    config = _given(options) if options.config else _made_up(options, timings)
    run = {"steps": options.steps * config.updates_per_batch, "samples_every": 0, "checkpoint_every": 0, "sinks": []}
    changes = {
        "run": config.run.model_copy(update=run),
        "rollout": config.rollout.model_copy(update={"max_engines": 0}),
        "eval": config.eval.model_copy(update={"every_steps": 0}),
    }
    return config.model_copy(update=changes)


def _given(options: argparse.Namespace) -> Config:
    """A file's, with the same checks as for a run."""
    asked = {"rollout.num_engines": options.engines, "learner.num_ranks": options.ranks}
    config = load_config([options.config], {key: str(number) for key, number in asked.items() if number is not None})
    check_devices(config, config_file(options.config).name)
    return config


def _made_up(options: argparse.Namespace, timings: Timings) -> Config:
    """Groups of 8, a few per engine, and as many ranks as keep up. Raises ``InputError`` E104."""
    engines, ranks, group = options.engines or 8, options.ranks, 8
    prompts = engines * options.groups_per_engine
    completions = prompts * group
    if ranks is None:  # A learner that keeps up with engines that are never without work.
        running = 2 * group * options.groups_per_engine
        busy = engines * running / timings.decode_s(running)
        ranks = max(1, min(round(busy * timings.train_token_s), completions // 2))
        while completions % ranks:
            ranks += 1
    elif completions % ranks:
        near = next(number for number in range(min(ranks, completions), 0, -1) if completions % number == 0)
        place, expected = "command line:--ranks", f"a divisor of the step's {completions} completions"
        raise InputError("E104", "batch does not divide", place, str(ranks), expected, f"--ranks {near}")
    table: dict[str, Any] = {
        "model": {"path": "simulated"},
        "data": {"train": "simulated"},
        "rollout": {"group_size": group, "max_staleness": 1, "num_engines": engines},
        "reward": {"functions": [{"function": "length"}], "workers": max(1, engines // 20), "groups_per_call": 8},
        "learner": {"prompts_per_step": prompts, "num_ranks": ranks},
    }
    return Config.model_validate(table)


def simulate(config: Config, timings: Timings) -> dict[str, Any]:
    """One run in virtual time: its step time, rates and shares, and what the control plane cost on this machine."""
    from launch import virtual_time

    with tempfile.TemporaryDirectory(prefix="millrace-simulate-") as folder:
        return virtual_time.run(_run(config, timings, Path(folder)))


async def _run(config: Config, timings: Timings, path: Path) -> dict[str, Any]:
    from launch.controller import Controller
    from launch.garbage import collected_by_the_clock
    from launch.run_folder import RunFolder
    from launch.simulated import SimulatedPlaces
    from learner.learner_group import LearnerGroup
    from rollout.engine_pool import EnginePool
    from rollout.prompts import PromptStream
    from rollout.reward_pool import RewardPool
    from shared.types import Prompt

    class Folder(RunFolder):
        """Records every step; there is nothing to save."""

        rows: list[dict[str, float]]
        marks: list[tuple[float, float, float]]
        """Of each step: CPU seconds, real seconds, virtual seconds."""

        def step(self, step: int, metrics: dict[str, float], *rest: Any) -> None:
            super().step(step, metrics, *rest)
            self.rows.append(metrics)
            self.marks.append((time.process_time(), time.perf_counter(), time.monotonic()))

        async def commit(self, *_: Any) -> bool:
            return True

    rng = np.random.default_rng(config.run.seed)
    sizes = rng.poisson(timings.prompt_tokens, 4096).clip(1, config.rollout.max_prompt_tokens)
    prompts = [Prompt(i, np.zeros(size, np.int32), "") for i, size in enumerate(sizes)]
    places = SimulatedPlaces(timings, config)
    folder = Folder(config, path)
    folder.rows, folder.marks = [], []
    engines, learners = EnginePool(config, places, {}), LearnerGroup(config, "simulated", places.ranks, {})
    rewards = RewardPool(config, places.rewards, {})
    await asyncio.gather(engines.start(), learners.start(), rewards.start())
    stream = PromptStream(prompts, config.run.seed)
    try:
        async with collected_by_the_clock():
            await Controller(config, stream, [], engines, rewards, learners, folder).run()
    finally:
        await engines.close()
        rewards.close()
        folder.close()
    return _summary(config, folder.rows, folder.marks)


def _summary(config: Config, rows: list[dict[str, float]], marks: list[tuple[float, float, float]]) -> dict[str, Any]:
    first = max(1, round(len(marks) * WARM_UP))
    (cpu_a, real_a, virtual_a), (cpu_b, real_b, virtual_b) = marks[first - 1], marks[-1]
    steps = len(marks) - first
    groups = config.groups_per_batch * steps
    samples = groups * config.rollout.group_size
    kept = rows[first:]

    def share(kind: str, states: tuple[str, ...]) -> float:
        found = [(name, row[name]) for row in kept for name in row if name.startswith(f"time/{kind}")]
        total = sum(seconds for _, seconds in found)
        return sum(seconds for name, seconds in found if name.endswith(states)) / total if total else 0.0

    return {
        "engines": config.rollout.num_engines,
        "ranks": config.learner.num_ranks,
        "groups": groups,
        "controller_us_per_group": 1e6 * (cpu_b - cpu_a) / groups,
        "completions_per_s": samples / (real_b - real_a),
        "simulated_step_s": (virtual_b - virtual_a) / steps,
        "simulated_samples_per_s": samples / (virtual_b - virtual_a),
        "simulated_engine_busy": share("engine-", ("/generate",)),
        "simulated_learner_busy": share("learner-", ("/backward", "/gather")),
        "staleness_mean": float(np.mean([row["staleness/mean"] for row in kept])),
        "staleness_max": float(max(row["staleness/max"] for row in kept)),
    }


if __name__ == "__main__":
    sys.exit(main())
