"""What fits on which cluster, node by node, and what the table says."""

from __future__ import annotations

import random
import time

import pytest

from launch.placement import ACCELERATOR, Needs, Node, arrange, check, table
from shared.errors import InputError
from tests.fakes import make_config
from tests.pace import scaled


def gpus(*counts: int, kind: str = "H100", cpus: int = 32) -> list[Node]:
    marks = {f"accelerator_type:{kind}": 1.0}
    return [Node(f"{kind}-{i}", {"GPU": float(n), "CPU": float(cpus)} | marks) for i, n in enumerate(counts)]


def cpus(*counts: int) -> list[Node]:
    return [Node(f"cpu-{i}", {"CPU": float(n)}) for i, n in enumerate(counts)]


def needs(nodes, **changes):
    config = make_config(**changes)
    return Needs.of(config, any(node.count("GPU") for node in nodes)), config


def checked(nodes, **changes):
    wanted, config = needs(nodes, **changes)
    check(wanted, nodes, config, "run.toml")


def arranged(nodes, **changes):
    return arrange(needs(nodes, **changes)[0], nodes)


def refused(nodes, code, **changes):
    with pytest.raises(InputError) as excinfo:
        checked(nodes, **changes)
    assert excinfo.value.code == code
    return excinfo.value


E, TP, PP, RANKS = (
    *("rollout.num_engines", "rollout.tensor_parallel_size", "rollout.pipeline_parallel_size"),
    "learner.num_ranks",
)
COLOCATE, BOTH = "rollout.colocate", "rollout.num_engines = {0}, learner.num_ranks = {0}"


@pytest.mark.parametrize(
    ("nodes", "changes"),
    [
        (gpus(8), {E: 3, TP: 2, RANKS: 2}),
        (gpus(8, 8), {E: 2, TP: 4, RANKS: 8}),
        (gpus(8, 8), {E: 1, TP: 4, PP: 2, RANKS: 8}),
        (gpus(3, 3, 2), {E: 3, TP: 2, RANKS: 2}),  # Ranks take what the engines leave over.
        ([*cpus(4), *gpus(2)], {E: 1, RANKS: 1}),  # A head without GPUs.
        ([*gpus(4), *gpus(8, kind="A100")], {E: 4, RANKS: 8}),
        ([*gpus(4), *gpus(4, kind="A100")], {E: 4, RANKS: 4}),
        (cpus(2, 2, 2), {E: 2, RANKS: 1}),
        (cpus(4, 2), {E: 1, TP: 4, "learner.cpu_threads": 2}),
        (gpus(2), {"rollout.colocate": True, E: 2, RANKS: 2}),
        ([*gpus(8), *gpus(4, kind="A100")], {E: 1, TP: 8, RANKS: 4}),  # Not on the commonest: the engine needs that.
        (gpus(5, 5), {E: 2, TP: 4, RANKS: 2}),
        (cpus(3, 8, 5), {E: 2, "rollout.cpu_threads": 5, RANKS: 2, "learner.cpu_threads": 3}),
    ],
)
def test_what_fits(nodes, changes):
    checked(nodes, **changes)


@pytest.mark.parametrize(
    ("nodes", "changes", "found", "fix"),
    [
        (gpus(4, 4), {E: 1, TP: 8}, "8 in the cluster", "at least 9"),
        (gpus(5, 4), {E: 1, TP: 8}, "room for 0 beside the learner (the largest node has 5 GPUs)", "8 GPUs"),
        (gpus(7, 7), {E: 3, TP: 4, RANKS: 2}, "room for 2 beside", "rollout.num_engines = 2"),
        (gpus(6, 6), {E: 2, TP: 3, PP: 2, RANKS: 1}, "12 in the cluster", "rollout.num_engines = 1"),
        (cpus(3, 3), {E: 2, "rollout.cpu_threads": 2, "learner.cpu_threads": 2}, "room for 1", "num_engines = 1"),
    ],
)
def test_what_has_no_place_says_so_with_a_table(nodes, changes, found, fix):
    error = refused(nodes, "E501", **changes)
    assert found in error.found
    assert fix in error.fix
    assert "learner rank" in error.table
    assert all(node.name in error.table for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "changes", "found", "fix"),
    [
        (cpus(2, 3, 2), {E: 3, RANKS: 1, "learner.cpu_threads": 4}, "room for 0", "one more node with 4 CPUs"),
        (cpus(7, 4), {E: 1, RANKS: 2, "learner.cpu_threads": 5}, "room for 1", "learner.num_ranks = 1"),
        # GPUs without the CPUs to feed them, on the only type that has enough.
        (
            [*gpus(8, cpus=2), *gpus(4, kind="A100", cpus=8)],
            {E: 1, RANKS: 8},
            "room for 4 (the largest node has 8 GPUs)",
            "learner.num_ranks = 4",
        ),
        # Pairs of engine and rank.
        ([*gpus(2, cpus=2), *cpus(32)], {COLOCATE: True, E: 2, RANKS: 2}, "room for 1", BOTH.format(1)),
    ],
)
def test_a_learner_without_a_place_says_so_with_a_table(nodes, changes, found, fix):
    error = refused(nodes, "E501", **changes)
    assert error.what == "learner does not fit"
    assert found in error.found
    assert fix in error.fix
    assert "learner rank" in error.table


