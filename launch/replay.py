"""``millrace replay RUN``: train again on the groups that a run has stored, and compare the weights step by step.

In which order an asynchronous run trains on its groups depends on timing. If it stored them (run.samples_every = 1), its
training can be repeated exactly, without engines and rewards. The exit code is 1 if the weights of a step differ.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.options import Options, guarded
from launch.resume import WEIGHTS
from launch.stored_groups import sample_files
from shared.config import Config
from shared.config_loader import load_config
from shared.errors import InputError, MillraceError
from shared.metrics import read_lines

if TYPE_CHECKING:
    from learner.learner_group import LearnerGroup
    from rollout.prompts import PromptStream


class Diverged(MillraceError):
    """The replayed weights are not those of the run."""


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _replay, parser())


def parser() -> Options:
    """The verb's options."""
    options = Options("replay", __doc__, "millrace replay runs/quickstart --to 20")
    options.add_argument("run", type=Path, help="run folder")
    options.add_argument("--to", type=int, help="last step to replay")
    return options


def _replay(arguments: list[str]) -> None:
    from launch.preflight import prepare

    options = parser().parse_args(arguments)
    file = options.run / "config.toml"
    files = stored_steps(options.run, options.to)
    prepared = prepare(load_config([str(file)], {}), file.name, file.parent)
    config = prepared.config
    stream = prepared.train.stream(config)
    asyncio.run(replay(config, stream, files, digests(options.run)))


def stored_steps(run: Path, last: int | None) -> dict[int, Path]:
    """Files of the run's groups by step. Raises ``InputError`` E603 if there are none, or a step is missing."""
    trained = sorted(digests(run))
    files = sample_files(run)
    wanted = [step for step in trained if last is None or step <= last]
    missing = [step for step in wanted if step not in files]
    if not wanted or missing:
        found = f"no groups of step {missing[0]}" if missing else "no trained step"
        fix = "train with run.samples_every = 1"
        raise InputError("E603", "nothing to replay", str(run / "samples"), found, "the groups of every step", fix)
    return {step: files[step] for step in wanted}


def digests(run: Path) -> dict[int, str]:
    """Digest of the published weights by step."""
    path = run / WEIGHTS
    rows = [row for _, row in read_lines(path) if row] if path.exists() else []
    return {row["step"]: str(row.get("digest", "")) for row in rows}


async def replay(config: Config, stream: PromptStream, files: dict[int, Path], expected: dict[int, str]) -> None:
    """Train on every file's groups in turn. Raises ``Diverged`` at the first step with other weights."""
    from launch.cluster import nodes, ray_session, reserve, worker_environment
    from launch.placement import Needs
    from learner.learner_group import LearnerGroup
    from shared.weights import remove_segments

    run_id = uuid.uuid4().hex[:12]
    async with ray_session(config):
        needs = Needs.of(config, any(node.count("GPU") for node in nodes()))
        reservation = await reserve(replace(needs, engines=0, colocated=False))
        learners = LearnerGroup(config, run_id, reservation.ranks, worker_environment())
        try:
            await learners.start()
            for step, file in files.items():
                await _repeat(learners, stream, step, file, expected[step])
        finally:
            remove_segments(run_id)
    print(f"{len(files)} steps replayed: the weights of every one are those of the run, bit for bit", flush=True)


async def _repeat(learners: LearnerGroup, stream: PromptStream, step: int, file: Path, expected: str) -> None:
    from launch.stored_groups import read_groups

    _, publication = await learners.train_step(read_groups(file, stream.at), np.zeros(2, np.int32))
    found = await learners.send(publication) if publication else "no update"
    if expected and found != expected:  # Not known of weights that no engine was left to take.
        raise Diverged(f"step {step}: weights {found[:16]}, the run had {expected[:16]} ({file})")


if __name__ == "__main__":
    sys.exit(main())
