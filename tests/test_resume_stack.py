"""A run that was killed goes on as if nothing had happened: the same weights, the same record, every row of the data once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shared.weights import orphans
from tests.fakes import write_config, write_rows
from tests.pace import scaled

pytestmark = pytest.mark.stack
ROOT = Path(__file__).resolve().parent.parent
ROWS = 13  # 20 groups in 10 steps: the second epoch begins in between.


@pytest.fixture(scope="module")
def train(tmp_path_factory, model_dir):
    """``train(folder, kill=..., **changes) -> CompletedProcess``: ten steps, checkpoints at 5 and 10."""
    place = tmp_path_factory.mktemp("resume")
    digits = np.random.default_rng(0).integers(0, 10, (ROWS, 4))
    write_rows(place / "train.jsonl", [{"prompt": "".join(map(str, row))} for row in digits])

    def run(folder: Path, faults: str = "", wait: bool = True, **changes):
        settings = {
            "run": {"output_dir": str(folder), "steps": 10, "checkpoint_every": 5, "samples_every": 1},
            "model.path": str(model_dir),
            "data.train": str(place / "train.jsonl"),
            "rollout": {"group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 12, "max_staleness": 0},
            "rollout.vllm": {"enforce_eager": True},
            "reward.functions": [{"function": "length"}],
            "algorithm.kl": {"coef": 0.05},
            "learner.prompts_per_step": 2,
            "learner.lr": 1e-3,
        }
        config = write_config(place / f"{folder.name}.toml", **settings | changes)
        environment = os.environ | ({"MILLRACE_FAULTS": faults} if faults else {})
        command = [sys.executable, "launch/run.py", str(config)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=scaled(200))
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


def weights(folder: Path) -> dict[str, str]:
    """Hashes of everything that the last checkpoint holds of the learner."""
    files = sorted((folder / "checkpoints" / "step-000010").rglob("*.safetensors"))
    assert len(files) >= 3
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def record(folder: Path) -> list[tuple]:
    """What metrics.jsonl says that does not hang on time."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    names = (
        "step",
        "reward",
        "loss",
        "kl",
        "grad_norm",
        "completions/mean_length",
        "samples/trained",
        "sync/canary_gap",
    )
    return [tuple(row.get(name) for name in names) for row in rows]


