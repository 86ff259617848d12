"""``millrace bench check``: measure the ratios to the ceilings again and hold them against the stored ones.

Ratios within one run travel between machines; absolute numbers do not. ``make bench-check`` runs it; ``--store``
writes what was found as the new measure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launch import bench_learner, bench_rollout
from launch.bench_workloads import print_table
from shared.errors import InputError

STORED = Path(__file__).parent / "bench_ratios.json"
MEASURES: dict[str, tuple[Any, list[str], str]] = {
    "rollout short, of raw vLLM": (bench_rollout, ["--shape", "short"], "of_raw"),
    "learner short, of a bare loop": (bench_learner, ["--shape", "short"], "of_bare"),
    "learner tail, of a bare loop": (bench_learner, ["--shape", "tail"], "of_bare"),
    "learner tail, over the padded form": (bench_learner, ["--shape", "tail", "--padded"], "over_padded"),
}
"""Name -> module of the bench, its options, and the ratio in its result; larger is better."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    parser.add_argument("--tolerance", type=float, default=0.15, help="share by which a ratio may be lower")
    parser.add_argument("--store", action="store_true", help="make what is found the new measure")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, compare, print the table. Raises ``InputError`` E109 if a ratio fell."""
    found = {name: _measure(*measure) for name, measure in MEASURES.items()}
    if options.store:
        STORED.write_text(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1) + "\n")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    print_table([{"ratio": name, "found": value, "stored": stored[name]} for name, value in found.items()])
    if fallen := fell(found, stored, options.tolerance):
        expected = f"within {options.tolerance:.0%} of the stored ratio"
        raise InputError(
            "E109",
            "slower than before",
            str(STORED.name),
            "; ".join(fallen),
            expected,
            "find what slowed it, or --store",
        )
    return {"bench": "check", "ratios": found}


def fell(found: dict[str, float], stored: dict[str, float], tolerance: float) -> list[str]:
    """A line for every ratio that is lower than it may be."""
    return [
        f"{name}: {value:.3f}, was {stored[name]:.3f}"
        for name, value in found.items()
        if value < stored[name] * (1 - tolerance)
    ]


def _measure(module: Any, arguments: list[str], ratio: str) -> float:
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    value: float = module.run(parser.parse_args(arguments))[ratio]
    return value
