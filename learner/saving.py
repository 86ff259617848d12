"""The policy as a folder that transformers, vLLM and other libraries load: a checkpoint's ``hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from learner.weight_sender import full_tensors
from shared.config import Config


def whole_copies(engine: Any, is_writer: bool) -> dict[str, Tensor]:
    """Every weight by name, on the CPU; empty where ``is_writer`` is False, but all ranks call it together."""
    return {name: tensor.cpu().contiguous().clone() for name, tensor in full_tensors(engine) if is_writer}


def save_pretrained(engine: Any, weights: dict[str, Tensor], config: Config, directory: str) -> None:
    """Write the policy in Hugging Face form (safetensors, config, tokenizer); no collective. Raises ``OSError``."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        write_model(engine.module.model, weights, directory)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(
        config.model.tokenizer or config.model.path, trust_remote_code=config.model.trust_remote_code
    )
    wanted, named = config.model.chat_template, tokenizer.chat_template
    if wanted and not (isinstance(named, dict) and wanted in named):  # The name of one of its own changes nothing.
        tokenizer.chat_template = wanted
    tokenizer.save_pretrained(directory)


def write_model(model: Any, weights: dict[str, Tensor], directory: str) -> None:
    """Write ``weights``, constants that belong to them and the configuration of ``model`` to ``directory``."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    kept = model.state_dict().keys()  # Gemma 4 scales its layers by buffers, which are no parameters.
    constants = {name: buffer for name, buffer in model.named_buffers() if name in kept and not buffer.is_meta}
    ours, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        model.save_pretrained(directory, state_dict=weights | constants)
    finally:
        model.config._attn_implementation = ours
