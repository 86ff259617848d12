"""``millrace bench hosts``: weights from one host of a cluster to others, which pass them on, or from the sender alone.

Runs on the cluster that ``RAY_ADDRESS`` names: the first node sends, the others receive, all at once, what a publication of
such a size would be; each takes it into its shared memory, and every byte is hashed there. No engine takes part.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import numpy as np

from launch.bench_workloads import print_table
from rollout.relays import SHARED_FROM, Relays
from rollout.weight_relay import WeightRelay
from shared.config import Config
from shared.errors import InputError, MillraceError
from shared.weights import SHM_BACKEND, Canary, Publication, TensorMeta

LIMIT_S = 600.0
NEVER = 1 << 30


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
        places, environment = Reservation([], [], [], Needs.of(config, on_gpu=False)), worker_environment()
        first, *others = addresses()
        if len(others) < max(options.receivers):
            found, expected = f"{len(others) + 1} nodes", f"{max(options.receivers) + 1} (one sends)"
            raise InputError("E501", "not enough nodes", "cluster", found, expected, f"--receivers {len(others)}")
        sender = places.on(first).spawn(_Source, environment=environment)
        publication = await sender.call("make", options.megabytes * 1_000_000, first).answer
        hashers = {node: places.on(node).spawn(_Hasher, environment=environment) for node in others}
        rows = []
        for count in options.receivers:
            relays = Relays(places, environment)
            test = _Test(relays, {node: hashers[node] for node in others[:count]}, publication)
            rows.append(await test.row(options.rounds, options.megabytes))
            await relays.close()
        await sender.call("close").answer
    return rows


class _Test:
    """One number of receivers."""

    def __init__(self, relays: Relays, hashers: dict[str, Any], publication: Publication) -> None:
        self._relays, self._hashers, self._publication = relays, hashers, publication

    async def row(self, rounds: int, megabytes: int) -> dict[str, Any]:
        """Medians, the two ways in turns, the first round of each left out."""
        shared, alone = list[float](), list[float]()
        for _ in range(rounds):
            shared.append(await self._round(SHARED_FROM))
            alone.append(await self._round(NEVER))
        count, seconds = len(self._hashers), statistics.median(shared[1:])
        return {
            "receivers": count,
            "megabytes": megabytes,
            "passed_on_s": seconds,
            "sender_alone_s": statistics.median(alone[1:]),
            "received_mb_per_s": count * megabytes / seconds,
        }

    async def _round(self, shared_from: int) -> float:
        self._relays.shared_from = shared_from
        self._publication = _again(self._publication)
        started = time.monotonic()
        await asyncio.gather(*map(self._receive, self._hashers))
        return time.monotonic() - started

    async def _receive(self, node: str) -> None:
        here = await self._relays.bring(self._publication, node, LIMIT_S)
        if await self._hashers[node].call("digest", here).answer != self._publication.digest:
            raise MillraceError(f"{node} got other bytes")


def _again(publication: Publication) -> Publication:
    """The same bytes as another publication."""
    return Publication(**(vars(publication) | {"version": publication.version + 1}))


class _Source(WeightRelay):
    """Memory with something in it."""

    def __init__(self) -> None:
        super().__init__(f"bench-{time.time_ns():x}")

    def make(self, size: int, node: str) -> Publication:
        """A publication of random bytes."""
        segment = self.begin(0, size)
        rng = np.random.default_rng(0)
        for start in range(0, size, 1 << 24):
            self.take(0, start, rng.integers(0, 256, min(1 << 24, size - start)).astype(np.uint8))
        canary = Canary(np.zeros(2, np.int32), np.zeros(1, np.float32))
        bare = Publication(0, SHM_BACKEND, segment, (TensorMeta("w", "uint8", (size,), 0, size),), "", canary)
        return Publication(**(vars(bare) | {"digest": bare.hash_segment(), "node": node}))


class _Hasher:
    """Reads what has come, as an engine would."""

    def digest(self, publication: Publication) -> str:
        """Of all bytes."""
        return publication.hash_segment()
