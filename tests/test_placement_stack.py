"""Placement groups on a real Ray: who shares a GPU with whom. The GPUs are counted, not used."""

import asyncio

import pytest

from launch.cluster import reserve
from launch.placement import Needs
from tests.fakes import make_config

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def ray_with_two_gpus():
    import ray

    ray.init(address="local", num_cpus=8, num_gpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("colocated", [True, False])
def test_an_engine_shares_its_gpu_with_the_rank_of_its_number(ray_with_two_gpus, colocated):
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
