"""The policy as a folder that transformers, vLLM and other libraries load: a checkpoint's ``hf``.

Weights are gathered and written a layer at a time; no rank ever holds them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.checkpoint_form import CheckpointForm
from learner.tensor_files import Described, write_tensors
from learner.weight_sender import layout, published
from shared.config import Config

FILE_BYTES = 50 * 10**9
"""Largest file of weights; more are split over several, as transformers does."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save_pretrained(engine: Any, config: Config, directory: str, is_writer: bool) -> None:
    """Write the policy in Hugging Face form (safetensors, config, tokenizer); all ranks call it, ``is_writer`` writes.

    Raises ``OSError``, after all that the ranks do together.
    """
    save_weights(engine, directory, is_writer)
    if not is_writer:
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        config.model.tokenizer or config.model.path, trust_remote_code=config.model.trust_remote_code
    )
    wanted, named = config.model.chat_template, tokenizer.chat_template
    if wanted and not (isinstance(named, dict) and wanted in named):  # The name of one of its own changes nothing.
        tokenizer.chat_template = wanted
    tokenizer.save_pretrained(directory)


def save_weights(engine: Any, directory: str, is_writer: bool = True) -> None:
    """Write the model of ``engine`` without its tokenizer; all ranks call it, ``is_writer`` writes. Raises ``OSError``."""
    model, folder = engine.module.model, Path(directory)
    form = CheckpointForm(model, as_loaded=True)
    if not is_writer:
        for _ in published(engine, form):
            pass
        return
    kept = model.state_dict().keys()  # Gemma 4 scales its layers by buffers, which are no parameters.
    constants = form([(name, buffer) for name, buffer in model.named_buffers() if name in kept and not buffer.is_meta])
    metas = [Described(m.name, getattr(torch, m.dtype), m.shape) for m in layout(engine, form=form)]
    metas += [Described(name, buffer.dtype, tuple(buffer.shape)) for name, buffer in constants]
    failed: OSError | None = None
    try:
        write_settings(model, directory)
    except OSError as error:  # The other ranks already gather weights with this one.
        failed = error

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from published(engine, form)
        yield from constants

    files = _files(metas)
    write_tensors([(folder / name, part) for name, part in files.items()], tensors())
    if failed is not None:
        raise failed
    if len(files) > 1:
        places = {one.name: name for name, part in files.items() for one in part}
        index = {"metadata": {"total_size": sum(one.nbytes for one in metas)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files(described: list[Described]) -> dict[str, list[Described]]:
    """Split tensors over files of at most ``FILE_BYTES``, under the names that transformers gives them."""
    parts: list[list[Described]] = [[]]
    for one in described:
        if parts[-1] and sum(other.nbytes for other in parts[-1]) + one.nbytes > FILE_BYTES:
            parts.append([])
        parts[-1].append(one)
    if len(parts) == 1:
        return {WHOLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_settings(model: Any, directory: str) -> None:
    """Write the configuration of ``model``, its settings for generation and its code, if it has any. Raises ``OSError``."""
    from safetensors import SafetensorError

    Path(directory).mkdir(parents=True, exist_ok=True)
    ours, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        model.save_pretrained(directory, state_dict={})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        model.config._attn_implementation = ours
    (Path(directory) / WHOLE).unlink(missing_ok=True)  # Of no weights, if it was written.
