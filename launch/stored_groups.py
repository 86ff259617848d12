"""Scored groups as parquet, one row a completion, without loss: samples to read, queued groups to go on with, steps to replay.

``RunFolder`` writes the samples of a step, a checkpoint the groups that wait for the learner; ``millrace replay`` reads
them. A group read back equals the one written, bit for bit; its prompt comes from the dataset again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import InputError, one_line
from shared.types import Completion, Prompt, RolloutGroup, VersionSpan

Row = dict[str, Any]


def write_groups(path: Path, groups: Sequence[RolloutGroup], step: int | None = None) -> None:
    """All completions of ``groups``; ``step`` that trained them, if any."""
    import pyarrow
    import pyarrow.parquet

    rows = [_row(group, i, step) for group in groups for i in range(len(group.completions))]
    columns = dict.fromkeys(column for row in rows for column in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "rollout_logprobs": pyarrow.list_(pyarrow.float32()),
        "versions": pyarrow.list_(pyarrow.int64()),
        "reward": pyarrow.float32(),
        "advantage": pyarrow.float32(),
    }
    arrays = {}
    for column in columns:
        kind = pyarrow.float32() if column.startswith("rewards/") else types.get(column)
        arrays[column] = pyarrow.array([row.get(column) for row in rows], type=kind, from_pandas=False)
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


def _row(group: RolloutGroup, i: int, step: int | None) -> dict[str, Any]:
    completion = group.completions[i]
    row: dict[str, Any] = {
        "step": step,
        "group_id": group.group_id,
        "prompt": str(group.prompt.text),
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
        "reward": float(group.rewards[i]),
        "advantage": None if group.advantages is None else float(group.advantages[i]),
    }
    row |= {f"rewards/{name}": float(values[i]) for name, values in group.reward_parts.items()}
    row |= {f"extra/{name}": _storable(values[i]) for name, values in group.extra.items()}
    return row | {
        "token_ids": completion.token_ids.tolist(),
        "rollout_logprobs": completion.logprobs.tolist(),
        "versions": [number for span in completion.version_spans for number in span],
        "names": json.dumps({"parts": list(group.reward_parts), "extra": list(group.extra), "metrics": group.metrics}),
    }


def _storable(value: Any) -> str:
    """``value`` as text, with halves of characters written out: a reward service may send them, and no file holds them."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def sample_files(run: Path) -> dict[int, Path]:
    """The files of a run's samples by step, in order; a file that somebody else named is none."""
    files = [path for path in (run / "samples").glob("step-*.parquet") if path.stem.removeprefix("step-").isdecimal()]
    return {int(path.stem.removeprefix("step-")): path for path in sorted(files)}


def read_samples(path: Path) -> tuple[list[list[Row]], int]:
    """The rows of a file by group, and how many groups are left out for a cell that ``write_groups`` cannot have written.

    Raises ``OSError`` for a file that cannot be read, or is being written.
    """
    import pyarrow.parquet

    together: dict[Any, list[Row]] = {}
    try:
        for row in pyarrow.parquet.read_table(path).to_pylist():
            together.setdefault(row.get("group_id"), []).append(row)
    except (
        pyarrow.ArrowException,
        ValueError,
        TypeError,
    ) as error:  # Text that is no UTF-8, a group id that is a list.
        raise OSError(one_line(error)) from None
    whole = [rows for rows in together.values() if all(map(_is_whole, rows))]
    return whole, len(together) - len(whole)


def _is_whole(row: Row) -> bool:
    count, cells = row.get("tokens"), [row.get(name) for name in ("versions", "token_ids", "rollout_logprobs")]
    values = [row.get("step"), *(value for name, value in row.items() if name.startswith("rewards/"))]
    if not (
        all(type(row.get(name)) is int for name in ("group_id", "tokens"))
        and all(type(row.get(name)) is str for name in ("prompt", "completion", "finish_reason"))
        and all(_is_number_or_none(value) for value in [*values, row.get("reward", ""), row.get("advantage", "")])
        and all(isinstance(cell, list) for cell in cells)
    ):
        return False
    versions, ids, logprobs = (list(cell or []) for cell in cells)
    return (
        len(ids) == len(logprobs) == count
        and all(type(number) is int and number >= 0 for number in (*ids, *versions))
        and all(map(_is_number_or_none, logprobs))
        and len(versions) % 3 == 0
        and all(start <= end <= count for start, end in zip(versions[1::3], versions[2::3], strict=True))
        and names_of(row) is not None
    )


def _is_number_or_none(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def names_of(row: Row) -> dict[str, Any] | None:
    """What the cell ``names`` of a row holds: reward functions, logged columns and metrics. None for what is no such cell."""
    try:
        names = json.loads(row.get("names") or "{}")
        lists = [names.get("parts", []), names.get("extra", [])]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    sound = all(isinstance(part, list) and all(isinstance(name, str) for name in part) for part in lists)
    return names if sound else None


def read_groups(path: Path, prompt_of: Callable[[int], Prompt]) -> list[RolloutGroup]:
    """The groups of a file; ``prompt_of`` gives the prompt of a group id. Advantages are not read back.

    Raises ``InputError`` E606 if the file, or one of its rows, is damaged.
    """
    try:
        stored, damaged = read_samples(path)
        found = f"{damaged} groups with damaged rows" if damaged else ""
    except OSError as error:
        stored, found = [], str(error)
    if found:
        raise InputError("E606", "damaged record", str(path), found, "the groups as they were written", "restore it")
    return [_group(rows, prompt_of(rows[0]["group_id"])) for rows in stored]


def _group(rows: list[Row], prompt: Prompt) -> RolloutGroup:
    names = {"parts": [], "extra": [], "metrics": {}} | (names_of(rows[0]) or {})
    return RolloutGroup(
        group_id=rows[0]["group_id"],
        prompt=prompt,
        completions=tuple(_completion(row) for row in rows),
        rewards=np.array([row["reward"] for row in rows], np.float32),
        reward_parts={name: np.array([row[f"rewards/{name}"] for row in rows], np.float32) for name in names["parts"]},
        extra={name: [row[f"extra/{name}"] for row in rows] for name in names["extra"]},
        metrics=names["metrics"],
    )


def _completion(row: dict[str, Any]) -> Completion:
    versions = row["versions"]
    return Completion(
        token_ids=np.array(row["token_ids"], np.int32),
        logprobs=np.array(row["rollout_logprobs"], np.float32),
        text=row["completion"],
        finish_reason=row["finish_reason"],
        version_spans=tuple(VersionSpan(*versions[i : i + 3]) for i in range(0, len(versions), 3)),
    )
