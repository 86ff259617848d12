"""Placement groups on a real Ray: who shares a GPU with whom. The GPUs are counted, not used."""

import asyncio
import time

import pytest

from launch import cluster
from launch.cluster import nodes, reserve
from launch.placement import Needs, check
from shared.errors import InputError
from tests.fakes import make_config
from tests.pace import scaled

pytestmark = pytest.mark.stack

E, TP = "rollout.num_engines", "rollout.tensor_parallel_size"
RANKS, COLOCATE = "learner.num_ranks", "rollout.colocate"
H100, A100 = "H100", "A100"
SMALL = {"object_store_memory": 80 << 20}


@pytest.mark.parametrize("colocated", [True, False])
def test_an_engine_shares_its_gpu_with_the_rank_of_its_number(private_ray, colocated):
    number = 2 if colocated else 1
    changes = {"rollout.colocate": colocated, "rollout.num_engines": number, "learner.num_ranks": number}
    reservation = asyncio.run(reserve(Needs.of(make_config(**changes), on_gpu=True)))

    class Where:
        def gpus(self):
            import ray

            return ray.get_gpu_ids()

    async def all_gpus():
        slots = [*reservation.engines, *reservation.ranks]
        actors = [slot.spawn(Where, environment={}) for slot in slots]
        return await asyncio.wait_for(asyncio.gather(*(actor.call("gpus").answer for actor in actors)), 60)

    try:
        gpus = asyncio.run(all_gpus())
    finally:
        reservation.release()
    assert all(len(ids) == 1 for ids in gpus)
    assert sorted(ids[0] for ids in gpus[:number]) == list(range(number)) or not colocated
    assert (gpus[:number] == gpus[number:]) == colocated


def test_what_has_no_place_at_all_is_not_waited_for(private_ray):
    with pytest.raises(InputError, match="no arrangement of engines and ranks"):
        asyncio.run(reserve(Needs.of(make_config(**{E: 2, RANKS: 1}), on_gpu=True)))


@pytest.fixture(scope="module")
def head():
    """A Ray whose head has nothing to give: the tests add the nodes that they need."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():  # Of the tests before.
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0} | SMALL)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def hosts(head):
    """Adds nodes, each given as CPUs, GPUs and their type, for one test. They are counted, not used."""
    added = []

    def start(*sizes):
        for number, count, kind in sizes:
            marks = {f"accelerator_type:{kind}": 1.0} if kind else {}
            added.append(head.add_node(num_cpus=number, num_gpus=count, resources=marks, wait=False, **SMALL))
        head.wait_for_nodes()
        return head, added

    yield start
    for node in added:
        if node in head.worker_nodes:
            head.remove_node(node)


def homes(group):
    from ray.util import placement_group_table

    return list(placement_group_table(group)["bundles_to_node_id"].values())


async def placed(changes):
    """What a run does at its start, and the node of every engine and rank."""
    config, there = make_config(**changes), nodes()
    needs = Needs.of(config, on_gpu=any(node.count("GPU") for node in there))
    check(needs, there, config, "run.toml")
    reservation = await reserve(needs)
    engines = [homes(slot.group)[slot.bundle] for slot in reservation.engines]
    return reservation, engines, [homes(slot.group)[slot.bundle] for slot in reservation.ranks]


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ([(32, 8, H100), (32, 4, H100)], {E: 1, TP: 8, RANKS: 4}),
        ([(32, 3, H100), (32, 3, H100), (32, 2, H100)], {E: 3, TP: 2, RANKS: 2}),
        ([(32, 8, H100), (32, 4, A100)], {E: 1, TP: 8, RANKS: 4}),
        ([(32, 4, H100), (32, 8, A100)], {E: 2, TP: 2, RANKS: 8}),
        ([(6, 0, ""), (4, 0, "")], {E: 1, "rollout.cpu_threads": 4, RANKS: 2, "learner.cpu_threads": 3}),
        ([(8, 2, H100), (8, 2, A100)], {E: 2, RANKS: 2, COLOCATE: True}),
    ],
)
def test_what_fits_is_placed_at_once(hosts, sizes, changes):
    _, added = hosts(*sizes)
    begun = time.monotonic()
    reservation, engines, ranks = asyncio.run(placed(changes))
    reservation.release()
    assert time.monotonic() - begun < scaled(30)  # 0.02 s on a quiet machine; without a place it would wait for 60.
    kinds = {node.node_id: kind for node, (_, _, kind) in zip(added, sizes, strict=True)}
    assert len({kinds[node] for node in ranks}) == 1
    assert engines == ranks or COLOCATE not in changes


def test_other_jobs_are_gone_around_and_a_lost_host_is_left(hosts, monkeypatch):
    from ray.util import placement_group, remove_placement_group

    made, added = hosts((32, 4, H100), (32, 4, H100), (32, 8, H100))
    taken = placement_group([{"GPU": 4}], strategy="STRICT_PACK", _soft_target_node_id=added[0].node_id)
    assert taken.wait(30)
    reservation, engines, ranks = asyncio.run(placed({E: 2, TP: 4, RANKS: 4}))
    assert sorted([*engines, ranks[0]]) == sorted([added[1].node_id, *[added[2].node_id] * 2])
    assert len(set(ranks)) == 1

    # No place for what else there would be one for: the other job is to blame.
    monkeypatch.setattr(cluster, "PLACEMENT_TIMEOUT_S", 3.0)
    with pytest.raises(InputError, match="still taken after 3 s"):
        asyncio.run(placed({E: 1, TP: 4, RANKS: 4}))

    # A host is lost, and another has room again: what was on the one is not bound to it.
    remove_placement_group(taken)
    lost = added[1].node_id
    moved = next(slot.group for slot in (*reservation.engines, *reservation.ranks) if lost in homes(slot.group))
    made.remove_node(added[1])
    deadline = time.monotonic() + 60
    while lost in homes(moved) or not moved.wait(1):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert set(homes(moved)) == {added[0].node_id}
    reservation.release()
