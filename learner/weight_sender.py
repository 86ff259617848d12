"""The learner's half of a publication: gathers full tensors layer by layer and puts them on the wire.

Gathering is aware of ZeRO: stages 0 to 2 hold full parameters and need no collective, stage 3 gathers one decoder
layer at a time. In shared memory the export is a snapshot, so the learner trains on while engines read it.
Two segments take turns; the controller has at most one publication in flight. ``device_senders.py`` sends between GPUs.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.checkpoint_form import CheckpointForm
from shared.weights import (
    SEGMENTS,
    SHM_BACKEND,
    Canary,
    Publication,
    Segment,
    TensorMeta,
    describe,
    digest,
    orphans,
    segment_name,
    shared_memory_error,
    shared_memory_free,
    views,
)

PREFIX = "model."
"""``PolicyModel`` wraps the Hugging Face model under this name."""


def named_parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters under their Hugging Face names, grouped by decoder layer; a tied head occurs once, as the embedding."""
    return [(name.removeprefix(PREFIX), parameter) for name, parameter in engine.module.named_parameters()]


def layout(engine: Any, alignment: int = 64, form: CheckpointForm | None = None) -> tuple[TensorMeta, ...]:
    """Names, types and full shapes of what ``published`` gives, without gathering."""
    form = form or CheckpointForm(engine.module.model)
    shapes = [
        (name, torch.empty(tuple(getattr(p, "ds_shape", p.shape)), dtype=p.dtype, device="meta"))
        for name, p in named_parameters(engine)
    ]
    named = [one for group in layers(shapes) for one in form(group)]
    return describe(((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named), alignment)


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
    for group in _whole_layers(engine):
        yield from group


@torch.no_grad()
def published(engine: Any, form: CheckpointForm | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight in full as checkpoint files have it, in the order of ``layout``; under ZeRO-3 as ``full_tensors``."""
    form = form or CheckpointForm(engine.module.model)
    for group in _whole_layers(engine):
        yield from form(group)


def _whole_layers(engine: Any) -> Iterator[list[tuple[str, Tensor]]]:
    for group in layers(named_parameters(engine)):
        if hasattr(group[0][1], "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter for _, parameter in group]):
                yield [(name, parameter.data) for name, parameter in group]
        else:
            yield [(name, parameter.data) for name, parameter in group]


class ShmSender:
    """Writes publications of ``engine``'s weights into shared memory."""

    def __init__(self, engine: Any, run_id: str, is_sender: bool) -> None:
        """Take the shared memory, if this rank sends. Raises ``InputError`` E505 if there is too little of it."""
        self._engine, self._is_sender = engine, is_sender
        self._tensors = layout(engine)
        self._segments: list[Segment] = []
        self._turn = 0
        if is_sender:
            self._take(run_id, self._tensors[-1].offset + self._tensors[-1].nbytes)

    def _take(self, run_id: str, size: int) -> None:
        for orphan in orphans():  # Of a run that was killed.
            orphan.unlink(missing_ok=True)
        try:
            for label in SEGMENTS:
                self._segments.append(Segment(segment_name(run_id, label), size))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.close()
            self._segments.clear()  # A mapping would keep its memory.
            needed, free = len(SEGMENTS) * size, shared_memory_free()
            raise shared_memory_error(needed, free, socket.gethostname(), torch.cuda.is_available()) from None

    def export(self, version: int, canary: Canary) -> Publication | None:
        """Snapshot the weights as policy ``version``; every rank calls it, the sender gets the publication."""
        started = time.monotonic()
        if not self._is_sender:
            for _ in published(
                self._engine
            ):  # Under ZeRO-3 all ranks gather; who sends nothing copies and hashes nothing.
                pass
            return None
        segment = self._segments[self._turn]
        self._turn = 1 - self._turn
        for view, (_, tensor) in zip(views(segment.bytes, self._tensors), published(self._engine), strict=True):
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
