"""Which models can have their weights made ready beside generation, and where each tensor goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rollout import cpu_weights, weight_receiver
from rollout.cpu_weights import make_ready, plan, put_in_place

pytestmark = pytest.mark.stack


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


def test_a_shared_parameter_is_copied_once():
    model = Model()
    model.other = nn.LayerNorm(3, bias=False)
    model.other.weight = model.norm.weight
    given = values(**{"other.weight": torch.zeros(3)})
    ready = make_ready(model, plan(model, [*NAMES, "other.weight"]), given)
    assert [list(r.parameters) for r in ready if r.layer in (model.norm, model.other)] == [["weight"], []]
    put_in_place(ready)
    assert torch.equal(model.other.weight, given["norm.weight"])


@pytest.mark.parametrize("mark", ["_cpu_skip_gemm_dispatch", "_cpu_unpacked_conv_weight"])
def test_layers_that_are_packed_otherwise_are_declined(mark):
    model = Model()
    setattr(model.block["out"], mark, True)
    assert plan(model, NAMES) is None


def test_layers_of_more_than_two_dimensions_are_declined_where_vllm_packs_them():
    model = Model()
    model.conv = nn.Conv1d(2, 2, 4, bias=False)
    names = [*NAMES, "conv.weight"]
    assert plan(model, names) is not None
    model.conv.quant_method = UnquantizedLinearMethod()
    assert plan(model, names) is None


def test_a_method_that_builds_on_the_plain_one_is_declined():
    class Own(UnquantizedLinearMethod):
        pass

    model = Model()
    model.block["out"].quant_method = UnquantizedLinearMethod()
    assert plan(model, NAMES) is not None
    model.block["out"].quant_method = Own()
    assert plan(model, NAMES) is None


def test_heads_and_linear_layers_multiply_and_embeddings_do_not():
    model = Model()
    model.embed, model.head = nn.Embedding(8, 2), ParallelLMHead.__new__(ParallelLMHead)
    nn.Module.__init__(model.head)
    for layer in (model.embed, model.head):
        layer.quant_method = UnquantizedEmbeddingMethod()
    model.block["out"].quant_method = UnquantizedLinearMethod()
    layers = [model.embed, model.head, model.block["out"], model.norm]
    assert [cpu_weights._multiplies(model, layer) for layer in layers] == [False, True, True, False]
    model.lm_head = model.embed  # One layer that does both.
    assert cpu_weights._multiplies(model, model.embed)


def test_the_product_uses_the_new_weights():
    model = Model()
    out, x = model.block["out"], torch.randn(5, 2)
    out.quant_method = UnquantizedLinearMethod()
    given = values()
    ready = make_ready(model, plan(model, NAMES), given)
    assert not hasattr(out, "cpu_linear")
    put_in_place(ready)
    torch.testing.assert_close(out.cpu_linear(x, out.weight, None), x @ given["block.out.weight"].T)
    assert not hasattr(model.norm, "cpu_linear")


def test_the_shape_of_weights_that_were_packed_away_is_the_layers():
    model = Model()
    out = model.block["out"]
    out.weight, out.output_size, out.input_size = nn.Parameter(torch.empty(0)), 3, 2
    where = plan(model, NAMES)
    make_ready(model, where, values())
    with pytest.raises(ValueError, match=r"^block.out.weight: shape \(3, 4\), the engine's is \(3, 2\)"):
        make_ready(model, where, values(**{"block.out.weight": torch.ones(3, 4)}))


def test_a_bias_that_was_widened_is_rounded_like_its_weight():
    model = Model().bfloat16()
    model.block["qkv"].bias.data = model.block["qkv"].bias.data.float()
    model.shift = nn.Module()
    model.shift.bias = nn.Parameter(torch.zeros(2))
    names = [*NAMES, "shift.bias"]
    where = plan(model, names)
    put_in_place(make_ready(model, where, values(**{"shift.bias": torch.full((2,), 0.1)})))
    assert model.block["qkv"].bias.dtype == torch.bfloat16
    assert torch.equal(model.shift.bias, torch.full((2,), 0.1))


def bare(kind, weight):
    """A layer of vLLM's without its parallel state."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight, layer.quant_method = weight, UnquantizedEmbeddingMethod()
    return layer


