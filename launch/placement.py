"""What a run needs of a cluster, whether it fits node by node, and the table that says so; knows no Ray.

An engine lives on one node, learner ranks may be spread but stay on GPUs of one type, reward workers take what is
left. Ray would wait for ever for what cannot be, so this is asked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.config import Config
from shared.errors import InputError
from shared.weights import NCCL_BACKEND, backend_of

ACCELERATOR = "accelerator_type:"
"""Ray's resource that names a node's GPUs; each has 1 of it."""
SOME = 0.001


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    name: str
    resources: dict[str, float]
    """As Ray counts them: CPU, GPU, accelerator_type:H100, ..."""

    @property
    def accelerator(self) -> str:
        """Type of its GPUs; empty without any."""
        return next((name.removeprefix(ACCELERATOR) for name in self.resources if name.startswith(ACCELERATOR)), "")

    def count(self, resource: str) -> float:
        """How much it has of ``resource``."""
        return self.resources.get(resource, 0.0)


@dataclass(frozen=True)
class Needs:
    """Ray resources of a run: one bundle per engine, one per learner rank."""

    engine: dict[str, float]
    engines: int
    """That must be there to start."""
    rank: dict[str, float]
    ranks: int
    colocated: bool = False
    """Engine and rank of the same number share a bundle, hence a GPU."""
    rewards: int = 1
    """Reward workers; they are light and take nothing for themselves."""

    @classmethod
    def of(cls, config: Config, on_gpu: bool) -> Needs:
        """What ``config`` takes."""
        rollout, learner = config.rollout, config.learner
        if rollout.colocate:
            engine, rank = {"GPU": 0.5, "CPU": 1.0}, {"GPU": 0.5, "CPU": 1.0}
        elif on_gpu:
            engine, rank = {"GPU": float(rollout.workers_per_engine), "CPU": 1.0}, {"GPU": 1.0, "CPU": 1.0}
        else:
            engine = {"CPU": float(rollout.cpu_threads * rollout.workers_per_engine)}
            rank = {"CPU": float(learner.cpu_threads)}
        return cls(engine, rollout.num_engines, rank, learner.num_ranks, rollout.colocate, config.reward.workers)

    @property
    def on_gpu(self) -> bool:
        """True if engines and learner get GPUs."""
        return "GPU" in self.engine

    def total(self, resource: str) -> float:
        """Sum over the bundles."""
        return self.engine.get(resource, 0) * self.engines + self.rank.get(resource, 0) * self.ranks


@dataclass
class _Room:
    """What is left of a node while bundles are put on it."""

    node: Node
    left: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.left = dict(self.node.resources)

    def put(self, bundle: dict[str, float], at_most: int) -> int:
        """Put up to so many bundles here; returns how many fitted."""
        fits = min(
            (int(self.left.get(name, 0) / need + 1e-9) for name, need in bundle.items() if need), default=at_most
        )
        fits = min(fits, at_most)
        for name, need in bundle.items():
            self.left[name] = self.left.get(name, 0) - need * fits
        return fits


def check(needs: Needs, nodes: Sequence[Node], config: Config, origin: str) -> None:
    """Raises ``InputError`` E501 with a table, E506 or E108 if ``needs`` cannot be met by ``nodes``."""
    if needs.on_gpu and config.rollout.max_engines and backend_of(config, on_gpu=True) == NCCL_BACKEND:
        key, expected = f"{origin}:rollout.max_engines", 'rollout.weights = "host" (a device link has fixed members)'
        raise InputError(
            "E108", "options disagree", key, f"{config.rollout.max_engines}", expected, 'rollout.weights = "host"'
        )
    for resource in ("GPU", "CPU"):
        needed, there = needs.total(resource), sum(node.count(resource) for node in nodes)
        if needed > there:
            raise _too_few(needs, nodes, origin, resource, there)
    if needs.colocated:
        return
    accelerator = accelerator_of_ranks(needs, nodes)
    if accelerator is None:
        types = ", ".join(f"{_gpus(nodes, name):g} {name}" for name in _types(nodes))
        place, found = f"{origin}:learner.num_ranks", f"{types} for {needs.ranks} ranks"
        most = max(_gpus(nodes, name) for name in _types(nodes))
        fix = f"learner.num_ranks = {most:g}"
        raise InputError("E506", "learner on mixed GPUs", place, found, "all its ranks on GPUs of one type", fix)
    fitted = _arrange(needs, nodes, accelerator)
    if fitted < needs.engines:
        most = max((node.count("GPU" if needs.on_gpu else "CPU") for node in nodes), default=0.0)
        resource, place = "GPU" if needs.on_gpu else "CPU", f"{origin}:rollout.num_engines"
        found = f"room for {fitted} beside the learner (the largest node has {most:g} {resource}s)"
        expected = f"{needs.engines} engines of {needs.engine[resource]:g} {resource}s, each on one node"
        fix = f"rollout.num_engines = {fitted}" if fitted else f"a node with {needs.engine[resource]:g} {resource}s"
        raise InputError("E501", "engines do not fit", place, found, expected, fix, table(needs, nodes))


def accelerator_of_ranks(needs: Needs, nodes: Sequence[Node]) -> str | None:
    """The type of GPU that all learner ranks can have, of several the commonest; empty if it does not matter."""
    types = _types(nodes)
    if not needs.on_gpu or len(types) < 2:
        return ""
    enough = [name for name in types if _gpus(nodes, name) >= needs.rank["GPU"] * needs.ranks]
    return max(enough, key=lambda name: _gpus(nodes, name), default=None)


def table(needs: Needs, nodes: Sequence[Node], free: dict[str, float] | None = None) -> str:
    """Needed against available, by role and node; ``free``: what other jobs leave of it at the moment."""
    rows = [("role", "actors", "each", "together")]
    rows.append(("engine", str(needs.engines), _text(needs.engine), _text(needs.engine, needs.engines)))
    rows.append(("learner rank", str(needs.ranks), _text(needs.rank), _text(needs.rank, needs.ranks)))
    rows.append(("reward worker", str(needs.rewards), "nothing reserved", ""))
    rows.append(("node", "", "has", ""))
    for node in nodes:
        rows.append((node.name, "", _text({name: node.count(name) for name in ("GPU", "CPU")}), node.accelerator))
    if free is not None:
        rows.append(("free at the moment", "", _text({name: free.get(name, 0.0) for name in ("GPU", "CPU")}), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _too_few(needs: Needs, nodes: Sequence[Node], origin: str, resource: str, there: float) -> InputError:
    per_engine, ranks = needs.engine.get(resource, 0), needs.rank.get(resource, 0) * needs.ranks
    needed = needs.total(resource)
    expected = f"{needed:g} (engines {needs.engines} x {per_engine:g}, learner {ranks:g})"
    fit = int((there - ranks) // per_engine) if per_engine else 0
    fix = f"rollout.num_engines = {fit}" if fit >= 1 else f"a cluster with at least {needed:g} {resource}s"
    place, found = f"{origin}:rollout.num_engines", f"{there:g} in the cluster"
    return InputError("E501", f"not enough {resource}s", place, found, expected, fix, table(needs, nodes))


def _arrange(needs: Needs, nodes: Sequence[Node], accelerator: str) -> int:
    """How many engines have a place, when each needs one node: the larger bundles are placed first, the fullest node next."""
    resource = "GPU" if needs.on_gpu else "CPU"
    rooms = [_Room(node) for node in nodes]
    fitted = 0

    def engines() -> None:
        nonlocal fitted
        for room in sorted(rooms, key=lambda room: room.left.get(resource, 0) % needs.engine[resource]):
            fitted += room.put(needs.engine, needs.engines - fitted)

    if needs.engine[resource] >= needs.rank[resource] and not accelerator:
        engines()
        return fitted if _ranks(needs, rooms, "") else fitted - 1
    _ranks(needs, rooms, accelerator)
    engines()
    return fitted


def _ranks(needs: Needs, rooms: list[_Room], accelerator: str) -> bool:
    left = needs.ranks
    for room in rooms:
        if not accelerator or room.node.accelerator == accelerator:
            left -= room.put(needs.rank, left)
    return left == 0


def _types(nodes: Sequence[Node]) -> list[str]:
    return sorted({node.accelerator for node in nodes if node.accelerator})


def _gpus(nodes: Sequence[Node], accelerator: str) -> float:
    return sum(node.count("GPU") for node in nodes if node.accelerator == accelerator)


def _text(resources: dict[str, float], times: int = 1) -> str:
    return " ".join(f"{amount * times:g} {name}" for name, amount in resources.items() if amount)
