"""``millrace score --reward NAME --data ROWS.jsonl [--json]``: score stored completions with a run's own reward pool.

It runs a reward without a run. Each row is a JSON object with ``completion``, ``prompt`` and the columns that the reward
reads. One value is printed for each row; with ``--json`` the last line is ``{"rewards": [...]}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from launch.options import Options, guarded
from rollout.row_checks import check_code_rows
from shared.config import Config
from shared.errors import GroupFailed, InputError, visible
from shared.types import Completion, Prompt


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _score, parser())


def parser() -> Options:
    """The verb's options."""
    options = Options("score", __doc__, "millrace score --reward gsm8k_answer --data rows.jsonl --json")
    options.add_argument(
        "--reward",
        action="append",
        required=True,
        help="built-in name, pkg.module:function or file.py:function; may repeat",
    )
    options.add_argument("--data", required=True, help="JSON lines with prompt, completion and columns")
    options.add_argument(
        "--args", default="{}", help='arguments of the functions as TOML, for example "{target = 200}"'
    )
    options.add_argument("--isolation", choices=["actor", "subprocess", "sandbox"], help="where the functions run")
    options.add_argument("--timeout-s", type=float, default=10.0, help="longest time of one call")
    options.add_argument("--workers", type=int, default=1, help="reward workers")
    options.add_argument("--json", action="store_true", help='print {"rewards": [...]} last')
    return options


def _score(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    try:
        table = tomllib.loads(f"args = {options.args}")["args"]
    except tomllib.TOMLDecodeError as error:
        expected, fix = "a TOML table", '--args "{target = 200}"'
        raise InputError("E106", "bad option", "command line:--args", str(error), expected, fix) from None
    rows = read_rows(Path(options.data))
    functions = []
    for name in options.reward:
        source, colon, attribute = name.rpartition(":")
        where = f"{Path(source).resolve()}:{attribute}" if colon and source.endswith(".py") else name
        functions.append({"function": where, "args": table, "isolation": options.isolation})
    config = Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": options.data},
            "reward": {
                "functions": functions,
                "workers": options.workers,
                "timeout_s": options.timeout_s,
                "groups_per_call": 32,
            },
        }
    )
    for problem in check_code_rows(config.reward.functions, _placed(Path(options.data), rows)):
        said = f"{problem.what} — {problem.place}. Found {problem.found}, expected {problem.expected}."
        print(visible(f"warning[W310] {said} Such rows get no reward"), file=sys.stderr)
    rewards, failed = asyncio.run(score_rows(config, rows))
    if not options.json:
        for i, value in enumerate(rewards):
            print(f"{i}\t{'None' if value is None else format(value, '.6g')}")
    for failure in failed:
        print(f"row {failure.group_id}: {failure.detail}", file=sys.stderr)
    if options.json:
        print(json.dumps({"rewards": rewards, "failed": [failure.group_id for failure in failed]}), flush=True)
    if failed:
        raise InputError(
            "E304",
            "rows without a reward",
            options.data,
            f"{len(failed)} of {len(rows)} rows failed",
            "none",
            "see the lines above",
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Raises ``InputError`` E201, E202 or E204."""
    if not path.is_file():
        raise InputError("E201", "dataset not found", str(path), "no such file", "JSON lines", "check the path")
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x}"
        fix = "convert with iconv -f latin1 -t utf-8"
        raise InputError("E205", "not UTF-8", str(path), found, "UTF-8", fix) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                "E204", "invalid JSON", f"{path}:{number}", error.msg, "an object a line", "repair it"
            ) from None
        if not isinstance(row, dict) or "completion" not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(
                "E202", "no such column", f"{path}:{number}", found, "prompt, completion, ...", "name them so"
            )
        rows.append(row)
    return rows


def _placed(path: Path, rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """``rows`` with their places in the file at ``path``."""
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    numbers = [number for number, line in lines if line.strip()]
    return [(f"{path.name}:{number}", row) for number, row in zip(numbers, rows, strict=True)]


async def score_rows(config: Config, rows: list[dict[str, Any]]) -> tuple[list[float | None], list[GroupFailed]]:
    """The combined reward of every row, None where no function applied, and the rows that failed."""
    from launch.cluster import connect, disconnect, worker_environment
    from launch.preflight import check_rewards
    from launch.ray_actors import RaySlot
    from rollout.reward_pool import RewardPool

    columns = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    check_rewards(config, "command line", list(columns))
    connect(config)
    pool = RewardPool(config, [RaySlot({})] * config.reward.workers, worker_environment())
    try:
        await pool.start()
        done = await asyncio.gather(
            *(pool.score(i, *_sample(i, row, list(columns))) for i, row in enumerate(rows)), return_exceptions=True
        )
    finally:
        pool.close()
        disconnect()
    rewards: list[float | None] = []
    for outcome in done:
        if isinstance(outcome, BaseException) and not isinstance(outcome, GroupFailed):
            raise outcome
        value = (
            float("nan") if isinstance(outcome, GroupFailed) else float(outcome.combined(config.reward.functions)[0])
        )
        rewards.append(None if np.isnan(value) else value)
    return rewards, [outcome for outcome in done if isinstance(outcome, GroupFailed)]


def _sample(number: int, row: dict[str, Any], columns: list[str]) -> tuple[Prompt, tuple[Completion, ...]]:
    """A stored row as a group of one completion; tokens are unknown unless the row has ``completion_ids``."""
    completion = row["completion"]
    messages = completion if isinstance(completion, list) else None
    text = completion if messages is None else str(messages[-1].get("content", "")) if messages else ""
    ids = np.array(row.get("completion_ids") or [], dtype=np.int32)
    prompt = Prompt(
        number,
        np.zeros(1, np.int32),
        row.get("prompt", ""),
        {name: row.get(name) for name in columns if name != "completion_ids"},
    )
    return prompt, (Completion(ids, np.zeros(len(ids), np.float32), str(text), "stop", messages=messages),)


if __name__ == "__main__":
    sys.exit(main())
