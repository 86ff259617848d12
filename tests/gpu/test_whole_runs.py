"""What needs GPUs: whole runs over every way that weights travel there, and the learner's numbers beside the CPU's.

``make test-gpu`` runs them all; each is skipped where there are too few GPUs. They have not been run by those who wrote
them unless the README gives figures of a GPU.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.chaos import Run

torch = pytest.importorskip("torch")
GPUS = torch.cuda.device_count()
QUICKSTART = "launch/configs/quickstart.toml"


def needs(count: int):
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} GPUs, there are {GPUS}")


WAYS = [
    pytest.param({"rollout.colocate": "true"}, id="ipc-colocated", marks=needs(1)),
    pytest.param({}, id="nccl-split", marks=needs(2)),
    pytest.param({"rollout.weights": "host"}, id="host-split", marks=needs(2)),
    pytest.param({"rollout.num_engines": 2}, id="nccl-two-independent-engines", marks=needs(3)),
    pytest.param({"rollout.tensor_parallel_size": 2}, id="nccl-tensor-parallel", marks=needs(3)),
    pytest.param({"rollout.pipeline_parallel_size": 2}, id="nccl-pipeline-parallel", marks=needs(3)),
    pytest.param({"learner.num_ranks": 2, "learner.zero_stage": 3}, id="nccl-zero3", marks=needs(3)),
    pytest.param(
        {"rollout.colocate": "true", "rollout.num_engines": 2, "learner.num_ranks": 2, "learner.zero_stage": 3},
        id="ipc-zero3",
        marks=needs(2),
    ),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", WAYS)
def test_a_run_learns_and_every_publication_is_proved(run_millrace, tmp_path, changes, dtype):
    folder = tmp_path / "run"
    common = {"run.output_dir": folder, "run.steps": 30, "eval.max_rows": 64, "model.dtype": dtype}
    process = run_millrace(QUICKSTART, *(f"--{k}={v}" for k, v in (common | changes).items()), timeout=580)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "staleness/max" in row]
    assert [row["policy_version"] for row in steps] == list(range(1, 31))
    assert max(row["sync/canary_gap"] for row in steps) < (1e-3 if dtype == "float32" else 0.25)
    assert np.mean([row["reward"] for row in steps[-8:]]) > np.mean([row["reward"] for row in steps[:8]])


@needs(3)
@pytest.mark.timeout(900)
def test_a_killed_engine_comes_back_with_weights_through_host_memory(tmp_path):
    changes = {"rollout.weights": "host", "rollout.num_engines": 2, "run.steps": 400, "eval.max_rows": 64}
    run = Run(QUICKSTART, f"--run.output_dir={tmp_path / 'run'}", *(f"--{k}={v}" for k, v in changes.items()))
    try:
        run.until("step ", 400)
        run.processes("engine")[0].kill()
        run.until("serves again", 400)
    finally:
        run.end()


@needs(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learner_s_log_probs_are_those_of_transformers_on_a_cpu(model_dir, dtype):
    """Our packed pass on the GPU (flash attention in bfloat16) against one whole row in float32."""
    from transformers import AutoModelForCausalLM

    from learner.learner import Learner
    from shared.config import Config
    from tests.learner_groups import learner_config

    tokens = np.random.default_rng(0).integers(0, 32, 40).astype(np.int32)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        whole = torch.log_softmax(reference(ids[None]).logits[0, :-1], -1)
    expected = whole.gather(1, ids[1:, None])[:, 0].numpy()
    learner = Learner(Config.model_validate(learner_config(model_dir, 1, model={"dtype": dtype})))
    assert learner.device.type == "cuda"
    found = learner.sequence_logprobs(tokens)
    assert np.abs(expected - found).max() < (1e-3 if dtype == "float32" else 0.1)
