"""How many threads a process beside a GPU uses for its work on the host."""

from __future__ import annotations

import os
from pathlib import Path

NVIDIA = Path("/proc/driver/nvidia/gpus")
MOST = 8
"""More threads than these do not load or hash a model faster."""


def gpu_threads() -> int:
    """Return the threads of one GPU's process: its share of the host's cores, from 1 to ``MOST``."""
    gpus = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 1
    return max(1, min(MOST, len(os.sched_getaffinity(0)) // max(gpus, 1)))
