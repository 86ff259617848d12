"""``millrace train --dry-run``: what a start would check and take, without starting anything.

Called by ``run.train`` after every check of files and settings. Without a cluster no Ray is started: the one machine is
judged as the private Ray would see it. With ``RAY_ADDRESS`` the cluster is asked what it has.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.environment import made_for_gpus, uses_gpus
from launch.hardware import DEVICES, ENGINE_SHARE, NAMES
from launch.memory import Sizes, engine_bytes, gb, learner_bytes, refusals, start_bytes, total
from launch.model_weights import count_parameters
from launch.placement import ACCELERATOR, Needs, Node, check, table
from launch.preflight import Prepared
from launch.private_ray import check_temporary_folder
from launch.resume import Point
from launch.run_folder import dump_config
from launch.shared_memory import check_this_host, shared_memory_bytes
from shared.checkpoints import all_of
from shared.config import Config
from shared.errors import InputError, InputErrors, raise_all, visible

DRIVER = Path("/proc/driver/nvidia/gpus")
CGROUP = Path("/sys/fs/cgroup")
ADAM_BYTES = 12
"""Of a parameter in a checkpoint: the master weights and two moments in float32."""


def dry_run(config: Config, origin: str, output: Path, point: Point | None, device: str = "") -> None:
    """Print the settings, the placement and the memory, then all that is wrong with them together.

    ``device``: plan for enough GPUs of that data sheet, which need not be here. Raises ``InputErrors``: E501, E506 or E508
    for the cluster, E601 for the disk, and others of ``check_room``; E502 if a cluster does not answer.
    """
    if device:
        nodes = [_planned(config, device)]
    elif os.environ.get("RAY_ADDRESS"):
        nodes = asyncio.run(_nodes_of_cluster(config))
    else:
        nodes = [this_machine(config)]
    problems: list[InputError] = []
    on_gpu = bool(device)
    if not device:
        gpus = sum(node.count("GPU") for node in nodes)
        on_gpu = bool(_collect(problems, lambda: uses_gpus(gpus, config.rollout.colocate, origin)))
    needs = Needs.of(config, on_gpu)
    begin = f"goes on from {point.place}" if point else "begins at step 0"
    print(visible(f"{dump_config(config)}\n# {begin}, in {output}; placement:\n{table(needs, nodes)}"))
    print("# memory, estimated:\n" + "\n".join(f"  {line}" for line in memory(config, needs.on_gpu)), flush=True)
    if not problems:  # Packages that do not fit the hardware leave nothing to compare with it.
        _collect(problems, lambda: check(needs, nodes, config, origin))
    if needs.on_gpu:
        problems += refusals(config, Sizes.of(config, count_parameters(Path(config.model.path))), nodes, origin)
    _collect(problems, lambda: check_room(config, output, origin))
    raise_all(problems)
    print("# dry run: everything checked, nothing started", flush=True)


def _planned(config: Config, device: str) -> Node:
    """One machine that has what a run of ``config`` takes, with GPUs of the data sheet ``device``."""
    needs = Needs.of(config, on_gpu=True)
    kind = next(name for name, sheet in NAMES.items() if sheet == device)
    have = {name: needs.bundles.total(name) for name in ("CPU", "GPU")}
    assert device in DEVICES
    return Node("planned", have | {f"{ACCELERATOR}{kind}": have["GPU"]})


def contents(prepared: Prepared) -> str:
    """The model and the rows of a run, in a line."""
    parameters = _count(count_parameters(Path(prepared.config.model.path)))
    rows, held = len(prepared.train.prompts), len(prepared.held_out)
    return f"model of {parameters} parameters, {rows:,} rows to train on, {held:,} to evaluate on"


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


def _on_gpus() -> bool:
    return made_for_gpus() and bool(_visible_gpus())


def memory(config: Config, on_gpu: bool) -> list[str]:
    """What an engine, a learner rank and a checkpoint take, in words, from the shape of the model alone."""
    rollout, stage = config.rollout, config.learner.zero_stage
    sizes = Sizes.of(config, count_parameters(Path(config.model.path)), measure=on_gpu)
    parts = learner_bytes(config, sizes, on_gpu)
    told = ", ".join(f"{name} {gb(nbytes)}" for name, nbytes in parts.items())
    told += "" if sizes.kept else "; activations not estimated"
    cache = f"{rollout.kv_cache_gib} GiB of keys and values"
    if on_gpu:
        cache = f"keys and values up to {rollout.vllm.get('gpu_memory_utilization', ENGINE_SHARE):.0%} of the GPU"
    if rollout.colocate:
        cache = "keys and values in what the learner leaves of the GPU"
    engine = engine_bytes(config, sizes)
    longest = f", {gb(engine['longest sequence'])} for the longest sequence" if sizes.kv_bytes else ""
    shared = shared_memory_bytes(config, on_gpu)
    return [
        f"model: {_count(sizes.parameters)} parameters",
        f"engine worker: weights {gb(engine['weights'])}, {cache}{longest}",
        f"learner rank, ZeRO {stage}: {gb(total(parts))} ({told})",
        f"start of a learner rank: {gb(start_bytes(config, sizes))} of the host's memory for weights",
        f"checkpoint: {gb(checkpoint_bytes(config))}, up to {most_checkpoints(config)} at a time",
        *([f"shared memory: {gb(shared)} in /dev/shm of every host that holds published weights"] if shared else []),
    ]


def checkpoint_bytes(config: Config) -> float:
    """Of one checkpoint: the optimizer with its master weights, and the model in its own type."""
    return count_parameters(Path(config.model.path)) * (ADAM_BYTES + _weight_bytes(config))


def most_checkpoints(config: Config) -> int:
    """Most checkpoints of a run on the disk at a time: those kept, the best one beside them, and the one being written."""
    run, every = config.run, config.eval.every_steps
    written = 1 + ((run.steps - 1) // run.checkpoint_every if run.checkpoint_every else 0)
    if _keeps_best(config) and every:
        written += (run.steps - 1) // every
    return min(written, run.keep_checkpoints + _keeps_best(config) + 1)


def _keeps_best(config: Config) -> bool:
    return bool(config.data.eval) and config.eval.early_stopping.name != "none"


def _weight_bytes(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2


def check_room(config: Config, output: Path, origin: str) -> None:
    """Raises ``InputErrors``: E601 the run folder cannot be written or its disk has no room for checkpoints, E503 no folder
    for Ray's sockets, E504 no memory, E505 no shared memory.
    """
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    problems, where = [], f"run.output_dir = {output}"
    if not (place.is_dir() and os.access(place, os.W_OK)):
        found = f"{place}, which is {'not writable' if place.is_dir() else 'no directory'}"
        what, expected = "cannot write the run folder", "a writable directory"
        problems.append(InputError("E601", what, where, found, expected, "another place"))
    _collect(problems, lambda: _check_disk(config, output, place))
    _collect(problems, check_temporary_folder)
    _collect(problems, lambda: check_this_host(config, on_gpu=_on_gpus()))
    _collect(problems, lambda: _check_workers(config, origin))
    rollout, gib = config.rollout, free_memory() / 2**30
    cache = int(rollout.kv_cache_gib) * rollout.num_engines
    # Where the engines of a cluster will live, only their nodes know what is free.
    if cache > gib and not os.environ.get("RAY_ADDRESS") and not _on_gpus():
        found, most = (
            f"{rollout.kv_cache_gib} for each of {rollout.num_engines} engines",
            int(gib / rollout.num_engines),
        )
        fix = f"rollout.kv_cache_gib = {most}" if most else f"rollout.num_engines = {max(1, int(gib))}"
        place_kv, expected = f"{origin}:rollout.kv_cache_gib", f"together <= {gib:.1f} GiB, which are free"
        problems.append(InputError("E504", "bad KV size", place_kv, found, expected, fix))
    raise_all(problems)


def _check_workers(config: Config, origin: str) -> None:
    """Raises ``InputError`` E501 if an engine on this machine's CPUs has more workers than there are cores.

    Workers wait for each other at every layer without giving up their cores.
    """
    workers, cores = config.rollout.workers_per_engine, os.cpu_count() or 1
    if workers <= cores or os.environ.get("RAY_ADDRESS") or _visible_gpus():
        return
    place, found = f"{origin}:rollout.tensor_parallel_size", f"{workers} workers per engine"
    expected, fix = f"at most {cores}, the cores of this machine", f"rollout.tensor_parallel_size = {cores}"
    raise InputError("E501", "not enough CPUs", place, found, expected, fix)


def _check_disk(config: Config, output: Path, place: Path) -> None:
    """Raises ``InputError`` E601 if the disk of ``place`` has no room for the checkpoints that the run will keep.

    Those in ``output`` already count as room: they are replaced by newer ones.
    """
    size, most = checkpoint_bytes(config), most_checkpoints(config)
    there = sum(f.stat().st_size for one in all_of(output / "checkpoints") for f in one.rglob("*"))
    free = shutil.disk_usage(place).free
    if free >= max(size, size * most - there):
        return
    found = f"{gb(free)} free{f' beside checkpoints of {gb(there)}' if there else ''}"
    expected = f"~{gb(size * most)} for {f'{most} checkpoints at a time' if most > 1 else 'a checkpoint'}"
    fewer = int((free + there) / size) - 1 - _keeps_best(config) if free >= size else 0
    fix = f"run.keep_checkpoints = {fewer}" if fewer > 0 else "another place, or make room"
    raise InputError("E601", "not enough disk", f"run.output_dir = {output}", found, expected, fix)


def _collect(problems: list[InputError], check: Callable[[], Any]) -> Any:
    """Return what ``check`` does; None if it raises, and add to ``problems`` what it raises."""
    try:
        return check()
    except InputErrors as found:
        problems += found.problems
    except InputError as problem:
        problems.append(problem)
    return None


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


def _count(number: float) -> str:
    for unit in ("", " thousand", " million", " billion"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} trillion"
