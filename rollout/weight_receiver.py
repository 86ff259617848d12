"""The worker's half of a weight transfer, loaded by vLLM through ``worker_extension_cls``.

Importing this module registers our backends with vLLM's weight-transfer factory before the model loads. The rounds
are vLLM's own: start, update, finish; what is added is proof. Invariant: every byte that is loaded was looked at on this
side, by every worker (shared memory is hashed before the update; between GPUs fingerprints are taken on the device while
loading), and a tied output head follows its embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout.cpu_weights import Replacement, make_ready, plan, put_in_place, reproduces, tied_heads
from shared.chunks import Turns, cut
from shared.fingerprints import Fingerprints
from shared.weights import IPC_BACKEND, NCCL_BACKEND, SHM_BACKEND, Segment, TensorMeta, digest, unpack_handle, views


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: every update names its segment."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Where the bytes lie (see ``Publication.update_info``)."""

    segment: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    sizes: list[int]

    def tensors(self) -> list[TensorMeta]:
        """The layout as metadata."""
        rows = zip(self.names, self.dtype_names, self.shapes, self.offsets, self.sizes, strict=True)
        return [TensorMeta(name, dtype, tuple(shape), offset, size) for name, dtype, shape, offset, size in rows]


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Takes full tensors from shared memory: the backend for CPU engines. ``prepare`` has hashed them there."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    _ready: list[Replacement] | None = None
    _ready_from: ShmUpdateInfo | None = None
    _loading = False
    """Layers are in loadable form; after a failed round they stay so, and only another load gets them out of it."""
    _loaded: ShmUpdateInfo | None = None
    """What vLLM's loader took in this round."""
    _beside = False
    """Whether this worker can pack beside its steps: it holds the whole model, on a CPU."""
    _reproduced: bool | None = None
    """Whether a plan gives the weights that vLLM's loader gives; None until the first publication, which tells."""

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to connect."""

    def prepare(self, update_info: ShmUpdateInfo) -> str:
        """Return the digest of the next weights; pack them beside the live ones if this worker can.

        The first publication is left to vLLM's own loader, which the later ones are measured by.
        """
        self._ready, self._beside = None, self.device.type == "cpu" and self.parallel_config.world_size == 1
        where = plan(self.model, update_info.names) if self._reproduced and not self._loading else None
        if where is not None:
            self._ready = make_ready(self.model, where, dict(_tensors(update_info)))
            self._ready_from = update_info
        return _digest(update_info)

    def start_weight_update(self) -> None:
        """Unless all is ready, put the layers into loadable form: packed ones cannot be written in place."""
        if self._ready is None:
            self._loading = True
            forget_expert_kernels(self.model)
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Put what is ready in place, or load every tensor."""
        if self._ready is not None:
            assert self._ready_from == update_info, "another publication is ready"
            put_in_place(self._ready)
            return
        self.model.load_weights(_tensors(update_info))
        self._loaded = update_info

    def finish_weight_update(self) -> None:
        """Finalise the layers; the first time, see whether a plan would have given the same."""
        if self._ready is None:
            finalize_layerwise_reload(self.model, self.model_config)
            pack_tied_heads(self.model)
            if self._reproduced is None and self._beside and self._loaded is not None:
                where = plan(self.model, self._loaded.names)
                self._reproduced = reproduces(self.model, where, dict(_tensors(self._loaded)))
        self._ready, self._loading, self._loaded = None, False, None

    def shutdown(self) -> None:
        """Nothing to release: a segment belongs to the learner."""


class ProvedNcclEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine, with a fingerprint of every tensor as it is loaded."""

    received = ""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Leave the link that there is, and join another; vLLM would keep the old communicator for ever."""
        self.shutdown()
        super().init_transfer_engine(init_info)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Join the broadcast; the fingerprints are those of all tensors in order, as the sender's are."""
        with _printed_load(self.model) as prints:
            super().receive_weights(update_info)
        self.received = prints.text()

    def finish_weight_update(self) -> None:
        """Finalise the layers, and a tied output head with its embedding."""
        super().finish_weight_update()
        pack_tied_heads(self.model)


@dataclass
class IpcUpdateInfo(IPCWeightTransferUpdateInfo):
    """All chunks of one publication: vLLM's own packed form, with plain handles."""

    limit_s: float = 0.0
    """Seconds that the learner may take for a chunk."""

    def tensors(self) -> list[TensorMeta]:
        """The tensors in order; where each lies depends on its chunk."""
        rows = zip(self.names, self.dtype_names, self.shapes, self.tensor_sizes or [], strict=True)
        return [TensorMeta(name, dtype, tuple(shape), 0, size) for name, dtype, shape, size in rows]

    def part(self, chunk: list[TensorMeta], handles: dict[str, tuple[Any, ...]]) -> IPCWeightTransferUpdateInfo:
        """What vLLM has to know of one ``chunk`` in the buffer."""
        return IPCWeightTransferUpdateInfo(
            names=[tensor.name for tensor in chunk],
            dtype_names=[tensor.dtype for tensor in chunk],
            shapes=[list(tensor.shape) for tensor in chunk],
            ipc_handles=handles,
            tensor_sizes=[tensor.nbytes for tensor in chunk],
        )


