"""``make plan-check``: the planner's step times against real runs on this machine, and against the simulator.

For two length distributions, in turns: a profile, then real runs at four splits of engines and learner ranks; after the last
profile its timings at 1,000 engines in the simulator. What is compared is the median over the rounds, for machines differ from
one minute to the next. Prints the tables of the README; exits 1 above the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch import simulate  # noqa: E402
from launch.bench_workloads import WORKLOADS, make_model, make_prompts, print_table, table_of  # noqa: E402
from launch.plan_model import predict  # noqa: E402
from launch.timings import Timings  # noqa: E402
from shared.config import Config  # noqa: E402
from shared.metrics import read_metrics  # noqa: E402

SPLITS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""The profile has run those with one engine itself."""
RUN_LIMIT, SIMULATION_LIMIT = 0.15, 0.10
WARMING = 12
"""Steps of a real run that are left out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["short", "tail"], choices=list(WORKLOADS))
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="of a real run, about; its first steps are left out"
    )
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows, simulated = [], []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(prefix="millrace-plan-") as name:
            config = _config(shape, Path(name), options)
            rounds = []
            for _ in range(options.rounds):
                timings = _profile(config, Path(name))
                print(shape, replace(timings, lengths=()), flush=True)
                rounds.append([_compare(shape, config, timings, split, options.seconds) for split in SPLITS])
                print_table(rounds[-1])
            rows += [_median(list(same)) for same in zip(*rounds)]
        simulated += [_simulate(shape, config, timings, staleness) for staleness in (0, 2)]
    print_table(rows)
    print_table(simulated)
    off = max(abs(row["off"]) for row in rows), max(abs(row["off"]) for row in simulated)
    print(
        f"largest: {off[0]:.1%} of real runs (limit {RUN_LIMIT:.0%}), {off[1]:.1%} of the simulator ({SIMULATION_LIMIT:.0%})"
    )
    return int(off[0] > RUN_LIMIT or off[1] > SIMULATION_LIMIT)


def _config(shape: str, folder: Path, options: argparse.Namespace) -> Config:
    workload = WORKLOADS[shape]
    table = table_of(workload, make_model(workload, folder / "model"), make_prompts(folder / "p.jsonl"), folder, "auto")
    table["run"] |= {"checkpoint_every": 0}
    table["rollout"]["max_staleness"] = options.max_staleness
    return Config.model_validate(table)


def _profile(config: Config, folder: Path) -> Timings:
    from launch.preflight import prepare
    from launch.profile import profile
    from rollout.prompts import PromptStream

    prepared = prepare(config, "plan.toml", folder, probing=False)
    return asyncio.run(profile(prepared.config, PromptStream(prepared.train.prompts, 0), "plan.toml"))


def _compare(shape: str, config: Config, timings: Timings, split: tuple[int, int], seconds: float) -> dict:
    from launch.run import train

    engines, ranks = split
    output, found = Path(config.run.output_dir), predict(config, timings, engines, ranks)
    steps = WARMING + math.ceil(seconds / found.step_s)
    changed = config.model_copy(
        update={
            "run": config.run.model_copy(update={"steps": steps, "resume": "overwrite"}),
            "rollout": config.rollout.model_copy(update={"num_engines": engines}),
            "learner": config.learner.model_copy(update={"num_ranks": ranks}),
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(changed, output.parent / "plan.toml")
    took = [row["time/step"] for row in read_metrics(output) if "time/step" in row][WARMING:]
    measured = statistics.fmean(sorted(took)[: round(0.95 * len(took))])  # Without the machine's own hiccups.
    return _row(shape, f"{engines} : {ranks}", config.rollout.max_staleness, found.step_s, measured) | {
        "bound": found.bound
    }


def _median(rows: list[dict]) -> dict:
    """One split over all rounds."""
    predicted, measured = (statistics.median(row[name] for row in rows) for name in ("predicted_s", "measured_s"))
    spread = max(abs(row["off"]) for row in rows)
    return rows[-1] | {
        "predicted_s": predicted,
        "measured_s": measured,
        "off": predicted / measured - 1,
        "worst": spread,
    }


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
    found = predict(changed, timings, engines, 1000)
    return _row(shape, "1000 : 1000", staleness, found.step_s, result["simulated_step_s"]) | {"bound": found.bound}


def _row(shape: str, split: str, staleness: int, predicted: float, measured: float) -> dict:
    return {
        "lengths": shape,
        "engines : ranks": split,
        "max_staleness": staleness,
        "predicted_s": predicted,
        "measured_s": measured,
        "off": predicted / measured - 1,
    }


if __name__ == "__main__":
    sys.exit(main())
