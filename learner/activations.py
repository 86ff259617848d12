"""Measuring of what a backward pass keeps: one forward pass of the model without values, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner import attention
from learner.attention import ATTENTION_NAME, Layout, register_attention

TOKENS = 256


class _Kept(torch.autograd.Function):
    """What a flash kernel keeps for its backward pass: its three inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def of_folder(path: str, dtype: str, trusted: bool) -> float:
    """Return ``saved_bytes`` of the model in the folder ``path``, of which only config.json is read."""
    from learner import meta_model

    raw = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    model = meta_model.build(path, meta_model.read(path, raw, trusted), trusted)
    return saved_bytes(model.to(getattr(torch, dtype)))


def saved_bytes(model: Any) -> float:
    """Return the bytes that a forward pass of ``model``, which is on the meta device, keeps for each packed token.

    Attention counts as a flash kernel does. Raises whatever a model raises that needs values, as one that routes tokens.
    """
    register_attention()
    model.train()
    ours = model.config._attn_implementation
    kernels = attention._causal, attention._banded
    model.set_attn_implementation(ATTENTION_NAME)
    for kernel in ("_causal", "_banded"):
        setattr(attention, kernel, lambda query, key, value, *_: _Kept.apply(query, key, value))
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # They stay alive, or their numbers would be used again.

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, storage)
        return tensor

    layout = Layout.of([[range(TOKENS)]]).to(torch.device("meta"))
    places = torch.arange(TOKENS, device="meta")[None]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=places, position_ids=places, attention_mask=None, use_cache=False, layout=layout)
    finally:
        attention._causal, attention._banded = kernels
        model.set_attn_implementation(ours)
    return sum(storage.nbytes() for number, storage in saved.items() if number not in own) / TOKENS
