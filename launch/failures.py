"""Failure budgets: dropped groups are counted by cause, refused optimizer steps in a row; too many of either end the run.

A failed group is dropped, never scored 0; a refused step changes no weight. The controller reports every outcome here.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

from rollout.buffer import RolloutBuffer
from shared.config import Config
from shared.config_reward import Reward
from shared.errors import GroupFailed, InputError, LearnerFailed, Stalled, visible
from shared.types import Prompt, RolloutGroup, StepReport

WINDOW = 200


class FailureBudget:
    """Counts groups that failed to be generated or scored."""

    def __init__(self, settings: Reward, keep: Callable[[GroupFailed, Prompt], None]) -> None:
        """``keep`` saves a dropped group for inspection (see ``sample_file``)."""
        self._settings, self._keep = settings, keep
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._first_trace = ""
        self.causes: Counter[str] = Counter()

    def succeeded(self) -> None:
        """A group was scored."""
        self._recent.append(False)

    def failed(self, failure: GroupFailed, prompt: Prompt) -> None:
        """A group was dropped. Raises ``TooManyFailures`` E310 when that was one too many."""
        self._keep(failure, prompt)
        self._recent.append(True)
        self.causes[failure.cause] += 1
        self._first_trace = self._first_trace or failure.trace
        total, share = self.causes.total(), sum(self._recent) / WINDOW
        most, most_share = self._settings.max_failed_groups, self._settings.max_failed_share
        if total > most or share > most_share:
            raise TooManyFailures(
                f"{total} dropped groups ({', '.join(f'{n} {cause}' for cause, n in self.causes.most_common())})",
                f"<= reward.max_failed_groups = {most} and <= {most_share:.0%} of the last {WINDOW}",
                f"{failure} (saved: {sample_file(failure)})",
                self._first_trace,
            )


class RefusedSteps:
    """Optimizer steps in a row that left the weights as they were although there was something to train on."""

    def __init__(self, most: int, keep: Callable[[int, list[RolloutGroup]], Path]) -> None:
        """``keep`` saves the groups of a refused step for inspection and says where."""
        self._most, self._keep = most, keep
        self._in_a_row = 0

    def observe(self, report: StepReport, groups: list[RolloutGroup], version: int) -> bool:
        """True if this step was refused; a step without any signal is normal. Raises ``LearnerFailed`` at the last."""
        if report.applied or report.metrics.get("groups/trained") == 0.0:
            self._in_a_row = 0 if report.applied else self._in_a_row
            return False
        self._in_a_row += 1
        place = self._keep(version, groups)
        if self._in_a_row >= self._most:
            ids = ", ".join(str(group.group_id) for group in groups)
            reason = "had a non-finite loss or gradient"
            if not report.metrics.get("trainable_tokens", 1.0):
                reason = "had not one trainable token (algorithm.mask_truncated?)"
            raise LearnerFailed(
                f"{self._in_a_row} steps in a row {reason} at policy version {version} "
                f"(learner.max_skipped_steps); last groups: {ids} (saved: {place}); lower learner.lr or check the rewards"
            )
        return True


def stalled(config: Config, version: int, buffer: RolloutBuffer, delivery: asyncio.Task[None] | None) -> Stalled:
    """Who waits for whom, in a run that stands still."""
    way = "still on its way to an engine" if delivery is not None and not delivery.done() else "not under way"
    return Stalled(
        f"no step finished within run.stall_timeout_s = {config.run.stall_timeout_s:g} s: policy version {version}, "
        f"{buffer.status()}, a publication is {way}"
    )


class TooManyFailures(InputError):
    """E310, with the last failure and where a user's function raised first below the line; tracebacks are in ``failed/``."""

    def __init__(self, found: str, expected: str, last: str, trace: str) -> None:
        fix = "correct the function or raise timeout_s"
        super().__init__("E310", "too many reward failures", "reward", found, expected, fix)
        self.args = (found, expected, last, trace)
        self.last, self.trace = last, trace

    def __str__(self) -> str:
        first = f"\nfirst failure: {_innermost(self.trace)}" if self.trace else ""
        return visible(f"{super().__str__()}\nlast: {self.last}{first}")


def _innermost(trace: str) -> str:
    """Of a traceback, where it ends and with what: ``rewards.py:7 in score: ValueError: bad fraction``."""
    error, places = trace.strip().splitlines()[-1], re.findall(r'File "(.+)", line (\d+), in (.+)', trace)
    return f"{places[-1][0]}:{places[-1][1]} in {places[-1][2]}: {error}" if places else error


def sample_file(failure: GroupFailed) -> str:
    """Where the run folder keeps a failed group, relative to it."""
    return f"failed/{failure.group_id}-{max(failure.sample, 0)}.json"
