"""Which model folders a start takes, and which it refuses, from their files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.model_config import check_config, context_of
from launch.model_files import check_model
from launch.model_tokenizer import check_ids, load_tokenizer, rehearse_save
from launch.model_weights import count_parameters, read_tensors
from shared.errors import InputError, InputErrors
from tests.conftest import ROOT
from tests.fakes import make_config, make_prompt, qwen2_shapes, write_model, write_tensors
from tests.model_folders import ARCHITECTURES, BASE, save_tiny
from tests.pace import scaled


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def judged(path: Path, **changes: Any) -> list[str]:
    """Warnings about the folder ``path``, or its errors."""
    try:
        return check_model(make_config(**{"model.path": str(path)} | changes), "run.toml")
    except InputErrors as errors:
        return [str(problem) for problem in errors.problems]
    except InputError as error:
        return [str(error)]


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    table = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


# --- folders that are taken ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_that_trains_is_taken(name, tmp_path):
    kind, shape = ARCHITECTURES[name]
    assert judged(save_tiny(tmp_path, kind, **shape)) == []


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        shapes = qwen2_shapes(json.loads((path / "config.json").read_text()))
        write_tensors(path / "model.safetensors", {change(name): shape for name, shape in shapes.items()})

    return spoil


def dropped(part: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        shapes = qwen2_shapes(json.loads((path / "config.json").read_text()))
        write_tensors(path / "model.safetensors", {name: shape for name, shape in shapes.items() if part not in name})

    return spoil


def sharded(*gone: str) -> Callable[[Path], None]:
    """Two shards and their index, of which the files ``gone`` are missing, beside Mistral's second copy."""

    def spoil(path: Path) -> None:
        shapes = list(qwen2_shapes(json.loads((path / "config.json").read_text())).items())
        files = {"model-00001-of-00002.safetensors": shapes[:5], "model-00002-of-00002.safetensors": shapes[5:]}
        for name, part in files.items():
            write_tensors(path / name, dict(part))
        weight_map = {key: name for name, part in files.items() for key, _ in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        write_tensors(path / "consolidated.safetensors", {"tok_embeddings.weight": [512, 64]})
        for name in ("model.safetensors", *gone):
            (path / name).unlink()

    return spoil


def config_json(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "config.json", **changes)


TAKEN = {
    "base model's names, without model.": renamed(lambda name: name.removeprefix("model.")),
    "shards beside consolidated.safetensors": sharded(),
    "no architectures": config_json(architectures=None),
    "other dtype": config_json(dtype="bfloat16"),
    "quantization_config null": lambda path: (path / "config.json").write_text(
        (path / "config.json").read_text()[:-1] + ', "quantization_config": null}'
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_folder_that_is_whole_is_taken(name, tmp_path):
    TAKEN[name](write_model(tmp_path))
    assert judged(tmp_path) == []


def test_weights_beside_the_shards_are_not_counted_twice(tmp_path):
    whole = count_parameters(write_model(tmp_path))
    sharded()(tmp_path)
    assert count_parameters(tmp_path) == whole


OLD_NAMES: dict[str, tuple[Callable[[str], str], dict[str, list[int]]]] = {
    "GPT-2": (
        lambda n: n.removeprefix("transformer."),
        {"h.0.attn.bias": [1, 1, 256, 256], "h.0.attn.masked_bias": []},
    ),
    "GPT-NeoX": (
        str,
        {"gpt_neox.layers.0.attention.bias": [256], "gpt_neox.layers.0.attention.rotary_emb.inv_freq": [4]},
    ),
    "OPT": (lambda n: n.removeprefix("model."), {"lm_head.weight": [288, 64]}),
    "Llama": (str, {"model.layers.0.self_attn.rotary_emb.inv_freq": [16]}),
    "Qwen2": (str, {"lm_head.weight": [288, 64]}),
    "Mixtral": (str, {}),
    "Qwen3-MoE": (str, {}),
    "DeepSeek-V2": (str, {}),
}
"""How checkpoints on the hub name their weights, and what they hold beside them."""


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_that_transformers_maps_by_itself_are_taken(name, tmp_path):
    kind, shape = ARCHITECTURES[name]
    save_tiny(tmp_path, kind, **shape)
    change, extra = OLD_NAMES[name]
    shapes = {change(key): tensor["shape"] for key, tensor in read_tensors(tmp_path).items()}
    write_tensors(tmp_path / "model.safetensors", shapes | extra)
    assert judged(tmp_path) == []
    if "MoE" in name:  # One tensor for each expert in the file, one for all in the model.
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in shapes
        del shapes["model.layers.1.mlp.experts.3.up_proj.weight"]
        write_tensors(tmp_path / "model.safetensors", shapes)
        (line,) = judged(tmp_path)
        assert "1 missing (model.layers.1.mlp.experts.gate_up_proj)" in line


# --- folders that are refused ---


def of_other_size(path: Path) -> None:
    shapes = qwen2_shapes(json.loads((path / "config.json").read_text())) | {"model.embed_tokens.weight": [500, 64]}
    write_tensors(path / "model.safetensors", shapes)


def rounded(path: Path) -> None:
    shapes = qwen2_shapes(json.loads((path / "config.json").read_text()))
    write_tensors(path / "model.safetensors", shapes, dtype="F8_E4M3")


def with_adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))


def with_broken_index(path: Path) -> None:
    sharded()(path)
    (path / "model.safetensors.index.json").write_text("<html>")


def unindexed(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.safetensors")


def generation(**settings: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "generation_config.json", **settings)


def quantised(method: str) -> Callable[[Path], None]:
    return config_json(quantization_config={"quant_method": method, "bits": 4})


LORA = renamed(lambda name: f"base_model.model.{name}".replace("proj.weight", "proj.base_layer.weight"))
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "FSDP": (renamed(lambda n: f"_fsdp_wrapped_module.{n}"), "E411", '"_fsdp_wrapped_module."'),
    "FSDP, inner": (renamed(lambda n: n.replace(".0.", ".0._fsdp_wrapped_module.")), "E411", '"_fsdp_wrapped_module."'),
    "torch.compile": (renamed(lambda n: f"_orig_mod.{n}"), "E411", '"_orig_mod."'),
    "DDP": (renamed(lambda n: f"module.{n}"), "E411", '"module."'),
    "a trainer's own wrapper": (renamed(lambda n: f"policy.{n}"), "E411", '"policy."'),
    "LoRA, unmerged": (LORA, "E411", "merge the adapter"),
    "adapter beside": (with_adapter, "E411", "adapter_config.json"),
    "a layer is missing": (dropped("o_proj"), "E411", "1 missing (model.layers.0.self_attn.o_proj.weight)"),
    "embeddings are missing": (dropped("embed"), "E411", "1 missing (model.embed_tokens.weight)"),
    "no output head": (config_json(tie_word_embeddings=False), "E411", "saved without its output head"),
    "more layers by config.json": (config_json(num_hidden_layers=2), "E411", "model.layers.1."),
    "other shapes": (of_other_size, "E411", "model.embed_tokens.weight [500, 64], expected [512, 64] by config.json"),
    "a shard is missing": (
        sharded("model-00002-of-00002.safetensors"),
        "E411",
        "model-00002-of-00002.safetensors of 2",
    ),
    "index of nothing": (with_broken_index, "E411", "model.safetensors.index.json. Found no weight_map"),
    "shards without an index": (unindexed, "E409", "name the file model.safetensors"),
    "GPTQ": (quantised("gptq"), "E412", "gptq"),
    "AWQ": (quantised("awq"), "E412", "awq"),
    "bitsandbytes": (quantised("bitsandbytes"), "E412", "bitsandbytes"),
    "FP8": (quantised("fp8"), "E412", "fp8"),
    "FP8, unsaid": (rounded, "E412", "in F8_E4M3"),
    "classifier": (config_json(architectures=["Qwen2ForSequenceClassification"]), "E412", "Qwen2ForSequenceClass"),
    "reward model": (config_json(architectures=["Qwen2ForRewardModel"]), "E412", "Qwen2ForRewardModel"),
    "base model": (config_json(architectures=["Qwen2Model"]), "E412", "Qwen2Model"),
    "vision": (config_json(model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForX"]), "E412", "Qwen2_5_VLForX"),
    "masked language model": (config_json(model_type="bert", architectures=["BertForMaskedLM"]), "E412", "BertForMask"),
    "unknown type": (
        config_json(model_type="foo", architectures=["FooForCausalLM"]),
        "E412",
        "model_type foo of FooFor",
    ),
    "no type": (config_json(model_type=None), "E412", "model_type None"),
    "sizes that are no numbers": (config_json(num_hidden_layers="2"), "E401", "expected int, got str"),
    "unknown activation": (config_json(hidden_act="nope"), "E401", "KeyError: 'nope'"),
    "generation_config of nonsense": (generation(max_new_tokens=0), "E401", "`max_new_tokens` must be greater than 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_train_is_refused_in_one_line(name, tmp_path):
    spoil, code, said = REFUSED[name]
    spoil(write_model(tmp_path))
    (line,) = judged(tmp_path)
    assert line.startswith(f"error[{code}] ")
    assert said in line
    assert "\n" not in line


def test_weights_that_the_model_does_not_have_are_told(tmp_path):
    shapes = qwen2_shapes(json.loads((write_model(tmp_path) / "config.json").read_text()))
    write_tensors(tmp_path / "model.safetensors", shapes | {"model.mtp.weight": [4, 4], "value_head.weight": [1, 64]})
    (line,) = judged(tmp_path)
    assert line == (
        f"warning[W411] weights not used — {tmp_path}. "
        "Found 2 that Qwen2ForCausalLM does not have (model.mtp.weight, value_head.weight)"
    )


# --- what config.json rules out ---

PLAIN = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256}
LAYERS: dict[str, dict[str, Any]] = {
    "Qwen3.5, Qwen3-Next": {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4},
    "LFM2": {"layer_types": ["conv", "full_attention"]},
    "LFM2, old keys": {"conv_L_cache": 3, "full_attn_idxs": [1]},
    "Falcon-H1": {"mamba_d_ssm": 64, "mamba_d_conv": 4},
    "Mamba-2": {"state_size": 128, "conv_kernel": 4},
    "Jamba": {"mamba_d_state": 16, "attn_layer_period": 8},
    "Zamba 2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "Granite hybrid": {"layer_types": ["mamba", "attention"]},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "Nemotron-H": {"layers_block_type": ["moe", "linear_attention"]},
    "ZAYA": {"layer_types": ["hybrid", "hybrid"]},
    "Llama 4": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8192},
    "DeepSeek-V3.2": {"layer_types": ["indexed_attention"]},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "Gemma 2": {"attn_logit_softcapping": 50.0},
    "Falcon": {"alibi": True},
    "MPT": {"attn_config": {"alibi": True}},
    "ALiBi by name": {"position_embedding_type": "alibi"},
    "MiMo-V2": {"add_swa_attention_sink_bias": True},
    "DeepSeek-V3.2": {"index_topk": 2048},
    "EmbeddingGemma": {"use_bidirectional_attention": True},
}
HEADS: dict[str, dict[str, Any]] = {
    "Gemma 2": {"final_logit_softcapping": 30.0},
    "Cohere": {"logit_scale": 0.0625},
    "Granite": {"logits_scaling": 8.0},
    "Falcon-H1": {"lm_head_multiplier": 0.5},
}
NEUTRAL: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "nulls": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": None, "alibi": None},
    "defaults": {"alibi": False, "logit_scale": 1.0, "logits_scaling": 1.0, "use_bidirectional_attention": False},
    "plain layers": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
    "mixture of experts": {"mlp_layer_types": ["dense", "sparse"], "routed_scaling_factor": 2.5},
    "multimodal masks": {"use_bidirectional_attention": "vision"},
    "latent attention": {"kv_lora_rank": 512, "num_attention_heads": 16, "head_dim": 24},
}


def problems_of(shape: dict[str, Any], **changes: Any) -> list[str]:
    problems: list[InputError] = []
    check_config(make_config(**changes), "run.toml", PLAIN | shape, False, problems)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("what", "shape"),
    [
        pytest.param(what, shape, id=f"{what}: {name}")
        for what, table in (("layers", LAYERS), ("attention", ATTENTION), ("output head", HEADS))
        for name, shape in table.items()
    ],
)
def test_what_packing_or_the_output_head_cannot_do_is_refused(what, shape):
    (line,) = problems_of(shape)
    assert line.startswith(f"error[E412] {what} not supported — model/config.json:")


@pytest.mark.parametrize("name", NEUTRAL)
def test_keys_that_change_nothing_are_no_reason(name):
    assert problems_of(NEUTRAL[name]) == []


HYBRIDS = {
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 32},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 32},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Mamba2": {},
    "FalconH1": {},
    "GraniteMoeHybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "OlmoHybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "Jamba": {},
    "Bamba": {},
    "Zamba2": {},
    "RecurrentGemma": {},
    "Rwkv": {},
    "Mamba": {},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrid_models_are_refused_as_transformers_writes_them(kind, tmp_path):
    import transformers

    sizes = {} if kind in ("Mamba", "Mamba2", "Rwkv", "Zamba2") else BASE
    getattr(transformers, f"{kind}Config")(**sizes | HYBRIDS[kind]).save_pretrained(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"w": [16]})
    lines = judged(tmp_path)
    assert any(line.startswith("error[E412]") for line in lines), lines
    assert "\n" not in "".join(lines)