@pytest.mark.parametrize(("embedding", "head"), [("wte", "lm_head"), ("word_embeddings", "embed_out")])
def test_a_tied_head_is_a_layer_that_holds_the_embeddings_parameter_whatever_their_names(embedding, head):
    model, weight = Model(), nn.Parameter(torch.randn(8, 3))
    model.body = nn.ModuleDict({embedding: bare(VocabParallelEmbedding, weight)})
    setattr(model, head, bare(ParallelLMHead, nn.Parameter(weight.detach().clone())))
    assert cpu_weights.tied_heads(model) == {}  # Equal values are not enough.
    getattr(model, head).weight = weight
    assert cpu_weights.tied_heads(model) == {head: f"body.{embedding}"}
    names = [*NAMES, f"body.{embedding}.weight"]
    assert plan(model, names)[getattr(model, head)] == {"weight": [f"body.{embedding}.weight"]}
    weight.data = torch.randn(8, 3)
    weight_receiver.pack_tied_heads(model)
    x = torch.randn(2, 3)
    torch.testing.assert_close(getattr(model, head).cpu_linear(x, weight, None), x @ weight.T)


def test_one_layer_that_embeds_and_multiplies_is_no_tied_head():
    model = Model()
    model.embed = model.lm_head = bare(VocabParallelEmbedding, nn.Parameter(torch.randn(8, 3)))
    assert cpu_weights.tied_heads(model) == {}


def loaded(transpose=False):
    """A model that has just loaded ``tensors`` as vLLM would; with ``transpose`` its file has them the other way round."""
    model, tensors = Model(), values(**{"block.out.weight": torch.randn(3, 3)})
    model.block["out"] = nn.Linear(3, 3, bias=False)
    model.block["out"].output_size = model.block["out"].input_size = 3
    model.block["out"].quant_method = UnquantizedLinearMethod()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            getattr(model.block["qkv"], kind).copy_(torch.cat([tensors[f"block.{part}.{kind}"] for part in "qkv"]))
        model.norm.weight.copy_(tensors["norm.weight"])
        given = tensors["block.out.weight"]
        model.block["out"].weight.copy_(given.T if transpose else given)
    model.block["out"].quant_method.process_weights_after_loading(model.block["out"])
    return model, tensors


def test_a_plan_is_trusted_if_it_gives_what_the_loader_gave():
    model, tensors = loaded()
    assert cpu_weights.reproduces(model, plan(model, NAMES), tensors)
    assert not cpu_weights.reproduces(model, None, tensors)
    for name in NAMES:
        changed = tensors | {name: tensors[name] + 1}
        assert not cpu_weights.reproduces(model, plan(model, NAMES), changed), name


@pytest.mark.parametrize("name", ["block.out.weight", "norm.weight"])
def test_a_plan_is_not_trusted_where_the_loader_does_something_else(name):
    model, tensors = loaded(transpose=name == "block.out.weight")
    if name == "norm.weight":  # Another shape.
        tensors[name] = torch.randn(4)
    assert not cpu_weights.reproduces(model, plan(model, NAMES), tensors)


def test_weights_that_were_packed_away_are_compared_by_their_product():
    model, tensors = loaded()
    assert model.block["out"].weight.numel() == 0
    assert cpu_weights.reproduces(model, plan(model, NAMES), tensors)
    turned = tensors | {"block.out.weight": tensors["block.out.weight"].T.contiguous()}
    assert not cpu_weights.reproduces(model, plan(model, NAMES), turned)


@pytest.fixture
def rounds(monkeypatch):
    """A transfer engine without vLLM, and what it did."""
    done = []
    monkeypatch.setattr(weight_receiver, "plan", lambda model, names: {} if "plain" in names else None)
    monkeypatch.setattr(weight_receiver, "make_ready", lambda model, where, tensors: [])
    monkeypatch.setattr(weight_receiver, "_tensors", lambda info: [])
    monkeypatch.setattr(weight_receiver, "reproduces", lambda model, where, tensors: where is not None)
    monkeypatch.setattr(weight_receiver, "put_in_place", lambda ready: done.append("placed"))
    monkeypatch.setattr(weight_receiver, "initialize_layerwise_reload", lambda model: done.append("opened"))
    monkeypatch.setattr(weight_receiver, "finalize_layerwise_reload", lambda model, config: done.append("closed"))
    engine = weight_receiver.ShmWeightTransferEngine.__new__(weight_receiver.ShmWeightTransferEngine)
    engine.model, engine.model_config, engine.device = Model(), None, torch.device("cpu")
    engine.parallel_config = SimpleNamespace(world_size=1)
    monkeypatch.setattr(weight_receiver, "_digest", lambda info: f"digest of {info.segment}")
    engine.model.load_weights = lambda named: done.append("loaded")
    engine._reproduced = True
    return engine, done