def fates(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger" / "samples.jsonl").read_text().splitlines()]


def killed(train, folder: Path, **changes) -> None:
    """A run whose driver is killed in step 8, once the checkpoint of step 5 is whole, which is written meanwhile."""
    process = train(folder, faults="learner.before_step:8:sleep", wait=False, **changes)
    deadline = time.monotonic() + scaled(200)
    while not ((folder / "checkpoints" / "step-000005").exists() and len(record(folder)) >= 7):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint of step 5, or not seven steps"
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000005"]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A synchronous run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = train(folder)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


@pytest.mark.chaos
def test_a_synchronous_run_repeats_bit_for_bit(train, whole, tmp_path):
    assert train(tmp_path / "again").returncode == 0
    assert weights(tmp_path / "again") == weights(whole)
    assert record(tmp_path / "again") == record(whole)
    assert fates(tmp_path / "again") == fates(whole)


def test_a_killed_synchronous_run_goes_on_bit_for_bit(train, whole, tmp_path):
    folder = tmp_path / "killed"
    killed(train, folder)
    again = train(folder)  # The same command: going on is the default.
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"going on from {folder}/checkpoints/step-000005" in again.stdout
    assert weights(folder) == weights(whole)
    assert record(folder) == record(whole)
    assert fates(folder) == fates(whole)
    assert "0 lost" in again.stdout


@pytest.mark.chaos
def test_a_killed_run_at_zero_2_goes_on_bit_for_bit(train, tmp_path):
    zero = {"learner.zero_stage": 2}
    assert train(tmp_path / "whole", **zero).returncode == 0
    folder = tmp_path / "killed"
    killed(train, folder, **zero)
    assert train(folder, **zero).returncode == 0
    assert weights(folder) == weights(tmp_path / "whole")
    assert record(folder) == record(tmp_path / "whole")


@pytest.mark.chaos
def test_a_run_goes_on_with_fewer_ranks(train, whole, tmp_path):
    folder = tmp_path / "fewer"
    two = {"learner": {"prompts_per_step": 2, "lr": 1e-3, "num_ranks": 2, "zero_stage": 2}}
    killed(train, folder, **two)
    assert train(folder).returncode == 0
    from safetensors.numpy import load_file

    one, other = (load_file(f / "checkpoints" / "step-000010" / "hf" / "model.safetensors") for f in (whole, folder))
    assert max(float(np.max(np.abs(one[name] - other[name]))) for name in one) < 1e-5


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_learner_that_is_lost_is_built_again_and_the_run_goes_on_bit_for_bit(train, whole, tmp_path, fault):
    folder = tmp_path / fault
    changes = {"learner.step_timeout_s": 8.0} if fault == "stop" else {}
    process = train(folder, faults=f"learner.before_step:7:{fault}", **changes)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "warning[W902] learner lost (1 of 5 times) — " in process.stdout
    assert f"going on from {folder}/checkpoints/step-000005" in process.stdout
    assert weights(folder) == weights(whole)
    assert record(folder) == record(whole)
    assert fates(folder) == fates(whole)


@pytest.mark.chaos
def test_an_asynchronous_run_loses_and_repeats_no_row(train, tmp_path):
    folder = tmp_path / "asynchronous"
    changes = {
        "run": {"output_dir": str(folder), "steps": 40, "checkpoint_every": 4, "samples_every": 1},
        "rollout": {"group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 12, "max_staleness": 3},
    }
    for fault in ("controller.before_record:7:kill", "checkpoint.before_rename:3:kill"):
        assert train(folder, faults=fault, **changes).returncode == -signal.SIGKILL
    process = train(folder, wait=False, **changes)
    while not (folder / "checkpoints" / "step-000024").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, err = process.communicate(timeout=scaled(20))
    assert process.returncode == 143, err[-3000:]
    assert time.monotonic() - started < scaled(10)
    last = train(folder, **changes)
    assert last.returncode == 0, last.stderr[-3000:]
    trained = [row["group"] for row in fates(folder) if row["fate"] == "trained"]
    assert sorted(row["group"] for row in fates(folder)) == list(range(80))  # Each id once, none left out.
    assert len(trained) == len(set(trained))
    assert [row["step"] for row in fates(folder) if row["fate"] == "trained"] == sorted(
        row["step"] for row in fates(folder) if row["fate"] == "trained"
    )
    steps = [row[0] for row in record(folder)]
    assert steps == list(range(1, 41))
    assert orphans(older_than_s=0) == []
    replayed = replay(folder)
    assert replayed.returncode == 0, replayed.stderr[-3000:]
    assert "40 steps replayed: the weights of every one are those of the run, bit for bit" in replayed.stdout
    tamper(folder / "samples" / "step-000003.parquet")
    differs = replay(folder, "--to", "4")
    assert differs.returncode == 1
    assert "step 3: weights " in differs.stderr
    (folder / "samples" / "step-000002.parquet").unlink()
    assert "Found no groups of step 2, expected the groups of every step" in replay(folder).stderr


def replay(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.replay", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(200), check=False)


def tamper(file: Path) -> None:
    """Another reward for one completion."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    rewards = table["reward"].to_pylist()
    rewards[0] += 5.0
    place = table.column_names.index("reward")
    pyarrow.parquet.write_table(table.set_column(place, "reward", pyarrow.array(rewards, pyarrow.float32())), file)


@pytest.mark.chaos
def test_a_second_run_in_a_live_folder_is_refused(train, whole, tmp_path):
    from launch.resume import take_lock

    folder = tmp_path / "live"
    folder.mkdir()
    lock = take_lock(folder)
    refused = train(folder)
    assert refused.returncode == 2
    assert f"error[E602] run is live — run.output_dir = {folder}. Found pid {os.getpid()} on" in refused.stderr
    lock.close()
    complete = train(whole)
    assert (complete.returncode, "complete at step 10" in complete.stdout) == (0, True)
