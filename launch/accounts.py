"""What a run makes of its time: throughput, goodput, seconds by process and state, and what bounds it.

The controller asks once a step and once at the end. Goodput is counted in tokens that changed the policy: sampled,
unmasked, with an advantage other than zero, in an applied optimizer step; per second of every device reserved.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from launch.placement import Needs
from launch.room import Room
from shared.config import Config
from shared.errors import MillraceError, one_line
from shared.ledger import RESIDUE_LIMIT, TimeBook, TimeLedger, TimeSlice
from shared.types import Prompt, RolloutGroup

LEARNER_IDLE = ("start", "wait_for_groups")


class Part(Protocol):
    """A facade whose actors keep time ledgers."""

    slices: list[TimeSlice]

    async def close_books(self) -> None:
        """Fetch what the actors have not told yet into ``slices``."""


def useful_tokens(groups: Sequence[RolloutGroup], mask_truncated: bool) -> int:
    """Trained tokens of ``groups``: those of completions with an advantage other than zero."""
    return sum(
        len(completion.token_ids)
        for group in groups
        if group.advantages is not None
        for completion, advantage in zip(group.completions, group.advantages, strict=True)
        if advantage != 0 and not (mask_truncated and completion.finish_reason == "length")
    )


def tokens_of(groups: Sequence[RolloutGroup]) -> int:
    """Sampled tokens of ``groups``."""
    return sum(len(completion.token_ids) for group in groups for completion in group.completions)


def trainer_state(config: Config, version: int, epoch: float, history: list[dict[str, float]]) -> dict[str, Any]:
    """What reward functions get as ``trainer_state``."""
    return {"global_step": version, "max_steps": config.run.steps, "epoch": epoch, "log_history": history}


class Accounts:
    """The books of one run."""

    def __init__(
        self, config: Config, book: TimeBook, ledger: TimeLedger, parts: Sequence[Part], room: Room | None = None
    ) -> None:
        """``ledger`` is the controller's own; ``room`` is what the run could still take, if that is known."""
        self._config, self._book, self._ledger, self._parts, self._room = config, book, ledger, parts, room
        self._started = self._last = time.monotonic()
        self.seen = 0
        """Tokens of prompts and completions since the run began: of all that was sampled and has met its fate."""
        self._wasted = 0
        """Tokens sampled for nothing since the last step."""
        self._before: dict[str, dict[str, float]] = {}
        self._sums: Counter[str] = Counter()
        self._seconds = np.zeros(2)
        """Of all steps, and of all devices in them."""

    async def begin(self) -> None:
        """Training begins: what went before is not held against it."""
        await self._collect()
        self._book.row()
        self._before = {process: dict(states) for process, states in self._book.totals.items()}
        self._started = self._last = time.monotonic()

    def wasted(self, prompt: Prompt, samples: int, tokens: int) -> None:
        """A group of so many completions and tokens was sampled that no applied step holds: it counts as work."""
        self._wasted += tokens
        self.seen += tokens + samples * len(prompt.token_ids)

    def step(self, groups: list[RolloutGroup], trained: float, engines: int) -> dict[str, float]:
        """Figures since the last step, of the ``groups`` of this one; ``trained`` tokens passed the learner.

        ``engines``: how many the run has now.
        """
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        device_s = seconds * self._devices(engines)
        self._seconds += np.array([seconds, device_s])
        sampled, useful = tokens_of(groups), useful_tokens(groups, self._config.algorithm.mask_truncated)
        self.seen += sampled + sum(len(g.prompt.token_ids) * len(g.completions) for g in groups)
        generated, self._wasted = sampled + self._wasted, 0
        self._sums.update(useful=useful, generated=generated)
        self._drain()
        row = self._book.row()
        return row | {
            "num_tokens": float(self.seen),
            "throughput/rollout_tokens_per_second": sampled / seconds,
            "throughput/train_tokens_per_second": trained / seconds,
            "throughput/samples_per_second": sum(len(g.completions) for g in groups) / seconds,
            "time/step": seconds,
            "goodput": useful / device_s,
            "goodput/work": useful / max(generated, 1),
            "goodput/time": _busy(_nested(row)),
        }

    async def finish(self) -> dict[str, Any]:
        """The run's summary: seconds by process and state, goodput of the training, and the verdict."""
        await self._collect()
        residues, walls = self._book.residues(), self._book.walls()
        trained = {
            process: {state: seconds - self._before.get(process, {}).get(state, 0.0) for state, seconds in row.items()}
            for process, row in self._book.totals.items()
        }
        for process in [p for p, residue in residues.items() if residue > RESIDUE_LIMIT]:
            print(f"warning[W901] {process}: {residues[process]:.1%} of its time is in no state", flush=True)
        seconds = time.monotonic() - self._started
        stepped, device_s = self._seconds
        devices = device_s / stepped if stepped else self._devices(self._config.rollout.num_engines)
        useful, generated = self._sums["useful"], max(self._sums["generated"] + self._wasted, 1)
        self._book.close()
        return {
            "processes": {
                process: {"wall": walls[process], "residue": residues[process], "states": dict(states)}
                for process, states in self._book.totals.items()
            },
            "training_seconds": seconds,
            "goodput": {
                "tokens_per_device_second": useful / max(seconds, 1e-9) / devices,
                "work": useful / generated,
                "time": _busy(trained),
            },
            "verdict": verdict(trained, self._config, self._room),
        }

    def _devices(self, engines: int) -> int:
        """Reserved for so many engines and the learner."""
        rollout, ranks = self._config.rollout, self._config.learner.num_ranks
        return ranks if rollout.colocate else ranks + engines * rollout.workers_per_engine

    async def _collect(self) -> None:
        """Everything up to now, also of processes that answered nothing for a while.

        One that does not answer now costs its last seconds here; work will find out what is wrong with it.
        """
        books = await asyncio.gather(*(part.close_books() for part in self._parts), return_exceptions=True)
        for failure in [book for book in books if isinstance(book, BaseException)]:
            if not isinstance(failure, MillraceError):
                raise failure
            print(f"warning[W901] times of some processes are missing: {one_line(failure)}", flush=True)
        self._drain()

    def _drain(self) -> None:
        for part in self._parts:
            for piece in part.slices:
                self._book.add(piece)
            part.slices.clear()
        self._book.add(self._ledger.take())


