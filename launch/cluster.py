"""The cluster: connect, compare needs with what is there, reserve, tear down.

Ray waits for ever and in silence for resources that do not exist, so needs are compared first and the table is
printed. Without ``RAY_ADDRESS`` a run starts a private Ray of its own and never attaches to somebody else's: it listens
on loopback alone and answers only to a token that this run made.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.environment import SAFE, refuse_open_dashboard, refuse_open_gcs, uses_gpus
from launch.interrupts import kept
from launch.memory import refuse_unfit
from launch.placement import ACCELERATOR, SOME, Arrangement, Needs, Node, arrange, check, table
from launch.private_ray import check_temporary_folder, keep_private, remove_folders, start_private
from launch.ray_actors import RaySlot, slots_of
from shared.actors import LOGS
from shared.config import Config
from shared.errors import InputError, one_line, raise_all

ROOT = Path(__file__).resolve().parent.parent
PLACEMENT_TIMEOUT_S, TASKS_TIMEOUT_S = 60.0, 1.0
CLAIM_S = 5.0
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


@dataclass
class Reservation:
    """The places of a run's actors; each engine's is its own to give back."""

    engines: list[RaySlot]
    ranks: list[RaySlot]
    rewards: list[RaySlot]
    needs: Needs

    def another_engine(self, near: str = "") -> RaySlot:
        """A place for one engine more: there as soon as the cluster has it, on the node ``near`` if that has room then.

        Not there for ever: should the node be lost, Ray finds the engine a place on another.
        """
        from ray.util import placement_group

        # Private to Ray, and what Serve places replicas with; a label or a resource of the node would pin it.
        group = placement_group([self.needs.engine], strategy="STRICT_PACK", _soft_target_node_id=near or None)
        self.engines.append(RaySlot(self.needs.engine, group))
        return self.engines[-1]

    def add_learner(self, accelerator: str) -> None:
        """A place for every rank, on few nodes, on GPUs of that type if one is named; colocated, for its engine too."""
        from ray.util import placement_group

        needs = self.needs
        mark = {f"{ACCELERATOR}{accelerator}": SOME} if accelerator else {}
        group = placement_group([needs.bundles.rank | mark] * needs.ranks, strategy="PACK")
        self.ranks += [RaySlot(needs.rank, group, rank) for rank in range(needs.ranks)]
        if needs.colocated:
            self.engines += [RaySlot(needs.engine, group, rank) for rank in range(needs.engines)]

    def on(self, node: str) -> RaySlot:
        """A place on ``node`` that takes nothing for itself."""
        return RaySlot({}, node=node)

    def release(self) -> None:
        """Give the places back; a group that is gone already is no trouble."""
        for slot in {id(slot.group): slot for slot in (*self.ranks, *self.engines, *self.rewards)}.values():
            slot.free()


def connect(config: Config) -> None:
    """Join the cluster of ``RAY_ADDRESS``, else start one. Raises ``InputError`` E502, E503, E704 or ``MillraceError``."""
    check_temporary_folder()
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address and "ray" not in sys.modules:
        keep_private()
    import ray

    # Outside the main thread Ray warns of a signal handler that it cannot set; nobody needs it there.
    level = "warning" if threading.current_thread() is threading.main_thread() else "error"
    quiet: dict[str, Any] = {"log_to_driver": bool(os.environ.get("MILLRACE_WORKER_LOGS")), "logging_level": level}
    if not address:
        # Threads of one machine may share cores; Ray's own count is only bookkeeping here.
        cpus = max(os.cpu_count() or 1, int(Needs.of(config, on_gpu=False).total("CPU")))
        with kept():
            start_private(num_cpus=cpus, namespace=uuid.uuid4().hex, **quiet)
        return
    try:
        context = kept()(ray.init)(address=address, namespace=uuid.uuid4().hex, **quiet)
    except Exception as error:  # Ray has no one kind for it: ConnectionError, RuntimeError, its own for a token, ...
        found, fix = one_line(error), "start it, or unset RAY_ADDRESS"
        if any(word in found.lower() for word in ("token", "authenticat")):
            fix = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as the cluster has them"
        raise InputError("E502", "cannot reach Ray", f"RAY_ADDRESS={address}", found, "a live cluster", fix) from None
    try:
        refuse_open_gcs(getattr(context, "address_info", {}).get("gcs_address") or "")
        refuse_open_dashboard(getattr(context, "dashboard_url", None) or "")
    except InputError:
        ray.shutdown()
        raise


def disconnect(failed: bool = False) -> None:
    """Leave the cluster, or end the private one; what Ray logged is kept, and told, if the run ``failed``."""
    import ray

    ray.shutdown()
    remove_folders(failed)


@asynccontextmanager
async def ray_session(config: Config) -> AsyncIterator[None]:
    """Connected to Ray for the length of the block; no task that it left behind outlives the connection."""
    connect(config)
    failed = False
    try:
        yield
    except Exception as error:
        failed = not isinstance(error, InputError)
        raise
    finally:
        await _end_tasks()
        disconnect(failed)


async def _end_tasks() -> None:
    """Cancel what still runs and see it end: a task that asked Ray something later would start a Ray of its own, and wait."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=TASKS_TIMEOUT_S)


def nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    found = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeManagerAddress"], node["Resources"], node["NodeID"]) for node in found]


def free() -> list[Node]:
    """The nodes that are alive, with what other jobs leave of them at the moment."""
    from ray._private.state import available_resources_per_node  # In public there is but the sum.

    left = available_resources_per_node()
    return [replace(node, resources=left.get(node.id, {})) for node in nodes()]


