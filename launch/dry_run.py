"""``millrace train --dry-run``: what a start would check and take, without starting anything.

Called by ``run.train`` after every check of files and settings. Without a cluster no Ray is started: the one machine is
judged as the private Ray would see it. With ``RAY_ADDRESS`` the cluster is asked what it has.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path

from launch.hardware import Shape
from launch.model_weights import count_parameters
from launch.placement import Needs, Node, check, table
from launch.resume import Point
from launch.run_folder import dump_config
from shared.config import Config
from shared.errors import InputError, raise_all

DRIVER = Path("/proc/driver/nvidia/gpus")
CGROUP = Path("/sys/fs/cgroup")
ADAM_BYTES = 12
"""Of a parameter in a checkpoint: the master weights and two moments in float32."""


def dry_run(config: Config, origin: str, output: Path, point: Point | None) -> None:
    """Print the settings, the placement and the memory. Raises ``InputError`` E501, E506, E601 or E502."""
    if os.environ.get("RAY_ADDRESS"):
        nodes = asyncio.run(_nodes_of_cluster(config))
    else:
        nodes = [this_machine(config)]
    needs = Needs.of(config, on_gpu=any(node.count("GPU") for node in nodes))
    check(needs, nodes, config, origin)
    begin = f"goes on from {point.place}" if point else "begins at step 0"
    print(f"{dump_config(config)}\n# {begin}, in {output}; placement:\n{table(needs, nodes)}")
    print("# memory, estimated:\n" + "\n".join(f"  {line}" for line in memory(config, needs.on_gpu)))
    print("# dry run: everything checked, nothing started", flush=True)


def this_machine(config: Config) -> Node:
    """The node that a private Ray would be: threads may share cores, so it has as many as are asked for."""
    cpus = max(os.cpu_count() or 1, int(Needs.of(config, on_gpu=False).total("CPU")))
    gpus = _visible_gpus()
    return Node(socket.gethostname(), {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}))


async def _nodes_of_cluster(config: Config) -> list[Node]:
    from launch.cluster import nodes, ray_session

    async with ray_session(config):
        return nodes()


def _visible_gpus() -> int:
    """NVIDIA's, as the driver lists them: asking torch would take longer than all the checks."""
    there = len(list(DRIVER.glob("*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    return min(there, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def memory(config: Config, on_gpu: bool) -> list[str]:
    """What an engine, a learner rank and a checkpoint take, in words, from the shape of the model alone."""
    rollout, learner = config.rollout, config.learner
    parameters, size = count_parameters(Path(config.model.path)), _weight_bytes(config)
    ranks, stage = learner.num_ranks, learner.zero_stage
    states = parameters * (
        12 / (ranks if stage >= 1 else 1) + 4 / (ranks if stage >= 2 else 1) + size / (ranks if stage >= 3 else 1)
    )
    told = f"optimizer, gradients and weights {_size(states)}"
    if config.needs_reference:
        states += (reference := size * parameters / (ranks if stage >= 3 else 1))
        told += f", reference {_size(reference)}"
    cache = f"{rollout.kv_cache_gib} GiB of keys and values"
    if on_gpu:
        cache = f"keys and values up to {rollout.vllm.get('gpu_memory_utilization', 0.9):.0%} of the GPU"
    try:
        shape = Shape.of(config)
    except InputError:  # A family whose configuration names things otherwise.
        activations, longest = 0.0, ""
        told += "; activations not estimated"
    else:
        activations = size * shape.hidden * shape.layers * (1 if learner.gradient_checkpointing else 17)
        activations *= learner.max_tokens_per_microbatch
        told += f", activations {_size(activations)}"
        tokens = rollout.max_prompt_tokens + rollout.max_new_tokens
        longest = f", {_size(shape.kv_bytes * tokens)} for the longest sequence"
    return [
        f"model: {_count(parameters)} parameters",
        f"engine worker: weights {_size(size * parameters / rollout.workers_per_engine)}, {cache}{longest}",
        f"learner rank, ZeRO {stage}: {_size(states + activations)} ({told})",
        f"checkpoint: {_size(checkpoint_bytes(config))}, up to {config.run.keep_checkpoints + 2} at a time",
    ]


def checkpoint_bytes(config: Config) -> float:
    """Of one checkpoint: the optimizer with its master weights, and the model in its own type."""
    return count_parameters(Path(config.model.path)) * (ADAM_BYTES + _weight_bytes(config))


def _weight_bytes(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def check_room(config: Config, output: Path, origin: str) -> None:
    """Raises ``InputErrors``: E601 the run folder cannot be written or its disk has no room for a checkpoint, E504 no memory."""
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    problems, where = [], f"run.output_dir = {output}"
    if not (place.is_dir() and os.access(place, os.W_OK)):
        found = f"{place}, which is {'not writable' if place.is_dir() else 'no directory'}"
        what, expected = "cannot write the run folder", "a writable directory"
        problems.append(InputError("E601", what, where, found, expected, "another place"))
    free, needed = shutil.disk_usage(place).free, checkpoint_bytes(config)
    if free < needed:
        found, expected = f"{_size(free)} free", f"~{_size(needed)} for a checkpoint"
        problems.append(InputError("E601", "not enough disk", where, found, expected, "another place, or make room"))
    rollout, gib = config.rollout, free_memory() / 2**30
    cache = int(rollout.kv_cache_gib) * rollout.num_engines
    # Where the engines of a cluster will live, only their nodes know what is free.
    if cache > gib and not os.environ.get("RAY_ADDRESS") and not _visible_gpus():
        found, most = (
            f"{rollout.kv_cache_gib} for each of {rollout.num_engines} engines",
            int(gib / rollout.num_engines),
        )
        fix = f"rollout.kv_cache_gib = {most}" if most else f"rollout.num_engines = {max(1, int(gib))}"
        place_kv, expected = f"{origin}:rollout.kv_cache_gib", f"together <= {gib:.1f} GiB, which are free"
        problems.append(InputError("E504", "bad KV size", place_kv, found, expected, fix))
    raise_all(problems)


def free_memory() -> float:
    """Bytes that processes on this machine can still take, within the limit of this container if it has one."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    try:
        limit, used = (int((CGROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        cached = (CGROUP / "memory.stat").read_text(encoding="utf-8").split()
        used -= int(cached[cached.index("file") + 1])
    except (OSError, ValueError):  # "max", or another version of control groups.
        return free
    return min(free, limit - used)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _count(number: float) -> str:
    for unit in ("", " thousand", " million", " billion"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} trillion"
