"""What a run needs of a cluster, whether it fits node by node, and the table that says so; knows no Ray.

An engine lives on one node, learner ranks may be spread but stay on GPUs of one type, reward workers take what is
left. Ray would wait for ever for what cannot be, so this is asked first; ``cluster.reserve`` asks again where to. Both
get the answer of one exact search.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from shared.config import Config
from shared.errors import InputError
from shared.weights import NCCL_BACKEND, backend_of

ACCELERATOR = "accelerator_type:"
"""Ray's resource that names a node's GPUs; each has 1 of it."""
SOME = 0.001
IMPOSSIBLE = -(2**40)


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    name: str
    resources: dict[str, float]
    """As Ray counts them: CPU, GPU, accelerator_type:H100, ..."""
    id: str = ""
    """Ray's; several nodes may have one name."""

    @property
    def accelerator(self) -> str:
        """Type of its GPUs; empty without any."""
        return next((name.removeprefix(ACCELERATOR) for name in self.resources if name.startswith(ACCELERATOR)), "")

    def count(self, resource: str) -> float:
        """How much it has of ``resource``."""
        return self.resources.get(resource, 0.0)

    def room(self, bundle: dict[str, float], beside: Mapping[str, float] = MappingProxyType({}), times: int = 0) -> int:
        """How many of ``bundle`` fit beside so many of ``beside``, which do."""
        left = [(self.count(name) - beside.get(name, 0) * times, need) for name, need in bundle.items()]
        return min((int(rest / need + 1e-9) for rest, need in left), default=0)


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
    """Reward workers."""
    reward: dict[str, float] = field(default_factory=dict)
    """What a reward worker takes for itself: GPUs that its models ask for, else nothing."""

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
        gpus = sum(function.gpus for function in config.reward.functions)
        rewards = config.reward.workers, {"GPU": gpus} if gpus else {}
        return cls(engine, rollout.num_engines, rank, learner.num_ranks, rollout.colocate, *rewards)

    @property
    def on_gpu(self) -> bool:
        """True if engines and learner get GPUs."""
        return "GPU" in self.engine

    @property
    def words(self) -> str:
        """The actors of the run, as a person reads them."""
        counts = {"engine": self.engines, "learner rank": self.ranks, "reward worker": self.rewards}
        parts = [f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items()]
        return f"{', '.join(parts[:-1])} and {parts[-1]}"

    @property
    def bundles(self) -> Needs:
        """What is to be placed: colocated, ranks that hold their engines too, and nothing else."""
        if not self.colocated:
            return self
        pair = {name: need + self.rank[name] for name, need in self.engine.items()}
        return replace(self, engine={}, engines=0, rank=pair, colocated=False)

    def total(self, resource: str) -> float:
        """Sum over the bundles."""
        roles = (self.engine, self.engines), (self.rank, self.ranks), (self.reward, self.rewards)
        return sum(bundle.get(resource, 0) * count for bundle, count in roles)


@dataclass(frozen=True)
class Arrangement:
    """Where a run finds room."""

    engines: Sequence[Node]
    """One for each; colocated none. Ranks, and pairs, are all alike: after the engines any order finds them a place."""
    accelerator: str = ""
    """GPU type of all the ranks; empty if it does not matter."""