def _nested(row: dict[str, float]) -> dict[str, dict[str, float]]:
    nested: dict[str, dict[str, float]] = {}
    for name, seconds in row.items():
        _, process, state = name.split("/")
        nested.setdefault(process, {})[state] = seconds
    return nested


def _busy(times: dict[str, dict[str, float]]) -> float:
    """Share of their time that engines generate and learner ranks work."""
    busy = wall = 0.0
    for process, states in times.items():
        if process.startswith(("engine", "learner")):
            idle = sum(states.get(state, 0.0) for state in LEARNER_IDLE)
            wall += sum(states.values())
            busy += states.get("generate", 0.0) if process.startswith("engine") else sum(states.values()) - idle
    return busy / wall if wall else 0.0


def _share(times: dict[str, dict[str, float]], kind: str, *states: str) -> float:
    """Share of the time of all processes of ``kind`` spent in ``states``."""
    rows = [row for process, row in times.items() if process.startswith(kind)]
    wall = sum(sum(row.values()) for row in rows)
    return sum(row.get(state, 0.0) for row in rows for state in states) / wall if wall else 0.0


def verdict(times: dict[str, dict[str, float]], config: Config, room: Room | None = None) -> str:
    """One sentence: what bounds the run whose process spent ``times[process][state]`` seconds, and what to change.

    Where ``room`` is known and used up, nothing is advised that would take more cores or GPUs.
    """
    learner = 1 - _share(times, "learner", *LEARNER_IDLE)
    engines, unfed = _share(times, "engine", "generate"), _share(times, "engine", "wait_for_prompts")
    updating = _share(times, "engine", "pause", "receive")
    scoring, evaluating = _share(times, "reward", "score"), _share(times, "controller", "evaluate")
    staleness = config.rollout.max_staleness
    if evaluating > 0.25:
        return f"Evaluation takes {evaluating:.0%} of the training: raise eval.every_steps or lower eval.max_rows."
    if scoring > 0.8 > learner:
        remote = any(function.url for function in config.reward.functions)
        more = _more("reward.workers", config.reward.workers, {} if remote else {"CPU": 1.0}, room, "faster functions")
        return f"The reward workers bound this run, busy {scoring:.0%} of the time: {more}."
    if updating > 0.2:
        return (
            f"Weight updates hold the engines for {updating:.0%} of the time: "
            f"raise learner.prompts_per_step (now {config.learner.prompts_per_step})."
        )
    if staleness == 0 and learner < 0.9 and engines < 0.9:
        return (
            f"Engines ({engines:.0%} busy) and learner ({learner:.0%}) wait for each other: "
            "raise rollout.max_staleness (now 0, synchronous)."
        )
    if max(learner, engines) < 0.6:
        return (
            f"Neither engines ({engines:.0%} busy) nor learner ({learner:.0%}) bound this run: "
            f"raise rollout.max_staleness (now {staleness})."
        )
    needs = Needs.of(config, on_gpu=room is not None and room.on_gpu)
    if learner >= engines:
        more = _more("learner.num_ranks", config.learner.num_ranks, needs.rank, room, "fewer tokens a step")
        return (
            f"The learner bounds this run, busy {learner:.0%} of the time while the engines wait {unfed:.0%} "
            f"for prompts: {more}."
        )
    waiting = _share(times, "learner", "wait_for_groups")
    more = _more("rollout.num_engines", config.rollout.num_engines, needs.engine, room, "shorter completions")
    return (
        f"The engines bound this run, generating {engines:.0%} of the time while the learner waits {waiting:.0%} "
        f"for groups: {more}."
    )


def _more(key: str, now: int, bundle: dict[str, float], room: Room | None, without: str) -> str:
    """Advise to raise ``key`` if there is room for one more; else say what would help ``without`` more room."""
    if room is None or room.fits(bundle):
        return f"raise {key} (now {now})"
    return f"{room.words}, and a higher {key} (now {now}) would not help; a larger machine would, or {without}"
