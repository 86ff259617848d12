"""Loading of a model folder a decoder layer at a time: each rank keeps its ZeRO-3 share of a layer before the next one is read.

The library's own loader converts and checks the weights; it is only called once for each layer. Rank 0 reads the files, and
DeepSpeed broadcasts what it read. Invariant: no rank holds more than its share of the model and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learner.tensor_files import TYPES


@contextmanager
def in_shares(deepspeed_settings: dict[str, Any]) -> Iterator[None]:
    """While open, ``from_pretrained`` gives each rank its ZeRO-3 share of a model; all ranks must load it together."""
    from transformers import PreTrainedModel

    def load(
        model: Any, _: None, files: list[str], load_config: Any, *__: Any, **___: Any
    ) -> tuple[Any, dict[str, Any]]:
        return _load_layers(model, files, load_config, deepspeed_settings), {}

    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = before


def _load_layers(model: Any, files: list[str], load_config: Any, settings: dict[str, Any]) -> Any:
    """Load ``model``, whose weights are on the meta device, from ``files``; return what the library says of its keys."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    told = None
    for layer in _layers(_where(files)):
        with ExitStack() as open_files:
            info, _ = convert_and_load_state_dict_in_model(
                model=model, state_dict=_values(layer, open_files), load_config=load_config
            )
            partition(model, settings)
        if told is None:
            told = info
            continue
        told.missing_keys &= info.missing_keys
        for name in ("unexpected_keys", "mismatched_keys", "skipped_pp_keys"):
            getattr(told, name).update(getattr(info, name))
        told.conversion_errors.update(info.conversion_errors)
        told.error_msgs += info.error_msgs
    return told


def partition(model: nn.Module, settings: dict[str, Any]) -> None:
    """Keep this rank's share of every parameter that has values and is whole; a collective of all ranks."""
    import deepspeed

    whole = [p for p in model.parameters() if not p.is_meta and not hasattr(p, "ds_id")]
    if whole:
        offload = settings["zero_optimization"].get("offload_param") or {}
        deepspeed.zero.Init(
            module=nn.ParameterList(whole), config_dict_or_path=settings, remote_device=offload.get("device")
        )


def _where(files: list[str]) -> dict[str, str]:
    """Return the file of every tensor in ``files``, by name."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _layers(where: dict[str, str]) -> list[dict[str, str]]:
    """Split ``where`` by decoder layer; every module outside the layers is a part of its own."""
    groups: dict[str, dict[str, str]] = {}
    for name, path in where.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        place = ".".join(parts[:-1] if number is None else parts[: number + 1])
        groups.setdefault(place, {})[name] = path
    return list(groups.values())


def _values(layer: dict[str, str], open_files: ExitStack) -> dict[str, Any]:
    """Return the tensors of ``layer``, not read yet; on all ranks but the first, which sends them, without values."""
    from safetensors import safe_open

    opened = {path: open_files.enter_context(safe_open(path, "pt")) for path in set(layer.values())}
    slices = {name: opened[path].get_slice(name) for name, path in layer.items()}
    if torch.distributed.get_rank() == 0:
        return slices
    return {name: _WithoutValues(one) for name, one in slices.items()}


class _WithoutValues:
    """A tensor of a file as safetensors offers it, whose memory is not filled: rank 0 sends the values."""

    def __init__(self, slice_: Any) -> None:
        self.get_shape, self.get_dtype = slice_.get_shape, slice_.get_dtype

    def __getitem__(self, _: Any) -> Tensor:
        return torch.empty(self.get_shape(), dtype=TYPES[self.get_dtype()])
