"""``millrace bench hosts``: weights from one host of a cluster to others, all at once and one after the other.

Runs on the cluster that ``RAY_ADDRESS`` names: the first node sends, the others receive what a publication of such a
size would be; each takes it into its shared memory, and every byte is hashed there. No engine takes part.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import numpy as np

from launch.bench_workloads import print_table
from rollout.weight_relay import Relays, WeightRelay
from shared.config import Config
from shared.errors import InputError, MillraceError
from shared.weights import SHM_BACKEND, Canary, Publication, TensorMeta

LIMIT_S = 600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    parser.add_argument("--megabytes", type=int, default=500, help="size of the weights")
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2, 4, 8], help="hosts that receive")
    parser.add_argument("--rounds", type=int, default=4, help="publications of each kind; the first is left out")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it. Raises ``InputError`` E501 if the cluster has too few nodes."""
    rows = asyncio.run(_measure(options))
    print_table(rows)
    return {"bench": "hosts", "rows": rows}


async def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    from launch.cluster import Reservation, addresses, ray_session, worker_environment
    from launch.placement import Needs

    function = {"function": "length"}
    unused = {"model": {"path": "unused"}, "data": {"train": "unused"}, "reward": {"functions": [function]}}
    config = Config.model_validate(unused)
    async with ray_session(config):
        places = Reservation([], [], [], Needs.of(config, on_gpu=False))
        nodes = list(addresses())
        if len(nodes) <= max(options.receivers):
            found, expected = f"{len(nodes)} nodes", f"{max(options.receivers) + 1} (one sends)"
            raise InputError("E501", "not enough nodes", "cluster", found, expected, f"--receivers {len(nodes) - 1}")
        environment = worker_environment()
        sender = places.on(nodes[0]).spawn(_Source, environment=environment)
        publication = await sender.call("make", options.megabytes * 1_000_000, nodes[0]).answer
        hashers = {node: places.on(node).spawn(_Hasher, environment=environment) for node in nodes[1:]}
        relays = Relays(places, environment)

        async def receive(node: str) -> None:
            here = await relays.bring(publication, node, LIMIT_S)
            if await hashers[node].call("digest", here).answer != publication.digest:
                raise MillraceError(f"{node} got other bytes")

        rows = []
        for count in options.receivers:
            chosen, together, apart = nodes[1 : count + 1], list[float](), list[float]()
            for number in range(2 * options.rounds):
                publication = _again(publication)
                started = time.monotonic()
                if number % 2:
                    for node in chosen:
                        await receive(node)
                else:
                    await asyncio.gather(*map(receive, chosen))
                (apart if number % 2 else together).append(time.monotonic() - started)
            rows.append(_row(options.megabytes, count, statistics.median(together[1:]), statistics.median(apart[1:])))
        await relays.close()
        await sender.call("close").answer
    return rows


def _again(publication: Publication) -> Publication:
    """The same bytes as another publication."""
    return Publication(**(vars(publication) | {"version": publication.version + 1}))


def _row(megabytes: int, count: int, together: float, apart: float) -> dict[str, Any]:
    return {
        "receivers": count,
        "megabytes": megabytes,
        "together_s": together,
        "one_by_one_s": apart,
        "ratio": apart / together,
        "received_mb_per_s": count * megabytes / together,
    }


class _Source(WeightRelay):
    """Memory with something in it."""

    def __init__(self) -> None:
        super().__init__(f"bench-{time.time_ns():x}")

    def make(self, size: int, node: str) -> Publication:
        """A publication of random bytes."""
        segment = self.begin(size)
        rng = np.random.default_rng(0)
        for start in range(0, size, 1 << 24):
            self.put(segment, start, rng.integers(0, 256, min(1 << 24, size - start)).astype(np.uint8))
        canary = Canary(np.zeros(2, np.int32), np.zeros(1, np.float32))
        bare = Publication(0, SHM_BACKEND, segment, (TensorMeta("w", "uint8", (size,), 0, size),), "", canary)
        return Publication(**(vars(bare) | {"digest": bare.hash_segment(), "node": node}))


class _Hasher:
    """Reads what has come, as an engine would."""

    def digest(self, publication: Publication) -> str:
        """Of all bytes."""
        return publication.hash_segment()
