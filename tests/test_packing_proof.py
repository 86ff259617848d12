"""The proof at the start: it passes models whose tokens meet in attention alone, and says of others what leaks."""

from __future__ import annotations

import pytest
import torch

from learner import attention, packing_proof
from learner.attention import ATTENTION_NAME, register_attention
from learner.logprobs import PolicyModel, Sampled
from learner.packing_proof import prove_packing
from shared.errors import ModelRefused
from tests.tiny_models import ATTENTION_ALONE, tiny_model

CPU = torch.device("cpu")
torch.set_num_threads(1)


class Engine:
    """DeepSpeed's engine as the proof sees it."""

    def __init__(self, module):
        self.module, self.training = module, True

    def eval(self):
        self.train(False)

    def train(self, mode=True):
        self.training = mode
        self.module.train(mode)

    def __call__(self, *arguments, **keywords):
        return self.module(*arguments, **keywords)


def engine(name, dtype=torch.float32):
    register_attention()
    model = tiny_model(name).to(dtype)
    model.config._attn_implementation = ATTENTION_NAME
    return Engine(PolicyModel(model, Sampled(0.5, top_k=3)))


@pytest.mark.parametrize("name", ATTENTION_ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_whose_tokens_meet_in_attention_alone_pass(name, dtype):
    prove_packing(engine(name, dtype), CPU)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "LFM2",
            r"Lfm2ForCausalLM \(layers: conv, full_attention\): .* behind another completion of its prompt by 0\.\d+",
        ),
        ("Qwen3.5", r"behind another completion of its prompt by 0\.\d+, behind another prompt by 0\.\d+ nats"),
        (
            "Mamba2",
            r"Mamba2ForCausalLM \(layers: linear_attention\): .* behind another completion of its prompt by 0\.\d+",
        ),
    ],
)
def test_hybrid_models_are_refused_with_what_leaks(name, said):
    with pytest.raises(ModelRefused, match=said) as refused:
        prove_packing(engine(name), CPU)
    assert "\n" not in str(refused.value)
    assert "as the first" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-oss", "attention of GptOssAttention needs s_aux"),
        ("Gemma2", "attention of Gemma2Attention needs softcap"),
        ("Bloom", "log-probs of BloomForCausalLM in the learner differ from its own forward by"),
        ("StableLM", "attention of StableLmAttention does not hand on where packed sequences lie"),
        ("Granite", "log-probs of GraniteForCausalLM in the learner differ from its own forward by"),
    ],
)
def test_what_the_learner_does_not_compute_is_refused(name, said):
    with pytest.raises(ModelRefused, match=said):
        prove_packing(engine(name), CPU)


def test_attention_that_leaks_is_caught(monkeypatch):
    """The packed row as one sequence: what a forgotten layout would do."""
    exact = attention.packed_attention

    def leaking(module, query, key, value, mask, *, layout, **others):
        whole = attention.Layout.of([[range(query.shape[2])]])
        return exact(module, query, key, value, mask, layout=whole, **others)

    proved = engine("Llama")
    monkeypatch.setattr(attention, "packed_attention", leaking)
    register_attention()
    with pytest.raises(ModelRefused, match=r"behind another completion of its prompt by .*, behind another prompt by"):
        prove_packing(proved, CPU)


def test_attention_that_sees_what_follows_is_caught(monkeypatch):
    proved = engine("Llama")
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention, "_causal", lambda q, k, v, *_: kernel(q, k, v, enable_gqa=True))
    with pytest.raises(ModelRefused, match="differ from its own forward"):
        prove_packing(proved, CPU)


def test_positions_that_run_on_are_caught(monkeypatch):
    proved = engine("Llama")
    forward = proved.module.model.model.forward

    def running(**arguments):
        positions = torch.arange(arguments["input_ids"].shape[1])[None]
        return forward(**arguments | {"position_ids": positions})

    monkeypatch.setattr(proved.module.model.model, "forward", running)
    with pytest.raises(ModelRefused, match="behind another completion of its prompt"):  # Rotations are relative.
        prove_packing(proved, CPU)


def test_what_a_model_raises_that_does_not_know_the_call_is_one_line(monkeypatch):
    proved = engine("Llama")

    def forward(*_, **__):
        raise KeyError(ATTENTION_NAME)

    monkeypatch.setattr(proved.module.model.model, "forward", forward)
    with pytest.raises(ModelRefused, match=r"LlamaForCausalLM cannot be run on packed sequences \(KeyError: 'millrace"):
        prove_packing(proved, CPU)


def test_all_is_as_it_was_afterwards():
    proved = engine("Llama")
    prove_packing(proved, CPU)
    assert proved.training
    assert proved.module.training
    assert proved.module.sampled == Sampled(0.5, top_k=3)
    assert proved.module.model.config._attn_implementation == ATTENTION_NAME


def test_a_deep_model_may_round_more(monkeypatch):
    """The bound follows what another kernel changes: packing of an exact model is never refused for its depth."""
    proved = engine("Llama")
    monkeypatch.setitem(packing_proof.EXACT, torch.float32, 0.0)
    prove_packing(proved, CPU)
