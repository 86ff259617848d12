"""Refuse by its configuration a model that engine or learner cannot compute, or whose sequences would be too long.

The rules read one table: ``config.json``, or what transformers makes of it (``learner.meta_model.canonical``), which
knows every name of a key and the defaults. No weights and no heavy library are needed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.errors import InputError

Shape = dict[str, Any]
"""Keys of a model's configuration."""
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length"),
    *("n_ctx", "seq_len"),
)
"""Keys for the longest sequence of a model; the smallest counts, as in vLLM."""
LONGER = {"linear", "dynamic", "ntk"}
"""Kinds of rotary scaling by which the context is ``factor`` times the configured one."""
WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
"""Keys for the inner width of a feed-forward layer, which workers share out evenly."""
LAYER_KEYS = ("layer_types", "layers_block_type", "block_types", "attn_layers")
ATTENTION = {"full_attention", "sliding_attention", "attention", "global", "local"}
"""Kinds of layers that mix tokens by attention alone, with the mask of a causal model or a window of it."""
STATE = re.compile(
    r"mamba_|use_mamba|ssm_|linear_(conv|key|value|num)_|conv_L_cache|lru_width|time_step_|state_size$|rwkv"
)
"""Names of keys of layers that carry a state from token to token."""
ATTENTIONS = {
    "attn_logit_softcapping": "a soft cap on its scores",
    "alibi": "ALiBi",
    "use_bidirectional_attention": "attention in both directions",
    "add_swa_attention_sink_bias": "attention sinks",
    "add_full_attention_sink_bias": "attention sinks",
    "learnable_sink_init": "attention sinks",
    "index_topk": "sparse attention with an indexer",
    "index_topk_blocks": "sparse attention with an indexer",
}
"""Keys that change attention where they are set, and what each stands for."""
HEADS = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_mup_width_multiplier": 1.0,
}
"""Keys that change logits after the output head, and the value that does not."""


def check_config(config: Config, origin: str, shape: Shape, on_gpu: bool, problems: list[InputError]) -> None:
    """Add E108, E406, E407, E410 and E412 for the model of ``config``, whose configuration is ``shape``, to ``problems``."""
    file = f"{config.model.path}/config.json"
    _check_heads(config, origin, shape, problems)
    _check_lengths(config, origin, shape, problems)
    _check_output_head(file, shape, problems)
    _check_layers(file, shape, problems)
    _check_attention(file, shape, problems)
    if not on_gpu:
        _check_head_dim(file, shape, problems)
    if config.algorithm.old_logprobs == "current" and shape.get("attention_dropout"):
        keys, fix = f"{origin}:algorithm.old_logprobs", 'algorithm.old_logprobs = "auto"'
        found = f"current with attention_dropout {shape['attention_dropout']}"
        problems.append(InputError("E108", "options disagree", keys, found, "a pass without dropout", fix))


def check_quantised(path: Path, raw: Shape, problems: list[InputError]) -> None:
    """Add E412 if ``config.json`` of the folder ``path``, read as ``raw``, says that the weights are quantised."""
    text = raw.get("text_config")
    for key in ("quantization_config", "compression_config"):
        table = raw.get(key) or (text.get(key) if isinstance(text, dict) else None)
        if table:
            found = str(table.get("quant_method", table)) if isinstance(table, dict) else str(table)
            place, expected = f"{path}/config.json:{key}", "none: rounded weights cannot be trained"
            fix = "use the model that is not quantised"
            problems.append(InputError("E412", "quantised weights", place, found, expected, fix))


def _check_heads(config: Config, origin: str, shape: Shape, problems: list[InputError]) -> None:
    """Add E406 if a layer cannot be shared out evenly, as vLLM asserts, or there are fewer layers than stages."""
    heads, tp = shape.get("num_attention_heads") or shape.get("n_head"), config.rollout.tensor_parallel_size
    layers, stages = shape.get("num_hidden_layers") or shape.get("n_layer"), config.rollout.pipeline_parallel_size
    if heads and not _splits(shape, heads, tp):
        sizes = [n for n in range(1, heads + 1) if _splits(shape, heads, n)]
        parts = {key: shape[key] for key in ("num_key_value_heads", *WIDTHS) if _is_number(shape.get(key))}
        found = f"{tp} for {heads} heads" + "".join(f", {key} {value}" for key, value in parts.items())
        found = f"{tp} for {heads} heads" if heads % tp else found
        place, fix = f"{origin}:rollout.tensor_parallel_size", f"use {max(n for n in sizes if n <= tp)}"
        problems.append(InputError("E406", "heads do not split", place, found, f"one of {sizes}", fix))
    if layers and layers < stages:
        place, expected = f"{origin}:rollout.pipeline_parallel_size", f"at most {layers}, the layers of the model"
        problems.append(InputError("E406", "layers do not split", place, str(stages), expected, f"use {layers}"))


