"""What is wrong, or odd, with the rows of a checked configuration: how many, twice, shared, dropped, without a value.

``preflight.prepare`` asks for it once the rows are prompts.
"""

from __future__ import annotations

from pathlib import Path

from rollout.prompts import PromptSet
from shared.config import Config
from shared.config_data import Source
from shared.errors import InputError
from shared.types import Prompt

Reads = dict[str, list[str]]
"""Columns that each reward reads, by its name."""


def check_rows(
    config: Config, train: PromptSet, held_out: list[Prompt], reads: Reads, problems: list[InputError]
) -> list[str]:
    """Enough rows, no row twice, none of ``held_out`` in them: ``problems`` get what is wrong, the lines what is odd."""
    name, needed = _names(config.data.train), config.learner.prompts_per_step
    if len(train.prompts) < needed:
        found, expected = f"{len(train.prompts)} usable rows", f">= learner.prompts_per_step ({needed})"
        problems.append(
            InputError("E203", "too few rows", name, found, expected, "add rows or lower learner.prompts_per_step")
        )
    warnings = train.warnings + _dropped(train, name) + _missing_values(name, train, reads)
    seen = {prompt.token_ids.tobytes() for prompt in train.prompts}
    duplicates = len(train.prompts) - len(seen)
    if duplicates:
        warnings.append(f"warning[W209] duplicate prompts — {name}. Found {duplicates}, expected none.")
    shared = [prompt for prompt in held_out if prompt.token_ids.tobytes() in seen]
    if shared and not config.data.allow_overlap:
        place = f"{_names(config.data.eval)}:{shared[0].prompt_id + 1}"
        fix = "remove them or data.allow_overlap = true"
        problems.append(InputError("E209", "eval rows in train", place, f"{len(shared)} shared prompts", "0", fix))
    return warnings


def check_held_out(config: Config, held: PromptSet, reads: Reads, problems: list[InputError]) -> list[str]:
    """Some rows are left: else ``problems`` get it. The lines say what was left out."""
    name, count = _names(config.data.eval), len(held.prompts)
    if config.data.eval and not count:
        dropped = ", ".join(f"{n} {reason}" for reason, n in held.dropped.items() if n)
        problems.append(
            InputError("E203", "no rows", name, f"all dropped ({dropped})", "at least 1", "change the rows")
        )
    lines = held.warnings + _dropped(held, name) + _missing_values(name, held, reads)
    if count > config.eval.max_rows:
        lines.append(f"info: the first {config.eval.max_rows} of {count} rows of {name} are evaluated (eval.max_rows)")
    return lines


def _missing_values(name: str, rows: PromptSet, reads: Reads) -> list[str]:
    """A warning for each column that some rows lack and a reward reads."""
    lines = []
    for column in dict.fromkeys(column for columns in reads.values() for column in columns):
        lacking = sum(prompt.columns.get(column) is None for prompt in rows.prompts)
        if lacking:
            readers = ", ".join(reader for reader, columns in reads.items() if column in columns)
            found = (
                f"Found no value in {lacking} of {len(rows.prompts)}, expected one in each: {readers} gets None there."
            )
            lines.append(f"warning[W210] rows without {column} — {name}. {found}")
    return lines


def complete_rows(prompts: list[Prompt], reads: Reads) -> list[Prompt]:
    """Those of ``prompts`` that have a value in every column that a reward reads; all if there is none such."""
    needed = {column for columns in reads.values() for column in columns}
    return [p for p in prompts if all(p.columns.get(column) is not None for column in needed)] or prompts


def _dropped(rows: PromptSet, name: str) -> list[str]:
    found = {("rows" if reason == "filtered" else "prompts", reason): n for reason, n in rows.dropped.items() if n}
    return [f"info: {n} {reason} {kind} of {name} dropped" for (kind, reason), n in found.items()]


def _names(sources: list[Source] | None) -> str:
    return " + ".join(Path(source.path).name for source in sources or [])
