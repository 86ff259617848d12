"""The learner's half of a publication: gathers full tensors layer by layer and puts them on the wire.

Gathering is aware of ZeRO: stages 0 to 2 hold full parameters and need no collective, stage 3 gathers one decoder
layer at a time. The export is a snapshot in shared memory, so the learner trains on while engines read it.
Two segments take turns; the controller has at most one publication in flight.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.weights import Canary, Publication, Segment, TensorMeta, describe, digest, segment_name, views

SHM_BACKEND = "millrace_shm"
PREFIX = "model."
"""``PolicyModel`` wraps the Hugging Face model under this name."""


def named_parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters under their Hugging Face names, grouped by decoder layer; a tied head occurs once, as the embedding."""
    return [(name.removeprefix(PREFIX), parameter) for name, parameter in engine.module.named_parameters()]


def layout(engine: Any) -> tuple[TensorMeta, ...]:
    """Names, types and full shapes of the weights, without gathering."""
    named = named_parameters(engine)
    return describe((name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named)


def layers(named: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Consecutive parameters that share a decoder layer, as one list each."""
    group: list[tuple[str, Any]] = []
    previous: str | None = None
    for name, parameter in named:
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if group and number != previous:
            yield group
            group = []
        group.append((name, parameter))
        previous = number
    if group:
        yield group


@torch.no_grad()
def full_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full, in ``named_parameters`` order; under ZeRO-3 a collective that all ranks must iterate."""
    for group in layers(named_parameters(engine)):
        if hasattr(group[0][1], "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter for _, parameter in group]):
                yield from ((name, parameter.data) for name, parameter in group)
        else:
            yield from ((name, parameter.data) for name, parameter in group)


class WeightSender:
    """Writes publications of ``engine``'s weights into shared memory."""

    def __init__(self, engine: Any, run_id: str, is_sender: bool) -> None:
        self._engine, self._is_sender = engine, is_sender
        self._tensors = layout(engine)
        size = self._tensors[-1].offset + self._tensors[-1].nbytes
        self._segments = [Segment(segment_name(run_id, label), size) for label in ("a", "b")] if is_sender else []
        self._turn = 0

    def export(self, version: int, canary: Canary) -> Publication | None:
        """Snapshot the weights as policy ``version``; every rank calls it, the sender gets the publication."""
        started = time.monotonic()
        if not self._is_sender:
            for _ in full_tensors(self._engine):
                pass
            return None
        segment = self._segments[self._turn]
        self._turn = 1 - self._turn
        for view, (_, tensor) in zip(views(segment.bytes, self._tensors), full_tensors(self._engine), strict=True):
            np.copyto(view, tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return Publication(
            version=version,
            backend=SHM_BACKEND,
            segment=segment.name,
            tensors=self._tensors,
            digest=digest(views(segment.bytes, self._tensors)),
            canary=canary,
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        """Remove the shared memory."""
        for segment in self._segments:
            segment.unlink()
