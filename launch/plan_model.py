"""The step time of a run from what its parts take: the arithmetic behind ``millrace plan``.

Engines decode their running sequences in lock step, at ``decode_step_s + k decode_sequence_s`` seconds a token. A batch is
admitted whenever one is published, ``ahead + 1`` of them overlap, and each must have all its completions before it can be
trained: with a step of ``T`` seconds,

    (ahead + 1) T = time until its longest completion is done + scoring + training + delivery.            (latency)

In a periodic state every sequence gains ``v`` tokens a step, and the sequences alive are those of the last batches:

    T = prefill + pause + decode_step_s v + decode_sequence_s n E[min(L, (ahead + 1) v)],                 (engines)

with ``n`` sequences a step and engine and ``L`` the length of a completion. The two equations fix ``v`` and ``T``. The
learner needs ``T >= train + publish``. On shared cores everybody is slower, by the factor at which all CPU time fits
into ``cores T``: then more batches overlap, and engines need fewer decoding steps for the same tokens. Where an engine has
no room for all sequences, some wait: decoding takes at least ``n E[L] / places`` steps, and a batch's last completion is late.
The parts are timed one by one; ``together`` is how much longer all takes in a real loop, where ``calibrated`` finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from launch.timings import BISECTIONS, Lengths, Timings
from shared.config import Config
from shared.errors import InputError

POINTS = 64
SLOWEST, SHARED_MUCH = 64.0, 1.02
"""On shared cores: how much slower everybody may be, and from where on the cores are what a step waits for."""
QUICKEST, CALIBRATIONS = 0.25, 24
"""The least ``together`` that a calibration finds, and its bisections."""
ENGINES_BOUND = 0.75
"""Share of their time that engines work, above which they and not the way round are what a step waits for."""


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


@dataclass(frozen=True)
class _Step:
    """The seconds of one step's parts, per engine or rank."""

    ahead: int
    per_engine: float
    """Sequences a step and engine."""
    places: int
    """Sequences that run in an engine at the same time."""
    longest: float
    """Decoding steps until the last completion of a batch that is alone in the engines."""
    decoding: float
    """Decoding steps that an engine makes at least."""
    fixed: float
    """Prefill and requests, per engine."""
    pause: float
    train: float
    """The learner's whole step, publication included."""
    after: float
    """From the last token to the release of the slots, beside training: scoring and delivery."""


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
            state = _at(config, timings, lengths, split, ahead, (slower, slower))
            work = engines * state.busy + ranks * state.step.train
            return work / slower * together + timings.control_s <= timings.cores * state.seconds

        slower = _first(fits, SLOWEST * together, together)
    pace = slower, slower
    if timings.cores and not ahead:  # Engines and learner take turns.
        pace = max(engines / timings.cores, 1.0) * together, max(ranks / timings.cores, 1.0) * together
    seconds, busy, step, bound = _at(config, timings, lengths, split, ahead, pace)
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
        running=_running(timings, step, lengths, seconds),
        bound=bound,
    )


def calibrated(config: Config, timings: Timings, engines: int, ranks: int, step_s: float) -> Timings:
    """``timings`` with the ``together`` by which a real loop's ``step_s`` seconds are what is predicted for its split."""

    def at(together: float) -> Timings:
        return replace(timings, ranks_together=together) if ranks > 1 else replace(timings, together=together)

    def reaches(together: float) -> bool:
        return predict(config, at(together), engines, ranks).step_s >= step_s

    return at(_first(reaches, SLOWEST, QUICKEST, CALIBRATIONS))


class _State(NamedTuple):
    """A step at a certain speed of everybody."""

    seconds: float
    busy: float
    """Of an engine."""
    step: _Step
    bound: str


def _at(
    config: Config, timings: Timings, lengths: Lengths, split: tuple[int, int], ahead: int, slower: tuple[float, float]
) -> _State:
    """When ``slower`` is how many times as long engines and learner take for everything."""
    of_engines, of_learner = slower
    slow = replace(
        timings,
        decode_step_s=timings.decode_step_s * of_engines,
        decode_sequence_s=timings.decode_sequence_s * of_engines,
        request_s=timings.request_s * of_engines,
        prefill_token_s=timings.prefill_token_s * of_engines,
    )
    step = _step(config, slow, lengths, split, ahead)
    step = replace(step, train=step.train * of_learner)
    limits = {
        "latency": _periodic(slow, step, lengths),
        "learner": step.train,
        "rewards": config.groups_per_batch * timings.score_s / config.reward.workers,
        "engines": _crowded(slow, step, lengths),
    }
    bound = max(limits, key=lambda name: limits[name])
    seconds = limits[bound]
    busy = _busy(slow, step, lengths, seconds)
    if bound == "latency" and busy > ENGINES_BOUND * seconds:
        bound = "engines"
    return _State(seconds, busy, step, bound)


