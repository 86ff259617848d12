"""Which models can have their weights made ready beside generation, and where each tensor goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from rollout.cpu_weights import make_ready, plan, put_in_place


class Model(nn.Module):
    """Two joined layers, a plain one and a norm."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=False)
        self.block = nn.ModuleDict({"qkv": nn.Linear(3, 6), "out": nn.Linear(2, 3, bias=False)})
        self.packed_modules_mapping = {"qkv": ["q", "k", "v"]}
        self.norm = nn.LayerNorm(3, bias=False)


NAMES = [f"block.{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")] + ["block.out.weight", "norm.weight"]


def test_every_tensor_has_its_place():
    model = Model()
    found = plan(model, reversed(NAMES))
    assert found == {
        model.block["qkv"]: {
            "weight": ["block.q.weight", "block.k.weight", "block.v.weight"],
            "bias": ["block.q.bias", "block.k.bias", "block.v.bias"],
        },
        model.block["out"]: {"weight": ["block.out.weight"]},
        model.norm: {"weight": ["norm.weight"]},
    }


def test_joined_values_are_copies_in_order():
    model = Model()
    tensors = {name: torch.randn(2, 3) if name.endswith("weight") else torch.randn(2) for name in NAMES}
    tensors |= {"block.out.weight": torch.randn(3, 2), "norm.weight": torch.randn(3)}
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    live = model.block["qkv"].weight
    before = live.detach().clone()
    ready = make_ready(model, plan(model, NAMES), tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(live, before)
    put_in_place(ready)
    assert model.block["qkv"].weight is live
    assert torch.equal(live, torch.cat([given[f"block.{part}.weight"] for part in "qkv"]))
    assert torch.equal(model.block["qkv"].bias, torch.cat([given[f"block.{part}.bias"] for part in "qkv"]))
    assert torch.equal(model.block["out"].weight, given["block.out.weight"])
    assert torch.equal(model.norm.weight, given["norm.weight"])


@pytest.mark.parametrize(
    "names",
    [
        NAMES[1:],  # A part is missing.
        NAMES[:-1],  # A layer is missing.
        [*NAMES, "block.gate.weight"],  # One too many.
        [name.replace(".q.", ".qkv.") for name in NAMES],
        [],
    ],
)
def test_whatever_is_not_clear_is_declined(names):
    assert plan(Model(), names) is None


def test_layers_with_a_format_of_their_own_are_declined():
    model = Model()
    model.block["out"].quant_method = object()
    assert plan(model, NAMES) is None


def test_values_that_the_model_changes_while_loading_are_declined():
    model = Model()
    model.norm.weight.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded + 1)
    assert plan(model, NAMES) is None


def values(**changed):
    tensors = {n: torch.randn(2, 3) if n.endswith("weight") else torch.randn(2) for n in NAMES}
    return tensors | {"block.out.weight": torch.randn(3, 2), "norm.weight": torch.randn(3)} | changed


def test_another_shape_is_refused_by_name():
    model = Model()
    with pytest.raises(ValueError, match=r"^norm.weight: shape \(4,\), the engine's is \(3,\)"):
        make_ready(model, plan(model, NAMES), values(**{"norm.weight": torch.ones(4)}))


def test_another_type_is_converted():
    model = Model()
    given = {name: tensor.double() for name, tensor in values().items()}
    put_in_place(make_ready(model, plan(model, NAMES), given))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.norm.weight, given["norm.weight"].float())


def test_a_vocabulary_is_padded_but_a_shorter_one_is_refused():
    model = Model()
    model.embed = nn.Embedding(8, 2)
    model.embed.num_embeddings_padded, model.embed.org_vocab_size = 8, 6
    table = torch.randn(6, 2)
    where = plan(model, [*NAMES, "embed.weight"])
    put_in_place(make_ready(model, where, values(**{"embed.weight": table})))
    assert torch.equal(model.embed.weight, torch.cat([table, torch.zeros(2, 2)]))
    with pytest.raises(ValueError, match=r"embed.weight: shape \(5, 2\), the engine's is \(6, 2\)"):
        make_ready(model, where, values(**{"embed.weight": table[:5]}))
