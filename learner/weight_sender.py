"""The learner's half of a publication: gathers full tensors layer by layer and puts them on the wire.

Gathering is aware of ZeRO: stages 0 to 2 hold full parameters and need no collective, stage 3 gathers one decoder
layer at a time. The export is a snapshot in shared memory, so the learner trains on while engines read it.
Two segments take turns; the controller has at most one publication in flight.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from learner.checkpoint_form import CheckpointForm
from shared.config import Config
from shared.weights import (
    IPC_BACKEND,
    NCCL_BACKEND,
    SEGMENTS,
    SHM_BACKEND,
    Canary,
    Link,
    Publication,
    Segment,
    TensorMeta,
    backend_of,
    describe,
    digest,
    orphans,
    pack_handle,
    segment_name,
    shared_memory_error,
    shared_memory_free,
    views,
)

PREFIX = "model."
"""``PolicyModel`` wraps the Hugging Face model under this name."""


def named_parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters under their Hugging Face names, grouped by decoder layer; a tied head occurs once, as the embedding."""
    return [(name.removeprefix(PREFIX), parameter) for name, parameter in engine.module.named_parameters()]


def layout(engine: Any, alignment: int = 64, form: CheckpointForm | None = None) -> tuple[TensorMeta, ...]:
    """Names, types and full shapes of what ``published`` gives, without gathering."""
    form = form or CheckpointForm(engine.module.model)
    shapes = [
        (name, torch.empty(tuple(getattr(p, "ds_shape", p.shape)), dtype=p.dtype, device="meta"))
        for name, p in named_parameters(engine)
    ]
    named = [one for group in layers(shapes) for one in form(group)]
    return describe(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named), alignment)


