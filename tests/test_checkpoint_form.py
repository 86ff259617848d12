"""What is published has the names, shapes and values of the checkpoint that transformers would write, whatever the model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.device_senders import _PrintedSource
from learner.logprobs import PolicyModel, Sampled
from learner.weight_sender import full_tensors, layout, published
from tests.tiny_models import ATTENTION_ALONE, HYBRID, tiny_model


class Engine:
    """DeepSpeed's engine as the sender sees it."""

    def __init__(self, model):
        self.module = PolicyModel(model, Sampled())


@pytest.mark.parametrize("name", [*ATTENTION_ALONE, *HYBRID])
def test_a_publication_is_the_file(tmp_path, name):
    tiny_model(name).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    engine = Engine(AutoModelForCausalLM.from_pretrained(tmp_path))
    described = {meta.name: (meta.dtype, meta.shape) for meta in layout(engine)}
    assert described == {key: ("float32", tuple(tensor.shape)) for key, tensor in stored.items()}
    sent = list(published(engine))
    assert [key for key, _ in sent] == list(described)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in sent)
    assert [meta.name for meta in _PrintedSource(engine, True).metadata()] == list(described)


def test_experts_are_published_one_by_one_though_they_are_trained_as_one_tensor():
    engine = Engine(tiny_model("Qwen3MoE"))
    sent = {name: tensor for name, tensor in published(engine) if ".0.mlp.experts." in name}
    whole = dict(full_tensors(engine))
    assert len(sent) == 4 * 3
    fused = whole["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(4):
        path = f"model.layers.0.mlp.experts.{expert}"
        assert torch.equal(sent[f"{path}.gate_proj.weight"], fused[expert, :32])
        assert torch.equal(sent[f"{path}.up_proj.weight"], fused[expert, 32:])


def test_a_file_with_names_of_its_own_is_published_under_the_usual_ones(tmp_path):
    """A base model's file has no ``model.`` in front of its names; engines are not asked to guess that."""
    model = tiny_model("GPT2")
    model.transformer.save_pretrained(tmp_path)
    engine = Engine(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert {meta.name for meta in layout(engine)} == {name for name, _ in model.named_parameters()}


def test_the_way_a_model_is_saved_stays_as_it_was(tmp_path):
    tiny_model("Qwen3MoE").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = model._weight_conversions
    list(published(Engine(model)))
    assert model._weight_conversions is before
