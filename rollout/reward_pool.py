"""The reward workers as one object: groups are scored in parallel, each as soon as its last completion ends.

Invariants: a failure is never a reward of 0 (a failed call is repeated, then its
whole group fails with a cause); a worker that died or hangs is replaced, so capacity stays constant.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.code_tests import count_tests, limits_of_test, longest_s
from rollout.reward_loading import isolation_of, reward_name
from rollout.reward_worker import Group, RewardWorker
from rollout.row_checks import CODE_TESTS, code_column
from rollout.scores import Scores
from shared.actors import Actor, ActorDied, ActorUnreachable, Slot, named
from shared.config import Config
from shared.config_reward import RewardFunction
from shared.errors import GroupFailed, RewardFailed, one_line, visible
from shared.ledger import TimeSlice
from shared.types import Completion, Prompt

LATENCIES = 1000
GRACE_S = 10.0
"""Beyond the functions' own limits: for a worker that ends its children itself, and starts others."""


@dataclass
class _Item:
    """A group on its way to its scores."""

    group: Group
    result: asyncio.Future[Scores]
    since: float
    attempts: int = 0


class RewardPool:
    """A worker in each of ``slots``; ``score`` is safe to call concurrently."""

    def __init__(self, config: Config, slots: Sequence[Slot], environment: dict[str, str]) -> None:
        self._settings, self._slots, self._environment = config.reward, slots, environment
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._actors = [self._spawn(i, f"reward-{i}") for i in range(len(slots))]
        self.slices: list[TimeSlice] = []
        """What the workers did, as far as their answers told."""
        self._serving: list[asyncio.Task[None]] = []
        limits = [(isolation_of(f), self._fixed_s(f)) for f in config.reward.functions]
        self._limit_s = sum(seconds for _, seconds in limits)
        if any(isolation != "actor" for isolation, _ in limits):
            self._limit_s += GRACE_S
        self._latencies = {reward_name(f): deque[float](maxlen=LATENCIES) for f in config.reward.functions}
        self._waits: deque[float] = deque(maxlen=LATENCIES)
        self._busy_s, self._since, self._warned = 0.0, time.monotonic(), set[str]()
        self.counters: Counter[str] = Counter(
            dict.fromkeys(("retries", "timeouts", "worker_restarts", "failed_samples", "dropped_groups"), 0)
        )
        self.state: dict[str, Any] = {"global_step": 0, "epoch": 0, "max_steps": config.run.steps, "log_history": []}
        """Snapshot for the functions' ``trainer_state``."""

    async def start(self, timeout_s: float = 120.0) -> None:
        """Wait until every worker has imported its functions."""
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(a.call("ready").answer for a in self._actors))

    async def score(self, group_id: int, prompt: Prompt, completions: tuple[Completion, ...]) -> Scores:
        """Score one group. Raises ``GroupFailed`` when every try failed."""
        if not self._serving:
            self._serving = [asyncio.create_task(self._serve(i)) for i in range(len(self._actors))]
        item = _Item((group_id, prompt, completions), asyncio.get_running_loop().create_future(), time.monotonic())
        self._queue.put_nowait(item)
        return await item.result

    def metrics(self) -> dict[str, float]:
        """Counters since the start; latencies and load since the last call."""
        elapsed, workers = max(time.monotonic() - self._since, 1e-9), len(self._actors)
        metrics = {name: float(count) for name, count in self.counters.items()}
        metrics |= {"workers": float(workers), "queue_depth": float(self._queue.qsize())}
        metrics["busy_frac"] = self._busy_s / (elapsed * workers)
        metrics["queue_s_mean"] = float(np.mean(self._waits)) if self._waits else 0.0
        for name, seconds in self._latencies.items():
            if seconds:
                values = np.array(seconds)
                metrics[f"{name}/latency_s_p50"] = float(np.quantile(values, 0.5))
                metrics[f"{name}/latency_s_p95"] = float(np.quantile(values, 0.95))
                metrics[f"{name}/latency_s_max"] = float(values.max())
                seconds.clear()
        self._waits.clear()
        self._busy_s, self._since = 0.0, time.monotonic()
        return metrics

    async def close_books(self) -> None:
        """Ask every worker for what is still missing in ``slices``; one that dies or hangs now has nothing to add."""
        calls = [asyncio.ensure_future(actor.call("times").answer) for actor in self._actors]
        if not calls:
            return
        answered, silent = await asyncio.wait(calls, timeout=GRACE_S)
        for call in silent:
            call.cancel()
        answers = await asyncio.gather(*answered, return_exceptions=True)
        self.slices += [answer for answer in answers if isinstance(answer, TimeSlice)]

    def close(self) -> None:
        """End the workers. Ray is told first: of a process that ends by itself it would warn on the terminal."""
        for task in self._serving:
            task.cancel()
        for actor in self._actors:
            actor.release()

    async def _serve(self, index: int) -> None:
        """Hand groups to worker ``index``, one call at a time."""
        while True:
            items = [await self._queue.get()]
            self._add_company(items)
            started = time.monotonic()
            self._waits.extend(started - item.since for item in items)
            try:
                await self._call(index, items)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # A fault of ours: whoever waits must hear of it.
                for item in (item for item in items if not item.result.done()):
                    item.result.set_exception(error)
            self._busy_s += time.monotonic() - started

    def _add_company(self, items: list[_Item]) -> None:
        """More waiting groups for the same call; one that failed before is tried alone."""
        while not items[0].attempts and len(items) < self._settings.groups_per_call and not self._queue.empty():
            item = self._queue.get_nowait()
            if item.attempts:
                self._queue.put_nowait(item)
                return
            items.append(item)

    async def _call(self, index: int, items: list[_Item]) -> None:
        actor = self._actors[index]
        try:
            groups = [item.group for item in items]
            limit_s = self._limit_s + self._code_s(groups)
            async with asyncio.timeout(limit_s):
                scores = await actor.call("score", groups, self.state).answer
        except TimeoutError:
            self._replace(index)
            self._again(items, "timeout", f"> {limit_s:g} s (worker replaced)")
        except RewardFailed as failure:
            self._again(items, "timeout" if failure.code == "E305" else failure.code, str(failure), failure)
        except (ActorDied, ActorUnreachable) as error:
            self._replace(index)
            self._again(items, "worker_died", one_line(error))
        else:
            self._finish(items, scores)

    def _fixed_s(self, function: RewardFunction) -> float:
        """Longest time of one call of ``function``; that of ``code_tests`` depends on its groups."""
        return 0.0 if function.function == CODE_TESTS else function.timeout_s or self._settings.timeout_s

    def _code_s(self, groups: list[Group]) -> float:
        """Longest time that ``code_tests`` may take for ``groups``: it grows with the number of their tests."""
        total = 0.0
        for function in (f for f in self._settings.functions if f.function == CODE_TESTS):
            column, counts = code_column(function), list[int]()
            for _, prompt, completions in groups:
                counts += [count_tests(prompt.columns.get(column), prompt.columns)] * len(completions)
            total += longest_s(counts, *limits_of_test(function))
        return total

    def _finish(self, items: list[_Item], scores: list[Scores]) -> None:
        for item, score in zip(items, scores, strict=True):
            if not item.result.done():
                item.result.set_result(score)
        if scores[0].times is not None:
            self.slices.append(scores[0].times)
        for name, seconds in scores[0].seconds.items():
            self._latencies[name].append(seconds)
        for line in set(scores[0].warnings) - self._warned:
            self._warned.add(line)
            print(visible(line), flush=True)

    def _again(self, items: list[_Item], cause: str, detail: str, failure: RewardFailed | None = None) -> None:
        """Queue failed groups once more, each alone; give up on those that had all their tries."""
        self.counters["timeouts"] += cause == "timeout"
        for item in items:
            if len(items) == 1:
                item.attempts += 1
            if item.attempts <= self._settings.retries:
                self.counters["retries"] += 1
                item.attempts = max(item.attempts, 1)
                self._queue.put_nowait(item)
                continue
            self.counters["failed_samples"] += len(item.group[2])
            self.counters["dropped_groups"] += 1
            self.counters[f"dropped_groups/{cause}"] += 1
            if not item.result.done():
                trace = (failure.sample, failure.text, failure.trace) if failure else (-1, "", "")
                item.result.set_exception(GroupFailed(item.group[0], cause, detail, *trace))

    def _spawn(self, index: int, name: str) -> Actor:
        environment = self._environment | named(name)
        if not any(function.gpus for function in self._settings.functions):  # Ray leaves all GPUs to who reserved none.
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        return self._slots[index].spawn(RewardWorker, self._settings, False, name, environment=environment)

    def _replace(self, index: int) -> None:
        self._actors[index].kill()
        self.counters["worker_restarts"] += 1
        # A process of its own in the time ledger: the killed one's books end with its last answer.
        self._actors[index] = self._spawn(index, f"reward-{index}.{self.counters['worker_restarts']}")
