"""Timings and memory from data sheets: for planning on devices that are not here.

Decoding reads all weights and the live keys and values once a step, training does ``phi`` FLOPs a token and parameter;
each at a usual share of the device's peak. What was measured is better: ``millrace plan --timings``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.timings import Timings
from shared.config import Config
from shared.errors import InputError


@dataclass(frozen=True)
class Device:
    """A data sheet."""

    flops: float
    """Dense bfloat16 FLOP/s."""
    bandwidth: float
    """Memory bytes/s."""
    memory: float
    """Bytes."""


DEVICES = {
    "a100-80": Device(312e12, 2.04e12, 80e9),
    "h100-80": Device(989e12, 3.35e12, 80e9),
    "h200": Device(989e12, 4.8e12, 141e9),
    "b200": Device(2250e12, 8.0e12, 180e9),
    "l40s": Device(362e12, 0.864e12, 48e9),
}
READ_SHARE, DECODE_SHARE, PREFILL_SHARE, TRAIN_SHARE = 0.75, 0.5, 0.5, 0.4
"""Of the peaks that decoding, prefill and training usually reach."""
STEP_OVERHEAD_S = 2e-3
"""Of a decoding step, beside the device's work."""
LINK, HOST_LINK = 50e9, 25e9
"""Bytes/s between devices, and between a device and its host's memory."""
ENGINE_SHARE = 0.9
"""Of its memory that vLLM takes."""


@dataclass(frozen=True)
class Shape:
    """A decoder's size, from its ``config.json``."""

    parameters: float
    layers: int
    hidden: int
    kv_bytes: float
    """Of a token's keys and values over all layers, in bfloat16."""

    @classmethod
    def of(cls, config: Config) -> Shape:
        """Read it. Raises ``InputError`` E401."""
        path = Path(config.model.path) / "config.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            return cls._from(table)
        except (OSError, ValueError, KeyError) as error:
            expected, fix = "the config.json of a decoder", "a model directory, or --timings"
            raise InputError("E401", "model not readable", str(path), repr(error), expected, fix) from None

    @classmethod
    def _from(cls, table: dict[str, Any]) -> Shape:
        hidden, layers, heads = table["hidden_size"], table["num_hidden_layers"], table["num_attention_heads"]
        kv_heads, head = table.get("num_key_value_heads") or heads, table.get("head_dim") or hidden // heads
        attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
        per_layer = attention + 3 * hidden * table["intermediate_size"]
        embeddings = table["vocab_size"] * hidden * (1 if table.get("tie_word_embeddings") else 2)
        return cls(float(layers * per_layer + embeddings), layers, hidden, 2.0 * layers * kv_heads * head * 2)


def timings_of(config: Config, device: Device, mean: float, longest: int, prompt: float) -> Timings:
    """Of ``config``'s model on ``device``, for completions of ``mean`` tokens cut at ``longest``, and such prompts."""
    shape, width = Shape.of(config), config.rollout.workers_per_engine
    weights = 2 * shape.parameters
    read, compute = device.bandwidth * READ_SHARE * width, device.flops * width
    context = prompt + mean / 2
    per_token = max(shape.kv_bytes * context / read, 2 * shape.parameters / (DECODE_SHARE * compute))
    recompute = 2 if config.learner.gradient_checkpointing else 0
    passes = 6 + recompute + (2 if config.needs_reference else 0)
    attention = 12 * shape.layers * shape.hidden * context / shape.parameters
    link = HOST_LINK if config.rollout.weights == "host" else LINK
    return Timings(
        decode_step_s=weights / read + STEP_OVERHEAD_S,
        decode_sequence_s=per_token,
        prefill_token_s=2 * shape.parameters / (PREFILL_SHARE * compute),
        request_s=0.2e-3,
        train_step_s=20 * shape.parameters / device.bandwidth,  # Adam reads and writes its states once.
        train_token_s=(passes + attention) * shape.parameters / (TRAIN_SHARE * device.flops),
        ranks_s=2 * weights / LINK,
        publish_s=weights / link,
        prepare_s=weights / link,
        pause_s=weights / link,
        prove_s=10e-3,
        score_s=2e-3,
        mean_length=mean,
        longest=longest,
        prompt_tokens=prompt,
    )


def memory_report(config: Config, device: Device, ranks: int, running: float, timings: Timings) -> list[str]:
    """What an engine with ``running`` sequences and one of ``ranks`` learner ranks need, in words; wrong fits say so."""
    shape, width = Shape.of(config), config.rollout.workers_per_engine
    live = min(running, config.max_num_seqs) * (timings.prompt_tokens + timings.mean_length / 2) * shape.kv_bytes
    engine, room = (2 * shape.parameters + live) / width, ENGINE_SHARE * device.memory
    spread = ranks if config.learner.zero_stage >= 1 else 1
    states = 12 * shape.parameters / spread
    states += 2 * shape.parameters / (ranks if config.learner.zero_stage >= 2 else 1)
    states += 2 * shape.parameters / (ranks if config.learner.zero_stage >= 3 else 1)
    per_token = 2 * shape.hidden * shape.layers * (1 if config.learner.gradient_checkpointing else 17)
    learner = states + per_token * config.learner.max_tokens_per_microbatch
    if config.needs_reference:
        learner += 2 * shape.parameters / (ranks if config.learner.zero_stage >= 3 else 1)
    return [
        _fits(f"engine: weights {2 * shape.parameters / width / 1e9:.1f} GB, keys and values", engine, room),
        _fits(
            f"learner rank, ZeRO {config.learner.zero_stage}: optimizer, weights, activations", learner, device.memory
        ),
    ]


def _fits(what: str, needed: float, there: float) -> str:
    verdict = "fits" if needed <= there else "DOES NOT FIT"
    return f"{what}: {needed / 1e9:.1f} of {there / 1e9:.0f} GB, {verdict}"