def info(name, segment="s"):
    return weight_receiver.ShmUpdateInfo(segment, [name], ["float32"], [[1]], [0], [4])


def take(engine, update):
    engine.prepare(update)
    engine.start_weight_update()
    engine.receive_weights(update)
    engine.finish_weight_update()


@pytest.mark.parametrize(("first", "later"), [("plain", "placed"), ("strange", "loaded")])
def test_the_first_publication_tells_whether_a_plan_gives_what_the_loader_gives(rounds, first, later):
    engine, done = rounds
    engine._reproduced = None
    take(engine, info(first))
    assert done == ["opened", "loaded", "closed"]
    take(engine, info("plain"))
    assert later in done[3:]


def test_a_worker_that_is_never_asked_to_prepare_compares_nothing(rounds, monkeypatch):
    engine, done = rounds
    engine._reproduced = None
    monkeypatch.setattr(weight_receiver, "reproduces", lambda *_: pytest.fail("compared"))
    engine.start_weight_update()
    engine.receive_weights(info("plain"))
    engine.finish_weight_update()
    assert done == ["opened", "loaded", "closed"]


def test_a_round_places_what_is_ready_and_loads_the_rest(rounds):
    engine, done = rounds
    take(engine, info("plain"))
    take(engine, info("strange"))
    take(engine, info("plain"))
    assert done == ["placed", "opened", "loaded", "closed", "placed"]
    assert engine._ready is None


def test_what_is_ready_belongs_to_one_publication(rounds):
    engine, done = rounds
    engine.prepare(info("plain"))
    engine.start_weight_update()
    with pytest.raises(AssertionError, match="another publication"):
        engine.receive_weights(info("plain", "other"))
    assert done == []


def test_a_later_publication_that_is_declined_drops_what_was_ready(rounds):
    engine, done = rounds
    engine.prepare(info("plain"))
    take(engine, info("strange"))
    assert done == ["opened", "loaded", "closed"]


def test_layers_in_loadable_form_are_loaded_whatever_comes(rounds):
    engine, done = rounds
    engine.prepare(info("strange"))
    engine.start_weight_update()  # And no more of this round.
    take(engine, info("plain"))
    assert done == ["opened", "opened", "loaded", "closed"]


def test_a_padded_head_with_a_bias_is_declined():
    """Its bias would need the same padding; vLLM's own reload knows how."""
    model = Model()
    out = model.block["out"]
    assert plan(model, NAMES) is not None
    out.num_embeddings_padded = 4
    assert (out.bias is None) == (plan(model, NAMES) is not None)
    out.bias = nn.Parameter(torch.zeros(len(out.weight)))
    assert not cpu_weights._replaceable(out)


@pytest.mark.parametrize("name", ["ProvedNcclEngine", "ProvedIpcEngine"])
def test_a_tied_head_follows_weights_from_a_device_link_once_the_layers_are_final(monkeypatch, name):
    receiver, done = getattr(weight_receiver, name), []
    monkeypatch.setattr(receiver.__mro__[1], "finish_weight_update", lambda self: done.append("final"))
    monkeypatch.setattr(weight_receiver, "finalize_layerwise_reload", lambda *_: done.append("final"))
    monkeypatch.setattr(weight_receiver, "pack_tied_heads", done.append)
    engine = receiver.__new__(receiver)
    engine.model, engine.model_config = "the model", None
    engine.finish_weight_update()
    assert done == ["final", "the model"]


@pytest.mark.parametrize(("device", "workers"), [("cpu", 2), ("cuda", 1)])
def test_a_worker_that_holds_a_part_or_computes_on_a_gpu_hashes_and_packs_nothing(rounds, monkeypatch, device, workers):
    engine, done = rounds
    engine._reproduced, engine.device = None, torch.device(device)
    engine.parallel_config = SimpleNamespace(world_size=workers)
    monkeypatch.setattr(weight_receiver, "reproduces", lambda *_: pytest.fail("compared"))
    assert engine.prepare(info("plain")) == "digest of s"
    engine.start_weight_update()
    engine.receive_weights(info("plain"))
    engine.finish_weight_update()
    assert done == ["opened", "loaded", "closed"]
