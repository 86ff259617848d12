"""Tiny model folders of real architectures, written by transformers itself, for ``test_model_files.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BASE = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"vocab_size": 288, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "eos_token_id": 257}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
BOTH = ["sliding_attention", "full_attention"]
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3.1": ("Llama", {"rope_parameters": SCALED | {"original_max_position_embeddings": 64}}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Ministral 3": ("Ministral3", {"head_dim": 32}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, window off": ("Qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    "Qwen2-MoE": ("Qwen2Moe", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    "Qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS | {"head_dim": 32, "num_experts": 4}),
    "Gemma": ("Gemma", {"head_dim": 32}),
    "Gemma 3 text": ("Gemma3Text", {"head_dim": 32, "sliding_window": 64, "layer_types": BOTH}),
    "Gemma 4 text": (
        "Gemma4Text",
        {"head_dim": 32, "global_head_dim": 32, "sliding_window": 64, "layer_types": BOTH}
        | {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32},
    ),
    "Phi-3": ("Phi3", {"sliding_window": None, "original_max_position_embeddings": 256}),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", {"sliding_window": 64, "layer_types": BOTH}),
    "OLMoE": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "Granite": ("Granite", {"attention_multiplier": 0.02, "residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    "StarCoder2": ("Starcoder2", {"sliding_window": None}),
    "GLM-4": ("Glm4", {"head_dim": 32}),
    "Persimmon": ("Persimmon", {}),
    "Ernie 4.5": ("Ernie4_5", {"head_dim": 32}),
    "Seed-OSS": ("SeedOss", {"head_dim": 32}),
    "EXAONE 4": ("Exaone4", {"sliding_window": 64, "layer_types": BOTH}),
    "HunYuan": ("HunYuanDenseV1", {"head_dim": 32}),
    "Apertus": ("Apertus", {}),
    "Arcee": ("Arcee", {}),
    "Cohere, scale 1": ("Cohere", {"logit_scale": 1.0}),
    "DeepSeek-V2": ("DeepseekV2", EXPERTS | LATENT | {"num_key_value_heads": 2}),
    "OPT": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-2": ("GPT2", GPT2),
}
"""Architectures that the learner trains: the class of their configuration without its ending, and what differs from BASE."""


def save_tiny(path: Path, kind: str, **shape: Any) -> Path:
    """A random model of the configuration class ``kind`` with a byte tokenizer, as transformers saves it."""
    import transformers

    from launch.builtin import TASKS, make_tokenizer

    table = shape if kind == "GPT2" else BASE | shape
    configuration = getattr(transformers, f"{kind}Config")(**table)
    transformers.AutoModelForCausalLM.from_config(configuration, trust_remote_code=False).save_pretrained(path)
    make_tokenizer(TASKS["gsm8k"]).save_pretrained(path)
    return path
