"""The learner's process group and its DeepSpeed configuration."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shared.config import Config
from shared.threads import gpu_threads


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed configuration of ``config``; the user's own keys are merged over it."""
    settings = config.learner
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Every step() is the accumulation boundary: a token budget needs a varying number of micro-batches.
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 1 << 60,
    }
    for key, value in settings.deepspeed.items():
        ours[key] = ours[key] | value if isinstance(value, dict) and isinstance(ours.get(key), dict) else value
    return ours


def learner_environment(config: Config) -> dict[str, str]:
    """Environment variables of a learner rank; they must be set before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(config.learner.cpu_threads),
        "DS_LOG_LEVEL": "warning",
        # Keep freed activations instead of giving them back page by page: 5 to 15 % of a CPU step.
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # Pages of 2 MB: 5 % more samples per second.
    }


M_MMAP_THRESHOLD, SMALL = -3, 1 << 20
"""glibc's number of the limit above which memory is mapped, and that limit, in bytes, while a learner starts."""


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While open, memory of a megabyte or more goes back to the system when it is freed.

    A start frees the parts of the model one by one; ``learner_environment`` would keep them for activations to come.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # Another library than glibc.
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", f"{1 << 25}")))
        libc.malloc_trim(0)


def join_group(config: Config, rank: int, world_size: int, master: tuple[str, int]) -> None:
    """Initialise DeepSpeed's process group; a single in-process learner picks its own port."""
    import deepspeed

    if not torch.cuda.is_available():
        # DeepSpeed would compile its one operator for CPUs here, under a lock file that a killed process
        # leaves behind.
        # Only its own inference calls that operator. An empty table of what this machine can compile leaves it out.
        deepspeed.ops.__compatible_ops__ = {}
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(config.learner.cpu_threads)
    else:  # Ray and ``learner_environment`` allow one thread: too few to load a model and to hash it.
        torch.set_num_threads(gpu_threads())
    if torch.distributed.is_initialized():
        return
    host, port = master
    port = port or free_port()
    if rank == 0:
        _STORES.append(_open_store(host, port, world_size))
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # Rank 0 too joins a store that is there.
    }
    if world_size > 1 and (interface := interface_to(host)):
        # Else gloo listens where this host's name points, which other hosts may not reach, or not know.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    deepspeed.init_distributed(verbose=False)


_STORES: list[Any] = []
"""Alive as long as the process."""


def _open_store(host: str, port: int, world_size: int) -> Any:
    """The store where the ranks meet, on ``host`` alone: one that torch opens itself listens on every interface."""
    listener = socket.create_server((host, port))
    return torch.distributed.TCPStore(
        host, port, world_size, True, master_listen_fd=listener.detach(), wait_for_workers=False
    )


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` of every rank, on the CPU in float64."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values.double().cpu()
    total = values.double().to(learner_device())
    torch.distributed.all_reduce(total)
    return total.cpu()


def gather_values(values: Tensor) -> Tensor:
    """``values [n]`` of every rank, one after the other; the ranks may hold different numbers of them."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    sizes = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=values.device)
    sizes[torch.distributed.get_rank()] = len(values)
    torch.distributed.all_reduce(sizes)
    padded = values.new_zeros(int(sizes.max()))
    padded[: len(values)] = values
    everyone = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(everyone, padded)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes.tolist(), strict=True)])


def wait_for_device() -> None:
    """Wait until this process's GPU, if it has one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def learner_device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def interface_to(host: str) -> str:
    """The network interface over which ``host`` is reached from here; empty if that is not known."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # Nothing is sent.
        except OSError:
            return ""
        own = probe.getsockname()[0]
    return next((name for name, all_ in psutil.net_if_addrs().items() if own in {a.address for a in all_}), "")


def free_port() -> int:
    """A TCP port that is free on this host at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
