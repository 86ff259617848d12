"""One step of a run from what its parts take: the arithmetic behind ``millrace plan``.

Engines decode their running sequences in lock step, at ``decode_step_s + k decode_sequence_s`` seconds a token. A batch is
admitted whenever one is published, ``ahead + 1`` of them overlap, and each must have all its completions before it can be
trained: with a step of ``T`` seconds,

    (ahead + 1) T = time until its longest completion is done + scoring + training + delivery.            (latency)

In a periodic state every sequence gains ``v`` tokens a step, and the sequences alive are those of the last batches:

    T = prefill + pause + decode_step_s v + decode_sequence_s n E[min(L, (ahead + 1) v)],                 (engines)

with ``n`` sequences a step and engine and ``L`` the length of a completion. The two equations fix ``v`` and ``T``. The
learner needs ``T >= train + publish``. Where an engine has no room for all sequences, some wait: decoding takes at least
``n E[L] / places`` steps, and a batch's last completion is late. Where more groups end at once than there are reward workers,
some wait for their scores; that more come at times than on average is left out, and makes a step up to a sixth longer where
the workers are busy for four fifths of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from launch.timings import BISECTIONS, Lengths, Timings
from shared.config import Config

POINTS = 64
SHARES = np.linspace(0.0, 1.0, POINTS + 1)
ROUNDING = 1e-9
"""Of a length, so that a group which ends exactly then has not ended before."""
ENGINES_BOUND = 0.75
"""Share of their time that engines work, above which they and not the way round are what a step waits for."""


@dataclass(frozen=True)
class Step:
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
    queue: NDArray[np.float64]
    """Seconds for which groups that end after so much of ``longest``, a share in ``SHARES``, wait for a reward worker."""
    after: float
    """From the last token to the release of the slots, beside training: scoring and delivery."""


class State(NamedTuple):
    """A step at a certain speed of everybody."""

    seconds: float
    busy: float
    """Of an engine."""
    step: Step
    bound: str


def state_at(
    config: Config, timings: Timings, lengths: Lengths, split: tuple[int, int], ahead: int, slower: tuple[float, float]
) -> State:
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
        "rewards": config.groups_per_batch / config.reward.workers * _score_s(config, timings),
        "engines": _crowded(slow, step, lengths),
    }
    bound = max(limits, key=lambda name: limits[name])
    seconds = limits[bound]
    busy = _busy(slow, step, lengths, seconds)
    if bound == "latency" and busy > ENGINES_BOUND * seconds:
        bound = "engines"
    return State(seconds, busy, step, bound)


def _step(config: Config, timings: Timings, lengths: Lengths, split: tuple[int, int], ahead: int) -> Step:
    engines, ranks = split
    groups = config.groups_per_batch
    samples, places = groups * config.rollout.group_size, timings.places(config.max_num_seqs)
    tokens = samples * lengths.mean + groups * timings.prompt_tokens
    updates, epochs = config.updates_per_batch, config.learner.epochs_per_batch
    fixed_step = timings.train_step_s + (timings.ranks_s if ranks > 1 else 0.0)
    each, longest = samples / engines, _makespan(lengths, samples, engines, places)
    return Step(
        ahead=ahead,
        per_engine=each,
        places=places,
        longest=longest,
        decoding=_makespan(lengths, each, 1, places) if ahead == 0 else each * lengths.mean / places,
        fixed=groups / engines * (timings.request_s + timings.prefill_token_s * timings.prompt_tokens),
        pause=timings.pause_s,
        train=updates * fixed_step + epochs * timings.train_token_s * tokens / ranks + timings.publish_s,
        queue=_queue(config, timings, lengths, longest),
        after=timings.score_call_s + timings.score_s + timings.prepare_s + timings.pause_s,
    )


def _score_s(config: Config, timings: Timings) -> float:
    """Of a reward worker for a group, where others wait for the same call."""
    return timings.score_s + timings.score_call_s / config.reward.groups_per_call


def _queue(config: Config, timings: Timings, lengths: Lengths, longest: float) -> NDArray[np.float64]:
    """See ``Step``: a group ends with the longest of its completions, and each worker begins one of them at once."""
    ended = np.array([lengths.done(share * longest * (1 - ROUNDING)) for share in SHARES])
    left = config.groups_per_batch * (1 - ended**config.rollout.group_size) / config.reward.workers
    return np.maximum(left - 1, 0) * _score_s(config, timings)


def _until_begun(step: Step, done: float) -> float:
    """Seconds until a worker begins with the last group, when the last completion is done after ``done``."""
    return float((done * SHARES + step.queue).max())


def _makespan(lengths: Lengths, samples: float, engines: int, places: int) -> float:
    """Decoding steps until the last of ``samples`` is done: those that wait begin when one ends, the last run out alone."""
    longest, each = lengths.longest(samples), samples / engines
    if each <= places:
        return longest
    begun = (each / places - 1) * lengths.mean
    return max(longest, each / places * lengths.mean, begun + lengths.longest_left(places * engines))


def _crowded(timings: Timings, step: Step, lengths: Lengths) -> float:
    """Seconds that an engine needs for a step's sequences with its every place taken."""
    decoding = timings.decode_s(step.places) * step.per_engine * lengths.mean / step.places
    return step.fixed + step.pause + decoding


