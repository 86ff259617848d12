"""One reward worker: holds the reward functions of a run, each in its isolation, and calls them on groups.

``RewardPool`` runs it as a Ray actor; the doctor, ``millrace score`` and tests use it in-process. Invariant: a call
ends within the sum of its functions' limits; what hangs is killed with everything it started, and replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from rollout.code_tests import CodeTests
from rollout.generated_scoring import MOST_PREPARED, tasks_of
from rollout.logged import Logged
from rollout.reward_calls import CallFailed, Payload, check_values, invoke, invoke_now
from rollout.reward_loading import isolation_of, load_reward, reward_name, reward_place
from rollout.reward_models import ClassifierReward, HttpOptions, HttpReward
from rollout.sandbox import CHILD_LIMITS, SANDBOX_LIMITS, Child, require_sandbox
from rollout.scores import Scores
from shared import faults
from shared.config_reward import Reward, RewardFunction
from shared.errors import InputError, RewardFailed, one_line
from shared.ledger import TimeLedger, TimeSlice
from shared.types import Completion, Prompt

Group = tuple[int, Prompt, tuple[Completion, ...]]


class _Scorer:
    """One reward function in its isolation."""

    def __init__(self, spec: RewardFunction, settings: Reward, key: str, isolate: bool) -> None:
        """Import it, here or in a child of its own. Raises ``InputError`` E301 or E308."""
        self.name, self.place, self._spec, self._key = reward_name(spec), reward_place(spec), spec, key
        self.timeout_s = spec.timeout_s or settings.timeout_s
        self.isolation = isolation_of(spec)
        if isolate and self.isolation == "actor" and spec.function is not None:
            self.isolation = "subprocess"
        if self.isolation == "sandbox":
            require_sandbox(f"{key}.isolation")
        usual = SANDBOX_LIMITS if self.isolation == "sandbox" else replace(CHILD_LIMITS, cpu_s=int(self.timeout_s) + 1)
        self._limits = replace(usual, cpu_s=spec.cpu_s or usual.cpu_s, memory_mb=spec.memory_mb or usual.memory_mb)
        self.logged = Logged(self.name)
        self._tasks: list[list[str]] = []
        """Generated tasks of the last calls: the next child imports them before it meets any text."""
        self._child: Child | None = None
        self._spare: Future[Child] | None = None
        """The next child, started while others work: replacing one costs no time."""
        self._starter = ThreadPoolExecutor(1)
        self._function: Callable[..., Any] | None = None
        if spec.model is not None:
            self._function = _made(key, lambda: ClassifierReward(str(spec.model), key, gpus=spec.gpus, **spec.args))
        elif spec.url is not None:
            urls = [spec.url] if isinstance(spec.url, str) else spec.url
            self._function = _made(key, lambda: HttpReward(urls, key, HttpOptions(**spec.args)))
        elif spec.function == "code_tests":
            load_reward(spec, key)  # For what is wrong with its arguments.
            self._function = CodeTests.configured(spec)
        elif self.isolation == "actor":
            self._function = load_reward(spec, key)
        else:
            self._child = self._start()

    async def call(self, payload: Payload) -> dict[str, Any]:
        """The checked answer of one call. Raises ``CallFailed``."""
        faults.point("reward.before_call")
        if self._function is None:
            return await asyncio.to_thread(self._call_child, payload)
        private = copy.deepcopy(payload)  # Changing an argument must have no effect on anybody else.
        if self._spec.function == "code_tests":
            return await asyncio.to_thread(invoke_now, self._function, private)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await invoke(self._function, private, self._spec.nan_is_none)
        except TimeoutError:
            found, expected = f"> {self.timeout_s:g} s", f"<= timeout_s = {self.timeout_s:g}"
            raise CallFailed("E305", "reward too slow", found, expected, "speed it up or raise the limit") from None

    def close(self) -> None:
        """End its child."""
        self._starter.shutdown(wait=True)
        spare = self._spare.result() if self._spare is not None and self._spare.exception() is None else None
        for child in (self._child, spare):
            if child is not None:
                child.kill()
        self._child = self._spare = None

    async def disconnect(self) -> None:
        """Close the connections of a service."""
        if isinstance(self._function, HttpReward):
            await self._function.aclose()

    def _call_child(self, payload: Payload) -> dict[str, Any]:
        if self._spec.function == "reasoning_gym":
            now = tasks_of(payload["columns"])
            self._tasks = [*(t for t in self._tasks if t not in now), *now][-MOST_PREPARED:]
        if self._child is None or not self._child.alive:
            self._child = self._spare.result() if self._spare is not None else self._start()
            self._spare = self._starter.submit(self._start)
        try:
            answer = _asked(self._child, payload, self.timeout_s)
            try:
                answer = _checked(answer, payload)
            except CallFailed:  # Checked in the child already: this one lies.
                self._child.kill()
                raise
            if self._child.cut:
                answer["warning"] = f"warning[W306] {self.name}: stdout cut at 64 KB"
            return answer
        finally:
            # Text that runs in a sandbox may have changed its process: the next call gets a fresh one.
            if self.isolation == "sandbox" or not self._child.alive:
                self._child.kill()
                self._child = None

    def _start(self) -> Child:
        spec = self._spec.model_dump()
        spec["args"] |= {"tasks": self._tasks} if self._tasks else {}
        return Child(spec, self._key, self._limits, self.isolation == "sandbox", self._spec.nan_is_none)


def _asked(child: Child, payload: Payload, timeout_s: float) -> dict[str, Any]:
    """The child's answer. Raises ``CallFailed``, also for columns that have no JSON form."""
    try:
        return child.call(payload, timeout_s)
    except (TypeError, ValueError, RecursionError) as error:
        found, expected, fix = one_line(error), "columns of plain values", "write the column as text or numbers"
        raise CallFailed("E304", "reward not called", found, expected, fix) from None


