"""``millrace bench rewards``: how fast the reward pool scores, alone and with calls that hang or crash.

Each row is measured on the real pool of Ray actors. The limit beside it is arithmetic: what the same workers could
do if a good call cost only its own time and a hanging one only its deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import Config
from shared.errors import GroupFailed
from shared.types import Completion, Prompt

CHEAP = """
import os, time
def cheap(completions, mode, **kwargs):
    if mode[0] == "hang":
        time.sleep(1000)
    if mode[0] == "crash":
        os._exit(3)
    return [float(len(c)) for c in completions]
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    parser.add_argument("--completions", type=int, default=10000, help="completions in all")
    parser.add_argument("--group-size", type=int, default=8, help="completions a group")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="reward workers, one row each")
    parser.add_argument("--groups-per-call", type=int, default=8, help="most groups that one call scores")
    parser.add_argument("--hang", type=float, default=0.05, help="share of groups whose call hangs")
    parser.add_argument("--crash", type=float, default=0.05, help="share of groups whose call kills its process")
    parser.add_argument("--timeout-s", type=float, default=0.5, help="deadline of a call in the faulty rows")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    rows = asyncio.run(bench_rewards(options))
    print("| workers | isolation | faults | completions/s | ms a completion | limit | of the limit | dropped |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        of_limit = "" if row["of_limit"] is None else f"{row['of_limit']:.2f}"
        limit = "" if row["limit_per_s"] is None else f"{row['limit_per_s']:,.0f}"
        print(
            f"| {row['workers']} | {row['isolation']} | {row['faults']} | {row['completions_per_s']:,.0f} | "
            f"{row['ms_per_completion']:.3f} | {limit} | {of_limit} | {row['dropped']} of {row['groups']} |"
        )
    return {"bench": "rewards", "rows": rows}


async def bench_rewards(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of workers, isolation and fault mix."""
    from launch.cluster import connect, disconnect

    rows = []
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
        source = Path(folder) / "bench_reward.py"
        source.write_text(CHEAP, encoding="utf-8")
        connect(_config(source, 1, options, "actor", 10.0, 1))
        try:
            for workers in options.workers:
                rows += await _rows(source, workers, options)
        finally:
            disconnect()
    return rows


async def _rows(source: Path, workers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table's rows for one number of workers."""
    rows = []
    for isolation in ("actor", "subprocess"):
        config = _config(source, workers, options, isolation, 10.0, options.groups_per_call)
        clean, _ = await _run(config, options, [])
        rows.append(_row(workers, isolation, "none", clean, options, None, 0))
    modes = _modes(options)
    config = _config(source, workers, options, "subprocess", options.timeout_s, 1)
    single, _ = await _run(config, options, [])
    seconds, dropped = await _run(config, options, modes)
    least = single + modes.count("hang") * options.timeout_s / workers
    faults = f"{options.hang:.0%} hang, {options.crash:.0%} crash"
    rows.append(_row(workers, "subprocess", faults, seconds, options, least, dropped))
    expected = sum(mode != "good" for mode in modes)
    assert dropped == expected, f"{dropped} groups dropped, {expected} were faulty"
    return rows


def _config(
    source: Path, workers: int, options: argparse.Namespace, isolation: str, timeout_s: float, calls: int
) -> Config:
    function = {"function": f"{source}:cheap", "isolation": isolation}
    reward = {
        "functions": [function],
        "workers": workers,
        "timeout_s": timeout_s,
        "retries": 0,
        "groups_per_call": calls,
    }
    rollout = {"group_size": options.group_size}
    return Config.model_validate(
        {"model": {"path": "unused"}, "data": {"train": "unused"}, "reward": reward, "rollout": rollout}
    )


def _modes(options: argparse.Namespace) -> list[str]:
    """``good``, ``hang`` or ``crash`` for every group, in a fixed random order."""
    groups = options.completions // options.group_size
    hang, crash = round(groups * options.hang), round(groups * options.crash)
    modes = ["hang"] * hang + ["crash"] * crash + ["good"] * (groups - hang - crash)
    return [modes[i] for i in np.random.default_rng(0).permutation(groups)]


async def _run(config: Config, options: argparse.Namespace, modes: list[str]) -> tuple[float, int]:
    """Seconds to score every group, and how many were dropped; every good one must have its values."""
    from launch.cluster import worker_environment
    from launch.ray_actors import RaySlot
    from rollout.reward_pool import RewardPool

    pool = RewardPool(config, [RaySlot({})] * config.reward.workers, worker_environment())
    groups = options.completions // options.group_size
    ids = np.arange(20, dtype=np.int32)
    answers = tuple(Completion(ids, np.zeros(20, np.float32), "x" * (i + 1), "stop") for i in range(options.group_size))
    expected = np.arange(1, options.group_size + 1, dtype=np.float32)

    async def one(i: int) -> int:
        prompt = Prompt(i, ids, f"prompt {i}", {"mode": modes[i] if modes else "good"})
        try:
            scores = await pool.score(i, prompt, answers)
        except GroupFailed:
            return 1
        assert np.array_equal(scores.parts["cheap"], expected), "a group got somebody else's rewards"
        return 0

    try:
        await pool.start()
        await one(0) if not modes else None
        started = time.monotonic()
        dropped = sum(await asyncio.gather(*(one(i) for i in range(groups))))
        return time.monotonic() - started, dropped
    finally:
        pool.close()


def _row(
    workers: int,
    isolation: str,
    faults: str,
    seconds: float,
    options: argparse.Namespace,
    least: float | None,
    dropped: int,
) -> dict[str, Any]:
    count = options.completions
    return {
        "workers": workers,
        "isolation": isolation,
        "faults": faults,
        "completions_per_s": count / seconds,
        "ms_per_completion": 1e3 * seconds * workers / count,
        "limit_per_s": None if least is None else count / least,
        "of_limit": None if least is None else least / seconds,
        "dropped": dropped,
        "groups": count // options.group_size,
    }
