"""Bytes that a learner rank and an engine worker take, by what they are for, and whether a device has room for them.

One model for the dry run, the planner and the start of a run. Shapes come from the model's files; what a backward pass
keeps is measured on the model without values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launch.hardware import ENGINE_SHARE, Device, Shape, device_named
from launch.model_weights import count_parameters
from launch.placement import Node
from shared.chunks import CHUNK_BYTES
from shared.config import Config
from shared.errors import InputError, raise_all
from shared.weights import IPC_BACKEND, NCCL_BACKEND, backend_of

RULE = 33
"""Hidden states' worth of bytes that a layer keeps for each token, for a model that cannot be measured."""
CHUNKS = 4
"""Matrices of the size of one chunk of logits that the output head holds at a time."""
CHUNK = {False: 16 << 20, True: 512 << 20}
"""Bytes of a chunk of logits, by whether it lies on a GPU: ``learner.logprobs.CHUNK_BYTES``."""
LIVE, BUCKET = 10**9, 5 * 10**8
"""DeepSpeed's defaults: most parameters that are whole at a time at ZeRO-3, and parameters of a bucket of gradients."""
CONTEXT = 1e9
"""Bytes of a CUDA context with the libraries' own buffers."""
WIRE = 4 << 30
"""Bytes of the pieces that rank 0 packs for NCCL: two of 1 GiB, each as a list of tensors and as one."""
RUNTIME = 2e9
"""Bytes of an engine beside weights, keys and values: a CUDA context, activations of a batch and CUDA graphs."""


@dataclass(frozen=True)
class Sizes:
    """What the bytes are computed from."""

    parameters: float
    number: int
    """Bytes of a weight: ``model.dtype``."""
    head: float
    """Parameters of the output head; 0 where they are not known."""
    layers: int
    hidden: int
    kv_bytes: float
    """Bytes of a token's keys and values over all layers; 0 where they are not known."""
    kept: float
    """Bytes that a backward pass keeps for each packed token; 0 where they are not known."""

    @classmethod
    def of(cls, config: Config, parameters: float = 0.0, measure: bool = True) -> Sizes:
        """Read the files of the model of ``config``; ``parameters`` are counted by its shape unless they are given.

        Without ``measure``, which takes a second, what a backward pass keeps is told by a rule.
        """
        number = 4 if config.model.dtype == "float32" else 2
        try:
            shape = Shape.of(config)
        except InputError:  # A family whose configuration names things otherwise.
            return cls(parameters, number, 0.0, 0, 0, 0.0, 0.0)
        kept = measure and _kept(config.model.path, config.model.dtype, config.model.trust_remote_code)
        kept = kept or RULE * number * shape.hidden * shape.layers
        head, parameters = float(shape.hidden * shape.vocabulary), parameters or shape.parameters
        return cls(parameters, number, head, shape.layers, shape.hidden, shape.kv_bytes, kept)


@cache
def _kept(path: str, dtype: str, trusted: bool) -> float:
    """Bytes that a backward pass keeps for each token, measured; 0 for a model that needs values or is not there."""
    from learner.activations import of_folder

    try:
        return of_folder(path, dtype, trusted)
    except Exception:  # Whatever a model of any kind raises without values.
        return 0.0


def learner_bytes(config: Config, sizes: Sizes, on_gpu: bool, ranks: int | None = None) -> dict[str, float]:
    """Bytes of one learner rank in a training step, by what they are for."""
    learner, count, size = config.learner, sizes.parameters, sizes.number
    ranks, stage = ranks or learner.num_ranks, learner.zero_stage
    copies = 12 if size == 2 or stage >= 1 else 8  # In float32 at stage 0 the weights themselves are the master copy.
    tokens = learner.max_tokens_per_microbatch
    kept = sizes.kept * tokens
    if learner.gradient_checkpointing and sizes.layers:
        kept = sizes.kept / sizes.layers * tokens + size * sizes.hidden * sizes.layers * tokens
    parts = {
        "optimizer": copies * count / (ranks if stage >= 1 else 1),
        "gradients": size * count / (ranks if stage >= 2 else 1),
        "weights": size * count / (ranks if stage >= 3 else 1),
        "activations": kept,
    }
    if config.needs_reference:
        parts["reference"] = size * count / (ranks if stage >= 3 else 1)
    whole = size * sizes.head if stage >= 3 and ranks > 1 else 0.0
    apart = (
        4 * sizes.head if size == 2 else 0.0
    )  # Its gradient is summed in float32; in float32 that sum is the gradient.
    parts["output head"] = CHUNKS * CHUNK[on_gpu] + apart + whole if sizes.head else 0.0
    if stage >= 3 and ranks > 1:
        parts["whole layers"] = size * (min(LIVE, count) + min(BUCKET, count))
    if on_gpu:
        backend = backend_of(config, on_gpu)
        # Over IPC, the buffer of a chunk, and the engine's copy of it on the same GPU.
        chunk = max(min(size * count, CHUNK_BYTES), size * sizes.head)
        parts["publication"] = WIRE if backend == NCCL_BACKEND else 2 * chunk if backend == IPC_BACKEND else 0.0
        parts["CUDA"] = CONTEXT
    return {name: nbytes for name, nbytes in parts.items() if nbytes}


def start_bytes(config: Config, sizes: Sizes, ranks: int | None = None) -> float:
    """Host bytes of one learner rank at its start, beside the libraries: at ZeRO-3 its share and one layer, else all."""
    ranks, size = ranks or config.learner.num_ranks, sizes.number
    whole = size * sizes.parameters
    if config.learner.zero_stage < 3:
        return whole
    layer = max(whole / sizes.layers if sizes.layers else whole, size * sizes.head)
    return whole / ranks * (2 if config.needs_reference else 1) + layer


