"""The cluster: connect, compare needs with what is there, reserve, tear down.

Ray waits for ever and in silence for resources that do not exist, so needs are compared first and the table is
printed. Without ``RAY_ADDRESS`` a run starts a private Ray of its own and never attaches to somebody else's: it listens
on loopback alone and answers only to a token that this run made.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.environment import SAFE, refuse_open_dashboard
from shared.config import Config
from shared.errors import InputError, one_line

ROOT = Path(__file__).resolve().parent.parent
PLACEMENT_TIMEOUT_S = 60.0
TASKS_TIMEOUT_S = 1.0
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


@dataclass(frozen=True)
class Needs:
    """Ray resources of a run: one bundle per engine, one per learner rank."""

    engine: dict[str, float]
    engines: int
    rank: dict[str, float]
    ranks: int
    colocated: bool = False
    """Engine and rank of the same number share a bundle, hence a GPU."""

    @classmethod
    def of(cls, config: Config, on_gpu: bool) -> Needs:
        """What ``config`` takes. Reward workers are light and take no reserved resource."""
        tp = config.rollout.tensor_parallel_size
        if config.rollout.colocate:
            engine, rank = {"GPU": 0.5, "CPU": 1.0}, {"GPU": 0.5, "CPU": 1.0}
        elif on_gpu:
            engine, rank = {"GPU": float(tp), "CPU": 1.0}, {"GPU": 1.0, "CPU": 1.0}
        else:
            engine = {"CPU": float(config.rollout.cpu_threads * tp)}
            rank = {"CPU": float(config.learner.cpu_threads)}
        return cls(engine, config.rollout.num_engines, rank, config.learner.num_ranks, config.rollout.colocate)

    @property
    def on_gpu(self) -> bool:
        """True if engines and learner get GPUs."""
        return "GPU" in self.engine

    def total(self, resource: str) -> float:
        """Sum over the bundles."""
        return self.engine.get(resource, 0) * self.engines + self.rank.get(resource, 0) * self.ranks


@dataclass(frozen=True)
class Slot:
    """The place of one actor: a bundle of a placement group, or a part of it."""

    group: Any
    bundle: int
    resources: dict[str, float]

    def options(self) -> dict[str, Any]:
        """Options of ``ray.remote`` that put an actor here."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.resources.get("CPU", 0),
            "num_gpus": self.resources.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.bundle),
        }


@dataclass
class Reservation:
    """Placement groups that hold the run's resources, and the slots in them."""

    groups: list[Any]
    engines: list[Slot]
    ranks: list[Slot]

    def release(self) -> None:
        """Give everything back."""
        from ray.util import remove_placement_group

        for group in self.groups:
            remove_placement_group(group)


def connect(config: Config) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, else start a private one. Raises ``InputError`` E502 or E704."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address and "ray" not in sys.modules:
        _keep_private()
    import ray

    quiet: dict[str, Any] = {"log_to_driver": bool(os.environ.get("MILLRACE_WORKER_LOGS")), "logging_level": "warning"}
    if not address:
        # Threads of one machine may share cores; Ray's own count is only bookkeeping here.
        cpus = max(os.cpu_count() or 1, int(Needs.of(config, on_gpu=False).total("CPU")))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, namespace=uuid.uuid4().hex, **quiet)
        return
    try:
        context = ray.init(address=address, namespace=uuid.uuid4().hex, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        found = one_line(error)
        raise InputError(
            "E502",
            "cannot reach Ray",
            f"RAY_ADDRESS={address}",
            found,
            "a live cluster",
            "start it, or unset RAY_ADDRESS",
        ) from None
    try:
        refuse_open_dashboard(getattr(context, "dashboard_url", None) or "")
    except InputError:
        ray.shutdown()
        raise


def _keep_private() -> None:
    """What Ray reads when it is imported and started, for a Ray of this run alone.

    The address 127.0.0.1 as an argument would be replaced by the machine's own; Ray's one way to loopback is its
    switch against clusters, made for other systems. The token is of this process: Ray's own would be written to the
    home folder for all to read.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def disconnect() -> None:
    """Leave the cluster, or end the private one."""
    import ray

    ray.shutdown()


@asynccontextmanager
async def ray_session(config: Config) -> AsyncIterator[None]:
    """Connected to Ray for the length of the block; no task that it left behind outlives the connection."""
    connect(config)
    try:
        yield
    finally:
        await _end_tasks()
        disconnect()


async def _end_tasks() -> None:
    """Cancel what still runs and see it end: a task that asked Ray something later would start a Ray of its own, and wait."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=TASKS_TIMEOUT_S)


def check_resources(config: Config, origin: str) -> Needs:
    """The run's needs, compared with the cluster. Raises ``InputError`` E501 with a table."""
    import ray

    have = ray.cluster_resources()
    on_gpu = have.get("GPU", 0) > 0
    needs = Needs.of(config, on_gpu)
    for resource in ("GPU", "CPU"):
        needed, there = needs.total(resource), have.get(resource, 0)
        if needed > there:
            per_engine, ranks = needs.engine.get(resource, 0), needs.rank.get(resource, 0) * needs.ranks
            found = f"{there:g} in the cluster"
            expected = f"{needed:g} (engines {needs.engines} x {per_engine:g}, learner {ranks:g})"
            fit = int((there - ranks) // per_engine) if per_engine else 0
            fix = f"rollout.num_engines = {fit}" if fit >= 1 else f"a cluster with at least {needed:g} {resource}s"
            raise InputError("E501", f"not enough {resource}s", f"{origin}:rollout.num_engines", found, expected, fix)
    return needs


async def reserve(needs: Needs) -> Reservation:
    """Reserve one placement group per engine and one for the learner. Raises ``InputError`` E501 when they stay pending.

    Colocated, there is one group with a bundle for every pair of engine and rank.
    """
    from ray.util import placement_group

    if needs.colocated:
        pair = {name: needs.engine[name] + needs.rank[name] for name in needs.engine}
        learner = placement_group([pair] * needs.ranks, strategy="PACK")
        groups, engines = [learner], [Slot(learner, i, needs.engine) for i in range(needs.engines)]
    else:
        learner = placement_group([needs.rank] * needs.ranks, strategy="PACK")
        own = [placement_group([needs.engine], strategy="STRICT_PACK") for _ in range(needs.engines)]
        groups, engines = [learner, *own], [Slot(group, 0, needs.engine) for group in own]
    reservation = Reservation(groups, engines, [Slot(learner, rank, needs.rank) for rank in range(needs.ranks)])
    try:
        await asyncio.wait_for(asyncio.gather(*(group.ready() for group in reservation.groups)), PLACEMENT_TIMEOUT_S)
    except TimeoutError:
        reservation.release()
        found, expected = (
            f"resources still taken after {PLACEMENT_TIMEOUT_S:g} s",
            f"{needs.total('CPU'):g} CPUs and {needs.total('GPU'):g} GPUs free",
        )
        raise InputError(
            "E501", "not enough resources", "cluster", found, expected, "end the other jobs, or ask for less"
        ) from None
    return reservation


def worker_environment() -> dict[str, str]:
    """Environment of every actor: it imports Millrace from where the driver did, and is no less safe on any node."""
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ours = {"PYTHONPATH": os.pathsep.join(p for p in dict.fromkeys(path) if p), "TOKENIZERS_PARALLELISM": "false"}
    if not os.environ.get("RAY_ADDRESS"):  # All on this machine: process groups need not be heard outside either.
        ours |= {name: os.environ.get(name, value) for name, value in LOOPBACK.items()}
    return ours | SAFE
