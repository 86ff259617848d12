"""One call of a reward function: its keyword arguments, and the checks on what it returns.

The same code serves the pool's actor, the child processes and the doctor, so it needs the standard library alone. A
failure is always a ``CallFailed`` with a cause, never a number.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

LARGEST_FLOAT32 = 3.4028234663852886e38
Payload = dict[str, Any]
"""``prompts``, ``completions``, ``completion_ids`` (n each), ``columns`` {name: n values}, ``state``; and ``watch``, with
which a changed argument is reported as the metric ``changed_input``."""
GIVEN = ("prompts", "completions", "completion_ids", "columns")


class CallFailed(Exception):
    """A call did not return one number or None per completion."""

    def __init__(self, code: str, what: str, found: str, expected: str, fix: str, sample: int = -1, trace: str = ""):
        super().__init__(code, what, found, expected, fix, sample, trace)
        self.code, self.what, self.found, self.expected, self.fix = code, what, found, expected, fix
        self.sample = sample
        """Number of the offending completion within the call; -1 if unknown."""
        self.trace = trace
        """The user's traceback, for the log."""


async def invoke(function: Callable[..., Any], payload: Payload, nan_is_none: bool = False) -> dict[str, Any]:
    """Call ``function`` and check what it returns: ``{"values", "extra", "metrics"}``. Raises ``CallFailed``.

    ``values`` holds n numbers or None. What a failed call logged is discarded with it.
    """
    count = len(payload["completions"])
    extra: dict[str, list[Any]] = {}
    logged: dict[str, list[float]] = {}
    arguments = {
        "prompts": payload["prompts"],
        "completions": payload["completions"],
        "completion_ids": payload["completion_ids"],
        **payload["columns"],
        "trainer_state": SimpleNamespace(**copy.deepcopy(payload["state"])),
        "log_extra": lambda column, values: extra.__setitem__(column, list(values)),
        "log_metric": lambda metric, value: logged.setdefault(metric, []).append(float(value)),
    }
    texts = [_text(completion) for completion in payload["completions"]]
    before = copy.deepcopy([payload[name] for name in GIVEN]) if payload.get("watch") else None
    try:
        result = function(**_accepted(function, arguments))
        if inspect.isawaitable(result):
            result = await result
    except CallFailed:
        raise
    except MemoryError:
        raise CallFailed(
            "E306",
            "reward over limit",
            "more memory than allowed",
            "<= memory_mb",
            "use less memory or raise reward.functions.memory_mb",
        ) from None
    except Exception as error:  # A user's function may raise anything; it becomes one typed error.
        found = f"{type(error).__name__}: {_short(error, 200)}"
        fix = "correct the function for this sample"
        raise CallFailed("E304", "reward raised", found, "a number", fix, trace=traceback.format_exc()) from error
    values = check_values(result, texts, nan_is_none)
    if before is not None and before != [payload[name] for name in GIVEN]:
        logged["changed_input"] = [1.0]
    for column, column_values in extra.items():
        if len(column_values) != count:
            found, expected = f"{column}: {len(column_values)} values", f"{count} (one per completion)"
            raise CallFailed("E302", "wrong log_extra count", found, expected, "log one each")
    return {"values": values, "extra": extra, "metrics": {name: sum(v) / len(v) for name, v in logged.items()}}


def invoke_now(function: Callable[..., Any], payload: Payload, nan_is_none: bool = False) -> dict[str, Any]:
    """``invoke`` where no event loop runs."""
    return asyncio.run(invoke(function, payload, nan_is_none))


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that ``function`` names, or all of them if it takes ``**kwargs``."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def check_values(result: Any, texts: list[str], nan_is_none: bool = False) -> list[float | None]:
    """One finite number or None per completion. Raises ``CallFailed`` E302 or E303."""
    count = len(texts)

    def wrong_count(found: str) -> CallFailed:
        expected = f"{count} numbers (one per completion)"
        return CallFailed("E302", "wrong reward count", found, expected, "return a flat list")

    if hasattr(result, "tolist"):
        if getattr(result, "ndim", 1) != 1:
            raise wrong_count(f"shape {tuple(result.shape)}")
        result = result.tolist()
    if not isinstance(result, list | tuple):
        raise wrong_count(type(result).__name__)
    if len(result) != count:
        raise wrong_count(f"{len(result)} values")
    return [_number(value, i, texts[i], nan_is_none) for i, value in enumerate(result)]


def _number(value: Any, sample: int, text: str, nan_is_none: bool) -> float | None:
    if value is None:
        return None
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(number, int | float):
        found = f"{type(value).__name__} {_short(repr(value), 60)}"
    elif abs(number) <= LARGEST_FLOAT32:  # False for NaN and infinity too.
        return float(number)
    elif nan_is_none and math.isnan(number):
        return None
    else:
        shown = number if isinstance(number, float) or abs(number) < 10**30 else "an integer beyond float32"
        overflow = "" if isinstance(number, float) and not math.isfinite(number) else " (overflows float32)"
        found = f"{shown}{overflow} for {_short(text, 60)!r}"
    fix = "handle this case, or return None where the reward does not apply"
    raise CallFailed("E303", "bad reward value", found, "a finite number or None", fix, sample)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0].get("content", "") if completion else "")


def _short(text: object, limit: int) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
