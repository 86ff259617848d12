"""Every error a user can meet, in one form, and the exit code each ends with.

An ``InputError`` is the user's to mend (exit code 2) and prints as one line without a traceback; any other
``MillraceError`` is a fault of a machine, process or bug (exit code 1). Errors cross process borders, so each
keeps its fields in ``args`` and survives pickling.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MillraceError(Exception):
    """A failure that Millrace itself detected; the run ends with ``exit_code``."""

    exit_code = 1


class InputError(MillraceError):
    """One wrong input: ``error[E###] what — place. Found X, expected Y. Fix: ...``."""

    exit_code = 2

    def __init__(self, code: str, what: str, place: str, found: str, expected: str, fix: str, table: str = "") -> None:
        super().__init__(code, what, place, found, expected, fix, table)
        self.code, self.what, self.place = code, what, place
        self.found, self.expected, self.fix = found, expected, fix
        self.table = table
        """Lines that follow the message."""

    def __str__(self) -> str:
        line = f"error[{self.code}] {self.what} — {self.place}. Found {self.found}, expected {self.expected}. Fix: {self.fix}"
        return f"{line}\n{self.table}" if self.table else line


class RewardFailed(InputError):
    """One call of a reward function failed (E302-E306): the place says function, sample and group."""

    def __init__(self, code: str, what: str, place: str, found: str, expected: str, fix: str, *evidence: Any) -> None:
        super().__init__(code, what, place, found, expected, fix)
        self.args = (code, what, place, found, expected, fix, *evidence)
        self.sample, self.text, self.trace = evidence
        """Number of the completion in its group (-1: unknown), its text, and the user's traceback."""


class InputErrors(MillraceError):
    """All the wrong inputs found in one pass, printed together, one line each."""

    exit_code = 2

    def __init__(self, problems: list[InputError]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class EngineFailed(MillraceError):
    """A rollout engine died, hung or could not be started."""


class FleetExhausted(MillraceError):
    """No engine is left: each was lost more often than ``run.max_restarts`` allows."""


class LearnerFailed(MillraceError):
    """The learner cannot go on: too many steps in a row were refused, or its ranks disagree."""


class LearnerLost(LearnerFailed):
    """A learner rank died, hung or could not be started; the ranks can be built again from a checkpoint."""


class WeightProofFailed(MillraceError):
    """An engine does not hold the weights that the learner published."""


class Stalled(MillraceError):
    """No step finished within ``run.stall_timeout_s``."""


class NothingToLearn(InputError):
    """E307: too many groups in a row carried no training signal, or no held-out row could be scored."""


class GroupFailed(MillraceError):
    """One group could not be generated or scored; it is dropped and counted under ``cause``."""

    def __init__(
        self, group_id: int, cause: str, detail: str, sample: int = -1, text: str = "", trace: str = ""
    ) -> None:
        super().__init__(group_id, cause, detail, sample, text, trace)
        self.group_id, self.cause, self.detail = group_id, cause, detail
        self.sample, self.text, self.trace = sample, text, trace
        """Number of the completion at fault (-1: unknown), its text, and the traceback of a user's function."""

    def __str__(self) -> str:
        return f"group {self.group_id} failed ({self.cause}): {self.detail}"


def raise_all(problems: list[InputError]) -> None:
    """Raise ``problems`` together, or return when there is none."""
    if problems:
        raise InputErrors(problems)


def first_cause(failures: BaseException) -> BaseException:
    """The first failure inside nested groups: it tells the story, the rest are its echoes."""
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most similar to ``name``, for "did you mean"; None when nothing is close."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return close[0] if close else None


def one_line(text: object, limit: int = 200) -> str:
    """``text`` on one line and at most ``limit`` characters, for use inside a message."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
