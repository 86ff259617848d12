"""Timings and memory from data sheets: for planning on devices that are not here.

Decoding reads all weights and the live keys and values once a step, training does ``phi`` FLOPs a token and parameter;
each at a usual share of the device's peak. What was measured is better: ``millrace plan --timings``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.timings import Lengths, Timings
from rollout import hub
from shared.config import Config
from shared.errors import InputError, one_line

"""A model on the hub: ``org/name``, or at one commit."""


@dataclass(frozen=True)
class Device:
    """A data sheet."""

    flops: float
    """Dense bfloat16 FLOP/s."""
    flops_float32: float
    """Those of float32 without tensor cores, as torch multiplies unless it is told otherwise."""
    bandwidth: float
    """Memory bytes/s."""
    memory: float
    """Bytes."""


DEVICES = {
    "a100-80": Device(312e12, 19.5e12, 2.04e12, 80e9),
    "h100-80": Device(989e12, 67e12, 3.35e12, 80e9),
    "h200": Device(989e12, 67e12, 4.8e12, 141e9),
    "b200": Device(2250e12, 75e12, 8.0e12, 180e9),
    "l40s": Device(362e12, 91.6e12, 0.864e12, 48e9),
}
NAMES = {"A100-80G": "a100-80", "H100": "h100-80", "H200": "h200", "B200": "b200", "L40S": "l40s"}
"""Data sheets of GPUs by the types that Ray gives them."""
READ_SHARE, DECODE_SHARE, PREFILL_SHARE, TRAIN_SHARE = 0.75, 0.5, 0.5, 0.4
"""Of the peaks that decoding, prefill and training usually reach."""
STEP_OVERHEAD_S = 2e-3
"""Of a decoding step, beside the device's work."""
LINK, HOST_LINK = 50e9, 25e9
"""Bytes/s between devices, and between a device and its host's memory."""
ENGINE_SHARE = 0.92
"""Of its memory that vLLM takes: the default of its gpu_memory_utilization."""
LARGEST = 10**9
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "num_key_value_heads",
    "head_dim",
)
"""Of ``config.json``; the last two may be missing or null."""


@dataclass(frozen=True)
class Shape:
    """A decoder's size, from its ``config.json``."""

    parameters: float
    layers: int
    hidden: int
    number: int
    """Bytes of a weight, a key or a value: ``model.dtype``."""
    kv_bytes: float
    """Of a token's keys and values over all layers."""
    vocabulary: int
    """Rows of the output head."""

    @classmethod
    def of(cls, config: Config) -> Shape:
        """Read it. Raises ``InputError`` E401."""
        path = _folder(config.model.path) / "config.json"
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(table, dict):
                raise ValueError(f"a {type(table).__name__}")
            return cls._from(table, 4 if config.model.dtype == "float32" else 2)
        except (OSError, ValueError, RecursionError) as error:
            expected, fix = "the config.json of a decoder", "a model directory, or --timings"
            raise InputError("E401", "model not readable", str(path), one_line(error), expected, fix) from None

    @classmethod
    def _from(cls, table: dict[str, Any], number: int) -> Shape:
        sizes: list[Any] = [table.get(name) for name in SIZES]
        for name, size in zip(SIZES, sizes, strict=True):
            missing = size is None and name in SIZES[-2:]
            if not missing and not (type(size) is int and 0 < size <= LARGEST):
                raise ValueError(f"{name} = {size!r}")
        hidden, layers, heads, wide, words, kv_heads, head = sizes
        kv_heads, head = kv_heads or heads, head or max(hidden // heads, 1)
        attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
        embeddings = words * hidden * (1 if table.get("tie_word_embeddings") else 2)
        parameters = float(layers * (attention + 3 * hidden * wide) + embeddings)
        return cls(parameters, layers, hidden, number, 2.0 * layers * kv_heads * head * number, words)

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return self.number * self.parameters


def device_named(accelerator: str) -> Device | None:
    """The data sheet of Ray's type of GPU; None if there is none."""
    return DEVICES.get(NAMES.get(accelerator, ""))


def _folder(path: str) -> Path:
    """Where a model's ``config.json`` lies; of one on the hub nothing else is fetched."""
    return hub.fetched(path, "model", "E401", "model.path", ["config.json"]) if hub.is_named(path) else Path(path)


def timings_of(config: Config, device: Device, mean: float, longest: int, prompt: float) -> Timings:
    """Of ``config``'s model on ``device``, for completions of ``mean`` tokens cut at ``longest``, and such prompts."""
    shape, width = Shape.of(config), config.rollout.workers_per_engine
    given = Timings(mean_length=mean, longest=longest, prompt_tokens=prompt)
    peak = device.flops_float32 if shape.number == 4 else device.flops
    read, compute = device.bandwidth * READ_SHARE * width, peak * width
    context = _context(given)
    recompute = 2 if config.learner.gradient_checkpointing else 0
    passes = 6 + recompute + (2 if config.needs_reference else 0)
    attention = 12 * shape.layers * shape.hidden * context / shape.parameters
    link = shape.weights / (HOST_LINK if config.rollout.weights == "host" else LINK)
    return replace(
        given,
        decode_step_s=shape.weights / read + STEP_OVERHEAD_S,
        decode_sequence_s=max(shape.kv_bytes * context / read, 2 * shape.parameters / (DECODE_SHARE * compute)),
        prefill_token_s=2 * shape.parameters / (PREFILL_SHARE * compute),
        request_s=0.2e-3,
        train_step_s=20 * shape.parameters / device.bandwidth,  # Adam reads and writes its states once.
        train_token_s=(passes + attention) * shape.parameters / (TRAIN_SHARE * peak),
        ranks_s=2 * shape.weights / LINK,
        publish_s=link,
        prepare_s=link,
        pause_s=link,
        prove_s=10e-3,
        room=max(_room(shape, device.memory * width, context), 1),
    )


def _context(timings: Timings) -> float:
    """Tokens of a running sequence on average, its prompt included."""
    return timings.prompt_tokens + Lengths(timings).live


def _room(shape: Shape, memory: float, context: float) -> int:
    """Sequences whose keys and values have room beside the weights in an engine of so much ``memory``."""
    return max(int((ENGINE_SHARE * memory - shape.weights) / (shape.kv_bytes * context)), 0)


def memory_report(config: Config, device: Device, ranks: int, running: float, timings: Timings) -> list[str]:
    """What an engine with ``running`` sequences and one of ``ranks`` learner ranks need, in words; wrong fits say so.

    Sequences beyond the room for keys and values wait; an engine fits if the weights and one sequence do.
    """
    from launch.memory import Sizes, learner_bytes, total  # It reads data sheets here.

    shape, width, learner = Shape.of(config), config.rollout.workers_per_engine, config.learner
    context = _context(timings)
    room = _room(shape, device.memory * width, context)
    live = min(running, config.max_num_seqs, room) * context
    engine = (shape.weights + max(live, config.max_model_len) * shape.kv_bytes) / width
    states = total(learner_bytes(config, Sizes.of(config), on_gpu=True, ranks=ranks))
    weights = f"engine: weights {shape.weights / width / 1e9:.1f} GB, keys and values (room for {room:,} sequences)"
    return [
        _fits(weights, engine, ENGINE_SHARE * device.memory),
        _fits(f"learner rank, ZeRO {learner.zero_stage}: optimizer, weights, activations", states, device.memory),
    ]


def _fits(what: str, needed: float, there: float) -> str:
    verdict = "fits" if needed <= there else "DOES NOT FIT"
    return f"{what}: {needed / 1e9:.1f} of {there / 1e9:.0f} GB, {verdict}"
