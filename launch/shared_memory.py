"""Room in /dev/shm for the weights that are published, on every host that will hold them.

A container has 64 MB there unless it is started with more. A run needs two copies of the weights on the host of the
learner's first rank, and on each other host with engines; it is told so before anything starts.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from launch.model_weights import count_parameters
from shared.config import Config
from shared.errors import raise_all
from shared.weights import SEGMENTS, SHM_BACKEND, backend_of, shared_memory_error, shared_memory_free

if TYPE_CHECKING:
    from launch.cluster import Reservation


def shared_memory_bytes(config: Config, on_gpu: bool) -> int:
    """Bytes of shared memory that a run of ``config`` takes on a host with published weights; 0 if none is used."""
    if backend_of(config, on_gpu) != SHM_BACKEND:
        return 0
    return len(SEGMENTS) * count_parameters(Path(config.model.path)) * (4 if config.model.dtype == "float32" else 2)


def check_this_host(config: Config, on_gpu: bool) -> None:
    """Raises ``InputError`` E505 if a run of its own has too little shared memory here; a cluster has other hosts."""
    needed = shared_memory_bytes(config, on_gpu)
    if needed and not os.environ.get("RAY_ADDRESS") and needed > (free := shared_memory_free()):
        raise shared_memory_error(needed, free, on_gpu=on_gpu)


async def check_hosts(config: Config, reservation: Reservation) -> None:
    """Raises ``InputErrors`` E505 for the hosts of a cluster that have too little shared memory."""
    on_gpu = reservation.needs.on_gpu
    needed = shared_memory_bytes(config, on_gpu)
    if not needed or not os.environ.get("RAY_ADDRESS"):
        return
    slots = [*reservation.ranks[:1], *reservation.engines]
    found = sorted(set(await asyncio.gather(*(slot.run(_free_here) for slot in slots))))
    raise_all([shared_memory_error(needed, free, host, on_gpu) for host, free in found if free < needed])


def _free_here() -> tuple[str, int]:
    return socket.gethostname(), shared_memory_free()
