"""Everything a learner needs to go on, as safetensors that fit any number of ranks and any ZeRO stage.

Master weights and Adam's moments are stored in full and by name; each rank writes its share of them and reads what it
needs. Nothing here is a pickle. Invariant: what ``load_state`` puts back is bit for bit what ``save_state`` found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from learner.batching import Row, collate
from learner.saving import save_pretrained
from learner.tensor_files import Described, write_tensors
from learner.weight_sender import named_parameters
from shared.types import Completion, Prompt

if TYPE_CHECKING:
    from learner.learner import Learner

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_all(learner: Learner, directory: str) -> None:
    """Write the policy in Hugging Face form to ``directory``/hf, and ``save_state`` to ``directory``/learner.

    All ranks call it together. Raises ``OSError``, after all that the ranks do together.
    """
    failed: OSError | None = None
    try:
        save_pretrained(learner.engine, learner.config, f"{directory}/hf", learner.rank == 0)
    except OSError as error:  # The other ranks already gather the state with this one.
        failed = error
    save_state(learner, f"{directory}/learner")
    if failed is not None:
        raise failed


def save_state(learner: Learner, directory: str) -> None:
    """Write this rank's share of master weights, moments and the moved reference, gathered one after the other.

    All ranks call it together. Raises ``OSError``, also for a full disk, after all that the ranks do together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(directory)
    mine = folder / f"part-{learner.rank:03d}.safetensors"
    write_tensors([(mine, [described for described, own in _described(learner) if own])], _share(learner))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not mine.exists():
            save_file({}, str(mine))
        save_file(_random_state(), str(folder / f"random-{learner.rank:03d}.safetensors"))
    except SafetensorError as error:
        raise OSError(str(error)) from None
    if learner.rank == 0:
        moving = {
            name: [type(coefficient).__name__, {field: getattr(coefficient, field) for field in coefficient.MOVING}]
            for name, coefficient in learner.coefficients.items()
        }
        numbers = {"policy_version": learner.policy_version, "adam_steps": _adam_steps(learner), "coefficients": moving}
        (folder / "learner.json").write_text(json.dumps(numbers), encoding="utf-8")


def _described(learner: Learner) -> Iterator[tuple[Described, bool]]:
    """Yield what a checkpoint holds, in the order of ``_share``, and whether this rank writes it."""
    keys = ("weight", *MOMENTS) if _adam_steps(learner) else ("weight",)
    for number, (name, parameter) in enumerate(named_parameters(learner.engine)):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for key in keys:
            yield Described(f"{key}/{name}", torch.float32, shape), number % learner.world_size == learner.rank
    if learner.reference is not None and learner.reference.moved:
        for number, (name, dtype, shape) in enumerate(learner.reference.described()):
            yield Described(f"reference/{name}", dtype, shape), number % learner.world_size == learner.rank


