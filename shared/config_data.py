"""The settings of training and evaluation rows; part of ``shared/config.py``."""

from __future__ import annotations

import contextlib
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from shared.config_algorithm import Positive, Section


class Filter(Section):
    """What a row has to meet to be used; of several, all."""

    column: str
    """Column that is looked at; a row without a value in it is left out."""
    one_of: list[str | int | float | bool] | None = None
    """Its value is one of these."""
    matches: str | None = None
    """Its text contains this regular expression."""
    at_least: float | None = None
    """Least value of a number, least length of a string or list."""
    at_most: float | None = None
    """Largest value, or length."""


class Source(Section):
    """Rows of one kind."""

    path: str
    """A .jsonl, .json, .csv or .parquet file, a folder of them, a hub dataset (org/name or org/name@COMMIT), builtin:NAME, or
    reasoning-gym:TASK."""
    args: dict[str, Any] = {}
    """Of a reasoning-gym task: size (default 1000), seed, and what it takes else."""
    subset: str | None = None
    """Configuration of a hub dataset: the folder of its files."""
    split: str | None = None
    """Split of a hub dataset or folder, or a pattern of its files; default: train for data.train, test for data.eval."""
    name: str | None = None
    """In messages and metrics; default: that of the file."""
    columns: dict[str, str] = {}
    """New name of a column -> its name in the file."""
    filters: list[Filter] = []
    """Rows that do not meet all of these are left out."""
    max_rows: Positive | None = None
    """Use the first so many that are left."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of a mixture, relative to the others' (all or none have one); default: every row once an epoch."""


def _as_sources(given: Any) -> Any:
    """A path alone, or one source, stands for a list of one."""
    given = [given] if isinstance(given, str | dict | Source) else given
    return [{"path": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given


Sources = Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]


def _as_day(given: Any) -> Any:
    """The day as text: TOML has dates of its own. Raises ``ValueError`` for what is no day of the calendar."""
    with contextlib.suppress(ValueError):
        if date.fromisoformat(str(given)).isoformat() == str(given):
            return str(given)
    raise ValueError("a day as YYYY-MM-DD")


Day = Annotated[str, BeforeValidator(_as_day)]


class Data(Section):
    """Rows to train and evaluate on."""

    train: Sources
    """Rows to train on: a path, or a list of sources with path, subset, split, columns, filters, max_rows, weight."""
    eval: Sources | None = None
    """Held-out rows, same forms; none: no evaluation."""
    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    chat: bool = False
    """Wrap string prompts as one user message and apply the chat template."""
    system_prompt: str | None = None
    """System message put before every conversation."""
    date: Day | None = None
    """Day, as YYYY-MM-DD, that chat templates are told when they ask for today's date; default: that of the run's first start."""
    shuffle: bool = True
    """Visit rows in a new random order each epoch (from run.seed)."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with blank prompts."""
    on_long_prompt: Literal["error", "drop"] = "error"
    """What to do with prompts over rollout.max_prompt_tokens; they are never cut."""
    allow_overlap: bool = False
    """Accept evaluation prompts that also occur in the training rows."""
