"""What became of each of TRL's settings: the table ``settings.txt`` beside this file, read once and checked.

The readers take names, kinds and defaults from it, ``rules`` what is copied, ``docs/import-trl.md`` shows it. Invariant: every
Millrace key that it names exists.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from shared.config_loader import known_keys
from shared.config_names import table
from shared.errors import InputError, one_line

VERSION = "TRL 1.16.0"
TRAINER = "GRPOTrainer"
MAY_BE_NONE = {"vllm_importance_sampling_clip_max", "max_completion_length"}
"""Settings with a number as default for which None means something."""
KINDS: dict[str, Any] = {
    **dict.fromkeys(("generation_batch_size", "steps_per_generation", "eval_steps", "save_total_limit"), int),
    **dict.fromkeys(("max_prompt_length", "vllm_max_model_length", "vllm_max_model_len"), int),
    **dict.fromkeys(("epsilon_high", "delta", "min_p", "off_policy_mask_threshold"), float),
    **dict.fromkeys(("vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap"), float),
    **dict.fromkeys(("loss_type", "vllm_importance_sampling_mode"), str),
    **dict.fromkeys(("model_init_kwargs", "lr_scheduler_kwargs"), dict),
    **dict.fromkeys(("reward_weights", "datasets"), list),
    "reward_funcs": str | list,
    "scale_rewards": str | bool,
    "bf16": bool,
}
"""What settings have to be whose default does not say it; a number as default says it."""
EXPECTED = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    dict: "a table",
    list: "a list",
    str | list: "a name, or a list of them",
    str | bool: "text, true or false",
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Row:
    """One setting of TRL."""

    section: str
    name: str
    default: Any
    keys: tuple[str, ...]
    """Millrace's keys; none where there is no equal, or no meaning."""
    fate: str
    """copied, mapped, no equal or no meaning."""
    text: str
    """How it is mapped, or why it is not."""
    differs: bool
    """It means something else here, which is said where it is given."""


@functools.cache
def rows() -> tuple[Row, ...]:
    """The whole table, in its order."""
    return tuple(_row(*cells) for cells in table())


def _row(section: str, name: str, default: str, keys: str, text: str) -> Row:
    fate = {"none": "no equal", "-": "no meaning"}.get(keys, "copied" if keys.startswith("=") else "mapped")
    named = () if fate.startswith("no ") else tuple(key.strip() for key in keys.lstrip("= ").split(","))
    # reward.functions and the like are lists of tables, algorithm.kl a table: both lie on the way to known keys.
    unknown = [key for key in named if not any(f"{known}.".startswith(f"{key}.") for known in known_keys())]
    assert not unknown, f"{name}: no such key {unknown}"
    return Row(section, name, ast.literal_eval(default), named, fate, text.removeprefix("! "), text.startswith("!"))


@functools.cache
def settings() -> dict[str, Row]:
    """Everything that may stand in a GRPOConfig, or in a file for ``trl grpo``, by name."""
    return {row.name: row for row in rows() if row.section != TRAINER}


@functools.cache
def trainer_arguments() -> dict[str, Row]:
    """The arguments of GRPOTrainer, by name."""
    return {row.name: row for row in rows() if row.section == TRAINER}


def coerced(name: str, value: Any, place: str) -> Any:
    """``value`` in the kind of the setting, as TRL's own parser would read it. Raises ``InputError`` E102."""
    default = settings()[name].default if name in settings() else None
    kind = KINDS.get(name) or (type(default) if isinstance(default, int | float) else None)
    if isinstance(value, str) and not isinstance(default, str):
        value = _from_text(value, kind)
    if kind is None:
        return value
    if value is None:  # As in the JSON of an older release, where it was allowed.
        return None if name in MAY_BE_NONE else default
    fix = "correct it, or leave it out" if default is None else f"{name} = {default}"
    if not _is(value, kind):
        raise InputError("E102", "bad value", place, one_line(repr(value)), EXPECTED[kind], fix)
    if name == "reward_weights":
        return [number(one, f"{place}[{i}]") for i, one in enumerate(value)]
    if kind is float:
        return float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: Any, place: str) -> float:
    """``value``, which lies inside a setting, as a number. Raises ``InputError`` E102."""
    value = _from_text(value, float) if isinstance(value, str) else value
    if not _is(value, float):
        raise InputError("E102", "bad value", place, one_line(repr(value)), EXPECTED[float], "write a number")
    return float(value)


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _from_text(value: str, kind: Any) -> Any:
    """YAML reads 1e-6 as text, and transformers takes tables as JSON."""
    words = {"none": None, "null": None} | ({"true": True, "false": False} if kind is bool else {})
    if value.lower() in words:
        return words[value.lower()]
    if NUMBER.fullmatch(value) and (kind in (bool, int, float) or "e" in value.lower()):
        return float(value)
    return _table(value) if kind is dict and value.startswith("{") else value


def _table(text: str) -> Any:
    """``text`` as JSON; as it is, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