# --- what only a computation shows ---

WRONG = {
    "StableLm": "does not hand on where packed sequences lie",
    "Nemotron": "does not hand on where packed sequences lie",
    "MiniCPM3": "wrong by",
    "Doge": "needs attention_mask, which the learner does not compute",
    "GptOss": "needs s_aux, which the learner does not compute",
    "NanoChat": "wrong by",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_small_twin_finds_what_no_key_says(kind):
    import torch
    import transformers

    from learner.small_twin import check_twin

    configuration = getattr(transformers, f"{kind}Config")(**BASE | {"num_key_value_heads": 2})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(configuration, trust_remote_code=False)
    with pytest.raises(InputError, match=rf"E412.*{WRONG[kind]}"):
        check_twin("model", model)


def test_a_twin_leaves_random_numbers_and_threads_as_they_were():
    import torch
    import transformers

    from learner.small_twin import check_twin

    with torch.device("meta"):
        configuration = transformers.LlamaConfig(**BASE | {"vocab_size": 289})
        model = transformers.AutoModelForCausalLM.from_config(configuration, trust_remote_code=False)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    check_twin("model", model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


# --- lengths ---


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONG = rope("longrope", original_max_position_embeddings=16, short_factor=[1.0] * 16, long_factor=[2.0] * 16)
CONTEXTS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_position_embeddings": 64}, 64),
    ({"n_positions": 32}, 32),
    ({"n_ctx": 32}, 32),
    ({"max_seq_len": 48}, 48),
    ({"seq_length": 48, "max_position_embeddings": 64}, 48),
    ({"max_position_embeddings": 64, "model_max_length": 256}, 256),
    ({}, None),
    ({"max_position_embeddings": 64} | rope("default"), 64),
    ({"max_position_embeddings": 64} | rope("yarn", factor=4.0), 256),
    ({"max_position_embeddings": 64} | rope("yarn", factor=4.0, original_max_position_embeddings=64), 256),
    ({"max_position_embeddings": 256} | rope("yarn", factor=4.0, original_max_position_embeddings=64), 256),
    ({"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 128),
    ({"max_position_embeddings": 64} | rope("linear", factor=4.0), 256),
    ({"max_position_embeddings": 64} | rope("dynamic", factor=2.0), 128),
    ({"max_position_embeddings": 64} | LLAMA3, 64),
    ({"max_position_embeddings": 64} | LONG, 64),
    ({"max_position_embeddings": 64} | rope("linear", factor=None), 64),
    ({"max_position_embeddings": 64, "model_type": "gemma3_text"} | rope("linear", factor=8.0), 64),
    ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 64),
]


@pytest.mark.parametrize(("shape", "context"), CONTEXTS)
def test_the_context_is_what_engine_and_learner_make_of_the_configuration(shape, context):
    assert context_of(shape) == context


# In a process of its own: vLLM reads its environment once, and an engine in this process has read it.
TAKES = """
import json, os, sys
from vllm.config import ModelConfig

def takes(folder, length):
    try:
        return ModelConfig(model=folder, max_model_len=length, dtype="float32").max_model_len == length
    except ValueError:
        return False

os.environ.pop(sys.argv[1], None)
asked = json.loads(sys.argv[3])
strict = [[takes(folder, length), takes(folder, length + 1)] for folder, length in asked]
os.environ[sys.argv[1]] = sys.argv[2]
print(json.dumps([[*found, takes(*one)] for found, one in zip(strict, asked)]))
"""


@pytest.mark.stack
def test_vllm_takes_the_context_and_only_that(tmp_path):
    from rollout.vllm_setup import engine_environment

    cases = [(s, c) for s, c in CONTEXTS if "max_position_embeddings" in s and "None" not in str(s)]
    assert len(cases) > 10
    for i, (shape, _) in enumerate(cases):
        write_model(tmp_path / str(i), **{key: value for key, value in shape.items() if key != "model_type"})
    name = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    asked = json.dumps([[str(tmp_path / str(i)), context] for i, (_, context) in enumerate(cases)])
    command = [sys.executable, "-c", TAKES, name, engine_environment(make_config())[name], asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(200), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for (shape, context), (exactly, longer, allowed) in zip(
        cases, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert allowed, shape
        if "gemma3" not in str(shape):
            yarn = "yarn" in str(shape) and context > shape["max_position_embeddings"]
            assert not longer, shape
            assert exactly is not yarn, shape  # vLLM does not multiply; its rotary table is long enough all the same.


def test_a_sequence_may_be_longer_than_a_sliding_window():
    longer = {"rollout.max_prompt_tokens": 40, "rollout.max_new_tokens": 48}
    assert problems_of({"sliding_window": 60}, **longer) == []


@pytest.mark.parametrize(
    ("kind", "shape", "changes", "code"),
    [
        ("GPT2", ARCHITECTURES["GPT-2"][1] | {"n_positions": 32}, {"rollout.max_new_tokens": 48}, "E407"),
        ("GPT2", ARCHITECTURES["GPT-2"][1], {"rollout.tensor_parallel_size": 4}, "E406"),
        ("GPT2", ARCHITECTURES["GPT-2"][1] | {"n_head": 4}, {}, "E410"),
    ],
)
def test_old_and_derived_keys_are_checked_too(kind, shape, changes, code, tmp_path):
    (line,) = judged(save_tiny(tmp_path, kind, **shape), **changes)
    assert line.startswith(f"error[{code}] ")


# --- tokenizers ---


@pytest.fixture
def larger(tmp_path):
    """``(config, tokenizer)``: a tokenizer with one id more than the model has embeddings."""
    write_model(tmp_path, vocab_size=32, eos_token_id=1)
    config = make_config(**{"model.path": str(tmp_path)})
    tokenizer = load_tokenizer(config, "run.toml", light=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(33 - len(tokenizer))]})
    assert len(tokenizer) == 33
    return config, tokenizer


def test_an_id_that_never_occurs_is_told_and_no_more(larger):
    config, tokenizer = larger
    (line,) = check_ids(config, "run.toml", tokenizer, [make_prompt()])
    assert line == (
        "warning[W402] tokenizer is larger than the model — run.toml:model.tokenizer. Found 1 ids without an embedding: "
        f"token 32 ({tokenizer.convert_ids_to_tokens(32)}). None occurs"
    )


def test_an_id_that_occurs_is_refused(larger):
    config, tokenizer = larger
    with pytest.raises(InputError, match=r'E402.*token 32 \(<x.+>\) in the prompt "prompt 30"'):
        check_ids(config, "run.toml", tokenizer, [make_prompt(), make_prompt(30)])
    stop = tokenizer.convert_ids_to_tokens(32)
    stopping = config.model_copy(update={"rollout": config.rollout.model_copy(update={"stop": [stop]})})
    with pytest.raises(InputError, match=r"E402.*token 32 .*in rollout.stop"):
        check_ids(stopping, "run.toml", tokenizer, [])
    tokenizer.eos_token = stop
    assert len(check_ids(config, "run.toml", tokenizer, [])) == 1  # The model's own end is still there.
    edit(Path(config.model.path) / "config.json", eos_token_id=None)
    with pytest.raises(InputError, match=r"E402.*token 32 .*, which ends a completion"):
        check_ids(config, "run.toml", tokenizer, [])


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "rag", "template": "x"}]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"model_max_length": 1e30},
        {"padding_side": "left", "unknown_key": {"a": [1]}},
    ],
)
def test_tokenizers_of_all_kinds_can_be_saved(change, tmp_path):
    edit(write_model(tmp_path) / "tokenizer_config.json", **change)
    config = make_config(**{"model.path": str(tmp_path)})
    rehearse_save("run.toml", load_tokenizer(config, "run.toml", light=False))


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_start(tmp_path):
    config = make_config(**{"model.path": str(write_model(tmp_path))})
    tokenizer = load_tokenizer(config, "run.toml", light=False)
    tokenizer.init_kwargs["odd"] = object()
    with pytest.raises(InputError, match=r"E413.*run.toml:model.tokenizer.*not JSON serializable"):
        rehearse_save("run.toml", tokenizer)


