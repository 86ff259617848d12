"""The run folder: what is written when, what is refused, what is printed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pyarrow.parquet
import pytest

from launch.run_folder import RunFolder, draw_curves, dump_config, resolve_output
from launch.stored_groups import write_groups
from shared.config_loader import config_of, known_keys, load_config
from shared.errors import InputError
from shared.metrics import MetricsWriter, group_metrics, read_metrics
from shared.types import RolloutGroup
from tests.fakes import make_completion, make_config, make_group, make_prompt

METRICS = {"reward": 0.5, "advantages/abs_mean": 1.0, "throughput/rollout_tokens_per_second": 1234.5}


@pytest.fixture
def opened(tmp_path):
    """``opened(**changes)`` opens the folder ``out``."""
    return lambda **changes: RunFolder(make_config(**changes), tmp_path / "out")


def test_steps_become_lines_of_metrics(opened):
    folder = opened(**{"run.steps": 3})
    for step in (1, 2):
        folder.step(step, METRICS | {"kl": step / 10, "grad_norm": math.nan, "loss": -math.inf}, [make_group()])
    rows = read_metrics(folder.path)  # Readable while the run goes on.
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1] == {"step": 2, **METRICS, "kl": 0.2, "grad_norm": None, "loss": None}
    for line in (folder.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_samples_are_written_every_so_many_steps_and_at_the_end(opened):
    folder = opened(**{"run.steps": 7, "run.samples_every": 3})
    for step in range(1, 8):
        folder.step(step, METRICS, [make_group()])
    names = sorted(path.name for path in (folder.path / "samples").iterdir())
    assert names == ["step-000003.parquet", "step-000006.parquet", "step-000007.parquet"]


def test_no_samples_on_request(opened):
    folder = opened(**{"run.steps": 1, "run.samples_every": 0})
    folder.step(1, METRICS, [make_group()])
    assert list((folder.path / "samples").iterdir()) == []


def test_an_evaluation_is_a_row_of_its_own_at_its_step(opened, capsys):
    folder = opened(**{"run.steps": 2})
    score = {"eval/rewards/exact_match/mean": 0.25, "eval/reward": 0.5}
    folder.evaluated(0, score)
    folder.step(1, METRICS, [make_group()])
    folder.evaluated(1, score)
    folder.step(2, METRICS, [make_group()])
    folder.evaluated(2, score)
    rows = read_metrics(folder.path)
    assert [(row["step"], "eval/reward" in row, "reward" in row) for row in rows] == [
        (0, True, False),
        (1, False, True),
        (1, True, False),
        (2, False, True),
        (2, True, False),
    ]
    assert "evaluation at version 0: exact_match 0.250  reward 0.500" in capsys.readouterr().out


def test_the_screen_shows_the_first_and_the_last_step(opened, capsys):
    folder = opened(**{"run.steps": 50})
    for step in range(1, 51):
        folder.step(step, METRICS | {"kl": 0.01}, [make_group()])
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "step 1/50 reward 0.500 kl 0.0100 |A| 1.00 1,234 tokens/s ? left"
    assert lines[-1].startswith("step    50/50")
    assert lines[-1].endswith("  0:00 left")
    assert len(lines) < 10


def test_the_time_left_is_told_once_there_is_a_pace(tmp_path, monkeypatch):
    told, now = [], iter(range(100, 200, 10))
    screen = SimpleNamespace(step=lambda step, row, left_s: told.append(left_s))
    folder = RunFolder(make_config(**{"run.steps": 8}), tmp_path / "out", screen)
    monkeypatch.setattr("launch.run_folder.time", SimpleNamespace(monotonic=lambda: next(now)))
    for step in (5, 6, 7, 8):  # A run that goes on.
        folder.step(step, METRICS, [make_group()])
    assert math.isnan(told[0])
    assert told[1:] == [20.0, 10.0, 0.0]


def test_the_configuration_is_written_and_reads_back(opened):
    changes = {
        "rollout.vllm": {"enforce_eager": True},
        "reward.functions": [{"function": "regex", "args": {"pattern": "a"}}],
    }
    folder = opened(**changes, **{"algorithm.policy_loss": {"name": "clip", "low": 0.1}})
    again = load_config([str(folder.path / "config.toml")])
    assert again == make_config(**changes, **{"algorithm.policy_loss": {"name": "clip", "low": 0.1}})
    assert "tokenizer" not in dump_config(again)  # Keys that are none are left out.


@pytest.mark.parametrize("recipe", [None, "dapo"])
@pytest.mark.parametrize(
    "key", [key for key, field in known_keys().items() if type(None) in get_args(field.annotation)]
)
def test_none_is_none_again_whatever_default_and_recipe_say(tmp_path, recipe, key):
    if key == "algorithm.recipe":
        return
    wanted = make_config(**({"algorithm.recipe": recipe} if recipe else {}))
    given = config_of(wanted.model_dump(), {key: None})
    (tmp_path / "run.toml").write_text(dump_config(given))
    assert load_config([str(tmp_path / "run.toml")]) == given


def test_finishing_draws_the_curve(opened, capsys):
    folder = opened(**{"run.steps": 2})
    folder.evaluated(0, {"eval/reward": 0.1})
    for step in (1, 2):
        folder.step(step, METRICS, [make_group()])
    folder.finish()
    assert (folder.path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert f"run folder: {folder.path}" in capsys.readouterr().out


def test_a_run_that_ended_before_its_first_step_still_finishes(opened, tmp_path):
    opened().finish()
    draw_curves([{"step": 1, "reward": None}], tmp_path / "none.png", make_config())
    assert (tmp_path / "none.png").exists()


# --- refusals ---


def test_overwrite_empties_the_folder(opened):
    folder = opened()
    folder.step(10, METRICS, [make_group()])
    folder.finish()
    folder = opened(**{"run.resume": "overwrite"})
    assert read_metrics(folder.path) == []
    assert list((folder.path / "samples").iterdir()) == []


def test_a_place_that_cannot_be_written_is_e601(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as excinfo:
        RunFolder(make_config(), tmp_path / "file" / "out")
    assert excinfo.value.code == "E601"
    assert "file/out" in excinfo.value.place


def test_the_output_directory_is_taken_from_the_working_directory_or_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert resolve_output("runs/a") == tmp_path / "runs" / "a"
    assert resolve_output("/x/a") == Path("/x/a")
    assert resolve_output("~/a") == tmp_path / "home" / "a"
    job = tmp_path / "_ray_pkg_123"
    job.mkdir()
    monkeypatch.chdir(job)
    assert resolve_output("runs/a") == tmp_path / "home" / "millrace" / "runs" / "a"
    assert resolve_output("/x/a") == Path("/x/a")


# --- samples ---


def test_every_completion_is_a_row(tmp_path):
    values = np.array([0.0, np.nan], np.float32)
    completions = (make_completion("a", 2), make_completion("b", 5))
    group = RolloutGroup(4, make_prompt(4), completions, values, {"f": values}, {"note": ["x", "y"]})
    write_groups(tmp_path / "s.parquet", [group], 3)
    first, second = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert first["reward"] == 0.0
    assert first["advantage"] is None
    assert math.isnan(second.pop("reward"))
    assert math.isnan(second.pop("rewards/f"))
    assert second["token_ids"] == [0, 1, 2, 3, 4]
    assert second == {
        "step": 3,
        "group_id": 4,
        "prompt": "prompt 4",
        "completion": "b",
        "finish_reason": "stop",
        "tokens": 5,
        "advantage": None,
        "extra/note": "y",
    } | {name: second[name] for name in ("token_ids", "rollout_logprobs", "versions", "names")}


def test_a_column_that_only_later_groups_logged_is_kept(tmp_path):
    plain = make_group(0)
    logged = RolloutGroup(1, plain.prompt, plain.completions, plain.rewards, plain.reward_parts, {"note": ["x", "y"]})
    write_groups(tmp_path / "s.parquet", [plain, logged], 1)
    notes = pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row.get("extra/note") for row in notes] == [None, None, "x", "y"]


# --- metrics ---


def test_group_metrics_by_hand():
    nan = np.nan
    groups = [make_group(0, (0.0, 1.0), version=3), make_group(1, (1.0, 1.0), version=1), make_group(2, (nan, 2.0), 2)]
    metrics = group_metrics(groups, 4)
    assert metrics["reward"] == 1.0
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5))  # 0 1 1 1 2, ddof 1.
    assert metrics["reward_group_std"] == pytest.approx(math.sqrt(0.5) / 3)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (2, 3)
    assert (metrics["rewards/r/mean"], metrics["rewards/r/none_frac"]) == (1.0, pytest.approx(1 / 6))
    assert (metrics["completions/mean_length"], metrics["completions/clipped_ratio"]) == (3, 0)


def test_a_logged_metric_never_replaces_one_of_the_step():
    group = replace(make_group(0, (0.0, 1.0)), metrics={"reward": 9.0, "seen": 2.0})
    metrics = group_metrics([group], 0)
    assert (metrics["reward"], metrics["seen"]) == (0.5, 2.0)


def test_text_that_no_file_can_hold_is_stored_written_out(tmp_path):
    group = replace(make_group(), extra={"why": ["\ud800", "ä"]})
    write_groups(tmp_path / "s.parquet", [group], 1)
    assert [row["extra/why"] for row in pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist()] == [
        r"\ud800",
        "ä",
    ]


def test_the_writer_appends(tmp_path):
    for step in (1, 2):
        writer = MetricsWriter(tmp_path)
        writer.write(step, {"a": 1.0})
        writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 1.0}]
