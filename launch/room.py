"""How many cores and GPUs a run could still take: its closing advice must not ask for what is not there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from launch.placement import Needs

QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Room:
    """Cores and GPUs of the machine or cluster, and those that neither this run nor others use."""

    cores: int
    free_cores: int
    gpus: int
    free_gpus: int
    on_gpu: bool
    """True if engines and learner take GPUs."""

    def fits(self, bundle: dict[str, float]) -> bool:
        """Whether one more process with the resources ``bundle`` finds room."""
        if "GPU" in bundle:
            return self.free_gpus >= bundle["GPU"]
        return self.free_cores >= bundle.get("CPU", 0)

    @property
    def words(self) -> str:
        """What is used up: ``all 2 cores are in use``."""
        count, name = (self.gpus, "GPU") if self.on_gpu else (self.cores, "core")
        return f"all {count} {name}s are in use" if count > 1 else f"the only {name} is in use"


def usable_cores() -> int:
    """Cores that this process may use, within the quota of its container if it has one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # "max", or another version of control groups.
        return cores


def room_of(needs: Needs) -> Room:
    """The room that a run with ``needs`` leaves, once its actors have their places. Ray must be connected.

    A private Ray counts threads, which may share cores; the cores are counted here, reward workers included.
    """
    from launch.cluster import free, nodes

    there, left = nodes(), free()
    gpus, free_gpus = (int(sum(node.count("GPU") for node in some)) for some in (there, left))
    if os.environ.get("RAY_ADDRESS"):
        cores, free_cores = (int(sum(node.count("CPU") for node in some)) for some in (there, left))
    else:
        cores = usable_cores()
        free_cores = max(0, cores - int(needs.total("CPU")) - needs.rewards)
    return Room(cores, free_cores, gpus, free_gpus, needs.on_gpu)