# --- the learner loads the folder whole, and can save it ---

INCONSISTENT: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.6, "top_p": 0.9}, "do_sample = true"),
    ({"do_sample": False, "top_k": 20}, "do_sample = true"),
    ({"pad_token_id": -1, "eos_token_id": 257}, "nothing but its token ids"),
    ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, "nothing but its token ids"),
    ({"output_scores": True}, "nothing but its token ids"),
]


@pytest.mark.parametrize(("settings", "told"), INCONSISTENT)
def test_settings_that_could_not_be_saved_are_repaired_at_load_and_told_before(settings, told, tmp_path):
    from transformers import AutoModelForCausalLM, GenerationConfig

    from learner.logprobs import PolicyModel
    from learner.saving import save_weights

    folder = save_tiny(tmp_path / "model", "Llama")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (line,) = judged(folder)
    assert line.startswith("warning[W413]")
    assert told in line
    policy = PolicyModel.load(make_config(**{"model.path": str(folder)}))
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    save_weights(SimpleNamespace(module=policy), str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=False, use_safetensors=True)
    assert all((weights[name] == tensor).all() for name, tensor in again.state_dict().items())
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert kept.eos_token_id == settings.get("eos_token_id", kept.eos_token_id)
    assert judged(folder) == [line]  # The model's own folder is left as it is.


def test_the_learner_refuses_weights_that_are_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    from learner.logprobs import PolicyModel

    folder = save_tiny(tmp_path, "Llama")
    config = make_config(**{"model.path": str(folder)})
    whole = load_file(folder / "model.safetensors")
    PolicyModel.load(config)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in whole.items()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r'E411.*missing.*unexpected.*"_orig_mod\."'):
        PolicyModel.load(config)
    del whole["lm_head.weight"]
    save_file(whole, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"E411.*lm_head.weight.*saved without its output head"):
        PolicyModel.load(config)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral", "Gemma 4 text", "GPT-2", "DeepSeek-V2", "OPT"])
def test_a_checkpoint_has_the_names_and_values_that_were_loaded(name, tmp_path):
    from safetensors.torch import load_file

    from learner.logprobs import PolicyModel
    from learner.saving import save_weights

    kind, shape = ARCHITECTURES[name]
    folder = save_tiny(tmp_path / "model", kind, **shape)
    policy = PolicyModel.load(make_config(**{"model.path": str(folder)}))
    save_weights(SimpleNamespace(module=policy), str(tmp_path / "hf"))
    there, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "hf"))
    assert there.keys() == again.keys()
    assert all((there[key] == again[key]).all() for key in there)
