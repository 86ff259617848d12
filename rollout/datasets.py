"""Where rows come from: files, the Hugging Face hub, generated tasks; mapped to the columns that are wanted, and filtered.

``PromptSet`` asks for the rows of every ``data.Source`` and names each by its file and number as the file counts. Nothing is
left out in silence: what a filter drops is counted by the caller.
"""

from __future__ import annotations

import fnmatch
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.generated_tasks import SCHEME, task_rows
from shared.config_data import Filter, Source
from shared.errors import InputError, nearest, one_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PINNED = re.compile(r"([\w.-]+/[\w.-]+)(?:@([0-9a-f]{40}))?")
"""A hub dataset: ``org/name``, or at one commit ``org/name@<commit>``."""
HUB_SAYS = {
    "GatedRepoError": "asks for a login",
    "RepositoryNotFoundError": "knows no such dataset",
    "RevisionNotFoundError": "knows no such commit",
    "LocalEntryNotFoundError": "cannot be reached",
    "ConnectionError": "cannot be reached",
}
"""What an exception means that its client raises."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of one source."""

    name: str
    """As messages and metrics call it."""
    rows: list[tuple[str, Row]]
    """``(place, row)``: the place is file and number, lines of JSONL and rows of other forms from 1."""
    filtered: int
    """That a filter left out."""


def read(source: Source, split: str, key: str) -> Rows:
    """The rows of ``source``; ``split`` where it names none, ``key`` is the setting that messages name.

    Raises ``InputError`` E201-E206 or E210; of a generated task E101, E102, E201, E309 or E702.
    """
    name, rows = _all_rows(source, source.split or split, key)
    for column, original in source.columns.items():
        if rows and all(original not in row for _, row in rows):
            there = ", ".join(rows[0][1])
            guess = nearest(original, rows[0][1])
            fix = f'{key}.columns.{column} = "{guess or next(iter(rows[0][1]))}"'
            place = f"{rows[0][0].rpartition(':')[0]}:{original}"
            raise InputError("E202", "no such column", place, there, original, fix)
    rows = [(place, _renamed(row, source.columns)) for place, row in rows]
    kept = [(place, row) for place, row in rows if all(_passes(row, f, place) for f in source.filters)]
    if not kept:
        found, fix = f"0 of {len(rows)} rows pass its filters", "loosen the filters"
        raise InputError("E203", "no rows", key, found, "at least 1", fix)
    return Rows(source.name or name, kept[: source.max_rows], len(rows) - len(kept))


def _all_rows(source: Source, split: str, key: str) -> tuple[str, list[tuple[str, Row]]]:
    """What messages call ``source``, and its rows with their places, as they are before its columns and filters."""
    if source.path.startswith(SCHEME):
        return source.path.removeprefix(SCHEME), task_rows(source, split, key)
    if source.args:
        found, expected = f"args of {source.path}", f"args of {SCHEME}TASK alone"
        raise InputError("E108", "options disagree", f"{key}.args", found, expected, "remove args")
    files = find_files(source, split, key)
    name = Path(source.path).stem if Path(source.path).is_file() else source.path
    return name, [(f"{file.name}:{number}", row) for file in files for number, row in number_rows(file)]


def find_files(source: Source, split: str, key: str) -> list[Path]:
    """The files of ``source`` on this machine, from the hub if need be. Raises ``InputError`` E201 or E210."""
    path, matched = Path(source.path), PINNED.fullmatch(source.path)
    if path.is_dir():
        return _of_split(path, source, split, key)
    if matched and not path.exists() and not path.parent.is_dir():
        return _of_split(_from_hub(matched[1], matched[2], key), source, split, key)
    if path.suffix == ".py":
        fix = "convert it once"
        raise InputError("E210", "dataset script refused", key, source.path, "parquet, json, csv or jsonl", fix)
    if not path.is_file():
        similar = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        fix = f"did you mean {path.parent / similar}?" if similar else "give the path of a local file"
        found, expected = f'"{source.path}" (no such file)', f"a {', '.join(SUFFIXES)} file"
        raise InputError("E201", "dataset not found", key, found, expected, fix)
    if path.suffix not in SUFFIXES:
        expected, fix = f"one of {', '.join(SUFFIXES)}", "convert it once"
        raise InputError("E201", "dataset not found", key, f'"{source.path}"', expected, fix)
    return [path]


