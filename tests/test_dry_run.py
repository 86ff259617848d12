"""A dry run: what it says of placement, memory and disk, without a Ray."""

from __future__ import annotations

import json
import sys
from collections import namedtuple

import numpy as np
import pytest

from launch import dry_run
from launch.dry_run import check_room, checkpoint_bytes, memory, most_checkpoints, this_machine
from launch.environment import uses_gpus
from launch.model_weights import count_parameters
from shared.errors import InputError, InputErrors
from tests.fakes import make_config

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model(tmp_path):
    """1,000 million parameters by its header, in two files: hidden 2,000, 20 layers, 4 of 20 heads of 100."""
    shape = {"hidden_size": 2000, "num_hidden_layers": 20, "num_attention_heads": 20, "num_key_value_heads": 4}
    shape |= {"intermediate_size": 8000, "vocab_size": 10_000, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    for number, size in enumerate((600_000_000, 400_000_000)):
        tensor = {"dtype": "BF16", "shape": [size // 1000, 1000], "data_offsets": [0, 2 * size]}
        header = json.dumps({"__metadata__": {}, f"t{number}": tensor}).encode()
        file = tmp_path / f"model-{number}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
    return tmp_path


def config(model, **changes):
    return make_config(**{"model.path": str(model), "model.dtype": "bfloat16", "learner.num_ranks": 2} | changes)


def test_parameters_are_counted_by_the_headers(model):
    assert count_parameters(model) == 1_000_000_000


@pytest.mark.parametrize(
    ("stage", "states"),
    [
        (0, (12, 2, 2)),
        (1, (6, 2, 2)),
        (2, (6, 1, 2)),
        (3, (6, 1, 1)),
    ],  # Of 12, 2 and 2 bytes a parameter, halved one by one.
)
def test_memory_of_a_learner_rank(model, stage, states):
    rank = memory(config(model, **{"learner.zero_stage": stage}), on_gpu=True)[2]
    assert f"learner rank, ZeRO {stage}:" in rank
    assert "optimizer {} GB, gradients {} GB, weights {} GB".format(*states) in rank


def test_memory_of_engine_and_checkpoint(model):
    long = {"rollout.max_prompt_tokens": 1000, "rollout.max_new_tokens": 3000, "rollout.tensor_parallel_size": 2}
    told = memory(config(model, **long), on_gpu=True)
    assert told[0] == "model: 1 billion parameters"
    # 2 x 20 layers x 4 heads x 100 x 2 bytes = 32 kB a token.
    assert (
        told[1] == "engine worker: weights 1 GB, keys and values up to 92% of the GPU, 64 MB for the longest sequence"
    )
    assert told[3] == "start of a learner rank: 2 GB of the host's memory for weights"
    assert told[4] == "checkpoint: 14 GB, up to 2 at a time"
    assert len(told) == 5  # Over NCCL: no shared memory.
    assert memory(config(model), on_gpu=False)[5].startswith("shared memory: 4 GB in /dev/shm")
    assert memory(config(model, **{"rollout.weights": "host"}), on_gpu=True)[5].startswith("shared memory: 4 GB")
    assert "1 GiB of keys and values" in memory(config(model), on_gpu=False)[1]


def test_a_reference_is_counted_where_there_is_one(model):
    assert "reference" not in memory(config(model), on_gpu=False)[2]
    assert "reference 2 GB" in memory(config(model, **{"algorithm.kl.coef": 0.1}), on_gpu=False)[2]


def test_a_model_of_an_unusual_kind_is_still_estimated(model):
    (model / "config.json").write_text('{"text_config": {}}')
    told = memory(config(model), on_gpu=False)
    assert "activations not estimated" in told[2]
    assert told[4].startswith("checkpoint: 14 GB")


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"run.steps": 100, "run.checkpoint_every": 0}, 1),
        ({"run.steps": 100, "run.checkpoint_every": 100}, 1),
        ({"run.steps": 100, "run.checkpoint_every": 50}, 2),
        ({"run.steps": 1000, "run.checkpoint_every": 50}, 3),
        ({"run.steps": 1000, "run.checkpoint_every": 50, "data.eval": "e.jsonl"}, 4),
        ({"run.steps": 1000, "run.checkpoint_every": 50, "data.eval": "e.jsonl", "eval.early_stopping": "none"}, 3),
        ({"run.steps": 100, "run.checkpoint_every": 0, "data.eval": "e.jsonl", "eval.every_steps": 50}, 2),
        ({"run.steps": 1000, "run.checkpoint_every": 10, "run.keep_checkpoints": 20}, 21),
    ],
)
def test_checkpoints_that_lie_on_the_disk_at_a_time(model, changes, most):
    assert most_checkpoints(config(model, **changes)) == most