def _step(config: Config, timings: Timings, lengths: Lengths, split: tuple[int, int], ahead: int) -> _Step:
    engines, ranks = split
    groups = config.groups_per_batch
    samples, places = groups * config.rollout.group_size, timings.places(config.max_num_seqs)
    tokens = samples * lengths.mean + groups * timings.prompt_tokens
    updates, epochs = config.updates_per_batch, config.learner.epochs_per_batch
    fixed_step = timings.train_step_s + (timings.ranks_s if ranks > 1 else 0.0)
    each = samples / engines
    return _Step(
        ahead=ahead,
        per_engine=each,
        places=places,
        longest=_makespan(lengths, samples, engines, places),
        decoding=_makespan(lengths, each, 1, places) if ahead == 0 else each * lengths.mean / places,
        fixed=groups / engines * (timings.request_s + timings.prefill_token_s * timings.prompt_tokens),
        pause=timings.pause_s,
        train=updates * fixed_step + epochs * timings.train_token_s * tokens / ranks + timings.publish_s,
        after=timings.score_s + timings.prepare_s + timings.pause_s,
    )


def _makespan(lengths: Lengths, samples: float, engines: int, places: int) -> float:
    """Decoding steps until the last of ``samples`` is done: those that wait begin when one ends, the last run out alone."""
    longest, each = lengths.longest(samples), samples / engines
    if each <= places:
        return longest
    begun = (each / places - 1) * lengths.mean
    return max(longest, each / places * lengths.mean, begun + lengths.longest_left(places * engines))


def _crowded(timings: Timings, step: _Step, lengths: Lengths) -> float:
    """Seconds that an engine needs for a step's sequences with its every place taken."""
    decoding = timings.decode_s(step.places) * step.per_engine * lengths.mean / step.places
    return step.fixed + step.pause + decoding


def _period(timings: Timings, step: _Step, lengths: Lengths, gained: float) -> float:
    """Seconds in which an engine takes a step's prompts and every sequence gains so many tokens."""
    alive = step.per_engine * lengths.capped((step.ahead + 1) * gained)
    return step.fixed + step.pause + timings.decode_step_s * gained + timings.decode_sequence_s * alive


def _until_done(timings: Timings, step: _Step, lengths: Lengths, gained: float) -> float:
    """Seconds from a batch's admission to its last token, past the admissions of later ones."""
    whole = int(step.longest / gained)
    over = step.longest - whole * gained
    alive = sum(lengths.capped(j * gained + over) - lengths.capped(j * gained) for j in range(step.ahead + 1))
    partial = timings.decode_step_s * over + timings.decode_sequence_s * step.per_engine * alive
    return whole * _period(timings, step, lengths, gained) + step.fixed + partial


def _periodic(timings: Timings, step: _Step, lengths: Lengths) -> float:
    """The step's seconds by the two equations, the learner never in the way."""
    rest, batches = step.after + step.train, step.ahead + 1
    # Each batch alone in the engines, which then wait for the learner.
    alone = step.fixed + timings.decode_step_s * step.longest
    alone += timings.decode_sequence_s * step.per_engine * lengths.mean
    if batches * (alone + step.pause) <= alone + rest:
        return (alone + rest) / batches

    def early(gained: float) -> bool:
        return batches * _period(timings, step, lengths, gained) > _until_done(timings, step, lengths, gained) + rest

    return _period(timings, step, lengths, _first(early, step.longest))


def _busy(timings: Timings, step: _Step, lengths: Lengths, seconds: float) -> float:
    """Seconds of a step in which an engine has something to do."""
    gained = _first(lambda v: _period(timings, step, lengths, v) > seconds, step.longest)
    points = gained * (np.arange(POINTS) + 0.5) / POINTS
    idle = [
        np.prod([lengths.done(point + j * gained) ** step.per_engine for j in range(step.ahead + 1)])
        for point in points
    ]
    decoding = max(gained * (1 - float(np.mean(idle))), step.decoding)
    alive = step.per_engine * lengths.capped((step.ahead + 1) * gained)
    return min(step.fixed + timings.decode_step_s * decoding + timings.decode_sequence_s * alive, seconds)


def _running(timings: Timings, step: _Step, lengths: Lengths, seconds: float) -> float:
    """``k`` with ``k / decode_s(k)`` tokens a second."""
    rate = step.per_engine * lengths.mean / seconds
    return rate * timings.decode_step_s / max(1 - rate * timings.decode_sequence_s, 1e-3)


def _first(holds: Callable[[float], bool], limit: float, least: float | None = None, times: int = BISECTIONS) -> float:
    """The smallest number from ``least`` to ``limit`` for which ``holds`` is true, as it stays from there on."""
    low, high = limit / 1e4 if least is None else least, limit
    if least is not None and holds(least):
        return least
    for _ in range(times):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


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
