"""Load a model folder completely and in a state that can be saved again, or say in one line what keeps it from that."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from learner.sharded_loading import in_shares
from shared.errors import InputError

MARKERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
"""Parts of names that wrappers (FSDP, activation checkpointing, torch.compile, DDP) leave in a saved state."""
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def load_model(path: str, shares: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return the causal language model in the folder ``path``, loaded with ``options`` of ``from_pretrained``.

    With ``shares``, settings of DeepSpeed, every rank gets its ZeRO-3 share of each weight, and all ranks call it together.
    Raises ``InputError`` E411 if weights are missing: transformers would make up random ones.
    """
    from transformers import AutoModelForCausalLM

    trusted = options.pop("trust_remote_code")
    with in_shares(shares) if shares else nullcontext():
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, trust_remote_code=trusted, **options
        )
    refuse_missing(path, model, info["missing_keys"], info["unexpected_keys"])
    make_savable(model)
    return model


def refuse_missing(path: str, model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ``InputError`` E411 that names weights which ``model`` needs and the folder ``path`` lacks."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    lacking, odd = sorted(set(missing) - set(tied)), sorted(unexpected)
    if not lacking:
        return
    found = f"{len(lacking)} missing ({_some(lacking)})"
    found += f", {len(odd)} unexpected ({_some(odd)})" if odd else ""
    expected, fix = f"every weight of {type(model).__name__}", _fix(lacking, odd)
    raise InputError("E411", "weights missing", path, found, expected, fix)


def _fix(missing: list[str], unexpected: list[str]) -> str:
    """Return what to do about ``missing`` weights, by what the ``unexpected`` names have in common."""
    if any("lora_" in name or ".base_layer." in name for name in unexpected):
        return "merge the adapter into the model (merge_and_unload of peft), and save that"
    extra = _extra(missing, unexpected)
    if extra:
        return f'save the weights without "{extra}" in their names'
    if missing == ["lm_head.weight"] or all("lm_head" in name for name in missing):
        return "use a causal language model: this one was saved without its output head"
    return "use weights that belong to this config.json, and all of them"


def _extra(missing: list[str], unexpected: list[str]) -> str:
    """Return the text without which most of the ``unexpected`` names are names of ``missing`` weights, or nothing."""
    wanted, needed = set(missing), len(missing) / 2
    for marker in MARKERS:
        if len(wanted & {name.replace(marker, "") for name in unexpected if marker in name}) >= needed:
            return marker
    prefixes = {name[: -len(one)] for one in missing[-3:] for name in unexpected if name.endswith(f".{one}")}
    for prefix in sorted(prefixes):
        if len(wanted & {name.removeprefix(prefix) for name in unexpected}) >= needed:
            return prefix
    return ""


def make_savable(model: Any) -> list[str]:
    """Repair the settings for generation of ``model`` that transformers loads and then refuses to save.

    Returns what was changed, in words. Training reads none of them.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or not _objection(generation):
        return []
    if generation.do_sample is not True:
        generation.do_sample = True
        if not _objection(generation):
            return ["do_sample = true, for the sampling settings beside it"]
    kept = {name: getattr(generation, name, None) for name in KEPT}
    usable = {name: value for name, value in kept.items() if value is not None and value != -1}
    model.generation_config = type(generation)(**usable)
    return ["nothing but its token ids"]


def _objection(generation: Any) -> str:
    """Return why transformers would not save ``generation``; empty if it would."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])