def test_a_sequence_of_stages_is_refused_on_cpus_in_one_line():
    error = refused(cpus(8), "E108", **{TP: 2, PP: 2})
    assert error.place == "run.toml:rollout.pipeline_parallel_size"
    assert error.fix == "rollout.pipeline_parallel_size = 1, rollout.tensor_parallel_size = 4"
    assert not error.table


def test_pairs_stay_on_gpus_of_one_type():
    error = refused([*gpus(1), *gpus(1, kind="A100")], "E506", **{COLOCATE: True, E: 2, RANKS: 2})
    assert error.fix == BOTH.format(1)


def test_the_engines_of_too_large_a_run_are_as_many_as_fit_node_by_node():
    error = refused(gpus(7, 7), "E501", **{E: 4, TP: 4, RANKS: 2})  # 14 GPUs would do for three.
    assert error.fix == "rollout.num_engines = 2"


def test_a_learner_stays_on_gpus_of_one_type():
    error = refused([*gpus(4), *gpus(4, kind="A100")], "E506", **{E: 1, RANKS: 6})
    assert str(error).startswith(
        "error[E506] learner on mixed GPUs — run.toml:learner.num_ranks. Found 4 A100, 4 H100 for 6 ranks, "
        "expected all its ranks on GPUs of one type. Fix: learner.num_ranks = 4"
    )
    mixed = [*gpus(4), *gpus(8, kind="A100")]
    assert arranged(mixed, **{E: 2, RANKS: 4}).accelerator == "A100"
    assert arranged(mixed, **{E: 1, TP: 8, RANKS: 4}).accelerator == "H100"
    assert arranged(gpus(8), **{RANKS: 4}).accelerator == ""
    # All that is left for the engines is on the other type.
    left = [*gpus(3), *gpus(8, kind="A100")]  # The ranks take seven of the A100s.
    assert refused(left, "E501", **{E: 2, TP: 2, RANKS: 7}).fix == "rollout.num_engines = 1"


def test_engines_that_come_and_go_need_weights_through_host_memory():
    error = refused(gpus(8), "E108", **{"rollout.max_engines": 4})
    assert error.fix == 'rollout.weights = "host"'
    checked(gpus(8), **{"rollout.max_engines": 4, "rollout.weights": "host"})
    checked(cpus(8), **{"rollout.max_engines": 4})


@pytest.mark.parametrize(("share", "there", "fits"), [(0.25, 3, True), (0.5, 3, True), (1.0, 3, False), (1.0, 4, True)])
def test_gpus_of_reward_models_are_reserved(share, there, fits):
    """An engine and a rank take one GPU each; two reward workers take their share."""
    models = [{"model": "judge", "gpus": share}, {"function": "exact_match"}]
    changes = {E: 1, RANKS: 1, "reward.workers": 2, "reward.functions": models}
    if fits:
        checked(gpus(there), **changes)
        return
    error = refused(gpus(there), "E501", **changes)
    assert error.expected == "4 (engines 1 x 1, learner 1, reward workers 2)"
    assert error.table.splitlines()[3].split() == ["reward", "worker", "2", "1", "GPU", "2", "GPU"]


def test_the_table():
    nodes = [*cpus(4), *gpus(8)]
    wanted, _ = needs(nodes, **{E: 2, TP: 2, RANKS: 4, "reward.workers": 3})
    assert table(wanted, nodes, {"GPU": 3.0, "CPU": 30.0}).splitlines() == [
        "  role                actors  each              together",
        "  engine              2       2 GPU 1 CPU       4 GPU 2 CPU",
        "  learner rank        4       1 GPU 1 CPU       4 GPU 4 CPU",
        "  reward worker       3       nothing reserved",
        "  node                        has",
        "  cpu-0                       4 CPU",
        "  H100-0                      8 GPU 32 CPU      H100",
        "  free at the moment          3 GPU 30 CPU",
    ]


def test_every_worker_of_an_engine_on_cpus_has_its_threads():
    wanted, _ = needs(cpus(8), **{E: 1, TP: 2, "rollout.cpu_threads": 3})
    assert wanted.engine == {"CPU": 6.0}
    assert refused(cpus(6), "E501", **{E: 1, TP: 2, "rollout.cpu_threads": 3}).fix == "a cluster with at least 7 CPUs"


def test_engines_go_where_they_leave_the_least_over():
    # The first node could have the engine, but then only one rank would find a place.
    checked(cpus(6, 4), **{E: 1, RANKS: 2, "rollout.cpu_threads": 4, "learner.cpu_threads": 3})


def names(arrangement):
    return [node.name for node in arrangement.engines]