def test_a_disk_without_room_for_the_checkpoints_that_a_run_keeps_is_refused(model, tmp_path, monkeypatch):
    wanted = config(model, **{"run.steps": 1000})
    monkeypatch.setattr("launch.shared_memory.shared_memory_free", lambda: 4e9)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 43e9))
    check_room(wanted, tmp_path / "a", "run.toml")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 41e9))
    fix = r"Found 41 GB free, expected ~42 GB for 3 checkpoints at a time\. Fix: run.keep_checkpoints = 1"
    with pytest.raises(InputErrors, match=fix):
        check_room(wanted, tmp_path / "a", "run.toml")


def test_checkpoints_that_newer_ones_replace_are_room(model, tmp_path, monkeypatch):
    wanted = config(model, **{"run.steps": 1000})
    monkeypatch.setattr("launch.shared_memory.shared_memory_free", lambda: 4e9)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 15e9))
    for step in (50, 100):
        folder = tmp_path / "a" / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        with (folder / "state").open("wb") as file:
            file.truncate(14 * 10**9)  # Sparse: it takes no room.
    check_room(wanted, tmp_path / "a", "run.toml")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 13e9))
    with pytest.raises(InputErrors, match="13 GB free beside checkpoints of 28 GB, expected ~42 GB"):
        check_room(wanted, tmp_path / "a", "run.toml")


def test_a_disk_without_room_for_a_checkpoint_is_refused(model, tmp_path, monkeypatch):
    wanted = config(model, **{"run.checkpoint_every": 0})
    assert checkpoint_bytes(wanted) == 14e9
    monkeypatch.setattr("launch.shared_memory.shared_memory_free", lambda: 4e9)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 15e9))
    check_room(wanted, tmp_path / "a" / "b", "run.toml")
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 13e9))
    with pytest.raises(InputErrors, match=r"E601.*Found 13 GB free, expected ~14 GB"):
        check_room(wanted, tmp_path / "a" / "b", "run.toml")


def test_more_workers_of_an_engine_than_cores_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("launch.shared_memory.shared_memory_free", lambda: 4e9)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 1e12))
    monkeypatch.setattr(dry_run.os, "cpu_count", lambda: 2)
    check_room(config(model, **{"rollout.tensor_parallel_size": 2}), tmp_path, "run.toml")
    four = config(model, **{"rollout.tensor_parallel_size": 4})
    with pytest.raises(InputErrors, match=r"E501.*Found 4 workers per engine, expected at most 2, the cores"):
        check_room(four, tmp_path, "run.toml")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # Its nodes are asked for room instead.
    check_room(four, tmp_path, "run.toml")


@pytest.mark.parametrize(("visible", "gpus"), [(None, 4), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)])
def test_this_machine_as_a_private_ray_would_see_it(model, tmp_path, monkeypatch, visible, gpus):
    driver = tmp_path / "gpus"
    for number in range(4):
        (driver / f"{number}").mkdir(parents=True)
    monkeypatch.setattr(dry_run, "DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    node = this_machine(config(model, **{"rollout.num_engines": 64}))
    assert node.count("GPU") == gpus
    assert node.count("CPU") >= 66  # Threads may share cores.


def test_problems_are_told_together_after_placement_and_memory(model, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("launch.shared_memory.shared_memory_free", lambda: 4e9)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(0, 0, 1e9))
    wanted = config(model, **{"learner.num_ranks": 8, "learner.max_tokens_per_microbatch": 65536})
    with pytest.raises(InputErrors) as refused:
        dry_run.dry_run(wanted, "run.toml", tmp_path, None, device="l40s")
    assert [problem.code for problem in refused.value.problems] == ["E508", "E601"]
    fix = "learner.gradient_checkpointing = true"
    assert f"expected at most 48 GB, the GPU's memory. Fix: {fix}" in str(refused.value.problems[0])
    out = capsys.readouterr().out
    assert "placement:" in out
    assert "9 GPU" in out
    assert "learner rank, ZeRO 0:" in out
    assert "nothing started" not in out


@pytest.mark.parametrize(
    ("gpus", "colocate", "built", "uses", "told"),
    [
        (0, False, False, False, ""),
        (8, False, True, True, ""),
        (8, True, True, True, ""),
        (8, False, False, False, "info: 8 GPUs are not used: the packages are for CPUs. Fix: make install-gpu"),
        (8, True, False, None, "E701.*rollout.colocate. Found packages for CPUs.*Fix: make install-gpu"),
        (0, False, True, None, "E701.*Found packages for GPUs, and no GPU.*Fix: make install,"),
    ],
)
def test_packages_and_hardware_that_disagree_are_one_line_with_the_fix(gpus, colocate, built, uses, told, capsys):
    if uses is None:
        with pytest.raises(InputError, match=told):
            uses_gpus(gpus, colocate, "run.toml", built)
    else:
        assert uses_gpus(gpus, colocate, "run.toml", built) is uses
        assert capsys.readouterr().out.startswith(told)


def test_it_asks_no_ray_on_one_machine(model, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    dry_run.dry_run(config(model), "run.toml", tmp_path, None)
    out = capsys.readouterr().out
    assert np.all([text in out for text in ("placement:", "memory, estimated:", "nothing started", "begins at step 0")])
