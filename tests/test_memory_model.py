"""The model of bytes: against numbers worked by hand, and what it refuses on which device."""

from __future__ import annotations

import json

import pytest

from launch.hardware import DEVICES, NAMES, device_named
from launch.memory import Sizes, colocated, engine_bytes, learner_bytes, refusals, start_bytes, total
from launch.placement import Node
from tests.fakes import make_config

SHAPES = {
    "7B": (3584, 28, 28, 4, 18944),
    "32B": (5120, 64, 40, 8, 27648),
    "72B": (8192, 80, 64, 8, 29568),
}
NAMES_OF = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@pytest.fixture
def config_of(tmp_path):
    """``config_of(size, **changes)``: a configuration for a Qwen2.5 of that size, in bfloat16; there are no weights."""

    def make(size, **changes):
        table = dict(zip(NAMES_OF, SHAPES[size], strict=True)) | {"vocab_size": 152064, "model_type": "qwen2"}
        table |= {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps(table))
        return make_config(**{"model.path": str(tmp_path), "model.dtype": "bfloat16"} | changes)

    return make


@pytest.mark.process
def test_seven_billion_parameters_on_four_ranks_as_worked_by_hand(config_of):
    changes = {"learner.num_ranks": 4, "learner.zero_stage": 3, "learner.max_tokens_per_microbatch": 16384}
    config = config_of("7B", **changes, **{"algorithm.kl.coef": 0.1, "rollout.num_engines": 4})
    sizes = Sizes.of(config)
    parts = {name: nbytes / 1e9 for name, nbytes in learner_bytes(config, sizes, on_gpu=True).items()}
    assert sizes.parameters == pytest.approx(7.62e9, rel=0.01)
    assert parts["optimizer"] == pytest.approx(22.9, rel=0.01)
    assert parts["gradients"] == parts["weights"] == parts["reference"] == pytest.approx(3.8, rel=0.01)
    assert 102 < parts["activations"] < 114
    assert parts["output head"] == pytest.approx(5.4, rel=0.05)
    assert parts["publication"] == pytest.approx(4.3, rel=0.01)
    assert parts["whole layers"] + parts["CUDA"] == pytest.approx(3.5, rel=0.15)
    assert 152 < sum(parts.values()) < 161
    thrifty = config_of("7B", **changes, **{"learner.gradient_checkpointing": True, "algorithm.kl.coef": 0.1})
    assert total(learner_bytes(thrifty, sizes, on_gpu=True)) / 1e9 == pytest.approx(55, rel=0.05)


def test_a_rank_starts_with_its_share_and_a_layer_at_stage_3_alone(config_of):
    config = config_of("72B", **{"learner.num_ranks": 8, "learner.zero_stage": 3})
    sizes = Sizes(72.7e9, 2, 152064 * 8192, 80, 8192, 3.2e5, 1.0)
    assert start_bytes(config, sizes) == pytest.approx(145.4e9 / 8 + 2 * 152064 * 8192)
    assert start_bytes(config_of("72B", **{"learner.zero_stage": 2}), sizes) == 145.4e9


def refused(config, kind):
    gpus = config.learner.num_ranks + config.rollout.num_engines
    node = Node("a", {"CPU": 64.0, "GPU": float(gpus), f"accelerator_type:{kind}": float(gpus)})
    return refusals(config, Sizes.of(config), [node], "run.toml")


@pytest.mark.process
def test_what_cannot_fit_is_refused_with_the_settings_that_make_it_fit(config_of):
    changes = {"learner.num_ranks": 4, "learner.zero_stage": 3, "learner.max_tokens_per_microbatch": 16384}
    (problem,) = refused(config_of("7B", **changes), "H100")
    assert problem.code == "E508"
    assert "most of it activations" in str(problem)
    assert str(problem).endswith("Fix: learner.gradient_checkpointing = true")
    assert not refused(config_of("7B", **changes, **{"learner.gradient_checkpointing": True}), "H100")
    assert not refused(config_of("7B", **changes), "GTX-1080")  # No data sheet: nothing is known.
    learner, engine = refused(config_of("72B", **{"learner.num_ranks": 8}), "H100")
    assert "learner.zero_stage = 3" in str(learner)
    assert "learner.num_ranks = " in str(learner)
    assert str(engine).endswith("Fix: rollout.tensor_parallel_size = 4")
    assert "73.6 GB, 92% of the GPU" in str(engine)


def test_colocated_the_engine_and_the_rank_are_added_up(config_of):
    changes = {"learner.num_ranks": 4, "learner.zero_stage": 3}
    config = config_of("7B", **changes, **{"rollout.num_engines": 4, "learner.max_tokens_per_microbatch": 4096})
    together = config.model_copy(update={"rollout": config.rollout.model_copy(update={"colocate": True})})
    sizes = Sizes.of(config)
    node = Node("a", {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 8.0})
    assert not refusals(config, sizes, [node], "run.toml")
    (problem,) = refusals(together, sizes, [node], "run.toml")
    assert "with the engine on the same GPU" in str(problem)
    parts = engine_bytes(together, sizes)
    assert parts["weights"] == 2 * sizes.parameters


def test_a_colocated_engine_gets_what_the_learner_leaves(config_of):
    node = Node("a", {"CPU": 64.0, "GPU": 4.0, "accelerator_type:H200": 4.0})
    changes = {"learner.num_ranks": 4, "learner.zero_stage": 3, "learner.gradient_checkpointing": True}
    config = config_of("7B", **changes, **{"rollout.num_engines": 4, "rollout.colocate": True})
    sizes = Sizes.of(config)
    given = colocated(config, sizes, [node]).rollout.vllm
    learner = total(learner_bytes(config, sizes, on_gpu=True))
    assert given["kv_cache_memory_bytes"] == pytest.approx(141e9 - learner - 2 * sizes.parameters - 2e9)
    assert given["gpu_memory_utilization"] == pytest.approx(1 - learner / 141e9, abs=1e-3)
    own = config_of("7B", **{"rollout.colocate": True, "rollout.vllm": {"gpu_memory_utilization": 0.3}})
    assert colocated(own, sizes, [node]) is own
    apart = config_of("7B")
    assert colocated(apart, sizes, [node]) is apart
    assert colocated(config, sizes, [Node("a", {"GPU": 4.0})]) is config


def test_every_type_of_ray_s_has_a_data_sheet():
    assert set(NAMES.values()) == set(DEVICES)
    assert device_named("H200").memory == 141e9
    assert device_named("") is None
