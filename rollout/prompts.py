"""Rows become prompts: load, check, apply the chat template, tokenise, and hand out in a seeded order.

The position in the data is one integer, so a run resumes exactly. Invariant: a prompt is never cut; what cannot be
used is refused, or dropped and counted when the configuration says so.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import Config
from shared.errors import InputError, nearest, one_line, raise_all
from shared.types import Prompt

RESERVED = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
"""Keywords that reward functions get from Millrace; a column of that name would hide them."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Row = dict[str, Any]


def load_rows(path: str, key: str) -> list[Row]:
    """All rows of a data file; errors as in ``number_rows``."""
    return [row for _, row in number_rows(path, key)]


def number_rows(path: str, key: str) -> list[tuple[int, Row]]:
    """All rows with their numbers as the file counts them: lines of JSONL, rows of other forms, from 1.

    Raises ``InputError`` E201, E203-E206 or E210, naming ``key`` or file and line.
    """
    file = Path(path)
    if file.suffix == ".py":
        raise InputError("E210", "dataset script refused", key, path, "parquet, json, csv or jsonl", "convert it once")
    if not file.is_file():
        similar = nearest(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else None
        fix = f"did you mean {file.parent / similar}?" if similar else "give the path of a local file"
        raise InputError(
            "E201", "dataset not found", key, f'"{path}" (no such file)', f"a {', '.join(SUFFIXES)} file", fix
        )
    if file.suffix not in SUFFIXES:
        raise InputError(
            "E201", "dataset not found", key, f'"{path}"', f"one of {', '.join(SUFFIXES)}", "convert it once"
        )
    rows = _read_parquet(file) if file.suffix == ".parquet" else _read_text(file)
    if not rows:
        raise InputError("E203", "no rows", file.name, "0 rows", "at least 1", "check the export")
    _check_types(rows, file.name)
    return rows


def _read_parquet(file: Path) -> list[tuple[int, Row]]:
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(
            "E204", "invalid parquet", file.name, str(error), "a parquet file", "export it again"
        ) from None


def _read_text(file: Path) -> list[tuple[int, Row]]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte {raw[error.start]:#04x}"
        fix = "convert with iconv -f latin1 -t utf-8"
        raise InputError("E205", "not UTF-8", f"{file.name}:{line}", found, "UTF-8", fix) from None
    if file.suffix == ".csv":
        import csv

        numbered = list(enumerate(map(dict, csv.DictReader(io.StringIO(text, newline=""))), 1))
        for number, row in numbered:
            if None in row:
                found, fix = "more cells than columns", f"repair row {number}"
                raise InputError("E204", "invalid CSV", f"{file.name}:{number}", found, "one cell per column", fix)
        return numbered
    if file.suffix == ".json":
        rows = _parse_json(text, file.name, 1)
        if not isinstance(rows, list):
            raise InputError(
                "E204",
                "invalid JSON",
                file.name,
                type(rows).__name__,
                "a list of objects",
                "use .jsonl for one object per line",
            )
        numbered = list(enumerate(rows, 1))
    else:
        # JSON ends lines with a newline only; splitlines() would also cut at separators inside strings.
        numbered = [(i, _parse_json(line, file.name, i)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            found = type(row).__name__
            raise InputError(
                "E204",
                "invalid JSON",
                f"{file.name}:{number}",
                found,
                "one object per line",
                f"repair or remove line {number}",
            )
    return numbered


def _parse_json(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number, found = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except RecursionError:
        number, found = line, "brackets nested too deep"
    fix = f"repair or remove line {number}"
    raise InputError("E204", "invalid JSON", f"{name}:{number}", found, "one object per line", fix)


def _check_types(rows: list[tuple[int, Row]], name: str) -> None:
    seen: dict[str, tuple[type, int]] = {}
    for number, row in rows:
        for column, value in row.items():
            if value is None:
                continue
            kind, first = seen.setdefault(column, (type(value), number))
            if type(value) is not kind and {type(value), kind} != {int, float}:
                found = f"{kind.__name__} in row {first} and {type(value).__name__} in row {number}"
                raise InputError(
                    "E206", "mixed types", f"{name}:{column}", found, "one type", f"write all of {column} as strings"
                )


@dataclass
class PromptSet:
    """The usable rows of one file, tokenised."""

    prompts: list[Prompt]
    dropped: dict[str, int]
    """Rows left out, by reason."""

    @classmethod
    def load(cls, config: Config, path: str, key: str, tokenizer: Any) -> PromptSet:
        """Read, check and tokenise ``path``. Raises ``InputErrors`` E202, E207, E208, E403 and those of ``load_rows``."""
        rows, name = number_rows(path, key), Path(path).name
        column = config.data.prompt_column
        for number, row in rows:
            if row.get(column) is None and column not in row:
                others = ", ".join(row)
                guess = nearest(column, row) or next(
                    (c for c in ("prompt", "question", "messages", "problem") if c in row), None
                )
                fix = f'data.prompt_column = "{guess}"' if guess else "set data.prompt_column"
                raise InputError("E202", "no such column", f"{name}:{column}", f"{others} in row {number}", column, fix)
        taken = sorted(RESERVED & {c for _, row in rows for c in row})
        if taken:
            found, fix = ", ".join(taken), "rename the column"
            raise InputError("E202", "column name taken", name, found, "no argument of a reward function", fix)
        encode = _encoder(config, tokenizer, f"{name}:1", key)
        blank, long, prompts = [], [], []
        limit = config.rollout.max_prompt_tokens
        for index, (number, row) in enumerate(rows):
            text = row[column]
            if text is not None and not isinstance(text, str | list):
                found, fix = type(text).__name__, f"write {column} as text"
                raise InputError("E206", "prompt is no text", f"{name}:{number}", found, "text or messages", fix)
            if not text or (isinstance(text, str) and not text.strip()):
                blank.append(number)
                continue
            shown, ids = encode(text)
            if not ids:
                blank.append(number)
                continue
            if len(ids) > limit:
                long.append((number, len(ids)))
                continue
            columns = {c: v for c, v in row.items() if c not in ("prompt", "completion", "completion_ids")}
            prompts.append(Prompt(index, np.asarray(ids, dtype=np.int32), shown, columns))
        _refuse(config, name, blank, long, limit)
        return cls(prompts, {"blank": len(blank), "long": len(long)})


def _refuse(config: Config, name: str, blank: list[int], long: list[tuple[int, int]], limit: int) -> None:
    problems = []
    if blank and config.data.on_bad_row == "error":
        place = f"{name}:{blank[0]}" + (f" (and {len(blank) - 1} more)" if len(blank) > 1 else "")
        fix = 'remove them or data.on_bad_row = "drop"'
        problems.append(InputError("E207", "blank prompts", place, f"{len(blank)} empty prompts", "text", fix))
    if long and config.data.on_long_prompt == "error":
        place = f"{name}:{long[0][0]}" + (f" (and {len(long) - 1} more)" if len(long) > 1 else "")
        fix = 'raise it or data.on_long_prompt = "drop"'
        found, expected = f"up to {max(n for _, n in long)} tokens", f"<= rollout.max_prompt_tokens = {limit}"
        problems.append(InputError("E208", "prompts too long", place, found, expected, fix))
    raise_all(problems)


def _encoder(config: Config, tokenizer: Any, place: str, key: str) -> Callable[[Any], tuple[Any, list[int]]]:
    """``text or messages -> (prompt as the rewards see it, token ids)``."""
    import jinja2

    template = config.model.chat_template or tokenizer.chat_template
    system = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt else []

    def encode(value: Any) -> tuple[Any, list[int]]:
        if isinstance(value, str) and not config.data.chat:
            return value, tokenizer(value)["input_ids"]
        messages = system + ([{"role": "user", "content": value}] if isinstance(value, str) else list(value))
        if template is None:
            fix = "set model.chat_template"
            raise InputError(
                "E403",
                "no chat template",
                key.rpartition("data.")[0] + "model.tokenizer",
                f"messages in {place}",
                "a template or plain prompts",
                fix,
            )
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            where, found = key.rpartition("data.")[0] + "model.chat_template", f"{one_line(error)} for {place}"
            raise InputError(
                "E403", "chat template failed", where, found, "a template for these messages", "correct it"
            ) from None
        return messages, tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode


class PromptStream:
    """Endless prompts in a seeded order; ``cursor`` is the whole state."""

    def __init__(self, prompts: list[Prompt], seed: int, shuffle: bool = True) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self.cursor = 0
        """Prompts handed out so far; also the next group's id."""
        self._epoch, self._order = -1, np.arange(len(prompts))

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.cursor / len(self._prompts)

    def at(self, position: int) -> Prompt:
        """The prompt at ``position``, in its epoch's permutation."""
        epoch, row = divmod(position, len(self._prompts))
        if self._shuffle and epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
        return self._prompts[int(self._order[row])]

    def next(self) -> tuple[int, Prompt]:
        """``(group_id, prompt)`` at the cursor, which moves on."""
        group_id = self.cursor
        self.cursor += 1
        return group_id, self.at(group_id)

    @cached_property
    def digest(self) -> str:
        """What tells one dataset from another: sha256 over all token ids, in the file's order."""
        hasher = hashlib.sha256()
        for prompt in self._prompts:
            hasher.update(len(prompt.token_ids).to_bytes(4, "little") + prompt.token_ids.tobytes())
        return hasher.hexdigest()
