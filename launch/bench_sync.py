"""``millrace bench sync``: a publication of weights from the learner to a running engine, and a memory copy of the same bytes.

A real learner and a real engine; every publication is proved. The copy runs in the driver between two publications.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench_workloads import Workload, configured, make_model, make_prompts, print_table, table_of
from shared.config import Config

SHAPES = {
    1: Workload(4, 4, 16, 512, 128, 3, 4, 384),
    25: Workload(4, 4, 16, 4096, 320, 4, 4, 864),
    500: Workload(4, 4, 16, 32000, 768, 13, 12, 2304),
}
"""Megabytes in float32, roughly -> a model of that size."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    parser.add_argument(
        "--megabytes", type=int, nargs="+", choices=list(SHAPES), default=[1, 25], help="sizes of the weights"
    )
    parser.add_argument("--rounds", type=int, default=8, help="publications; the first two are left out")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="float32", help="type of the weights"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    rows = []
    for size in options.megabytes:
        with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
            folder = Path(name)
            shape = SHAPES[size]
            model, prompts = make_model(shape, folder / "model"), make_prompts(folder / "prompts.jsonl")
            config = configured(table_of(shape, model, prompts, folder, options.dtype), folder, options.set)
            rows.append(asyncio.run(_publish(config, options.rounds)))
    print_table(rows)
    return {"bench": "sync", "rows": rows}


async def _publish(config: Config, rounds: int) -> dict[str, Any]:
    """Medians over the rounds of one model."""
    from launch.cluster import check_resources, ray_session
    from launch.parts import started

    found: list[dict[str, float]] = []
    async with ray_session(config), started(config, check_resources(config, "bench")) as parts:
        canary = np.arange(4, 36, dtype=np.int32)
        for _ in range(rounds):
            began = time.monotonic()
            publication = await parts.learners.publish(canary)
            exported = time.monotonic()
            digest, sync = await asyncio.gather(parts.learners.send(publication), parts.engines.receive(publication))
            received = time.monotonic()
            proof = await parts.engines.prove(publication, digest)
            found.append(
                {
                    "learner_s": exported - began,
                    "engine_s": received - exported,
                    "pause_s": sync["sync/pause_seconds"],
                    "proof_s": proof["sync/proof_seconds"],
                    "copy_s": _copy(publication.nbytes),
                }
            )
    medians = {name: statistics.median(row[name] for row in found[2:]) for name in found[0]}
    ratio = statistics.median(row["pause_s"] / row["copy_s"] for row in found[2:])
    size = {"megabytes": publication.nbytes / 1e6, "tensors": len(publication.tensors)}
    return size | medians | {"pause_over_copy": ratio, "dtype": config.model.dtype}


def _copy(size: int) -> float:
    """Seconds of one copy of ``size`` bytes between two buffers that are already mapped."""
    source, target = np.full(size, 1, np.uint8), np.full(size, 2, np.uint8)
    started = time.monotonic()
    np.copyto(target, source)
    return time.monotonic() - started
