"""Faults inflicted on whole runs, for real; and the table that says where each row of the fault matrix is proved.

``make chaos`` runs all of it. Faults of single parts are tested beside those parts; the quick ones are in ``make test``.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from launch.environment import OVERRIDE
from shared.checkpoints import newest
from shared.weights import orphans
from tests.chaos import Run, inflict, pause
from tests.fakes import write_config, write_rows

ROOT = Path(__file__).resolve().parent.parent

MATRIX = {
    "1 engine killed while generating": "test_fleet_stack.py::test_a_killed_engine_comes_back",
    "2 vLLM fails inside a living actor": "test_fleet_stack.py::test_an_engine_whose_vllm_failed_in_a_step_is_replaced",
    "3 engine hangs": "test_fleet_stack.py::test_a_stopped_engine_is_replaced",
    "4 all engines dead": "test_chaos.py::test_without_engines_the_run_ends_with_a_checkpoint_and_goes_on_later",
    "5 straggling engine": "test_engine_pool.py::test_an_overdue_request_is_sent_to_another_engine_once",
    "6 reward raises": "test_reward_worker.py::test_a_raising_function_is_e304_with_its_traceback_and_what_it_logged_is_lost",
    "7 reward hangs": "test_reward_pool.py::test_with_ray_hangs_and_crashes_lose_nothing",
    "8 memory, forks, output": "test_sandbox.py::test_an_attack_that_works_in_a_subprocess_fails_in_the_sandbox",
    "9 reward worker killed": "test_reward_pool.py::test_with_ray_hangs_and_crashes_lose_nothing",
    "10 reward is no number": "test_reward_worker.py::test_a_bad_value_names_function_sample_and_group",
    "11 learner rank killed": "test_resume_stack.py::test_a_learner_that_is_lost_is_built_again_and_the_run_goes_on_bit_for_bit",
    "12 learner rank hangs": "test_resume_stack.py::test_a_learner_that_is_lost_is_built_again_and_the_run_goes_on_bit_for_bit",
    "13 loss or gradient not finite": "test_learner_stack.py::test_a_non_finite_gradient_changes_nothing",
    "14 weight push fails half way": "test_fleet_stack.py::test_an_engine_that_refuses_a_round_three_times_is_replaced",
    "15 driver killed": "test_resume_stack.py::test_a_killed_synchronous_run_goes_on_bit_for_bit",
    "16 driver terminated": "test_resume_stack.py::test_an_asynchronous_run_loses_and_repeats_no_row",
    "17 node lost": "test_chaos.py::test_a_lost_node_s_engine_comes_back_on_another",
    "18 control plane stalls": "test_chaos.py::test_a_control_plane_that_stalls_for_a_while_corrupts_nothing",
    "19 killed while saving": "test_checkpoints.py::test_a_writer_killed_at_any_point_leaves_the_old_or_the_new",
    "20 checkpoint damaged": "test_checkpoints.py::test_a_flipped_bit_is_found_named_and_the_one_before_is_taken",
    "21 disk full": "test_checkpoints.py::test_a_full_file_system_is_an_oserror_and_the_old_one_stays",
    "22 object store full": "test_chaos.py::test_a_small_object_store_holds_a_run_back_and_does_not_stop_it",
    "23 nothing to learn": "test_controller.py::test_equal_rewards_without_end_are_nothing_to_learn",
    "24 clock jumps": "test_chaos.py::test_no_deadline_hangs_on_the_wall_clock",
    "25 two runs in one folder": "test_resume.py::test_a_live_run_locks_its_folder",
}


def test_every_row_of_the_matrix_names_a_test_that_exists():
    assert [int(row.split()[0]) for row in MATRIX] == list(range(1, 26))
    for row, place in MATRIX.items():
        file, name = place.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), row


def test_no_deadline_hangs_on_the_wall_clock():
    """Row 24: a clock that jumps can end nothing. The ledger reads it once per process, to draw one timeline."""
    # Places in one timeline, and the age of a file: nothing waits for them.
    allowed = {"shared/ledger.py": 1, "rollout/engine_pool.py": 1, "shared/weights.py": 1}
    for package in ("rollout", "learner", "shared", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            found = len(re.findall(r"\btime\.time\(\)|datetime\.now|utcnow", path.read_text()))
            assert found == allowed.get(str(path.relative_to(ROOT)), 0), path


@pytest.fixture
def start(tmp_path, model_dir):
    """``start(**changes) -> Run`` of a small asynchronous run with a checkpoint every 5 of 60 steps."""
    digits = np.random.default_rng(0).integers(0, 10, (50, 4))
    write_rows(tmp_path / "train.jsonl", [{"prompt": "".join(map(str, row))} for row in digits])
    runs = []

    def begin(environment: dict | None = None, **changes) -> Run:
        settings = {
            "run": {"output_dir": str(tmp_path / "run"), "steps": 60, "checkpoint_every": 5, "max_restarts": 3},
            "model.path": str(model_dir),
            "data.train": str(tmp_path / "train.jsonl"),
            "rollout": {"group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 40, "max_staleness": 2},
            "rollout.vllm": {"enforce_eager": True},
            "reward.functions": [{"function": "length"}],
            "learner": {"prompts_per_step": 4, "lr": 1e-3},
        }
        config = write_config(tmp_path / "run.toml", **settings | changes)
        runs.append(Run(str(config), environment=environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def balanced(folder: Path, steps: int, per_step: int = 4) -> None:
    """Every step is recorded once, every group has one fate, none is left out."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, steps + 1))
    fates = [json.loads(line) for line in (folder / "ledger" / "samples.jsonl").read_text().splitlines()]
    groups = [row["group"] for row in fates]
    assert len(groups) == len(set(groups))
    assert sum(row["fate"] in ("trained", "filtered") for row in fates) == steps * per_step
    assert set(range(max(groups) + 1)) - set(groups) == set()