def addresses() -> dict[str, str]:
    """Node id -> address, of nodes alive or not."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}


def check_resources(config: Config, origin: str) -> Needs:
    """The run's needs, compared with the cluster. Raises ``InputError`` E501 or E506, with a table, or ``InputErrors`` E508."""
    there, colocate = nodes(), config.rollout.colocate
    needs = Needs.of(config, uses_gpus(sum(node.count("GPU") for node in there), colocate, origin))
    check(needs, there, config, origin)
    refuse_unfit(config, there if needs.on_gpu else [], origin)
    return needs


def claim(output: Path) -> Any:
    """Hold the run's name on a shared cluster while the result is kept. Raises ``InputError`` E602 if another has it.

    The lock in the run folder says so too, but only on the same file system.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    import ray

    owner = f"pid {os.getpid()} on {socket.gethostname()}"
    options = {"name": str(output), "namespace": "millrace", "num_cpus": 0}
    deadline = time.monotonic() + CLAIM_S
    while True:
        try:
            return ray.remote(_Claim).options(**options).remote(owner)
        except ValueError:  # The name is taken, if only by one that has just been killed.
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
    holder = ray.get(ray.get_actor(str(output), "millrace").owner.remote(), timeout=10)
    place, fix = f"run.output_dir = {output}", "wait for it, end it, or choose another run.output_dir"
    raise InputError("E602", "run is live", place, f"{holder} in this cluster", "no other writer", fix)


class _Claim:
    """Whoever runs under a name."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def owner(self) -> str:
        """Process and host of its driver."""
        return self._owner


async def check_files(config: Config, output: Path, reservation: Reservation) -> None:
    """Every host of an actor sees the model, and those of the learner the run folder. Raises ``InputErrors`` E601."""
    if len(nodes()) == 1:
        return
    probe = output / f"probe-{uuid.uuid4().hex[:8]}"
    try:
        probe.write_text("", encoding="utf-8")
        model = config.model.path
        seen = [slot.run(_missing, [model, str(probe)]) for slot in reservation.ranks]
        seen += [slot.run(_missing, [model]) for slot in reservation.engines]
        found = sorted({(host, path) for host, paths in await asyncio.gather(*seen) for path in paths})
    finally:
        probe.unlink(missing_ok=True)
    problems = []
    for host, path in found:
        key, fix = (
            ("model.path", "copy it there") if path == model else ("run.output_dir", "a folder that all hosts share")
        )
        place = f"{key} = {path if path == model else output}"
        problems.append(
            InputError("E601", "not on every host", place, f"nothing there on {host}", "the same files", fix)
        )
    raise_all(problems)


def _missing(paths: list[str]) -> tuple[str, list[str]]:
    """This host, and which of ``paths`` it does not have."""
    import ray

    return ray.util.get_node_ip_address(), [path for path in paths if not os.path.exists(path)]


async def reserve(needs: Needs) -> Reservation:
    """Reserve a place for every engine and one for the learner. Raises ``InputError`` E501 when they stay pending.

    Engines come first, each where ``arrange`` has it: Ray would break up for ranks what an engine needs whole.
    Colocated, there is one group with a bundle for every pair of engine and rank.
    """
    import ray

    expected = f"{needs.total('CPU'):g} CPUs and {needs.total('GPU'):g} GPUs free"
    # If other jobs leave no room at the moment, they may end; where to go then is a guess that Ray may correct.
    arrangement = arrange(needs, free()) or arrange(needs, nodes())
    if arrangement is None:
        found, fix = "no arrangement of engines and ranks on these nodes", "a larger cluster, or ask for less"
        raise InputError("E501", "not enough resources", "cluster", found, expected, fix, table(needs, nodes()))
    reservation = Reservation([], [], [], needs)
    try:
        async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
            await _fill(reservation, arrangement)
    except TimeoutError:
        reservation.release()
        found, fix = f"resources still taken after {PLACEMENT_TIMEOUT_S:g} s", "end the other jobs, or ask for less"
        shown = table(needs, nodes(), ray.available_resources())
        raise InputError("E501", "not enough resources", "cluster", found, expected, fix, shown) from None
    return reservation


async def _fill(reservation: Reservation, arrangement: Arrangement) -> None:
    for node in arrangement.engines:
        reservation.another_engine(near=node.id)
    await asyncio.gather(*(slot.ready() for slot in reservation.engines))
    reservation.add_learner(arrangement.accelerator)
    reservation.rewards = slots_of(reservation.needs.reward, reservation.needs.rewards)
    await asyncio.gather(*(s.ready() for s in (*reservation.ranks, *reservation.engines, *reservation.rewards)))


def worker_environment(output: Path | None = None) -> dict[str, str]:
    """Environment of every actor: it imports Millrace from where the driver did, and is no less safe on any node.

    What it prints goes to ``output``/logs, unless ``MILLRACE_WORKER_LOGS`` asks to see it at once.
    """
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ours = {"PYTHONPATH": os.pathsep.join(p for p in dict.fromkeys(path) if p), "TOKENIZERS_PARALLELISM": "false"}
    if not os.environ.get("RAY_ADDRESS"):  # All on this machine: process groups need not be heard outside either.
        ours |= {name: os.environ.get(name, value) for name, value in LOOPBACK.items()}
    if output is not None and not os.environ.get("MILLRACE_WORKER_LOGS"):
        (output / "logs").mkdir(exist_ok=True)
        ours[LOGS] = str(output / "logs")
    return ours | SAFE
