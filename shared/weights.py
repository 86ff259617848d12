"""One publication of weights on the wire: its manifest, its bytes, and the digests that prove them.

The learner writes a publication, the controller carries its manifest, every engine reads and proves it. Bytes lie
in order of decoder layer, because vLLM packs a layer as soon as all its elements arrived. Invariant: an engine
that took a publication has hashed exactly the bytes that it loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.config import Config
from shared.errors import InputError

if TYPE_CHECKING:
    import torch

SHM_DIR = Path("/dev/shm")
SHM_PREFIX = "millrace-"
SHM_BACKEND = "millrace_shm"
"""Weights through shared memory, a snapshot: engines on CPUs, and on GPUs where they come and go."""
SEGMENTS = ("a", "b")
"""Labels of a sender's segments; they take turns. A relay on another host has as many."""
NCCL_BACKEND = "millrace_nccl"
"""Weights over vLLM's NCCL broadcast: engines on GPUs of their own."""
IPC_BACKEND = "millrace_ipc"
"""Weights in a CUDA buffer that both processes map: an engine that shares its GPU with a learner rank."""
COLLECTIVE = (NCCL_BACKEND, IPC_BACKEND)
"""Backends without a snapshot: the learner takes part while the engines receive."""


def backend_of(config: Config, on_gpu: bool) -> str:
    """How weights travel in a run of ``config``."""
    if not on_gpu or config.rollout.weights == "host":
        return SHM_BACKEND
    return IPC_BACKEND if config.rollout.colocate else NCCL_BACKEND


@dataclass(frozen=True)
class TensorMeta:
    """One full tensor in Hugging Face naming."""

    name: str
    dtype: str
    """torch's name without the prefix, for example ``float32``."""
    shape: tuple[int, ...]
    offset: int
    """Byte offset in the publication."""
    nbytes: int


@dataclass(frozen=True)
class Canary:
    """A fixed token sequence with the learner's log-probs: the behavioural proof of a publication."""

    token_ids: NDArray[np.int32]
    """``[T] int32``."""
    logprobs: NDArray[np.float32]
    """``[T - 1] float32``: log-prob of ``token_ids[1:]`` at temperature 1."""


@dataclass(frozen=True)
class Publication:
    """Everything an engine needs to take weights and to prove that it took them."""

    version: int
    """Policy version of these weights."""
    backend: str
    """vLLM weight-transfer backend that carries the bytes."""
    segment: str
    """Shared-memory file with the bytes; empty for backends that send them over a device link."""
    tensors: tuple[TensorMeta, ...]
    digest: str
    """blake3 of all bytes in order; empty where the bytes are sent later (see ``collective``) and proved by fingerprints."""
    canary: Canary
    seconds: float = 0.0
    """Time the learner spent gathering and writing."""
    node: str = ""
    """Node of the cluster that has the segment."""
    handles: dict[str, list[Any]] = field(default_factory=dict)
    """For the IPC backend: GPU UUID -> name of the counters, and handle, of the buffer on that GPU (see ``pack_handle``)."""

    @property
    def collective(self) -> bool:
        """True if the bytes are not a snapshot: the learner takes part while the engines receive."""
        return self.backend in COLLECTIVE

    @property
    def nbytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(t.nbytes for t in self.tensors)

    def hash_segment(self) -> str:
        """The digest of the bytes as they lie in shared memory now."""
        return digest(views(Segment(self.segment).bytes, self.tensors))

    def update_info(self) -> dict[str, Any]:
        """The msgpack-able argument of vLLM's ``update_weights``."""
        tensors = {
            "names": [t.name for t in self.tensors],
            "dtype_names": [t.dtype for t in self.tensors],
            "shapes": [list(t.shape) for t in self.tensors],
        }
        if self.backend == NCCL_BACKEND:
            return tensors
        sizes = [t.nbytes for t in self.tensors]
        if self.backend == IPC_BACKEND:
            return {"ipc_handles": self.handles, "tensor_sizes": sizes, "limit_s": stage_limit(self), **tensors}
        places = {"offsets": [t.offset for t in self.tensors], "sizes": sizes}
        return {"segment": self.segment, **tensors, **places}


def stage_limit(publication: Publication) -> float:
    """Seconds that a stage of a weight update may take: 30 plus the bytes at 100 MB/s."""
    return 30 + publication.nbytes / 100e6


def read_s(folder: str, readers: int = 1) -> float:
    """Seconds in which ``readers`` processes read the model in ``folder`` from one disk, at 100 MB/s if nothing is cached."""
    return readers * sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 100e6


@dataclass(frozen=True)
class Link:
    """Where the learner's sender and all engine workers meet for collective publications."""

    host: str
    port: int
    workers: int
    """Engine workers over all engines; the sender is rank 0, they follow."""