def nothing_left(run: Run) -> None:
    end = time.monotonic() + 15
    while run.left() and time.monotonic() < end:
        time.sleep(0.1)
    assert run.left() == []
    assert orphans(older_than_s=0) == []


@pytest.mark.stack
@pytest.mark.chaos
def test_without_engines_the_run_ends_with_a_checkpoint_and_goes_on_later(start, tmp_path):
    folder = tmp_path / "run"
    run = start(**{"run.max_restarts": 0, "run.steps": 4000, "run.checkpoint_every": 1000})
    run.until("step ", after=run.until("up after"))
    time.sleep(1)
    assert inflict(run, "engine kill", random.Random(0))
    assert run.wait(30) == 1
    assert re.search(r"no engine is left|FleetExhausted|every engine", run.text), run.text[-2000:]
    place, manifest = newest(folder / "checkpoints")
    assert manifest["step"] > 1
    nothing_left(run)
    again = start(**{"run.steps": manifest["step"] + 5})
    assert again.wait(100) == 0, again.text[-3000:]
    assert f"going on from {place}" in again.text
    balanced(folder, manifest["step"] + 5)


@pytest.mark.stack
@pytest.mark.chaos
def test_a_control_plane_that_stalls_for_a_while_corrupts_nothing(start, tmp_path):
    run = start(**{"run.steps": 300})
    run.until("step ", after=run.until("up after"))
    for kind in ("gcs", "raylet"):
        pause(run, kind, 3.0)
    assert run.wait(120) == 0, run.text[-3000:]
    balanced(tmp_path / "run", 300)
    nothing_left(run)


@pytest.fixture
def cluster():
    """A head without engines' room, and nodes that can be added and taken away: ``(cluster, environment)``."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    yield made, {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": "disabled", OVERRIDE: "1"}
    made.shutdown()
    del os.environ["RAY_AUTH_MODE"]


@pytest.mark.stack
@pytest.mark.chaos
def test_a_lost_node_s_engine_comes_back_on_another(cluster, start, tmp_path):
    """Row 17, and row 22's small object store: 80 MB on every node."""
    nodes, environment = cluster
    first = nodes.add_node(num_cpus=2, object_store_memory=80 << 20)
    # Two threads: the head has room for the learner alone, which therefore outlives the node.
    run = start(environment, **{"run.steps": 4000, "run.checkpoint_every": 5, "rollout.cpu_threads": 2})
    lines = run.until("step ", after=run.until("up after"))
    nodes.add_node(num_cpus=2, object_store_memory=80 << 20)
    nodes.remove_node(first, allow_graceful=False)
    lost = run.until("lost", 60, after=lines)
    run.until("serves again", 120, after=lost)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(20) == 143
    again = start(environment, **{"run.steps": 4000, "run.resume": "auto", "rollout.cpu_threads": 2})
    again.until("going on from", 120)
    again.process.send_signal(signal.SIGTERM)
    assert again.wait(60) == 143


@pytest.mark.stack
@pytest.mark.chaos
def test_a_small_object_store_holds_a_run_back_and_does_not_stop_it(cluster, start, tmp_path):
    """Row 22: 200 groups in flight with 80 MB of store; two ranks, so that groups go through it."""
    nodes, environment = cluster
    nodes.add_node(num_cpus=2, object_store_memory=80 << 20)
    changes = {"rollout.max_staleness": 20, "run.steps": 40, "learner.num_ranks": 2, "learner.prompts_per_step": 8}
    run = start(environment, **changes)
    assert run.wait(200) == 0, run.text[-3000:]
    balanced(tmp_path / "run", 40, per_step=8)
