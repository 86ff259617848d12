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

from shared.types import Completion, Prompt, RolloutGroup, VersionSpan


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


def read_groups(path: Path, prompt_of: Callable[[int], Prompt]) -> list[RolloutGroup]:
    """The groups of a file; ``prompt_of`` gives the prompt of a group id. Advantages are not read back."""
    import pyarrow.parquet

    together: dict[int, list[dict[str, Any]]] = {}
    for row in pyarrow.parquet.read_table(path).to_pylist():
        together.setdefault(row["group_id"], []).append(row)
    return [_group(group_id, rows, prompt_of(group_id)) for group_id, rows in together.items()]


def _group(group_id: int, rows: list[dict[str, Any]], prompt: Prompt) -> RolloutGroup:
    names = json.loads(rows[0]["names"])
    return RolloutGroup(
        group_id=group_id,
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
