"""What fits on which cluster, node by node, and what the table says."""

from __future__ import annotations

import pytest

from launch.placement import Needs, Node, accelerator_of_ranks, check, table
from shared.errors import InputError
from tests.fakes import make_config


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


def refused(nodes, code, **changes):
    with pytest.raises(InputError) as excinfo:
        checked(nodes, **changes)
    assert excinfo.value.code == code
    return excinfo.value


E, TP, PP, RANKS = (
    *("rollout.num_engines", "rollout.tensor_parallel_size", "rollout.pipeline_parallel_size"),
    "learner.num_ranks",
)


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


def test_a_learner_stays_on_gpus_of_one_type():
    error = refused([*gpus(4), *gpus(4, kind="A100")], "E506", **{E: 1, RANKS: 6})
    assert str(error).startswith(
        "error[E506] learner on mixed GPUs — run.toml:learner.num_ranks. Found 4 A100, 4 H100 for 6 ranks, "
        "expected all its ranks on GPUs of one type. Fix: learner.num_ranks = 4"
    )
    mixed = [*gpus(4), *gpus(8, kind="A100")]
    assert accelerator_of_ranks(needs(mixed, **{RANKS: 4})[0], mixed) == "A100"
    assert accelerator_of_ranks(needs(gpus(8), **{RANKS: 4})[0], gpus(8)) == ""
    # All that is left for the engines is on the other type.
    left = [*gpus(3), *gpus(8, kind="A100")]  # The ranks take seven of the A100s.
    assert refused(left, "E501", **{E: 2, TP: 2, RANKS: 7}).fix == "rollout.num_engines = 1"


def test_engines_that_come_and_go_need_weights_through_host_memory():
    error = refused(gpus(8), "E108", **{"rollout.max_engines": 4})
    assert error.fix == 'rollout.weights = "host"'
    checked(gpus(8), **{"rollout.max_engines": 4, "rollout.weights": "host"})
    checked(cpus(8), **{"rollout.max_engines": 4})


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