def _share(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Gather everything, one tensor at a time; yield what this rank writes."""
    own = {described.name for described, mine in _described(learner) if mine}
    keys = ("weight", *MOMENTS) if _adam_steps(learner) else ("weight",)
    for name, parameter in named_parameters(learner.engine):
        for key in keys:
            value = _full(learner, parameter, key)
            if f"{key}/{name}" in own:
                yield f"{key}/{name}", value.detach().to("cpu", torch.float32)
    if learner.reference is not None and learner.reference.moved:
        for name, tensor in learner.reference.tensors():
            if f"reference/{name}" in own:
                yield f"reference/{name}", tensor


@torch.no_grad()
def load_state(learner: Learner, directory: str) -> None:
    """Put back what ``save_state`` wrote, by whatever number of ranks; a collective that all ranks call together."""
    folder = Path(directory)
    numbers = json.loads((folder / "learner.json").read_text(encoding="utf-8"))
    if numbers["adam_steps"]:
        _make_adam_state(learner)
    stored = _Stored(folder)
    for name, parameter in named_parameters(learner.engine):
        for key in ("weight", *MOMENTS) if numbers["adam_steps"] else ("weight",):
            _put(learner, parameter, key, stored[f"{key}/{name}"])
    for state in _base_optimizer(learner).state.values():
        state["step"].fill_(numbers["adam_steps"])
    if learner.reference is not None and "reference" in stored:
        learner.reference.load(lambda name: stored[f"reference/{name}"])
    learner.policy_version = numbers["policy_version"]
    for name, (kind, moved) in numbers["coefficients"].items():
        if kind == type(learner.coefficients[name]).__name__:  # Another kind begins where its settings say.
            vars(learner.coefficients[name]).update(moved)
    _restore_random_state(folder / f"random-{learner.rank:03d}.safetensors")


class _Stored:
    """Tensors by name, over all ranks' files, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._files = [safe_open(str(path), "pt") for path in sorted(folder.glob("part-*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - no mapping.

    def __contains__(self, kind: str) -> bool:
        return any(name.startswith(f"{kind}/") for name in self._where)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


def _base_optimizer(learner: Learner) -> Any:
    """AdamW itself, inside whatever DeepSpeed wraps around it."""
    return getattr(learner.engine.optimizer, "optimizer", learner.engine.optimizer)


def _adam_steps(learner: Learner) -> int:
    """Steps that Adam's moments have seen; 0: there are none."""
    return max((int(state["step"]) for state in _base_optimizer(learner).state.values() if "step" in state), default=0)


def _whole_master(learner: Learner, parameter: Tensor) -> Tensor | None:
    """What the optimizer updates in place of ``parameter``, where that is one whole tensor: at stage 0."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return None
    optimizer = learner.engine.optimizer
    for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        for own, master in zip(low, high, strict=True):
            if own is parameter:
                found: Tensor = master
                return found
    return parameter  # Float32 has no copy.


def _full(learner: Learner, parameter: Any, key: str) -> Tensor:
    """The whole master weight, or moment, of a parameter; a collective where it is partitioned."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    master = _whole_master(learner, parameter)
    if master is not None:
        found: Tensor = master.data if key == "weight" else _base_optimizer(learner).state[master][key]
    elif key == "weight":
        found = safe_get_full_fp32_param(parameter)
    else:
        found = safe_get_full_optimizer_state(parameter, key)
    return found.view(getattr(parameter, "ds_shape", parameter.shape))


def _put(learner: Learner, parameter: Any, key: str, value: Tensor) -> None:
    """``value`` in full becomes the parameter's master weight or moment; with the weight goes its copy for training."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(learner.device)
    if hasattr(parameter, "ds_id"):
        _put_partition(parameter, None if key == "weight" else key, value)
        if key == "weight":
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        return
    master = _whole_master(learner, parameter)
    if key == "weight":
        parameter.data.copy_(value)
        if master is not None:
            master.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
    elif master is not None:
        _base_optimizer(learner).state[master][key].copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _put_partition(parameter: Any, key: str | None, value: Tensor) -> None:
    """This rank's part of ``value`` at stage 3, whose last part is padded; DeepSpeed's own setter forgets the padding."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    ranks = torch.distributed.get_world_size()
    padded = torch.zeros(size * ranks, dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    mine = padded[size * torch.distributed.get_rank() :][:size]
    if key is None:
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)


def _make_adam_state(learner: Learner) -> None:
    """A step with a gradient of exactly 0 at a rate of 0: AdamW makes its moments, and nothing else changes."""
    token = np.ones(1, np.int32)
    completion = Completion(token, np.zeros(1, np.float32), "", "stop")
    batch = collate([Row(Prompt(0, token, ""), completion, 0, 0, 1)], learner.device)
    with torch.enable_grad():
        logprobs = learner.engine(batch.tokens, None)[0]
        learner.engine.backward(logprobs.sum() * 0.0, scale_wrt_gas=False)
    for group in learner.engine.optimizer.param_groups:
        group["lr"] = 0.0
    learner.engine.step()


def _random_state() -> dict[str, Tensor]:
    """torch's generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_state(path: Path) -> None:
    """A rank that did not exist when the checkpoint was written keeps its fresh generators."""
    from safetensors.torch import load_file

    if not path.exists():
        return
    states = load_file(str(path))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
