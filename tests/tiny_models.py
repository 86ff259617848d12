"""Random models of many architectures: two layers, heads of 32, a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 32
ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    **ENDS,
}
WINDOWS = {"head_dim": 32, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.1}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32}

ATTENTION_ALONE = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SHAPE),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SHAPE | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SHAPE | {"head_dim": 32, "tie_word_embeddings": True}),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SHAPE | WINDOWS | {"query_pre_attn_scalar": 32}),
    "OLMo2": ("Olmo2ForCausalLM", "Olmo2Config", SHAPE),
    "OLMo3": ("Olmo3ForCausalLM", "Olmo3Config", SHAPE | {k: WINDOWS[k] for k in ("sliding_window", "layer_types")}),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", SHAPE | {"no_rope_layers": [1, 0]}),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", SHAPE | {"sliding_window": 12, "original_max_position_embeddings": 64}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", SHAPE | {"sliding_window": 12}),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | ENDS),
    "GPT2untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | ENDS | {"tie_word_embeddings": False}),
    "GPTNeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {k: SHAPE[k] for k in SHAPE if k != "num_key_value_heads"}),
    "Qwen3MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SHAPE | EXPERTS),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Models whose tokens meet in attention and nowhere else."""
HYBRID = {
    "LFM2": ("Lfm2ForCausalLM", "Lfm2Config", SHAPE | {"layer_types": ["conv", "full_attention"]}),
    "Qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", SHAPE | LINEAR),
    "Mamba2": ("Mamba2ForCausalLM", "Mamba2Config", MAMBA | ENDS | {"state_size": 16, "n_groups": 1}),
}
"""Models that also mix tokens by convolutions or recurrent states."""
OTHERWISE = {
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        SHAPE | WINDOWS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SHAPE | {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "Bloom": ("BloomForCausalLM", "BloomConfig", MAMBA | ENDS | {"n_layer": 2, "n_head": 2, "initializer_range": 0.1}),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", SHAPE),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", SHAPE | {"logits_scaling": 8.0}),
}
"""Models whose attention or output head the learner does not compute."""


def tiny_model(name: str):
    """A model of the architecture, with noise on what transformers sets to 0 or 1."""
    import torch
    import transformers

    model_class, config_class, settings = (ATTENTION_ALONE | HYBRID | OTHERWISE)[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def write_tiny_model(name: str, path: Path, ends: list[int] | None = None) -> Path:
    """The model with the addition tokenizer, as a folder; ``ends``: end tokens of its generation_config."""
    from launch.builtin import TASKS, make_tokenizer

    tiny_model(name).save_pretrained(path)
    make_tokenizer(TASKS["addition"]).save_pretrained(path)
    if ends:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 0}))
    return path
