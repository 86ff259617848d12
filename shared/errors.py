"""Every error a user can meet, in one form, and the exit code each ends with.

An ``InputError`` is the user's to mend (exit code 2) and prints as one line without a traceback; any other
``MillraceError`` is a fault of a machine, process or bug (exit code 1). Errors cross process borders, so each
keeps its fields in ``args`` and survives pickling.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing: control characters but newline and tab, those that turn the
direction of text, and halves of characters, which cannot be printed."""
_DECORATION = re.compile(
    r"\x1b\[[0-9;]*m|\s*\[type=\w+, input_value=.*?, input_type=\w+\]|\s*For further information visit \S+", re.DOTALL
)

_BETWEEN = ("The above exception was", "During handling of the above exception", "Traceback (most recent")
"""Beginnings of the lines that stand between the exceptions of a chain."""


class MillraceError(Exception):
    """A failure that Millrace itself detected; the run ends with ``exit_code``."""

    exit_code = 1

    def __str__(self) -> str:
        return visible(super().__str__())


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
        return visible(f"{line}\n{self.table}" if self.table else line)


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


class LinkLost(MillraceError):
    """An engine that took part in a device link is lost; the learner can be saved, then the link is built again."""


class ModelRefused(LearnerFailed):
    """The learner cannot compute this model's log-probs exactly: another model is needed, not another try."""


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
        return visible(f"group {self.group_id} failed ({self.cause}): {self.detail}")


def raise_all(problems: list[InputError]) -> None:
    """Raise ``problems`` together, or return when there is none."""
    if problems:
        raise InputErrors(problems)


def first_cause(failures: BaseException) -> BaseException:
    """The first failure inside nested groups: it tells the story, the rest are its echoes."""
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures


def nearest(name: str, options: Iterable[str], least: float = 0.5) -> str | None:
    """The option most similar to ``name``, for "did you mean"; None when none is at least so similar, of 1."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=least)
    return close[0] if close else None


def visible(text: object) -> str:
    """``text`` with every character written out that a terminal would obey: ESC becomes ``\\x1b``. Lines stay lines.

    For text of models, data, services and users on its way to a terminal.
    """
    return _HIDDEN.sub(_written_out, str(text).replace("\r\n", "\n"))


def _written_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def one_line(text: object, limit: int = 200) -> str:
    """``text`` on one line and at most ``limit`` characters, for use inside a message.

    A traceback becomes what it says was raised (see ``raised_in``). Control characters become visible.
    """
    flat = _flat(str(text))
    if len(flat) <= limit:
        return flat
    return _cut(last_raised(str(text)) or flat, limit)


def last_raised(text: str) -> str:
    """What the traceback in ``text`` ends with, on one line, and what caused it behind it; empty without a traceback."""
    raised = raised_in(text)
    if not raised or raised[0] in raised[-1]:
        return raised[-1] if raised else ""
    return f"{_cut(raised[-1], 200)} (cause: {raised[0]})"


def raised_in(text: str) -> list[str]:
    """Texts of the exceptions that the tracebacks in ``text`` end with, in their order; empty without a traceback.

    Of a chain of exceptions the one that caused the others comes first.
    """
    found: list[list[str]] = []
    in_frames = in_exception = False
    for line in text.splitlines():
        if line.startswith('  File "'):
            if in_exception and "ray::" in found[-1][-1]:  # The heading of a traceback inside a message.
                found[-1].pop()
            in_frames, in_exception = True, False
        elif in_frames and line[:1].strip():
            in_frames, in_exception = False, True
            found.append([line])
        elif in_exception and line.startswith(_BETWEEN):
            in_exception = False
        elif in_exception:
            found[-1].append(line)
    return [flat for lines in found if (flat := _flat("\n".join(lines)))]


def _flat(text: str) -> str:
    """``text`` on one line, without colours and without what pydantic adds to a message."""
    return visible(" ".join(_DECORATION.sub("", text).split()))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