def layers(named: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Consecutive parameters that share a decoder layer, as one list each."""
    group: list[tuple[str, Any]] = []
    previous: str | None = None
    for name, parameter in named:
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if group and number != previous:
            yield group
            group = []
        group.append((name, parameter))
        previous = number
    if group:
        yield group


@torch.no_grad()
def full_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full, in ``named_parameters`` order; under ZeRO-3 a collective that all ranks must iterate."""
    for group in _whole_layers(engine):
        yield from group


@torch.no_grad()
def published(engine: Any, form: CheckpointForm | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full as checkpoint files have it, in the order of ``layout``; under ZeRO-3 as ``full_tensors``."""
    form = form or CheckpointForm(engine.module.model)
    for group in _whole_layers(engine):
        yield from form(group)


def _whole_layers(engine: Any) -> Iterator[list[tuple[str, Tensor]]]:
    for group in layers(named_parameters(engine)):
        if hasattr(group[0][1], "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter for _, parameter in group]):
                yield [(name, parameter.data) for name, parameter in group]
        else:
            yield [(name, parameter.data) for name, parameter in group]


class ShmSender:
    """Writes publications of ``engine``'s weights into shared memory."""

    def __init__(self, engine: Any, run_id: str, is_sender: bool) -> None:
        """Take the shared memory, if this rank sends. Raises ``InputError`` E505 if there is too little of it."""
        self._engine, self._is_sender = engine, is_sender
        self._tensors = layout(engine)
        self._segments: list[Segment] = []
        self._turn = 0
        if is_sender:
            self._take(run_id, self._tensors[-1].offset + self._tensors[-1].nbytes)

    def _take(self, run_id: str, size: int) -> None:
        for orphan in orphans():  # Of a run that was killed.
            orphan.unlink(missing_ok=True)
        try:
            for label in SEGMENTS:
                self._segments.append(Segment(segment_name(run_id, label), size))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.close()
            self._segments.clear()  # A mapping would keep its memory.
            needed, free = len(SEGMENTS) * size, shared_memory_free()
            raise shared_memory_error(needed, free, socket.gethostname(), torch.cuda.is_available()) from None

    def export(self, version: int, canary: Canary) -> Publication | None:
        """Snapshot the weights as policy ``version``; every rank calls it, the sender gets the publication."""
        started = time.monotonic()
        if not self._is_sender:
            for _ in published(self._engine):
                pass
            return None
        segment = self._segments[self._turn]
        self._turn = 1 - self._turn
        for view, (_, tensor) in zip(views(segment.bytes, self._tensors), published(self._engine), strict=True):
            np.copyto(view, tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return Publication(
            version=version,
            backend=SHM_BACKEND,
            segment=segment.name,
            tensors=self._tensors,
            digest=digest(views(segment.bytes, self._tensors)),
            canary=canary,
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        """Remove the shared memory."""
        for segment in self._segments:
            segment.unlink()


class IpcSender:
    """Copies publications of ``engine``'s weights into a buffer on this rank's GPU, which the engine there maps.

    Every rank serves the engine on its own GPU; a publication is a snapshot, and two buffers take turns.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._tensors = layout(engine, alignment=1)  # vLLM's packed form has no gaps.
        size = self._tensors[-1].offset + self._tensors[-1].nbytes
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._turn = 0

    def export(self, version: int, canary: Canary) -> Publication:
        """Snapshot the weights as policy ``version`` on this rank's GPU."""
        from torch.multiprocessing.reductions import reduce_tensor

        started = time.monotonic()
        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        for meta, (_, tensor) in zip(self._tensors, published(self._engine), strict=True):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            buffer[meta.offset : meta.offset + meta.nbytes].copy_(flat)
        gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        return Publication(
            version=version,
            backend=IPC_BACKEND,
            segment="",
            tensors=self._tensors,
            digest=digest(views(buffer.cpu().numpy(), self._tensors)),
            canary=canary,
            seconds=time.monotonic() - started,
            handles={gpu: pack_handle(reduce_tensor(buffer)[1])},
        )

    def close(self) -> None:
        """Free the buffers."""
        self._buffers.clear()


class NcclSender:
    """Broadcasts ``engine``'s weights from rank 0 over vLLM's NCCL backend, gathered while they are sent.

    A publication of this kind is no snapshot: ``send`` must end before the next optimizer step.
    """

    def __init__(self, engine: Any, is_sender: bool) -> None:
        self._source, self._is_sender = _HashedSource(engine), is_sender
        self._transfer: Any = None

    def connect(self, link: Link, rank: int) -> None:
        """Open the sender's end while the engines open theirs."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        info = NCCLTrainerInitInfo(link.host, link.port, 1 + link.workers, rank=rank)
        self._transfer = NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=_DrivenByThePool(), source=self._source
        )

    def export(self, version: int, canary: Canary) -> Publication | None:
        """What the engines have to know before the bytes come."""
        if not self._is_sender:
            return None
        return Publication(version, NCCL_BACKEND, "", layout(self._source.engine), "", canary)

    def send(self) -> str:
        """Broadcast, on all ranks together; the digest of what was sent."""
        self._transfer.send_weights()
        return self._source.digest

    def close(self) -> None:
        """Leave the link."""
        if self._transfer is not None:
            self._transfer.shutdown()


def make_sender(
    config: Config, engine: Any, device: torch.device, run_id: str, is_sender: bool
) -> ShmSender | IpcSender | NcclSender:
    """The sender for how weights travel in a run of ``config``; ``run_id`` names shared memory."""
    backend = backend_of(config, device.type != "cpu")
    if backend == SHM_BACKEND:
        return ShmSender(engine, run_id, is_sender)
    return IpcSender(engine, device) if backend == IPC_BACKEND else NcclSender(engine, is_sender)


class _ParameterMeta(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _HashedSource:
    """vLLM's ``WeightSource`` over a DeepSpeed engine; hashes every tensor that it yields."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.digest = engine, ""

    def metadata(self) -> list[_ParameterMeta]:
        return [_ParameterMeta(m.name, getattr(torch, m.dtype), m.shape) for m in layout(self.engine)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        from blake3 import blake3

        hasher = blake3()
        for name, tensor in published(self.engine):
            hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            yield name, tensor
        self.digest = hasher.hexdigest()


class _DrivenByThePool:
    """vLLM's sync client, silent: ``EnginePool`` calls the engines itself, each with a deadline."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
