"""The reference model: frozen, or following the policy now and then; absent where no KL term needs it.

It is partitioned over the ranks like the policy where that is. Invariant: it changes in ``follow`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from learner.batching import MicroBatch
from learner.distributed import deepspeed_config
from learner.logprobs import PolicyModel
from learner.weight_sender import full_tensors
from shared.config import Config


class Reference:
    """The starting policy beside the policy; every call is made on all ranks together."""

    def __init__(self, config: Config, model: PolicyModel, device: torch.device, with_head: bool) -> None:
        """``with_head``: also keep the whole output head here, for a KL over the vocabulary."""
        self._model = model.eval().requires_grad_(False)
        self._sharded = config.learner.zero_stage == 3
        self._with_head = with_head
        if self._sharded:
            import deepspeed

            self._engine, *_ = deepspeed.initialize(
                model=model, config=deepspeed_config(config), dist_init_required=False
            )
            self._engine.eval()  # DeepSpeed's own returns nothing.
        else:
            self._engine = self._model.to(device)
        self._head = self._whole_head()
        self.moved = False
        """Whether it is not the model that the run began with."""

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """``[B, C]``: of the batch's completion tokens, at the sampling temperature."""
        logprobs: Tensor = self._engine(batch.tokens, with_entropy=False)[0]
        return logprobs

    @torch.no_grad()
    def hidden(self, batch: MicroBatch) -> Tensor:
        """``[K, D]``: hidden states that predict the completion tokens."""
        hidden: Tensor = self._engine(batch.tokens, hidden_only=True)[0]
        return hidden

    def against(self, batch: MicroBatch) -> tuple[Tensor, Tensor] | None:
        """What ``PolicyModel`` needs for a KL over the vocabulary, where the batch carries it."""
        return None if batch.ref_hidden is None else (batch.ref_hidden, self._head)

    @torch.no_grad()
    def follow(self, policy: Any, alpha: float) -> None:
        """``reference = (1 - alpha) reference + alpha policy``, in float32, a layer at a time (arXiv 2404.09656)."""
        for (_, tensor), parameter in zip(full_tensors(policy), self._writable(), strict=True):
            mixed = parameter.float().lerp(tensor.to(parameter.device).float(), alpha)
            parameter.copy_(mixed)
        self._head, self.moved = self._whole_head(), True

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole parameters; under ZeRO-3 a collective that all ranks must iterate."""
        names = [name for name, _ in self._model.named_parameters()]
        yield from zip(names, self._writable(), strict=True)

    def described(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Names, types and whole shapes of ``tensors``."""
        named = self._model.named_parameters()
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]

    @torch.no_grad()
    def load(self, stored: Callable[[str], Tensor]) -> None:
        """Become what ``tensors`` gave once; ``stored`` finds a tensor by name."""
        for name, parameter in self.tensors():
            parameter.copy_(stored(name))
        self._head, self.moved = self._whole_head(), True

    def _writable(self) -> Iterator[Tensor]:
        for parameter in self._model.parameters():
            if not self._sharded:
                yield parameter.data
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                yield parameter.data

    def _whole_head(self) -> Tensor:
        if not self._with_head:
            return torch.empty(0)
        if not self._sharded:
            return self._model.head
        import deepspeed

        head = self._model.head
        with deepspeed.zero.GatheredParameters([head]):
            return head.data.clone()
