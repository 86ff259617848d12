"""The learner's half of a publication between GPUs: over NCCL to engines on their own, through CUDA IPC to those on its own.

There is no snapshot: the learner takes part while the engines receive, so ``send`` must end before the next optimizer step.
Fingerprints prove what was sent without a copy to the host; ``check`` compares them with the CPU's while nobody waits for it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learner.distributed import wait_for_device
from learner.weight_sender import ShmSender, layout, published
from shared.chunks import Turns, buffer_size, cut
from shared.config import Config
from shared.errors import WeightProofFailed
from shared.fingerprints import Fingerprints, differing
from shared.weights import (
    IPC_BACKEND,
    NCCL_BACKEND,
    SHM_BACKEND,
    Canary,
    Link,
    Publication,
    backend_of,
    pack_handle,
    segment_name,
    stage_limit,
)


class IpcSender:
    """Sends ``engine``'s weights in chunks through a buffer on this rank's GPU, which the engine there maps.

    Every rank serves the engine on its own GPU. A publication of this kind is no snapshot: ``send`` must end before the next
    optimizer step.
    """

    def __init__(self, engine: Any, device: torch.device, run_id: str, rank: int) -> None:
        """Make the buffer and export it once: each export would keep a counter and an event for as long as the buffer."""
        from torch.multiprocessing.reductions import reduce_tensor

        self._engine, self._device = engine, device
        self._tensors = layout(engine, alignment=1)  # vLLM's packed form has no gaps.
        self._buffer = torch.empty(buffer_size(self._tensors), dtype=torch.uint8, device=device)
        self._turns = Turns(segment_name(run_id, f"turns-{rank}"), owner=True)
        self._handle = [self._turns.name, *pack_handle(reduce_tensor(self._buffer)[1])]
        self._limit_s = 0.0
        self._sent = ""

    def export(self, version: int, canary: Canary) -> Publication:
        """What the engine on this rank's GPU has to know before the bytes come."""
        gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        handles = {gpu: self._handle}
        publication = Publication(version, IPC_BACKEND, "", self._tensors, "", canary, handles=handles)
        self._limit_s = stage_limit(publication)
        return publication

    def send(self) -> str:
        """Pass all weights through the buffer; the fingerprints of what was sent. Raises ``TurnMissed``."""
        prints, tensors = Fingerprints(), published(self._engine)
        for chunk in cut(self._tensors, len(self._buffer)):
            with self._turns.write(self._limit_s):
                offset = 0
                for meta in chunk:
                    _, tensor = next(tensors)
                    prints.add(tensor)
                    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
                    self._buffer[offset : offset + meta.nbytes].copy_(flat)
                    offset += meta.nbytes
                wait_for_device()
        self._turns.emptied(self._limit_s)
        self._sent = prints.text()
        return self._sent

    def check(self) -> str:
        """See ``_checked``."""
        return _checked(self._engine, self._sent)

    def close(self) -> None:
        """Free the buffer."""
        self._turns.close()
        del self._buffer


class NcclSender:
    """Broadcasts ``engine``'s weights from rank 0 over vLLM's NCCL backend, gathered while they are sent.

    A publication of this kind is no snapshot: ``send`` must end before the next optimizer step.
    """

    def __init__(self, engine: Any, is_sender: bool) -> None:
        self._source, self._is_sender = _PrintedSource(engine, is_sender), is_sender
        self._transfer: Any = None
        self._listener: socket.socket | None = None

    def listen(self, host: str) -> int:
        """Hold a port of ``host`` for the next link; its number. No other process can take it before ``connect``."""
        if self._listener is not None:
            self._listener.close()
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def connect(self, link: Link) -> None:
        """Leave the link that there is, and open the sender's end of the new one while the engines open theirs."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        self.close()
        self._transfer = NCCLTrainerWeightTransferEngine(
            client=_DrivenByThePool(), source=self._source, is_sender=self._is_sender
        )
        if self._is_sender:
            listener, self._listener = self._listener, None
            self._transfer.model_update_group = _communicator(link, listener)

    def export(self, version: int, canary: Canary) -> Publication | None:
        """What the engines have to know before the bytes come."""
        if not self._is_sender:
            return None
        return Publication(version, NCCL_BACKEND, "", layout(self._source.engine), "", canary)

    def send(self) -> str:
        """Broadcast, on all ranks together; the fingerprints of what was sent, from the rank that sends."""
        wait_for_device()  # The weights are read on other streams than those that the optimizer wrote them on.
        self._transfer.send_weights()
        return self._source.prints.text()

    def check(self) -> str:
        """See ``_checked``."""
        return _checked(self._source.engine, self._source.prints.text())

    def close(self) -> None:
        """Leave the link; a communicator that nobody destroys keeps its memory and connections."""
        if self._transfer is not None:
            self._transfer.shutdown()
            self._transfer = None


def _communicator(link: Link, listener: socket.socket | None) -> Any:
    """The sender's end of ``link``, rank 0, met at ``listener``: what ``trainer_init`` of vLLM opens, at a port held before."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    world = 1 + link.workers
    group = StatelessProcessGroup.create(link.host, link.port, 0, world, listen_socket=listener)
    with unpinned_nccl_env():
        return PyNcclCommunicator(group, device=torch.accelerator.current_device_index())


def _checked(engine: Any, sent: str) -> str:
    """Compare the fingerprints ``sent`` with those that the CPU finds in the weights as they are now; their blake3.

    All ranks call it together; one that sent nothing looks at nothing. Raises ``WeightProofFailed``.
    """
    from blake3 import blake3

    if not sent:
        for _ in published(engine):
            pass
        return ""
    prints, hasher, names = Fingerprints(), blake3(max_threads=blake3.AUTO), []
    for name, tensor in published(engine):
        copy = tensor.detach().cpu().contiguous()
        prints.add(copy)
        hasher.update(copy.view(-1).view(torch.uint8).numpy().data)
        names.append(name)
    if sent != prints.text():
        wrong = ", ".join(differing(sent, prints.text(), names)[:3]) or "a different number of tensors"
        raise WeightProofFailed(f"the learner's GPU and CPU find different fingerprints: {wrong}")
    return hasher.hexdigest()


def make_sender(
    config: Config, engine: Any, device: torch.device, run_id: str, rank: int
) -> ShmSender | IpcSender | NcclSender:
    """The sender for how weights travel in a run of ``config``; ``run_id`` names shared memory."""
    backend = backend_of(config, device.type != "cpu")
    if backend == SHM_BACKEND:
        return ShmSender(engine, run_id, rank == 0)
    return IpcSender(engine, device, run_id, rank) if backend == IPC_BACKEND else NcclSender(engine, rank == 0)


class _ParameterMeta(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _PrintedSource:
    """vLLM's ``WeightSource`` over a DeepSpeed engine; on the rank that sends it takes every tensor's fingerprint."""

    def __init__(self, engine: Any, is_sender: bool) -> None:
        self.engine, self._is_sender = engine, is_sender
        self.prints = Fingerprints()

    def metadata(self) -> list[_ParameterMeta]:
        return [_ParameterMeta(m.name, getattr(torch, m.dtype), m.shape) for m in layout(self.engine)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.prints = Fingerprints()
        for name, tensor in published(self.engine):
            if self._is_sender:
                self.prints.add(tensor)
            if tensor.is_cuda:  # Under ZeRO-3 it is freed while vLLM's stream may still copy it.
                tensor.record_stream(torch.cuda.current_stream())
            yield name, tensor


class _DrivenByThePool:
    """vLLM's sync client, silent: ``EnginePool`` calls the engines itself, each with a deadline."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