def _splits(shape: Shape, heads: int, workers: int) -> bool:
    """Return True if ``workers`` can share every layer equally; key heads may be split, or repeated, evenly."""
    given = shape.get("num_key_value_heads")
    keys = given if isinstance(given, int) and given > 0 else heads
    shared = max(keys, workers) % min(keys, workers) == 0
    widths = [shape[key] for key in WIDTHS if _is_number(shape.get(key))]
    return heads % workers == 0 and shared and not any(width % workers for width in widths)


def _check_lengths(config: Config, origin: str, shape: Shape, problems: list[InputError]) -> None:
    prompt, limit = config.rollout.max_prompt_tokens, context_of(shape)
    new = config.max_model_len - prompt
    if limit is None or prompt + new <= limit:
        return
    place, found = f"{origin}:rollout.max_new_tokens", f"{prompt} + {new} = {prompt + new}"
    longest = limit - prompt
    fix = f"at most {longest} new tokens" if longest > 0 else f"rollout.max_prompt_tokens below {limit}"
    problems.append(InputError("E407", "sequence too long", place, found, f"<= {limit} (model context)", fix))


def context_of(shape: Shape) -> int | None:
    """Return the tokens of the longest sequence that a model takes; None if its configuration sets no limit."""
    lengths = [shape[key] for key in LENGTHS if _is_number(shape.get(key)) and shape[key] > 0]
    if _is_number(shape.get("model_max_length")):
        lengths = [shape["model_max_length"]]
    if not lengths:
        return None
    context = min(lengths)
    for rope in _ropes(shape):
        kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
        original = rope.get("original_max_position_embeddings") or context
        if not _is_number(factor):
            continue
        if kind in LONGER and "gemma3" not in str(shape.get("model_type")):
            return int(context * factor)
        if kind == "yarn":
            return int(max(context, original * factor))
    return int(context)


def _ropes(shape: Shape) -> list[Shape]:
    """Return the rotary settings: one table, or one for each kind of layer."""
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    nested = [table for table in rope.values() if isinstance(table, dict)] if isinstance(rope, dict) else []
    return nested or ([rope] if isinstance(rope, dict) else [])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_output_head(file: str, shape: Shape, problems: list[InputError]) -> None:
    for key, neutral in HEADS.items():
        if shape.get(key, neutral) not in (None, neutral):
            expected = "logits straight from the output head, which the learner's chunked log-probs assume"
            found, fix = str(shape[key]), "use another model"
            problems.append(InputError("E412", "output head not supported", f"{file}:{key}", found, expected, fix))


def _check_layers(file: str, shape: Shape, problems: list[InputError]) -> None:
    """Refuse layers that leak from one packed sequence into the next, or whose attention is not ours."""
    expected = "layers of full or sliding attention; others would mix the sequences of a packed row"
    for key in LAYER_KEYS:
        kinds = shape.get(key) or []
        foreign = sorted({str(kind) for kind in kinds} - ATTENTION) if isinstance(kinds, list | tuple) else []
        if foreign:
            found = ", ".join(foreign)
            problems.append(
                InputError("E412", "layers not supported", f"{file}:{key}", found, expected, "use another model")
            )
            return
    for key in [key for key in shape if STATE.match(key) and shape[key]][:1]:
        found = f"{key} = {shape[key]} (a state-space or convolution layer)"
        problems.append(
            InputError("E412", "layers not supported", f"{file}:{key}", found, expected, "use another model")
        )


def _check_attention(file: str, shape: Shape, problems: list[InputError]) -> None:
    inner = shape.get("attn_config")
    table = shape | (inner if isinstance(inner, dict) else {})
    found = next((f"{key} = {table[key]} ({what})" for key, what in ATTENTIONS.items() if _is_set(table.get(key))), "")
    if table.get("position_embedding_type") == "alibi":
        found = "position_embedding_type = alibi (ALiBi)"
    if found:
        expected = "causal attention by rotary, learned or no positions, without soft cap, bias or sinks"
        place, fix = f"{file}:{found.partition(' =')[0]}", "use another model"
        problems.append(InputError("E412", "attention not supported", place, found, expected, fix))


def _is_set(value: Any) -> bool:
    return value is True or (_is_number(value) and value is not False)


def _check_head_dim(file: str, shape: Shape, problems: list[InputError]) -> None:
    heads = shape.get("num_attention_heads")
    if not heads or shape.get("kv_lora_rank"):  # Compressed keys are as wide as their rank.
        return
    head_dim = shape.get("head_dim") or shape["hidden_size"] // heads
    if head_dim not in CPU_HEAD_DIMS:
        expected = ", ".join(map(str, CPU_HEAD_DIMS)) + " (CPU attention)"
        place, fix = f"{file}:head_dim", "use another model"
        problems.append(InputError("E410", "head_dim not supported", place, str(head_dim), expected, fix))