def _period(timings: Timings, step: Step, lengths: Lengths, gained: float) -> float:
    """Seconds in which an engine takes a step's prompts and every sequence gains so many tokens."""
    alive = step.per_engine * lengths.capped((step.ahead + 1) * gained)
    return step.fixed + step.pause + timings.decode_step_s * gained + timings.decode_sequence_s * alive


def _until_done(timings: Timings, step: Step, lengths: Lengths, gained: float) -> float:
    """Seconds from a batch's admission until its last group's turn to be scored, past the admissions of later ones."""
    whole = int(step.longest / gained)
    over = step.longest - whole * gained
    alive = sum(lengths.capped(j * gained + over) - lengths.capped(j * gained) for j in range(step.ahead + 1))
    partial = timings.decode_step_s * over + timings.decode_sequence_s * step.per_engine * alive
    return _until_begun(step, whole * _period(timings, step, lengths, gained) + step.fixed + partial)


def _periodic(timings: Timings, step: Step, lengths: Lengths) -> float:
    """The step's seconds by the two equations, the learner never in the way."""
    rest, batches = step.after + step.train, step.ahead + 1
    # Each batch alone in the engines, which then wait for the learner.
    alone = step.fixed + timings.decode_step_s * step.longest
    alone += timings.decode_sequence_s * step.per_engine * lengths.mean
    begun = _until_begun(step, alone)
    if batches * (alone + step.pause) <= begun + rest:
        return (begun + rest) / batches

    def early(gained: float) -> bool:
        return batches * _period(timings, step, lengths, gained) > _until_done(timings, step, lengths, gained) + rest

    return _period(timings, step, lengths, first(early, step.longest))


def _busy(timings: Timings, step: Step, lengths: Lengths, seconds: float) -> float:
    """Seconds of a step in which an engine has something to do."""
    gained = first(lambda v: _period(timings, step, lengths, v) > seconds, step.longest)
    points = gained * (np.arange(POINTS) + 0.5) / POINTS
    idle = [
        np.prod([lengths.done(point + j * gained) ** step.per_engine for j in range(step.ahead + 1)])
        for point in points
    ]
    decoding = max(gained * (1 - float(np.mean(idle))), step.decoding)
    alive = step.per_engine * lengths.capped((step.ahead + 1) * gained)
    return min(step.fixed + timings.decode_step_s * decoding + timings.decode_sequence_s * alive, seconds)


def running(timings: Timings, step: Step, lengths: Lengths, seconds: float) -> float:
    """``k`` with ``k / decode_s(k)`` tokens a second."""
    rate = step.per_engine * lengths.mean / seconds
    return rate * timings.decode_step_s / max(1 - rate * timings.decode_sequence_s, 1e-3)


def first(holds: Callable[[float], bool], limit: float, least: float | None = None, times: int = BISECTIONS) -> float:
    """The smallest number from ``least`` to ``limit`` for which ``holds`` is true, as it stays from there on."""
    low, high = limit / 1e4 if least is None else least, limit
    if least is not None and holds(least):
        return least
    for _ in range(times):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