def _checked(answer: dict[str, Any], payload: Payload) -> dict[str, Any]:
    """A child's answer, as if it had been computed here. Raises ``CallFailed``."""
    texts = [str(completion) for completion in payload["completions"]]
    try:
        extra = {str(column): list(values) for column, values in answer["extra"].items()}
        metrics = {str(name): float(value) for name, value in answer["metrics"].items()}
        values = answer["values"]
    except (KeyError, TypeError, ValueError, AttributeError):
        fix = "see the saved sample"
        raise CallFailed("E304", "reward raised", "an answer that is none", "numbers", fix) from None
    if any(len(values) != len(texts) for values in extra.values()):
        raise CallFailed("E302", "wrong log_extra count", "another number of values", f"{len(texts)}", "log one each")
    return {"values": check_values(values, texts), "extra": extra, "metrics": metrics}


def _made(key: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What ``make`` returns; options that it does not know are the user's mistake."""
    try:
        return make()
    except TypeError as error:
        expected = "the options of this kind of reward"
        raise InputError(
            "E301", "reward arguments refused", f"{key}.args", str(error), expected, "correct args"
        ) from None


class RewardWorker:
    """The reward functions of a run, called on whole groups."""

    def __init__(self, settings: Reward, isolate: bool = False, name: str = "reward-0") -> None:
        """Import every function; ``isolate`` puts those of the actor into a killable subprocess too."""
        self._ledger = TimeLedger(name)
        self._scorers = [
            _Scorer(spec, settings, f"reward.functions[{i}]", isolate) for i, spec in enumerate(settings.functions)
        ]
        self._closed = False
        # A loop of its own, so that async functions keep their connections from call to call.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._ledger.enter("wait_for_groups")

    def ready(self) -> bool:
        """True once the functions are imported."""
        return True

    def score(self, groups: list[Group], state: dict[str, Any], watch: bool = False) -> list[Scores]:
        """Call every function once on all completions of ``groups``. Raises ``RewardFailed`` when one misbehaves.

        ``watch``: report a function that changes its arguments, as the metric ``changed_input``.
        """
        payload = _payload(groups, state) | {"watch": watch}
        with self._ledger.during("score"):
            scores = asyncio.run_coroutine_threadsafe(self._score(groups, payload), self._loop).result()
        scores[0].times = self._ledger.take()
        return scores

    def times(self) -> TimeSlice:
        """What this worker did since it was asked last."""
        return self._ledger.take()

    def close(self) -> None:
        """End connections, children and the loop."""
        if not self._closed:
            asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result(timeout=5.0)
            self._end()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if not self._closed:
                self._end()

    def _end(self) -> None:
        self._closed = True
        for scorer in self._scorers:
            scorer.close()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _disconnect(self) -> None:
        for scorer in self._scorers:
            await scorer.disconnect()

    async def _score(self, groups: list[Group], payload: Payload) -> list[Scores]:
        sizes = [len(completions) for _, _, completions in groups]
        scores = [Scores({}) for _ in groups]
        calls = await asyncio.gather(*(self._timed(scorer, payload, groups) for scorer in self._scorers))
        for scorer, (answer, seconds) in zip(self._scorers, calls, strict=True):
            start, extra = 0, scorer.logged.extra(answer["extra"])
            metrics, warnings = scorer.logged.metrics(answer["metrics"])
            warnings += [answer["warning"]] if "warning" in answer else []
            for score, size in zip(scores, sizes, strict=True):
                part = slice(start, start := start + size)
                values = [np.nan if value is None else value for value in answer["values"][part]]
                score.parts[scorer.name] = np.array(values, dtype=np.float32)
                score.extra |= {column: list(values[part]) for column, values in extra.items()}
                score.metrics |= metrics
                score.seconds[scorer.name] = seconds
                score.warnings += warnings
        return scores

    async def _timed(self, scorer: _Scorer, payload: Payload, groups: list[Group]) -> tuple[dict[str, Any], float]:
        started = time.monotonic()
        try:
            return await scorer.call(payload), time.monotonic() - started
        except CallFailed as failure:
            raise _failed(failure, scorer.place, groups) from None


def _payload(groups: list[Group], state: dict[str, Any]) -> Payload:
    """The keyword lists of one call: groups one after the other, a prompt's values repeated for its completions."""
    pairs = [(prompt, completion) for _, prompt, completions in groups for completion in completions]
    names = {name: None for _, prompt, _ in groups for name in prompt.columns}
    return {
        "prompts": [prompt.text for prompt, _ in pairs],
        "completions": [
            c.messages or (c.text if isinstance(prompt.text, str) else [{"role": "assistant", "content": c.text}])
            for prompt, c in pairs
        ],
        "completion_ids": [completion.token_ids.tolist() for _, completion in pairs],
        "columns": {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names},
        "state": state,
    }


def _failed(failure: CallFailed, name: str, groups: list[Group]) -> RewardFailed:
    """The failure with its place: function, sample and group."""
    place, text, sample = name, "", failure.sample
    for group_id, _, completions in groups:
        if 0 <= sample < len(completions):
            place, text = f"{name}, sample {sample} of group {group_id}", completions[sample].text
            break
        sample -= len(completions)
    else:
        place = f"{name}, group {groups[0][0]}" if len(groups) == 1 else name
        sample = -1
    arguments = (failure.code, failure.what, place, failure.found, failure.expected, failure.fix)
    return RewardFailed(*arguments, sample, text, failure.trace)
