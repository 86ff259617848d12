"""``make plan-check``: the planner's step times against real loops on this machine, and against the simulator.

For two length distributions: a profile; then, for every split to be predicted, its parts and those of the two splits that a
profile runs itself are brought up side by side, and the three loops run some seconds each, in turns. The planner is calibrated
by the latter two, as in a profile, so that a machine whose speed changes from minute to minute cannot pass for an error of
the planner. At last the timings at 1,000 engines in the simulator. Prints the tables of the README; exits 1 above the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch import simulate  # noqa: E402
from launch.bench_workloads import WORKLOADS, make_model, make_prompts, print_table, table_of  # noqa: E402
from launch.cluster import check_resources, ray_session  # noqa: E402
from launch.parts import started  # noqa: E402
from launch.plan_model import as_split, calibrated, predict  # noqa: E402
from launch.preflight import prepare  # noqa: E402
from launch.profile import Measurement, profile  # noqa: E402
from launch.profile_loop import undisturbed  # noqa: E402
from launch.timings import Timings  # noqa: E402
from rollout.prompts import PromptStream  # noqa: E402
from shared.config import Config  # noqa: E402

PROFILED, PREDICTED = [(1, 1), (1, 2)], ["2:1", "2:2", "3:1"]
"""Engines and ranks of the splits that a profile runs itself, and of others."""
RUN_LIMIT, SIMULATION_LIMIT = 0.15, 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["short", "tail"], choices=list(WORKLOADS))
    parser.add_argument("--splits", nargs="*", default=PREDICTED, help="engines:ranks; none: the simulator only")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a loop, about; its first steps are left out")
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    rows, simulated = list[dict[str, Any]](), list[dict[str, Any]]()
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(prefix="millrace-plan-") as name:
            config, stream = _prepared(shape, Path(name), options)
            timings = asyncio.run(profile(config, stream, "plan.toml"))
            print(shape, replace(timings, lengths=()), flush=True)
            for split in options.splits:
                engines, ranks = map(int, split.split(":"))
                rows.append(asyncio.run(_measure(shape, config, stream, timings, (engines, ranks), options)))
        simulated += [_simulate(shape, config, timings, staleness) for staleness in (0, 2)]
    if rows:
        print_table(rows)
    print_table(simulated)
    off = max((abs(row["off"]) for row in rows), default=0.0), max(abs(row["off"]) for row in simulated)
    print(
        f"largest: {off[0]:.1%} of real runs (limit {RUN_LIMIT:.0%}), {off[1]:.1%} of the simulator ({SIMULATION_LIMIT:.0%})"
    )
    return int(off[0] > RUN_LIMIT or off[1] > SIMULATION_LIMIT)


def _prepared(shape: str, folder: Path, options: argparse.Namespace) -> tuple[Config, PromptStream]:
    workload = WORKLOADS[shape]
    table = table_of(workload, make_model(workload, folder / "model"), make_prompts(folder / "p.jsonl"), folder, "auto")
    table["rollout"]["max_staleness"] = options.max_staleness
    prepared = prepare(Config.model_validate(table), "plan.toml", folder, probing=False)
    return prepared.config, PromptStream(prepared.train.prompts, 0)


async def _measure(
    shape: str,
    config: Config,
    stream: PromptStream,
    timings: Timings,
    predicted: tuple[int, int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The split's row, after turns of its loop and of the two that a profile runs; printed after each turn."""
    splits = [*PROFILED, predicted]
    configs = {split: undisturbed(as_split(config, *split, options.max_staleness)) for split in splits}
    all_of_them = as_split(config, sum(e for e, _ in splits), sum(r for _, r in splits), options.max_staleness)
    workers = config.reward.model_copy(update={"workers": len(splits) * config.reward.workers})
    measured: dict[tuple[int, int], list[float]] = {split: [] for split in splits}
    async with ray_session(all_of_them.model_copy(update={"reward": workers})), contextlib.AsyncExitStack() as stack:
        parts = {}
        for split, changed in configs.items():
            parts[split] = await stack.enter_async_context(started(changed, check_resources(changed, "plan.toml")))
        for turn in range(options.turns):
            for split in splits if turn % 2 else reversed(splits):
                loop = Measurement(configs[split], stream, parts[split]).loop
                guess = predict(config, timings, *split).step_s
                measured[split].append((await loop(guess, options.seconds))[0])
            print(f"turn {turn}: { {split: round(seconds[-1], 4) for split, seconds in measured.items()} }")
            print_table([row := _compare(shape, config, timings, measured, predicted)])
    return row


def _compare(
    shape: str, config: Config, timings: Timings, measured: dict[tuple[int, int], list[float]], split: tuple[int, int]
) -> dict[str, Any]:
    """``profile_off`` is what the profile said minutes before, ``off`` at the machine's speed of these turns."""
    seconds, then = {split: statistics.median(found) for split, found in measured.items()}, timings
    for profiled in PROFILED:
        timings = calibrated(config, timings, *profiled, seconds[profiled])
    row = _row(shape, config, timings, split, seconds[split])
    profiled_s = {f"{engines} : {ranks}": seconds[engines, ranks] for engines, ranks in PROFILED}
    return row | profiled_s | {"profile_off": predict(config, then, *split).step_s / seconds[split] - 1}


def _simulate(shape: str, config: Config, timings: Timings, staleness: int) -> dict:
    """1,000 engines with devices of their own, and ranks to match."""
    timings = replace(timings, cores=0, together=1.0, ranks_together=0.0)
    prompts, engines = 4000, 1000
    changed = config.model_copy(
        update={
            "run": config.run.model_copy(update={"steps": 8, "samples_every": 0}),
            "rollout": config.rollout.model_copy(update={"num_engines": engines, "max_staleness": staleness}),
            "learner": config.learner.model_copy(update={"num_ranks": 1000, "prompts_per_step": prompts}),
            "reward": config.reward.model_copy(update={"workers": 200}),
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        result = simulate.simulate(changed, timings)
    return _row(shape, changed, timings, (engines, 1000), result["simulated_step_s"])


def _row(shape: str, config: Config, timings: Timings, split: tuple[int, int], measured: float) -> dict[str, Any]:
    found = predict(config, timings, *split)
    return {
        "lengths": shape,
        "engines : ranks": f"{split[0]} : {split[1]}",
        "max_staleness": config.rollout.max_staleness,
        "predicted_s": found.step_s,
        "measured_s": measured,
        "off": found.step_s / measured - 1,
        "bound": found.bound,
    }


if __name__ == "__main__":
    sys.exit(main())
