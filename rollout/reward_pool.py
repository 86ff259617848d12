"""Reward workers: groups are scored in parallel, each as soon as its last completion ends.

``RewardPool`` owns the Ray actors and gives every call a deadline; a stuck or dead worker is killed and replaced,
so capacity stays constant. Invariant: a failure is never a reward of 0. A failed call is repeated, then its whole
group fails with a cause.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.rewards import load_reward, reward_name
from shared.config import Config, RewardFunction
from shared.errors import GroupFailed, InputError, one_line
from shared.types import Completion, FloatArray, Prompt


@dataclass
class Scores:
    """What the reward functions made of one group of G completions."""

    parts: dict[str, FloatArray]
    """``[G] float32`` per function; NaN where it returned None."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Columns given to ``log_extra``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars given to ``log_metric``, averaged over the call."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time inside each function."""

    def combined(self, functions: list[RewardFunction]) -> FloatArray:
        """``[G] float32``: weighted sum over the functions that applied; NaN where none did."""
        stacked = np.stack([self.parts[reward_name(f)] for f in functions])
        weights = np.array([f.weight for f in functions], dtype=np.float32)[:, None]
        total = np.nansum(stacked * weights, axis=0)
        return np.where(np.isnan(stacked).all(axis=0), np.nan, total).astype(np.float32)


class RewardWorker:
    """Holds the reward functions of a run and calls them; runs as a Ray actor or in-process."""

    def __init__(self, functions: list[RewardFunction]) -> None:
        self._functions = [(reward_name(f), load_reward(f, f"reward.functions[{i}]")) for i, f in enumerate(functions)]

    def ready(self) -> bool:
        """True once the functions are imported."""
        return True

    def score(self, prompt: Prompt, completions: tuple[Completion, ...], state: dict[str, Any]) -> Scores:
        """Call every function on one group. Raises ``InputError`` E302-E304 when one misbehaves."""
        scores = Scores({})
        for name, function in self._functions:
            started = time.monotonic()
            scores.parts[name] = self._call(name, function, prompt, completions, state, scores)
            scores.seconds[name] = time.monotonic() - started
        return scores

    def _call(
        self,
        name: str,
        function: Callable[..., Any],
        prompt: Prompt,
        completions: tuple[Completion, ...],
        state: dict[str, Any],
        scores: Scores,
    ) -> FloatArray:
        count = len(completions)
        extra: dict[str, list[Any]] = {}
        logged: dict[str, list[float]] = {}
        arguments = {
            "prompts": [copy.deepcopy(prompt.text) for _ in range(count)],
            "completions": [_shown(prompt, c.text) for c in completions],
            "completion_ids": [c.token_ids.tolist() for c in completions],
            "trainer_state": state,
            "log_extra": lambda column, values: extra.__setitem__(column, list(values)),
            "log_metric": lambda metric, value: logged.setdefault(metric, []).append(float(value)),
            **{column: [copy.deepcopy(value) for _ in range(count)] for column, value in prompt.columns.items()},
        }
        try:
            result = function(**_accepted(function, arguments))
            if inspect.isawaitable(result):
                result = asyncio.run(_await(result))
        except Exception as error:  # A user's function may raise anything; it becomes one typed error.
            found = f"{type(error).__name__}: {one_line(error)}"
            raise InputError(
                "E304", "reward raised", name, found, "a number", "correct the function for this sample"
            ) from error
        values = check_rewards(result, completions, name)
        for column, logged_values in extra.items():
            if len(logged_values) != count:
                found, expected = f"{len(logged_values)} values", f"{count} (one per completion)"
                raise InputError("E302", "wrong log_extra count", f"{name}: {column}", found, expected, "log one each")
        scores.extra |= extra
        scores.metrics |= {metric: sum(v) / len(v) for metric, v in logged.items()}
        return values


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _shown(prompt: Prompt, text: str) -> Any:
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that ``function`` names, or all of them if it takes ``**kwargs``."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def check_rewards(result: Any, completions: tuple[Completion, ...], name: str) -> FloatArray:
    """One finite number or None per completion, as ``[G] float32`` with NaN for None. Raises E302 or E303."""
    count = len(completions)

    def wrong_count(found: str) -> InputError:
        return InputError(
            "E302", "wrong reward count", name, found, f"{count} numbers (one per completion)", "return a flat list"
        )

    if hasattr(result, "tolist"):
        if getattr(result, "ndim", 1) != 1:
            raise wrong_count(f"shape {tuple(result.shape)}")
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise wrong_count(type(result).__name__)
    if len(result) != count:
        raise wrong_count(f"{len(result)} values")
    values = np.full(count, np.nan, dtype=np.float32)
    for i, value in enumerate(result):
        if value is None:
            continue
        number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not isinstance(number, int | float):
            found = f"{type(value).__name__} {value!r}"
        elif abs(number) <= float(np.finfo(np.float32).max):  # False for NaN and infinity too.
            values[i] = number
            continue
        else:
            found = f"{_short(number)} for {one_line(completions[i].text, 60)!r}"
        fix = "handle this case, or return None where the reward does not apply"
        raise InputError("E303", "bad reward value", f"{name}, sample {i}", found, "a finite number or None", fix)
    return values


def _short(number: float) -> str:
    """A number for a message; an integer too long to print is described."""
    return str(number) if isinstance(number, float) or abs(number) < 10**30 else "an integer beyond float32"


class RewardPool:
    """The reward workers as one object; ``score`` is safe to call concurrently."""

    def __init__(self, config: Config, environment: dict[str, str]) -> None:
        self._settings, self._environment = config.reward, environment
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        self._actors = [self._spawn() for _ in range(config.reward.workers)]
        for actor in self._actors:
            self._free.put_nowait(actor)
        self.counters: Counter[str] = Counter()
        """Cumulative retries, timeouts and worker restarts."""
        self.state: dict[str, Any] = {}
        """Snapshot for the functions' ``trainer_state``."""

    async def start(self, timeout_s: float = 120.0) -> None:
        """Wait until every worker has imported its functions."""
        await asyncio.wait_for(asyncio.gather(*(actor.ready.remote() for actor in self._actors)), timeout_s)

    async def score(self, group_id: int, prompt: Prompt, completions: tuple[Completion, ...]) -> Scores:
        """Score one group. Raises ``GroupFailed`` when every try failed."""
        cause, detail = "", ""
        for attempt in range(self._settings.retries + 1):
            self.counters["retries"] += attempt > 0
            actor = await self._free.get()
            try:
                reference = actor.score.remote(prompt, completions, self.state)
                return await asyncio.wait_for(reference, self._settings.timeout_s)
            except TimeoutError:
                cause, detail = "timeout", f"> {self._settings.timeout_s:g} s (worker replaced)"
                self.counters["timeouts"] += 1
                actor = self._replace(actor)
            except Exception as error:
                cause, detail, actor = self._diagnose(error, actor)
            finally:
                self._free.put_nowait(actor)
        raise GroupFailed(group_id, cause, detail)

    def close(self) -> None:
        """Kill the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _diagnose(self, error: Exception, actor: Any) -> tuple[str, str, Any]:
        from ray.exceptions import RayActorError, RayTaskError

        if isinstance(error, RayActorError):
            return "worker_died", one_line(error), self._replace(actor)
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InputError):
            return cause.code, str(cause), actor
        raise error

    def _spawn(self) -> Any:
        import ray

        options = {"num_cpus": 0, "max_restarts": 0, "runtime_env": {"env_vars": self._environment}}
        return ray.remote(RewardWorker).options(**options).remote(self._settings.functions)

    def _replace(self, actor: Any) -> Any:
        import ray

        ray.kill(actor)
        self.counters["worker_restarts"] += 1
        self._actors[self._actors.index(actor)] = fresh = self._spawn()
        return fresh