class ProvedIpcEngine(IPCWeightTransferEngine):
    """vLLM's CUDA IPC engine over one buffer that takes all chunks; fingerprints are taken as they are loaded."""

    update_info_cls = IpcUpdateInfo
    received = ""
    _turns: Turns | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.packed = True

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        """Map the learner's buffer on this GPU and load every chunk from it. Raises ``TurnMissed``."""
        assert isinstance(update_info, IpcUpdateInfo)
        assert isinstance(update_info.ipc_handles, dict)
        gpu = str(torch.cuda.get_device_properties(self.device.index).uuid)
        if gpu not in update_info.ipc_handles:
            raise ValueError(f"no learner rank on GPU {gpu}, ranks are on {sorted(update_info.ipc_handles)}")
        name, *handle = update_info.ipc_handles[gpu]
        if self._turns is None or self._turns.name != name:
            self._turns = Turns(name)
        handles = {gpu: unpack_handle(handle)}
        with _printed_load(self.model) as prints:
            for chunk in cut(update_info.tensors(), handle[0]):
                with self._turns.take(update_info.limit_s):
                    super().receive_weights(update_info.part(chunk, handles))
                    _wait_for(self.device)  # The learner writes over the buffer as soon as it may.
        self.received = prints.text()

    def finish_weight_update(self) -> None:
        """Finalise the layers; the mapping of the buffer stays, for the learner exports it once."""
        finalize_layerwise_reload(self.model, self.model_config)
        pack_tied_heads(self.model)


def _wait_for(device: torch.device) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)


@contextmanager
def _printed_load(model: torch.nn.Module) -> Iterator[Fingerprints]:
    """While open, ``model.load_weights`` takes the fingerprint of what it loads, on the device."""
    prints, load = Fingerprints(), model.load_weights

    def printed(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        named = list(weights)
        for _, tensor in named:
            prints.add(tensor)
        return load(named)

    model.load_weights = printed  # type: ignore[assignment]
    try:
        yield prints
    finally:
        del model.load_weights


def _tensors(info: ShmUpdateInfo) -> list[tuple[str, torch.Tensor]]:
    """The publication's tensors by name, as views of its shared memory."""
    flat = torch.from_numpy(Segment(info.segment).bytes)
    return [
        (m.name, flat[m.offset : m.offset + m.nbytes].view(getattr(torch, m.dtype)).view(m.shape))
        for m in info.tensors()
    ]


def _digest(info: ShmUpdateInfo) -> str:
    """Hash the publication's bytes as this process reads them."""
    return digest(views(Segment(info.segment).bytes, info.tensors()))


def pack_tied_heads(model: torch.nn.Module) -> None:
    """Let every tied output head of ``model`` multiply by its embedding's new values.

    A checkpoint of a tied model has no weights of the head, so a reload leaves the head as it was. On a CPU the head
    multiplies by a packed copy and would keep producing the old policy's logits.
    """
    for path in tied_heads(model):
        head = model.get_submodule(path)
        head.quant_method.process_weights_after_loading(head)  # type: ignore[union-attr, operator]


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Let vLLM pack the experts of layers on a CPU again when they are loaded.

    It packs them when it makes their kernel, and only then (0.32): later weights would be left as the file has them, and
    read as if they were packed.
    """
    for layer in model.modules():
        weight = getattr(layer, "w13_weight", None)
        if weight is not None and weight.device.type == "cpu":
            layer.quant_method.moe_kernel = None  # type: ignore[union-attr]


class MillraceWorker:
    """Mixed into vLLM's worker class; the names must not occur there."""

    millrace_thread: ThreadPoolExecutor | None = None
    millrace_preparing: Future[str]

    def millrace_prepare(self, update_info: dict[str, Any]) -> None:
        """Begin to hash and pack the next weights, on a thread beside this worker's steps."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        self.millrace_thread = self.millrace_thread or ThreadPoolExecutor(1, "millrace-prepare")
        self.millrace_preparing = self.millrace_thread.submit(engine.prepare, engine.parse_update_info(update_info))

    def millrace_prepared(self) -> str | None:
        """Return the digest of the bytes that this worker read, or None while it is not ready. Raises what ``prepare`` raised."""
        return self.millrace_preparing.result() if self.millrace_preparing.done() else None

    def millrace_received(self) -> str:
        """Digest of the publication that this worker took last."""
        return str(self.weight_transfer_engine.received)  # type: ignore[attr-defined]


def register_backends() -> None:
    """Make our backends known to vLLM; safe to call again."""
    registry: dict[str, Any] = WeightTransferEngineFactory._registry
    ours = {SHM_BACKEND: ShmWeightTransferEngine, NCCL_BACKEND: ProvedNcclEngine, IPC_BACKEND: ProvedIpcEngine}
    for name, engine in ours.items():
        if name not in registry:
            WeightTransferEngineFactory.register_engine(name, engine)


register_backends()
