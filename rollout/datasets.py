"""Where rows come from: files, the Hugging Face hub, generated tasks; mapped to the columns that are wanted, and filtered.

``PromptSet`` asks for the rows of every ``data.Source`` and names each by its file and number as the file counts. Nothing is
left out in silence: what a filter drops is counted by the caller.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path

from rollout import hub
from rollout.generated_tasks import SCHEME, task_rows
from rollout.row_files import SUFFIXES, Row, number_rows
from shared.config_data import Filter, Source
from shared.errors import InputError, nearest

SHARD = re.compile(r"[-_.]?(?P<part>\d+)(?:-of-(?P<parts>\d+)(?:-[0-9a-f]{16})?)?$")
"""How the name of a part of a file ends: ``train-00000-of-00002``, with or without a hash of 16 hex digits behind it."""


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
    rows = _with_all_columns(rows)
    for column, original in source.columns.items():
        if rows and original not in rows[0][1]:
            there = ", ".join(rows[0][1])
            guess = nearest(original, rows[0][1])
            fix = f'{key}.columns.{column} = "{guess or next(iter(rows[0][1]))}"'
            place = f"{rows[0][0].rpartition(':')[0]}:{original}"
            raise InputError("E202", "no such column", place, there, original, fix)
    rows = [(place, _renamed(row, source.columns)) for place, row in rows]
    for number, rule in enumerate(source.filters):
        _check_pattern(rule.matches or "", f"{key}.filters[{number}].matches")
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
    path = Path(source.path)
    if path.is_dir():
        return _of_split(path, source, split, key)
    if hub.is_named(source.path):
        kinds = [*(f"*{suffix}" for suffix in SUFFIXES), "*.py"]
        return _of_split(hub.fetched(source.path, "dataset", "E201", key, kinds), source, split, key)
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


def _of_split(folder: Path, source: Source, split: str, key: str) -> list[Path]:
    """Files of a folder in one of the hub's usual layouts: ``<subset>/<split>-*.parquet``, ``data/<split>*.jsonl``, ..."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
    named = {str(path.relative_to(folder)): path for path in files}
    if source.subset is not None:
        named = {name: path for name, path in named.items() if source.subset in Path(name).parts[:-1]}
    chosen = [path for name, path in named.items() if fnmatch.fnmatch(name, split)]
    words = re.compile(rf"(?:^|[/_.-]){re.escape(split)}(?:[_.-]|$|/)")
    one = bool(chosen)  # A pattern means all that it matches.
    if not chosen:
        chosen = [path for name, path in named.items() if words.search(name)]
        chosen = [path for path in chosen if _whole_name(path) == split] or chosen
        one = all(split in path.relative_to(folder).parts[:-1] for path in chosen)
        one = one or len({_whole_name(path) + path.suffix for path in chosen}) == 1
    layouts = {path.parent for path in chosen}
    if one and len(layouts) == 1:
        _check_parts(chosen, folder, key)
        return chosen
    place = f"{key}.{'split' if not chosen else 'subset'}"
    if not files and any(folder.glob("*.py")):
        fix = "convert it once"
        raise InputError("E210", "dataset script refused", key, source.path, "parquet, json, csv or jsonl", fix)
    there = ", ".join(sorted(named)[:6]) or ", ".join(p.name for p in files[:6]) or "no data files"
    found = f"{there} in {source.path}"
    if len(layouts) == 1:
        there = ", ".join(sorted(path.name for path in chosen)[:6])
        expected, fix = "one file, or its numbered parts", _choice(chosen, folder)
        raise InputError("E201", "several datasets", f"{key}.split", f"{there} for {split}", expected, fix)
    if chosen:
        expected = "files of one subset"
        fix = f'subset = "{chosen[0].parent.relative_to(folder)}"'
    else:
        expected, fix = (
            f"files of split {split}",
            "set split (a name, or a pattern like data/part-*.parquet) and subset",
        )
    raise InputError("E201", "dataset not found", place, found, expected, fix)


def _whole_name(path: Path) -> str:
    """The name of the file that ``path`` is a part of, without suffix; its own if it is none."""
    return SHARD.sub("", path.stem)


def _choice(chosen: list[Path], folder: Path) -> str:
    """The setting that takes all parts of one of the files in ``chosen``; of several, how to take them all."""
    several = list(dict.fromkeys(_pattern(path, folder) for path in chosen))
    more = f"; for all {len(several)}, a list of sources with a split each" if len(several) > 1 else ""
    return f'split = "{several[0]}"{more}'


def _pattern(path: Path, folder: Path) -> str:
    """The pattern of all parts of the file that ``path`` is a part of, and of no other; its name if it is none."""
    matched = SHARD.search(path.stem)
    if matched is None or matched["parts"] is None:
        return str(path.relative_to(folder))
    head = path.stem[: matched.start("part")]
    pattern = path.with_name(f"{head}*{path.suffix}")
    if {_whole_name(other) for other in path.parent.glob(pattern.name)} != {_whole_name(path)}:
        pattern = path.with_name(f"{head}[0-9]*{path.suffix}")
    return str(pattern.relative_to(folder))


def _check_parts(chosen: list[Path], folder: Path, key: str) -> None:
    """Raises ``InputError`` E201 if files say "of N" and are not N, or belong to several versions of a dataset."""
    matched = [(path, match) for path in chosen if (match := SHARD.search(path.stem)) and match["parts"]]
    if not matched or len(matched) < len(chosen):
        return
    sets: dict[tuple[str, str], list[int]] = {}
    for path, match in matched:
        sets.setdefault((_whole_name(path), match["parts"]), []).append(int(match["part"]))
    names = {name for name, _ in sets}
    if len(sets) > len(names) or any(len(set(parts)) < len(parts) for parts in sets.values()):
        there = ", ".join(path.name for path in chosen[:6])
        expected, fix = "parts of one upload", "remove the files of the older one"
        raise InputError("E201", "several datasets", f"{key}.split", there, expected, fix)
    for (name, total), parts in sets.items():
        first = 1 if int(total) in parts else 0  # Some writers count from 1.
        absent = [f"{name}-{i:0{len(total)}d}-of-{total}" for i in range(first, int(total) + first) if i not in parts]
        if absent:
            path = next(path for path, _ in matched if _whole_name(path) == name)
            found, expected = f"no {', '.join(absent[:6])}" + " ..." * (len(absent) > 6), f"all {int(total)} parts"
            fix = f'split = "{_pattern(path, folder)}" if they are there, else download the dataset again'
            raise InputError("E201", "parts of the dataset are missing", f"{key}.split", found, expected, fix)


def _with_all_columns(rows: list[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """``rows`` where each has every column that any of them has; a value that is not there is None."""
    columns = dict.fromkeys(column for _, row in rows for column in row)
    return [(p, row if len(row) == len(columns) else {c: row.get(c) for c in columns}) for p, row in rows]


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """``row`` with its mapped columns under their new names, in place of any that were called so."""
    moved = {column: row.get(original) for column, original in columns.items()}
    return {name: value for name, value in row.items() if name not in columns.values() and name not in moved} | moved


def _check_pattern(pattern: str, key: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        found, fix = f'"{pattern}" ({error})', f'matches = "{re.escape(pattern)}"'
        raise InputError("E102", "bad value", key, found, "a regular expression", fix) from None


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