def describe(named: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], alignment: int = 64) -> tuple[TensorMeta, ...]:
    """Lay tensors out back to back, each aligned to ``alignment`` bytes."""
    metas, offset = [], 0
    for name, dtype, shape in named:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        metas.append(TensorMeta(name, str(dtype).removeprefix("torch."), tuple(shape), offset, nbytes))
        offset += -(-nbytes // alignment) * alignment
    return tuple(metas)


def shared_memory_free() -> int:
    """Bytes that new segments can take on this host; what killed runs left behind is counted as free.

    A sender and a relay remove such files before they make their own.
    """
    there = os.statvfs(SHM_DIR)
    left = 0
    for orphan in orphans():
        with contextlib.suppress(OSError):
            left += orphan.stat().st_size
    return there.f_bavail * there.f_frsize + left


def shared_memory_error(needed: float, free: float, host: str = "", on_gpu: bool = False) -> InputError:
    """The ``InputError`` E505 of a host whose shared memory has ``free`` bytes for segments of ``needed``."""
    found = f"{free / 2**20:,.0f} MiB free{f' on {host}' if host else ''}"
    expected = f">= {needed / 2**20:,.0f} MiB for {len(SEGMENTS)} copies of the weights"
    size = int(needed / 2**30) + 2
    fix = f"docker run --shm-size={size}g, or in Kubernetes an emptyDir with medium: Memory on {SHM_DIR}"
    if on_gpu:
        fix += ', or rollout.weights = "auto"'
    return InputError("E505", "shared memory too small", str(SHM_DIR), found, expected, fix)


class Segment:
    """A shared-memory file, mapped; the learner owns it, engines map it read-only."""

    def __init__(self, name: str, size: int | None = None) -> None:
        """Create ``name`` with ``size`` bytes, or map an existing one when ``size`` is None. Raises ``OSError``."""
        self.name, self._path = name, SHM_DIR / name
        flags = os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "rb" if size is None else "r+b", buffering=0)
        if size is None:
            with self._file:  # A private copy-on-write mapping reads the same pages; torch warns of read-only memory.
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)  # Held while the owner lives: see ``orphans``.
            os.posix_fallocate(self._file.fileno(), 0, max(size, 1))
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_WRITE)
        except BaseException as error:  # No space, most often; there may be some later.
            self.unlink()
            if isinstance(error, OSError):
                error.filename = str(self._path)  # "No space left on device" alone reads like a full disk.
            raise

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The whole segment as ``[size] uint8``, without a copy."""
        return np.frombuffer(self._map, dtype=np.uint8)

    def unlink(self) -> None:
        """Remove the file and give up its lock; existing mappings stay valid."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def digest(chunks: Iterable[NDArray[np.uint8]]) -> str:
    """blake3 of ``chunks`` in order, as hex."""
    from blake3 import blake3

    hasher = blake3()
    for chunk in chunks:
        hasher.update(chunk.data)
    return hasher.hexdigest()


def views(buffer: NDArray[np.uint8], tensors: Iterable[TensorMeta]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of each tensor inside ``buffer``, without a copy."""
    for meta in tensors:
        yield buffer[meta.offset : meta.offset + meta.nbytes]


def pack_handle(rebuild_arguments: tuple[Any, ...]) -> list[Any]:
    """The plain values of ``torch.multiprocessing.reductions.reduce_tensor``'s arguments for a flat byte buffer.

    Classes and dtypes would need a pickle on the wire; ``unpack_handle`` puts them back.
    """
    _, size, _, offset, _, _, *rest = rebuild_arguments
    return [size[0], offset, *rest]


def unpack_handle(handle: list[Any]) -> tuple[Any, ...]:
    """Arguments of ``rebuild_cuda_tensor`` for the ``[size] uint8`` buffer that ``pack_handle`` described."""
    import torch

    size, offset, *rest = handle
    return (torch.Tensor, (size,), (1,), offset, torch.UntypedStorage, torch.uint8, *rest)


def segment_name(run_id: str, label: str) -> str:
    """Name of a shared-memory file; carries the run id so that a run can remove what it left."""
    return f"{SHM_PREFIX}{run_id}-{label}"


def orphans(older_than_s: float = 10.0) -> list[Path]:
    """Shared-memory files of runs on this host whose owner died without removing them.

    A file younger than ``older_than_s`` may be about to be locked by its owner.
    """
    found = []
    for path in SHM_DIR.glob(f"{SHM_PREFIX}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # Gone, locked, or another user's.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime >= older_than_s:
                found.append(path)
    return found


def remove_segments(run_id: str) -> list[str]:
    """Unlink every shared-memory file of ``run_id`` that is still there; returns their names."""
    left = list(SHM_DIR.glob(f"{SHM_PREFIX}{run_id}-*"))
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return [path.name for path in left]