def engine_bytes(config: Config, sizes: Sizes) -> dict[str, float]:
    """Bytes that one engine worker needs at the least, by what they are for."""
    workers = config.rollout.workers_per_engine
    tokens = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    return {
        "weights": sizes.number * sizes.parameters / workers,
        "longest sequence": sizes.kv_bytes * tokens / workers,
        "CUDA, a batch and its graphs": RUNTIME,
    }


def total(parts: dict[str, float]) -> float:
    """Sum of the bytes."""
    return sum(parts.values())


def refuse_unfit(config: Config, nodes: Sequence[Node], origin: str) -> None:
    """Raise ``InputErrors`` E508 if a learner rank or an engine cannot fit the GPUs of ``nodes``."""
    if _devices(nodes):
        raise_all(refusals(config, Sizes.of(config, count_parameters(Path(config.model.path))), nodes, origin))


def refusals(config: Config, sizes: Sizes, nodes: Sequence[Node], origin: str) -> list[InputError]:
    """E508 for a learner rank or an engine that cannot fit the smallest device that Ray names; none without a known one."""
    there = _devices(nodes)
    if not there:
        return []
    device, problems = min(there, key=lambda one: one.memory), []
    if not _rank_fits(config, sizes, device):
        parts = learner_bytes(config, sizes, on_gpu=True)
        largest = max(parts, key=lambda name: parts[name])
        found = f"~{gb(_beside(config, sizes) + total(parts))} a rank, most of it {largest}"
        found += ", with the engine on the same GPU" if config.rollout.colocate else ""
        problems.append(_refused(f"{origin}:learner", found, device, _fix(config, sizes, device)))
    needed, share = total(engine_bytes(config, sizes)), _engine_share(config)
    if needed > share * device.memory and not config.rollout.colocate:
        room = share * device.memory - RUNTIME
        workers = next((n for n in (2, 4, 8) if (needed - RUNTIME) * config.rollout.workers_per_engine / n <= room), 0)
        fix = f"rollout.tensor_parallel_size = {workers}" if workers else "a smaller model, or GPUs with more memory"
        place, found = f"{origin}:rollout.tensor_parallel_size", f"~{gb(needed)} a worker"
        problems.append(_refused(place, found, device, fix, share))
    return problems


def colocated(config: Config, sizes: Sizes, nodes: Sequence[Node]) -> Config:
    """Return ``config`` with vLLM's sizes for engines that share their GPU with a learner rank, which starts first.

    Keys and values get what the learner's peak, the weights and the engine's own buffers leave of the smallest device. With
    a size of its own vLLM does not measure what is free, which the learner changes meanwhile. Without a known device, or
    with a size in ``rollout.vllm``, nothing changes.
    """
    given = config.rollout.vllm
    there = _devices(nodes)
    if not config.rollout.colocate or not there or {"kv_cache_memory_bytes", "gpu_memory_utilization"} & given.keys():
        return config
    memory, workers = min(device.memory for device in there), config.rollout.workers_per_engine
    weights = sizes.number * sizes.parameters / workers
    room = memory - total(learner_bytes(config, sizes, on_gpu=True)) - weights - RUNTIME
    share = (weights + RUNTIME + room) / memory  # vLLM refuses to start if less than this is free.
    sized = {"kv_cache_memory_bytes": int(room), "gpu_memory_utilization": round(share, 3)}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"vllm": given | sized})})


def _devices(nodes: Sequence[Node]) -> list[Device]:
    """Data sheets of the GPUs that Ray names."""
    return [device for node in nodes if node.count("GPU") and (device := device_named(node.accelerator))]


def _refused(place: str, found: str, device: Device, fix: str, share: float = 1.0) -> InputError:
    expected = f"at most {gb(share * device.memory)}" + (
        f", {share:.0%} of the GPU" if share < 1 else ", the GPU's memory"
    )
    return InputError("E508", "too little GPU memory", place, found, expected, fix)


def _engine_share(config: Config) -> float:
    """Share of a GPU that vLLM takes."""
    return float(config.rollout.vllm.get("gpu_memory_utilization", ENGINE_SHARE))


def _beside(config: Config, sizes: Sizes) -> float:
    """Bytes of the engine on a rank's GPU."""
    return total(engine_bytes(config, sizes)) if config.rollout.colocate else 0.0


def _rank_fits(config: Config, sizes: Sizes, device: Device) -> bool:
    return total(learner_bytes(config, sizes, on_gpu=True)) + _beside(config, sizes) <= device.memory


def _fix(config: Config, sizes: Sizes, device: Device) -> str:
    """Return the fewest settings, in the order of what they cost, that make a learner rank fit ``device``."""
    changes: dict[str, object] = {}
    cheap = {"zero_stage": 3, "gradient_checkpointing": True, "max_tokens_per_microbatch": config.max_model_len}
    for order in (("gradient_checkpointing",), ("zero_stage",), tuple(cheap)):
        changes = {}
        for name in order:
            if getattr(config.learner, name) != cheap[name]:
                changes[name] = cheap[name]
            if _rank_fits(_changed(config, changes), sizes, device):
                return _words(changes)
    for ranks in (2**i for i in range(1, 11)):
        if ranks > config.learner.num_ranks and _rank_fits(
            _changed(config, changes | {"num_ranks": ranks}), sizes, device
        ):
            return _words(changes | {"num_ranks": ranks})
    return "a smaller model, or GPUs with more memory"


def _changed(config: Config, changes: dict[str, object]) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update=changes)})


def _words(changes: dict[str, object]) -> str:
    told = {name: str(value).lower() if isinstance(value, bool) else value for name, value in changes.items()}
    return ", ".join(f"learner.{name} = {value}" for name, value in told.items())


def gb(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
