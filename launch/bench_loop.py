"""``millrace bench loop``: the whole loop on a fixed workload: samples and response tokens per second, step time, goodput.

A real run in a temporary folder, read back from its ``metrics.jsonl``; the first three steps are left out. Workloads
``short``, ``tail`` and ``big`` make a random-weight Qwen2 and random prompts; or give a model and prompts of your own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

from launch import bench_learner, bench_rollout, bench_workloads
from launch.bench_workloads import (
    MAX_PROMPT_TOKENS,
    WORKLOADS,
    Workload,
    configured,
    make_groups,
    make_model,
    make_prompts,
    print_table,
    table_of,
)
from shared.config import Config
from shared.errors import InputError
from shared.metrics import read_metrics

WARM_UP_STEPS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    bench_workloads.add_options(parser)
    parser.add_argument("--model", help="a model of your own, with --prompts")
    parser.add_argument("--prompts", help="JSON lines")
    parser.add_argument("--prompt-column", default="prompt", help="column of the rows with the prompt")
    parser.add_argument("--reward", default="length", help="built-in name, pkg.module:function or file.py:function")
    parser.add_argument("--lr", type=float, default=1e-6, help="learning rate")
    parser.add_argument("--kl-coef", type=float, default=0.001, help="weight of the KL term")
    parser.add_argument("--prompts-per-step", type=int, help="groups in an optimizer step")
    parser.add_argument("--group-size", type=int, help="completions a group")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion")
    parser.add_argument("--max-prompt-tokens", type=int, default=MAX_PROMPT_TOKENS, help="longest prompt")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--max-staleness", type=int, default=4, help="bound on the age of weights, in steps")
    parser.add_argument("--ceilings", action="store_true", help="measure rollouts alone and learning alone too")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, print the table, and return it. Raises ``InputError`` for settings that do not fit."""
    from launch.run import train

    if options.steps <= WARM_UP_STEPS:
        found, expected = str(options.steps), f"> {WARM_UP_STEPS} (the first {WARM_UP_STEPS} are left out)"
        raise InputError("E102", "bad value", "command line:--steps", found, expected, "--steps 40")
    if bool(options.model) != bool(options.prompts):
        found = "--model" if options.model else "--prompts"
        raise InputError("E108", "options disagree", "command line", f"{found} alone", "both or none", "add the other")
    if options.model and options.ceilings:
        expected, fix = "a workload of ours", "--shape, or no --ceilings"
        raise InputError("E108", "options disagree", "command line", "--ceilings with --model", expected, fix)
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
        place = Path(folder)
        config = _config(options, place)
        train(config, place / "bench.toml")
        result = summary(read_metrics(Path(config.run.output_dir)), config, options.model or options.shape)
        if options.ceilings:
            result |= ceilings(config, WORKLOADS[options.shape], result["step_s_median"])
    print_table([result])
    return result


def ceilings(config: Config, shape: Workload, step_s: float) -> dict[str, float]:
    """A step of rollouts alone and of learning alone, under the run's own threads; the larger bounds the loop."""
    groups = 8 * shape.prompts_per_step
    rates, _ = asyncio.run(bench_rollout.alternate(config, 4, groups, with_raw=False))
    lengths = [sum(len(c.token_ids) for g in make_groups(shape, i) for c in g.completions) for i in range(20)]
    rollouts = statistics.fmean(lengths) / statistics.median(rates)
    learning = statistics.median(bench_learner.alternate(config, shape, 8, ["ours"])["ours"])
    limit = max(rollouts, learning)
    return {"rollouts_alone_s": rollouts, "learning_alone_s": learning, "step_over_limit": step_s / limit}


def summary(rows: list[dict[str, Any]], config: Config, workload: str) -> dict[str, Any]:
    """The figures of a run's steps after the warm-up."""
    steps = [row for row in rows if "time/step" in row][WARM_UP_STEPS:]
    seconds = sum(row["time/step"] for row in steps)
    samples = config.groups_per_batch * config.rollout.group_size * len(steps)
    tokens = sum(row["completions/mean_length"] for row in steps) * samples / len(steps)
    return {
        "system": "millrace",
        "workload": workload,
        "steps": len(steps),
        "samples_per_s": samples / seconds,
        "response_tokens_per_s": tokens / seconds,
        "mean_len": tokens / samples,
        "step_s_median": statistics.median(row["time/step"] for row in steps),
        "goodput": sum(row["goodput"] * row["time/step"] for row in steps) / seconds,
        "staleness_mean": statistics.fmean(row["staleness/mean"] for row in steps),
        "staleness_max": max(row["staleness/max"] for row in steps),
        "sync_pause_s_median": statistics.median(row["sync/pause_seconds"] for row in steps),
        "canary_gap_max": max(row["sync/canary_gap"] for row in steps),
        "train_s_mean": statistics.fmean(row.get("time/controller/train", 0.0) for row in steps),
        "wait_for_groups_s_mean": statistics.fmean(row.get("time/controller/wait_for_groups", 0.0) for row in steps),
        "dtype": config.model.dtype,
    }


def _config(options: argparse.Namespace, folder: Path) -> Config:
    """The run's configuration; the model and the prompts are made in ``folder`` unless they are given."""
    shape = WORKLOADS[options.shape]
    model, prompts = options.model, options.prompts
    if model is None:
        model, prompts = make_model(shape, folder / "model"), make_prompts(folder / "prompts.jsonl")
    source, colon, attribute = options.reward.rpartition(":")
    reward = f"{Path(source).resolve()}:{attribute}" if colon and source.endswith(".py") else options.reward
    new = options.max_new_tokens or shape.max_new_tokens
    table = table_of(shape, Path(model), Path(prompts).resolve(), folder, options.dtype)
    table["run"]["steps"] = options.steps
    table["data"]["prompt_column"] = options.prompt_column
    table["rollout"] |= {
        "group_size": options.group_size or shape.group_size,
        "max_prompt_tokens": options.max_prompt_tokens,
        "max_new_tokens": new,
        "max_staleness": options.max_staleness,
    }
    table["reward"]["functions"] = [{"function": reward}]
    table["algorithm"]["kl"]["coef"] = options.kl_coef
    table["learner"] |= {
        "prompts_per_step": options.prompts_per_step or shape.prompts_per_step,
        "lr": options.lr,
        "max_tokens_per_microbatch": max(8192, options.max_prompt_tokens + new),
    }
    return configured(table, folder, options.set)
