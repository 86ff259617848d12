"""The real loop for some seconds, as a profile needs it: the controller on parts that are there, stopped when enough is seen."""

from __future__ import annotations

import asyncio
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.controller import Controller
from launch.garbage import collected_by_the_clock
from launch.parts import Parts
from launch.run_folder import RunFolder
from rollout.prompts import PromptStream
from shared.config import Config

WARMING, MEASURED_S, LEAST_STEPS = 12, 30.0, 15
"""Steps that are left out; the seconds and the steps that are measured at least."""
ENDLESS = 1_000_000
TINY_LR = 1e-12
"""The profile trains for real, but must not change what it measures."""


def undisturbed(config: Config) -> Config:
    """``config`` as a run that goes on until it is stopped, and does nothing but steps on whatever is sampled."""
    run = {"steps": ENDLESS, "sinks": [], "samples_every": 0, "checkpoint_every": 0, "trace": False}
    changes = {
        "run": config.run.model_copy(update=run),
        "rollout": config.rollout.model_copy(update={"max_engines": 0}),
        "eval": config.eval.model_copy(update={"every_steps": 0}),
        "learner": config.learner.model_copy(update={"lr": TINY_LR}),
        "algorithm": config.algorithm.model_copy(update={"zero_variance": "keep"}),
    }
    return config.model_copy(update=changes)


async def timed_loop(
    config: Config, stream: PromptStream, parts: Parts, version: int, step_s: float, seconds: float = MEASURED_S
) -> tuple[float, float]:
    """Seconds of an optimizer step, and CPU seconds of this process in it.

    ``version`` is that of the weights, ``step_s`` about what is to be expected, and ``seconds`` how long to measure.
    """
    watch = _Watch(max(LEAST_STEPS, math.ceil(seconds / (step_s * config.updates_per_batch))))
    with tempfile.TemporaryDirectory(prefix="millrace-profile-") as place:
        folder = RunFolder(config, Path(place), watch)
        controller = Controller(config, stream, [], parts.engines, parts.rewards, parts.learners, folder)
        controller.version = version
        try:
            async with collected_by_the_clock():
                await _run(controller, watch.enough)
        finally:
            folder.close()
    step_s, cpu_s = (seconds / config.updates_per_batch for seconds in watch.seconds())
    return step_s, cpu_s


async def _run(controller: Controller, enough: asyncio.Future[None]) -> None:
    run = asyncio.create_task(controller.run())
    try:
        await asyncio.wait([run, enough], return_when=asyncio.FIRST_COMPLETED)
        if run.done():  # It failed: nothing else ends it.
            run.result()
    finally:
        run.cancel()
        await asyncio.wait([run])


class _Watch:
    """Sees the steps of a run (``Screen``) until it has seen enough."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen: list[float] = []
        self._cpu: list[float] = []
        self.enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def step(self, _: int, row: dict[str, Any], __: float) -> None:
        """See ``Screen``."""
        self._seen.append(row["time/step"])
        self._cpu.append(time.process_time())
        if len(self._seen) == WARMING + self._steps and not self.enough.done():
            self.enough.set_result(None)

    def evaluated(self, *_: Any) -> None:
        """Nothing is."""

    def close(self) -> None:
        """Nothing to close."""

    def seconds(self) -> tuple[float, float]:
        """Of a batch, without the worst twentieth; and the driver's CPU seconds in it."""
        seen = sorted(self._seen[WARMING:])
        spent = self._cpu[-1] - self._cpu[WARMING - 1]
        return statistics.fmean(seen[: math.ceil(0.95 * len(seen))]), spent / len(seen)
