"""New weights for a CPU engine, made ready while it samples and put in place between two of its steps.

vLLM packs the weights of linear layers for CPU kernels, so they cannot be written in place, and its own reload does the
packing while generation stands still. Here every layer's new tensors are packed beside the live ones first; the
exchange itself is a few assignments, whatever the size. Costs a second copy of the weights for that time.
Invariant: either every parameter of the model is replaced, or ``plan`` declines and vLLM's reload is used. What vLLM's
loader does with a checkpoint is not known from names alone (it may transpose or permute): ``reproduces`` tells whether a
plan gives what the loader gave.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

Plan = dict[nn.Module, dict[str, list[str]]]
"""Layer -> its parameter -> the checkpoint's tensors that make it up, in order."""


@dataclass
class Replacement:
    """New attributes of one layer."""

    layer: nn.Module
    parameters: dict[str, Tensor]
    product: Any = None
    """The layer's product with its packed weights, if it has one."""


def plan(model: nn.Module, names: Iterable[str]) -> Plan | None:
    """Where each of the checkpoint's ``names`` goes; None unless that is clear for all of them and all parameters.

    ``model`` is whole: not split over several workers.
    """
    joined = dict(getattr(model, "packed_modules_mapping", None) or {})  # qkv_proj: q_proj, k_proj and v_proj
    places = {part: (whole, parts.index(part)) for whole, parts in joined.items() for part in parts}
    found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        path, _, attribute = name.rpartition(".")
        parent, _, last = path.rpartition(".")
        whole, place = places.get(last, (last, -1 if last in joined else 0))
        found[f"{parent}.{whole}".removeprefix("."), attribute][place] = name
    for head, embedding in tied_heads(model).items():
        found[head, "weight"] = found[embedding, "weight"]
    layers = dict(model.named_modules())
    expected = {
        (path, attribute) for path, layer in layers.items() for attribute, _ in layer.named_parameters(recurse=False)
    }
    if set(found) != expected or not all(_replaceable(layers[path]) for path, _ in found):
        return None
    result: Plan = defaultdict(dict)
    for (path, attribute), parts in found.items():
        if set(parts) != set(range(len(joined.get(path.rpartition(".")[2], [path])))):
            return None
        result[layers[path]][attribute] = [parts[place] for place in sorted(parts)]
    return dict(result)


@torch.no_grad()
def make_ready(model: nn.Module, where: Plan, tensors: dict[str, Tensor]) -> list[Replacement]:
    """Copies of ``tensors``, joined, padded and packed as each layer of ``model`` needs them.

    Raises ``ValueError`` for one of another shape than the layer's; another type is converted, as vLLM's loaders do.
    """
    ready, copied = [], set[int]()
    for layer, parameters in where.items():
        new = {
            attribute: torch.cat([tensors[part] for part in parts]) if len(parts) > 1 else tensors[parts[0]]
            for attribute, parts in parameters.items()
        }
        _check(layer, new, parameters)
        if rows := getattr(layer, "num_embeddings_padded", 0):
            new["weight"] = nn.functional.pad(new["weight"], (0, 0, 0, rows - len(new["weight"])))
        new = {name: tensor.to(_dtype(layer, name)) for name, tensor in new.items()}
        replacement = _packed(layer, new) if _multiplies(model, layer) else Replacement(layer, new)
        # What was packed away is empty now; what is left must not depend on the tensors that were given.
        own = {name: id(getattr(layer, name)) for name in new}
        replacement.parameters = {
            name: tensor.clone() for name, tensor in replacement.parameters.items() if own[name] not in copied
        }
        copied |= set(own.values())  # A tied head's weight is the embedding's.
        ready.append(replacement)
    return ready


def _check(layer: nn.Module, new: dict[str, Tensor], parts: dict[str, list[str]]) -> None:
    for attribute, tensor in new.items():
        live = getattr(layer, attribute)
        shape = tuple(live.shape) if live.numel() else (layer.output_size, layer.input_size)  # Packed away.
        if attribute == "weight":
            shape = (getattr(layer, "org_vocab_size", shape[0]), *shape[1:])  # The rest is padding.
        if tuple(tensor.shape) != shape:
            names = ", ".join(parts[attribute])
            raise ValueError(f"{names}: shape {tuple(tensor.shape)}, the engine's is {shape}")


