"""The whole loop for real: Ray, vLLM, DeepSpeed, rewards and weights, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shared.weights import orphans
from tests.pace import scaled
from tests.whole_run import QUICKSTART, metrics_of, processes_of

pytestmark = pytest.mark.stack
ROOT = Path(__file__).resolve().parent.parent


def test_the_policy_learns(quickstart):
    assert quickstart.code == 0, quickstart.output[-3000:]
    evaluations = [row["eval/reward"] for row in quickstart.rows() if "eval/reward" in row]
    assert len(evaluations) == 3
    assert evaluations[0] <= 0.5
    assert evaluations[-1] >= evaluations[0] + 0.2
    assert re.search(r"step +40/40 +reward 0\.\d+ +kl \d\.\d+ .* tokens/s +0:00 left", quickstart.output)


def test_staleness_is_recorded_and_within_its_bound(quickstart):
    steps = [row for row in quickstart.rows() if "staleness/max" in row]
    assert [row["policy_version"] for row in steps] == list(range(1, 41))
    assert max(row["staleness/max"] for row in steps) <= 2
    assert max(row["staleness/max"] for row in steps) >= 1, "generation never ran ahead of the learner"


def test_every_publication_is_proved(quickstart):
    for row in quickstart.rows():
        if "sync/canary_gap" in row:
            assert row["sync/canary_gap"] < 1e-3
            assert row["sync/bytes"] > 3e6


def test_metrics_carry_the_names_of_the_field(quickstart):
    row = next(row for row in quickstart.rows() if row["step"] == 40)
    for name in [
        "step",
        "policy_version",
        "reward",
        "reward_std",
        "rewards/accuracy/mean",
        "kl",
        "entropy",
        "clip_ratio/low_mean",
        "loss",
        "grad_norm",
        "completions/mean_length",
        "frac_reward_zero_std",
        "staleness/mean",
        "staleness/max",
        "sync/seconds",
        "sync/pause_seconds",
        "sync/bytes",
        "sync/logprob_gap",
        "throughput/rollout_tokens_per_second",
        "throughput/train_tokens_per_second",
        "throughput/samples_per_second",
        "learning_rate",
        "num_tokens",
    ]:
        assert isinstance(row[name], int | float), name


def test_every_second_of_every_process_is_in_a_state(quickstart):
    folder = quickstart.folder
    summary = json.loads((folder / "ledger" / "time.json").read_text())
    assert set(summary["processes"]) == {"controller", "engine-0", "learner-0", "reward-0"}
    for name, row in summary["processes"].items():
        assert sum(row["states"].values()) == pytest.approx(row["wall"], rel=0.005), name
        assert row["residue"] <= 0.005, name
    states = {name: set(row["states"]) for name, row in summary["processes"].items()}
    assert {"generate", "wait_for_prompts", "pause", "receive"} <= states["engine-0"]
    assert {"plan", "forward", "backward", "optimizer", "canary", "gather", "wait_for_groups"} <= states["learner-0"]
    assert {"score", "wait_for_groups"} <= states["reward-0"]
    assert {"wait_for_groups", "train", "wait_for_delivery"} <= states["controller"]
    assert summary["verdict"] in quickstart.output
    assert summary["processes"]["controller"]["wall"] == pytest.approx(summary["training_seconds"], rel=0.7)
    trained = [row for row in quickstart.rows() if "time/step" in row]
    assert sum(row["time/step"] for row in trained) == pytest.approx(summary["training_seconds"], rel=0.05)
    assert all(0 < row["goodput/work"] <= 1 and 0 < row["goodput/time"] <= 1 for row in trained)
    trace = json.loads((folder / "ledger" / "trace.json").read_text())
    assert {e["args"]["name"] for e in trace if e["name"] == "thread_name"} == set(summary["processes"])


def test_the_run_folder_holds_curve_samples_and_configuration(quickstart):
    import pyarrow.parquet

    from shared.config_loader import load_config

    folder = quickstart.folder
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    table = pyarrow.parquet.read_table(folder / "samples" / "step-000040.parquet")
    assert table.num_rows == 32 * 8
    assert {"prompt", "completion", "reward", "rewards/accuracy"} <= set(table.column_names)
    assert load_config([str(folder / "config.toml")]).run.steps == 40


def test_the_checkpoint_scores_the_same_in_transformers_and_in_a_fresh_vllm(quickstart):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = quickstart.folder
    checkpoint = folder / "checkpoints" / "step-000040" / "hf"
    expected = [row["eval/rewards/accuracy/mean"] for row in quickstart.rows() if "eval/reward" in row][-1]
    command = [sys.executable, "-m", "launch.evaluate", QUICKSTART, "--model.path", str(checkpoint)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(200), check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    in_vllm = json.loads(process.stdout.splitlines()[-1])
    assert in_vllm["eval/rewards/accuracy/mean"] == pytest.approx(expected, abs=0.005)

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = Path(os.environ["MILLRACE_CACHE"]) / "addition-eval.jsonl"
    questions = [json.loads(line) for line in data.read_text().splitlines()]
    tokens = torch.tensor(tokenizer([q["prompt"] for q in questions])["input_ids"])
    answers = model.generate(tokens, max_new_tokens=5, do_sample=False)[:, tokens.shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = np.mean([text == q["answer"] for text, q in zip(texts, questions, strict=True)])
    assert right == pytest.approx(expected, abs=0.005)


def test_nothing_is_left_after_a_run(quickstart):
    deadline = time.monotonic() + scaled(15)  # vLLM's children notice the end of their parent within seconds.
    while processes_of(quickstart.session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(quickstart.session) == set()
    while (left := orphans(older_than_s=0)) and time.monotonic() < deadline:
        time.sleep(0.2)  # Another suite on this machine may be about to lock its own.
    assert left == []


@pytest.mark.timeout(400)
def test_two_engines_two_ranks_synchronous(run_millrace, tmp_path):
    """ZeRO-3 on two ranks, two engines, staleness 0; the policy still learns on what it just sampled."""
    folder = tmp_path / "run"
    changes = {
        "run.output_dir": folder,
        "run.steps": 12,
        "rollout.num_engines": 2,
        "rollout.max_staleness": 0,
        "learner.num_ranks": 2,
        "learner.zero_stage": 3,
        "eval.max_rows": 64,
    }
    process = run_millrace(QUICKSTART, *(f"--{key}={value}" for key, value in changes.items()), timeout=scaled(380))
    assert process.returncode == 0, process.stderr[-3000:]
    steps = [row for row in metrics_of(folder) if "staleness/max" in row]
    assert [row["policy_version"] for row in steps] == list(range(1, 13))
    assert {row["staleness/max"] for row in steps} == {0.0}
    assert all(row["sync/canary_gap"] < 1e-3 and row["sync/logprob_gap_max"] < 1e-2 for row in steps)
    assert np.mean([row["reward"] for row in steps[-4:]]) > np.mean([row["reward"] for row in steps[:4]])


@pytest.fixture(scope="module")
def cluster():
    """A private ``ray start --head``: the environment in which to use it."""
    from learner.distributed import free_port

    port, dashboard = free_port(), free_port()
    # A job's `python` is the one on the path of the cluster, so the cluster is started with ours.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": path}
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--block"]
    # The agent's usual port may be another Ray's; then this one would take no jobs.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={os.environ['RAY_TMPDIR']}/c"]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}, ray
    head.terminate()
    head.wait(60)


def submit(cluster, *arguments: str) -> subprocess.CompletedProcess:
    environment, ray = cluster
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "launch/run.py", *arguments]
    deadline = time.monotonic() + scaled(60)
    while True:
        process = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=scaled(280), check=False
        )
        # The job server answers some seconds after the head is up, and has an agent for jobs some seconds later.
        waiting = ("Failed to connect", "No available agent")
        if not any(words in process.stderr + process.stdout for words in waiting) or time.monotonic() > deadline:
            break
        time.sleep(1)
    return process


@pytest.mark.timeout(400)
def test_a_submitted_job_succeeds(cluster, tmp_path):
    folder = tmp_path / "run"
    process = submit(cluster, QUICKSTART, "--run.output_dir", str(folder), "--run.steps", "3", "--eval.max_rows", "8")
    assert process.returncode == 0, process.stdout[-3000:]
    assert "SUCCEEDED" in process.stdout + process.stderr or "succeeded" in process.stdout + process.stderr
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3, 3]


def test_a_failing_job_fails(cluster):
    process = submit(cluster, QUICKSTART, "--learner.lr", "-1")
    text = process.stdout + process.stderr
    assert process.returncode != 0
    assert "FAILED" in text or "failed" in text
    assert "error[E106] bad override — command line:--learner.lr. Found -1, expected a number > 0" in text
    assert "exit code 2" in text