def _from_hub(name: str, revision: str | None, key: str) -> Path:
    """The folder of a hub dataset: the copy on this machine, else downloaded."""
    from huggingface_hub import snapshot_download

    kinds, problem = [f"*{suffix}" for suffix in SUFFIXES] + ["*.py"], ""
    for offline in (True, False):
        try:
            folder = snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=kinds, local_files_only=offline
            )
            return Path(folder)
        except Exception as error:  # Whatever keeps it from being there, the message says so.
            answers = (HUB_SAYS.get(kind.__name__) for kind in type(error).__mro__)
            problem = next(filter(None, answers), one_line(f"says {type(error).__name__}: {error}", 120))
    found, expected = f'"{name}" (no local copy, and the hub {problem})', "a file or a cached dataset"
    raise InputError("E201", "dataset not found", key, found, expected, "download it once, or give a local path")


def _of_split(folder: Path, source: Source, split: str, key: str) -> list[Path]:
    """Files of a folder in one of the hub's usual layouts: ``<subset>/<split>-*.parquet``, ``data/<split>*.jsonl``, ..."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
    named = {str(path.relative_to(folder)): path for path in files}
    if source.subset is not None:
        named = {name: path for name, path in named.items() if source.subset in Path(name).parts[:-1]}
    chosen = [path for name, path in named.items() if fnmatch.fnmatch(name, split)]
    words = re.compile(rf"(?:^|[/_.-]){re.escape(split)}(?:[_.-]|$|/)")
    chosen = chosen or [path for name, path in named.items() if words.search(name)]
    layouts = {path.parent for path in chosen}
    if chosen and len(layouts) == 1:
        return chosen
    place = f"{key}.{'split' if not chosen else 'subset'}"
    if not files and any(folder.glob("*.py")):
        fix = "convert it once"
        raise InputError("E210", "dataset script refused", key, source.path, "parquet, json, csv or jsonl", fix)
    there = ", ".join(sorted(named)[:6]) or ", ".join(p.name for p in files[:6]) or "no data files"
    found = f"{there} in {source.path}"
    if chosen:
        expected = "files of one subset"
        fix = f'subset = "{chosen[0].parent.relative_to(folder)}"'
    else:
        expected, fix = (
            f"files of split {split}",
            "set split (a name, or a pattern like data/part-*.parquet) and subset",
        )
    raise InputError("E201", "dataset not found", place, found, expected, fix)


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """``row`` with its mapped columns under their new names, in place of any that were called so."""
    moved = {column: row.get(original) for column, original in columns.items()}
    return {name: value for name, value in row.items() if name not in columns.values() and name not in moved} | moved


def _passes(row: Row, rule: Filter, place: str) -> bool:
    """Whether ``row`` meets all that ``rule`` asks of its column; a row without a value does not."""
    value = row.get(rule.column)
    if rule.column not in row:
        guess = nearest(rule.column, row)
        fix = f'column = "{guess}"' if guess else "another column"
        raise InputError("E202", "no such column", f"{place}:{rule.column}", ", ".join(row), rule.column, fix)
    if value is None:
        return False
    checks: list[bool] = []
    if rule.one_of is not None:
        checks.append(value in rule.one_of)
    if rule.matches is not None:
        checks.append(re.search(rule.matches, str(value)) is not None)
    size = len(value) if isinstance(value, str | list) else value
    if (rule.at_least, rule.at_most) != (None, None) and not isinstance(size, int | float):
        found, fix = type(value).__name__, "at_least and at_most take numbers, and lengths of strings and lists"
        raise InputError("E206", "no number", f"{place}:{rule.column}", found, "a number, string or list", fix)
    if rule.at_least is not None:
        checks.append(size >= rule.at_least)
    if rule.at_most is not None:
        checks.append(size <= rule.at_most)
    return all(checks)


# --- files ---


def number_rows(file: Path) -> list[tuple[int, Row]]:
    """All rows of a data file with their numbers as it counts them: lines of JSONL, rows of other forms, from 1.

    Raises ``InputError`` E203-E206, naming file and line.
    """
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
        number, found = line + error.lineno - 1, f"{error.msg.removesuffix(' at')} at column {error.colno}"
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