def _dtype(layer: nn.Module, attribute: str) -> torch.dtype:
    """What the parameter has to be when it is packed: some kernels keep a bias in float32 afterwards."""
    weight = getattr(layer, "weight", None)
    live: Tensor = getattr(layer, attribute)
    return weight.dtype if attribute == "bias" and weight is not None else live.dtype


@torch.no_grad()
def reproduces(model: nn.Module, where: Plan | None, tensors: dict[str, Tensor]) -> bool:
    """Whether ``where`` turns ``tensors`` into what the layers of ``model`` hold, which vLLM's loader has just given them."""
    if where is None:
        return False
    try:
        return all(map(_is_live, make_ready(model, where, tensors)))
    except ValueError:  # Of another shape: the loader transposes.
        return False


def _is_live(replacement: Replacement) -> bool:
    """Whether the layer's values, and its product with a random input, are those of ``replacement``."""
    layer = replacement.layer
    for attribute, new in replacement.parameters.items():
        live: Tensor = getattr(layer, attribute)
        if live.numel() and not torch.equal(live, new.to(live.dtype)):
            return False
    if replacement.product is None:
        return True
    weight: Tensor = layer.weight  # type: ignore[assignment]
    width = weight.shape[1] if weight.numel() else layer.input_size
    x = torch.rand(2, width, dtype=weight.dtype)  # type: ignore[arg-type]
    return torch.equal(replacement.product(x, weight, None), layer.cpu_linear(x, weight, None))  # type: ignore[operator]


def put_in_place(ready: list[Replacement]) -> None:
    """Exchange the live tensors for those that are ready."""
    for replacement in ready:
        for attribute, tensor in replacement.parameters.items():
            getattr(replacement.layer, attribute).data = tensor
        if replacement.product is not None:
            replacement.layer.cpu_linear = replacement.product


def _packed(layer: nn.Module, new: dict[str, Tensor]) -> Replacement:
    """vLLM's own packing, on a stand-in: the live layer is in use."""
    stand_in = SimpleNamespace(**{name: nn.Parameter(tensor, requires_grad=False) for name, tensor in new.items()})
    layer.quant_method.process_weights_after_loading(stand_in)  # type: ignore[union-attr, operator]
    return Replacement(layer, {name: getattr(stand_in, name).data for name in new}, stand_in.cpu_linear)


def _multiplies(model: nn.Module, layer: nn.Module) -> bool:
    """Whether ``layer`` multiplies by packed weights; an embedding has them in vLLM, but only a head uses them."""
    method = getattr(layer, "quant_method", None)
    if isinstance(method, UnquantizedEmbeddingMethod):
        return isinstance(layer, ParallelLMHead) or layer is getattr(model, "lm_head", None)
    return isinstance(method, UnquantizedLinearMethod)


def _replaceable(layer: nn.Module) -> bool:
    """Whether its parameters are what the checkpoint has, joined and padded: no quantisation, no experts."""
    method = getattr(layer, "quant_method", None)
    plain = method is None or type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    packed_otherwise = hasattr(layer, "_cpu_skip_gemm_dispatch") or hasattr(layer, "_cpu_unpacked_conv_weight")
    flat = method is None or all(p.dim() <= 2 for p in layer.parameters(recurse=False))
    padded_bias = hasattr(layer, "num_embeddings_padded") and getattr(layer, "bias", None) is not None
    return (
        plain
        and flat
        and not packed_otherwise
        and not padded_bias
        and all(map(_plainly_loaded, layer.parameters(recurse=False)))
    )


def _plainly_loaded(parameter: nn.Parameter) -> bool:
    """Whether its values are the checkpoint's: a loader of the model's own may shift or permute them."""
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    return loader is default_weight_loader or isinstance(getattr(loader, "__self__", None), nn.Module)


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Path of each output head that is a layer of its own with an embedding's weights -> path of that embedding.

    Their names differ from model to model; what makes a head tied is that both layers hold one parameter.
    """
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)]
    owners = {id(layer.weight): path for path, layer in layers if not isinstance(layer, ParallelLMHead)}
    return {
        path: owners[id(layer.weight)]
        for path, layer in layers
        if isinstance(layer, ParallelLMHead) and id(layer.weight) in owners
    }