def test_engines_leave_the_learner_as_few_nodes_as_can_be():
    assert names(arranged(gpus(4, 8), **{E: 1, TP: 8, RANKS: 4})) == ["H100-1"]
    assert sorted(names(arranged(gpus(3, 3, 2), **{E: 3, TP: 2, RANKS: 2}))) == ["H100-0", "H100-1", "H100-2"]
    assert len(set(names(arranged(gpus(8, 8, 8), **{E: 16, RANKS: 8})))) == 2
    assert names(arranged(gpus(2, 8, 4), **{E: 2, TP: 2, RANKS: 8})) == ["H100-0", "H100-2"]
    assert arranged(gpus(4, 4), **{E: 1, TP: 8}) is None


def most_ranks(wanted, nodes):
    """By trying every number of engines on every node: are the ranks left a place?"""
    if not nodes:
        return {0: 0}
    node, found = nodes[0], {}
    rest = most_ranks(wanted, nodes[1:])
    for here in range(wanted.engines + 1):
        left = {name: node.count(name) - here * wanted.engine.get(name, 0) for name in wanted.rank}
        if min(left.values()) < 0:
            break
        ranks = min(int(left[name] // need) for name, need in wanted.rank.items())
        for engines, more in rest.items():
            found[here + engines] = max(found.get(here + engines, 0), ranks + more)
    return found


def possible(wanted, nodes):
    types = {node.accelerator for node in nodes if node.count("GPU")}
    for kind in types if len(types) > 1 else {None}:
        # A node of another type is to engines what it was, to ranks it is nothing: so engines are tried there first.
        other = [node for node in nodes if kind is not None and node.accelerator != kind]
        own = [node for node in nodes if node not in other]
        beside = sum(most_engines(wanted, node) for node in other)
        found = most_ranks(wanted, own)
        if any(found.get(engines, -1) >= wanted.ranks for engines in range(max(wanted.engines - beside, 0), 99)):
            return True
    return False


def most_engines(wanted, node):
    return int(min(node.count(name) // need for name, need in wanted.engine.items()))


def drawn(rng):
    """A small cluster and what a run needs of it; mostly nearly full."""
    if on_gpu := rng.random() < 0.7:
        kinds = ["H100", "H100", "A100", ""] if rng.random() < 0.5 else ["H100"]
        nodes = [
            Node(f"n{i}", {"CPU": float(rng.choice([2, 4, 8]))} | marked(rng.choice(kinds), rng))
            for i in range(rng.randint(1, 4))
        ]
    else:
        nodes = cpus(*(rng.randint(1, 8) for _ in range(rng.randint(1, 4))))
    engines = rng.randint(1, 4)
    changes = {E: engines, RANKS: rng.choice([1, 2, 4, 8]), TP: rng.choice([1, 2, 4, 8])}
    if on_gpu and rng.random() < 0.15:
        changes = {E: engines, RANKS: engines, COLOCATE: True}
    if not on_gpu:
        changes = {E: engines, RANKS: rng.choice([1, 2]), "learner.cpu_threads": rng.choice([1, 2, 4])}
        changes["rollout.cpu_threads"] = rng.choice([1, 2, 3])
    return nodes, changes


def marked(kind, rng):
    return {"GPU": float(rng.randint(1, 8)), f"{ACCELERATOR}{kind}": 1.0} if kind else {}


def test_what_is_accepted_is_what_an_exact_search_finds_a_place_for():
    rng, counts = random.Random(7), {True: 0, False: 0}
    for _ in range(1500):
        nodes, changes = drawn(rng)
        wanted, config = needs(nodes, **changes)
        try:
            check(wanted, nodes, config, "run.toml")
            accepted = True
        except InputError:
            accepted = False
        arrangement = arrange(wanted, nodes)
        assert accepted == (arrangement is not None)
        if wanted.colocated:
            pair = {name: need + wanted.rank[name] for name, need in wanted.engine.items()}
            assert accepted == possible(Needs(pair, 0, pair, wanted.ranks), nodes), (nodes, changes)
        else:
            assert accepted == possible(wanted, nodes), (nodes, changes)
            assert arrangement is None or holds(wanted, nodes, arrangement), (nodes, changes)
        counts[accepted] += 1
    assert min(counts.values()) > 300, counts


def holds(wanted, nodes, arrangement):
    """The engines have room where they are sent, and the ranks in what is left, on the type that is named."""
    ranks = 0
    for node in nodes:
        here = names(arrangement).count(node.name)
        left = {name: node.count(name) - here * wanted.engine.get(name, 0) for name in wanted.rank}
        assert min(left.values()) >= 0
        if arrangement.accelerator in ("", node.accelerator):
            ranks += min(int(left[name] // need) for name, need in wanted.rank.items())
    return len(arrangement.engines) == wanted.engines and ranks >= wanted.ranks


def test_a_thousand_nodes_are_arranged_at_once():
    begun = time.process_time()
    assert arranged(gpus(*[8] * 1000), **{E: 1000, TP: 7, RANKS: 1000}) is not None
    assert time.process_time() - begun < scaled(5)  # 1 s.