def check(needs: Needs, nodes: Sequence[Node], config: Config, origin: str) -> None:
    """Raises ``InputError`` E501 with a table, E506 or E108 if ``needs`` cannot be met by ``nodes``."""
    if not needs.on_gpu and (stages := config.rollout.pipeline_parallel_size) > 1:
        key, expected = (
            f"{origin}:rollout.pipeline_parallel_size",
            "1 on CPUs (vLLM splits layers there, not their sequence)",
        )
        fix = f"rollout.pipeline_parallel_size = 1, rollout.tensor_parallel_size = {config.rollout.workers_per_engine}"
        raise InputError("E108", "options disagree", key, f"{stages}", expected, fix)
    if needs.on_gpu and config.rollout.max_engines and backend_of(config, on_gpu=True) == NCCL_BACKEND:
        key, expected = f"{origin}:rollout.max_engines", 'rollout.weights = "host" (a device link has fixed members)'
        raise InputError(
            "E108", "options disagree", key, f"{config.rollout.max_engines}", expected, 'rollout.weights = "host"'
        )
    bundles = needs.bundles
    beside = [_most_ranks(bundles, nodes, _hosts(bundles, nodes, name))[-1] for name in _choices(needs, nodes)]
    rewarded = not needs.reward or needs.total("GPU") <= sum(node.count("GPU") for node in nodes)
    if rewarded and any(ranks[-1] >= needs.ranks for ranks in beside):
        return
    fitted = max(int(np.flatnonzero(ranks >= needs.ranks).max(initial=-1)) for ranks in beside)
    for resource in ("GPU", "CPU"):
        if needs.total(resource) > sum(node.count(resource) for node in nodes):
            raise _too_few(needs, nodes, origin, resource, fitted)
    if fitted < 0:
        raise _no_learner(needs, nodes, origin, beside)
    place, found = f"{origin}:rollout.num_engines", f"room for {fitted} beside the learner"
    expected = f"{needs.engines} engines of {_words(needs.engine)}, each on one node"
    fix = f"rollout.num_engines = {fitted}" if fitted else f"one more node with {_words(needs.engine)}"
    found += _largest(needs.engine, nodes)
    raise InputError("E501", "engines do not fit", place, found, expected, fix, table(needs, nodes))


def arrange(needs: Needs, nodes: Sequence[Node]) -> Arrangement | None:
    """Where every engine has a place and leaves one for every rank; None if there is no such arrangement.

    Of several: ranks on the commonest type of GPU, and then on few nodes.
    """
    bundles = needs.bundles
    for accelerator in _choices(needs, nodes):
        hosts = _hosts(bundles, nodes, accelerator)

        def beside_all(count: int, hosts: list[int] = hosts) -> int:
            return int(_most_ranks(bundles, nodes, hosts[:count])[-1][-1])

        if beside_all(len(hosts)) >= needs.ranks:
            hosts = hosts[: bisect_left(range(len(hosts)), needs.ranks, key=beside_all)]
            return Arrangement(_traced(bundles, nodes, hosts), accelerator)
    return None


def _choices(needs: Needs, nodes: Sequence[Node]) -> list[str]:
    """Types of GPU that the ranks may have, the commonest first; empty for whatever there is."""
    types = _types(nodes)
    if not needs.on_gpu or len(types) < 2:
        return [""]
    return sorted(types, key=lambda name: -_gpus(nodes, name))


def _hosts(needs: Needs, nodes: Sequence[Node], accelerator: str) -> list[int]:
    """The nodes for ranks, those with most room first."""
    found = [i for i, node in enumerate(nodes) if accelerator in ("", node.accelerator)]
    return sorted(found, key=lambda i: -nodes[i].room(needs.rank))


def _most_ranks(needs: Needs, nodes: Sequence[Node], hosts: Sequence[int]) -> list[np.ndarray]:
    """``[engines + 1]`` for the first 0, 1, ... ``nodes``: the most ranks on ``hosts`` beside so many engines.

    Exact, as a knapsack: a node's part is any number of engines and the ranks beside them. Negative if impossible.
    """
    size = needs.engines + 1
    tables = [np.full(size, IMPOSSIBLE)]
    tables[0][0] = 0
    chosen = set(hosts)
    for i, node in enumerate(nodes):
        ranks = _beside(needs, node, i in chosen)
        before = np.concatenate([np.full(len(ranks), IMPOSSIBLE), tables[-1]])
        options = [before[len(ranks) - k :][:size] + more for k, more in enumerate(ranks)]
        tables.append(np.maximum.reduce(options))
    return tables


def _beside(needs: Needs, node: Node, host: bool) -> list[int]:
    """The most ranks on one node beside 0, 1, ... engines, as many as it holds."""
    engines = min(node.room(needs.engine), needs.engines)
    return [node.room(needs.rank, needs.engine, k) if host else 0 for k in range(engines + 1)]


def _traced(needs: Needs, nodes: Sequence[Node], hosts: Sequence[int]) -> list[Node]:
    """The node of each engine, where they leave the most ranks a place on ``hosts``."""
    tables, left, found = _most_ranks(needs, nodes, hosts), needs.engines, list[Node]()
    for i in reversed(range(len(nodes))):
        ranks = enumerate(_beside(needs, nodes[i], i in hosts))
        here = next(k for k, more in ranks if k <= left and tables[i][left - k] + more == tables[i + 1][left])
        found += [nodes[i]] * here
        left -= here
    return found[::-1]


