"""The steady state of a run of so many engines and ranks: step time, rates, idle shares; and the splits of some devices.

A step at a given speed is that of ``launch/step_model.py``. On shared cores everybody is slower, by the factor at which all
CPU time fits into ``cores`` times the step: then more batches overlap, and engines need fewer decoding steps for the same
tokens. The parts are timed one by one; ``together`` is how much longer all takes in a real loop, where ``calibrated`` finds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launch.step_model import first, running, state_at
from launch.timings import Lengths, Timings
from shared.config import Config
from shared.errors import InputError

SLOWEST, SHARED_MUCH = 64.0, 1.02
"""On shared cores: how much slower everybody may be, and from where on the cores are what a step waits for."""
QUICKEST, CALIBRATIONS = 0.25, 24
"""The least ``together`` that a calibration finds, and its bisections."""


@dataclass(frozen=True)
class Prediction:
    """One split of the devices."""

    engines: int
    ranks: int
    staleness: int
    step_s: float
    samples_per_s: float
    tokens_per_s: float
    """Of completions."""
    engine_idle: float
    learner_idle: float
    """Shares of the step."""
    running: float
    """Sequences alive in an engine on average (Little's law)."""
    bound: str
    """What the step waits for: engines, learner, latency, rewards, cores."""


def as_split(config: Config, engines: int, ranks: int, staleness: int) -> Config:
    """``config`` with these numbers: the room of an engine, for one, follows from them."""
    rollout = {"num_engines": engines, "max_staleness": staleness}
    changes = {
        "rollout": config.rollout.model_copy(update=rollout),
        "learner": config.learner.model_copy(update={"num_ranks": ranks}),
    }
    return config.model_copy(update=changes)


def check_devices(config: Config, origin: str) -> None:
    """Raises ``InputError`` E108 for a run whose engines and ranks share their GPUs: it is not reckoned with here."""
    if config.rollout.colocate:
        expected = "false: engines and ranks are planned on devices of their own"
        fix = "rollout.colocate = false; to know what sharing gives, run both for a few steps"
        raise InputError("E108", "cannot be planned", f"{origin}:rollout.colocate", "true", expected, fix)


def predict(config: Config, timings: Timings, engines: int, ranks: int, staleness: int | None = None) -> Prediction:
    """The steady state of a run of ``config`` with so many ``engines`` and ``ranks``."""
    if staleness is None:
        staleness = config.rollout.max_staleness
    config = as_split(config, engines, ranks, staleness)
    together = timings.ranks_together if ranks > 1 and timings.ranks_together else timings.together
    lengths, ahead, slower, split = Lengths(timings), staleness // config.updates_per_batch, together, (engines, ranks)
    if timings.cores and ahead:

        def fits(slower: float) -> bool:
            state = state_at(config, timings, lengths, split, ahead, (slower, slower))
            work = engines * state.busy + ranks * state.step.train
            return work / slower * together + timings.control_s <= timings.cores * state.seconds

        slower = first(fits, SLOWEST * together, together)
    pace = slower, slower
    if timings.cores and not ahead:  # Engines and learner take turns.
        pace = max(engines / timings.cores, 1.0) * together, max(ranks / timings.cores, 1.0) * together
    seconds, busy, step, bound = state_at(config, timings, lengths, split, ahead, pace)
    if slower > SHARED_MUCH * together:
        bound = "cores"
    samples = config.groups_per_batch * config.rollout.group_size
    return Prediction(
        engines=engines,
        ranks=ranks,
        staleness=staleness,
        step_s=seconds / config.updates_per_batch,
        samples_per_s=samples / seconds,
        tokens_per_s=samples * lengths.mean / seconds,
        engine_idle=1 - busy / seconds,
        learner_idle=1 - min(step.train / seconds, 1.0),
        running=running(timings, step, lengths, seconds),
        bound=bound,
    )


def calibrated(config: Config, timings: Timings, engines: int, ranks: int, step_s: float) -> Timings:
    """``timings`` with the ``together`` by which a real loop's ``step_s`` seconds are what is predicted for its split."""

    def at(together: float) -> Timings:
        return replace(timings, ranks_together=together) if ranks > 1 else replace(timings, together=together)

    def reaches(together: float) -> bool:
        return predict(config, at(together), engines, ranks).step_s >= step_s

    return at(first(reaches, SLOWEST, QUICKEST, CALIBRATIONS))


def shares(config: Config, devices: int) -> list[tuple[int, int]]:
    """Every way to share all ``devices``: engines, and a number of ranks that divides the step's completions."""
    width, completions = config.rollout.workers_per_engine, config.completions_per_step
    ranks = [r for r in range(min(devices - width, completions), 0, -1) if completions % r == 0]
    return [((devices - r) // width, r) for r in ranks if (devices - r) % width == 0]


def splits(config: Config, timings: Timings, devices: int) -> list[Prediction]:
    """What every share of ``devices`` gives, the fastest first."""
    found = [predict(config, timings, engines, ranks) for engines, ranks in shares(config, devices)]
    return sorted(found, key=lambda p: -p.samples_per_s)


def staleness_needed(config: Config, timings: Timings, engines: int, ranks: int, share: float = 0.95) -> int:
    """The smallest ``max_staleness`` that gives ``share`` of what an unbounded one would."""
    every = config.updates_per_batch
    rates = [predict(config, timings, engines, ranks, s * every).samples_per_s for s in range(33)]
    return next(s for s, rate in enumerate(rates) if rate >= share * max(rates)) * every