def table(needs: Needs, nodes: Sequence[Node], free: dict[str, float] | None = None) -> str:
    """Needed against available, by role and node; ``free``: what other jobs leave of it at the moment."""
    rows = [("role", "actors", "each", "together")]
    rows.append(("engine", str(needs.engines), _text(needs.engine), _text(needs.engine, needs.engines)))
    rows.append(("learner rank", str(needs.ranks), _text(needs.rank), _text(needs.rank, needs.ranks)))
    rows.append(
        (
            "reward worker",
            str(needs.rewards),
            _text(needs.reward) or "nothing reserved",
            _text(needs.reward, needs.rewards),
        )
    )
    rows.append(("node", "", "has", ""))
    for node in nodes:
        rows.append((node.name, "", _text({name: node.count(name) for name in ("GPU", "CPU")}), node.accelerator))
    if free is not None:
        rows.append(("free at the moment", "", _text({name: free.get(name, 0.0) for name in ("GPU", "CPU")}), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _too_few(needs: Needs, nodes: Sequence[Node], origin: str, resource: str, fitted: int) -> InputError:
    per_engine, ranks = needs.engine.get(resource, 0), needs.rank.get(resource, 0) * needs.ranks
    there, needed = sum(node.count(resource) for node in nodes), needs.total(resource)
    rewards = needs.reward.get(resource, 0) * needs.rewards
    others = f", reward workers {rewards:g}" if rewards else ""
    expected = f"{needed:g} (engines {needs.engines} x {per_engine:g}, learner {ranks:g}{others})"
    fix = f"rollout.num_engines = {fitted}" if fitted >= 1 else f"a cluster with at least {needed:g} {resource}s"
    place, found = f"{origin}:rollout.num_engines", f"{there:g} in the cluster"
    return InputError("E501", f"not enough {resource}s", place, found, expected, fix, table(needs, nodes))


def _no_learner(needs: Needs, nodes: Sequence[Node], origin: str, beside: list[np.ndarray]) -> InputError:
    """The ranks do not fit, even without engines. ``beside``: how many do beside 0, 1, ... engines, by type of GPU."""
    bundles, place = needs.bundles, f"{origin}:learner.num_ranks"
    alone = max(int(ranks[0]) for ranks in beside)
    most = max(int(ranks[-1]) for ranks in beside)
    fits = most if most >= 1 else alone
    fix = f"learner.num_ranks = {fits}" if fits else f"one more node with {_words(bundles.rank)}"
    if fits and needs.colocated:
        fix = f"rollout.num_engines = {fits}, {fix}"
    if len(beside) > 1 and sum(node.room(bundles.rank) for node in nodes) >= needs.ranks:
        types = ", ".join(f"{_gpus(nodes, name):g} {name}" for name in _types(nodes))
        found, expected = f"{types} for {needs.ranks} ranks", "all its ranks on GPUs of one type"
        return InputError("E506", "learner on mixed GPUs", place, found, expected, fix)
    found = f"room for {alone}{_largest(bundles.rank, nodes)}"
    expected = f"{needs.ranks} ranks of {_words(bundles.rank)}" + (", engines included" if needs.colocated else "")
    return InputError("E501", "learner does not fit", place, found, expected, fix, table(needs, nodes))


def _types(nodes: Sequence[Node]) -> list[str]:
    return sorted({node.accelerator for node in nodes if node.accelerator})


def _gpus(nodes: Sequence[Node], accelerator: str) -> float:
    return sum(node.count("GPU") for node in nodes if node.accelerator == accelerator)


def _largest(bundle: dict[str, float], nodes: Sequence[Node]) -> str:
    """What the largest node has of the resource that ``bundle`` lacks most plainly."""
    most = {name: max((node.count(name) for node in nodes), default=0.0) for name in bundle}
    resource = next((name for name, need in bundle.items() if most[name] < need), next(iter(bundle)))
    return f" (the largest node has {most[resource]:g} {resource}s)"


def _words(bundle: dict[str, float]) -> str:
    return " and ".join(f"{need:g} {name}{'s' if need != 1 else ''}" for name, need in bundle.items())


def _text(resources: dict[str, float], times: int = 1) -> str:
    return " ".join(f"{amount * times:g} {name}" for name, amount in resources.items() if amount)
