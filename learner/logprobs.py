"""From packed tokens to per-token log-probs and entropy, in float32: the only place with the shift by one.

Sequences lie end to end in one row without padding (see ``attention.py``). The output head runs in chunks over
completion tokens; no ``[tokens, vocabulary]`` matrix is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learner.attention import ATTENTION_NAME, Layout, register_attention
from learner.distributed import deepspeed_config
from learner.model_folder import load_model
from shared.config import Config

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Of float32 logits at a time: little beside the model's own memory; enough rows for an efficient product."""


@dataclass(frozen=True)
class Sampled:
    """The distribution that tokens were sampled from, as far as it is not the model's own."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def log_softmax(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``[K, V]`` float32 log-probs of ``hidden [K, D]``; -inf outside the kept set, as vLLM filters."""
        logits = hidden @ weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.min_p > 0:
            logits = logits.masked_fill(logits < logits.amax(1, keepdim=True) + math.log(self.min_p), -torch.inf)
        if self.top_k > 0:
            least = logits.topk(min(self.top_k, logits.shape[1]), 1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ascending, order = logits.sort(1)
            out = ascending.softmax(1).cumsum(1) <= 1 - self.top_p
            out[:, -1] = False
            logits = logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
        return torch.log_softmax(logits, dim=-1)


class _TokenLogProbs(torch.autograd.Function):
    """Chunked log-softmax of an output head at the labels, with its entropy and its KL to a reference.

    The backward pass recomputes each chunk: d logprob / d logits = onehot - p, d H / d logits = -p (ln p + H),
    d KL / d logits = p (ln p - ln q - KL).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        sampled: Sampled,
        reference: tuple[Tensor, Tensor] | None,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.sampled, ctx.reference = sampled, reference
        logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy, kl = torch.zeros_like(logprobs), torch.zeros_like(logprobs)

        def fill(rows: slice) -> None:  # A function, so that no chunk outlives its turn.
            log_p = sampled.log_softmax(hidden[rows], weight)
            logprobs[rows] = log_p.gather(1, labels[rows, None])[:, 0]
            if not with_entropy and reference is None:
                return
            p = log_p.exp()
            entropy[rows] = -_expect(p, log_p)[:, 0]
            if reference is not None:
                kl[rows] = _expect(p, log_p - sampled.log_softmax(reference[0][rows], reference[1]))[:, 0]

        for rows in _chunks(len(hidden), len(weight), hidden.device):
            fill(rows)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grad_logprobs.dtype)
        with_entropy, with_kl = bool(grad_entropy.any()), ctx.reference is not None and bool(grad_kl.any())

        def grad_logits(rows: slice) -> Tensor:
            log_p = ctx.sampled.log_softmax(hidden[rows], weight)
            p = log_p.exp() if with_entropy or with_kl else log_p.exp_()
            grad = p * -grad_logprobs[rows, None] if with_entropy or with_kl else p.mul_(-grad_logprobs[rows, None])
            grad.scatter_add_(1, labels[rows, None], grad_logprobs[rows, None])
            if with_entropy:
                centred = torch.where(p > 0, log_p - _expect(p, log_p), 0.0)
                grad -= grad_entropy[rows, None] * p * centred
            if with_kl:
                log_q = ctx.sampled.log_softmax(ctx.reference[0][rows], ctx.reference[1])
                gap = torch.where(p > 0, log_p - log_q, 0.0)
                grad += grad_kl[rows, None] * p * (gap - _expect(p, gap))
            if ctx.sampled.temperature != 1.0:
                grad /= ctx.sampled.temperature
            return grad.to(weight.dtype)

        for rows in _chunks(len(hidden), len(weight), hidden.device):
            grad = grad_logits(rows)
            grad_hidden[rows] = grad @ weight
            for words in _chunks(len(weight), weight.shape[1], hidden.device):  # Not the whole ``[V, D]`` once more.
                grad_weight[words] += grad[:, words].T @ hidden[rows]
            del grad
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _expect(p: Tensor, values: Tensor) -> Tensor:
    """``sum_v p_v values_v`` ``[K, 1]``, with 0 where p is 0."""
    sums: Tensor = torch.linalg.vecdot(p, values)[:, None]
    if not torch.isfinite(sums).all():  # A filtered token: 0 times infinity.
        sums = torch.where(p > 0, p * values, 0.0).sum(1, keepdim=True)
    return sums


def _chunks(rows: int, width: int, device: torch.device) -> list[slice]:
    """Parts of a ``[rows, width]`` float32 matrix of at most ``CHUNK_BYTES``."""
    size = max(1, CHUNK_BYTES[device.type] // (4 * width))
    return [slice(start, start + size) for start in range(0, rows, size)]


@dataclass(frozen=True)
class PackedTokens:
    """One micro-batch as the model sees it: ``T`` tokens of ``B`` sequences, ``K`` of them completion tokens."""

    token_ids: Tensor
    """``[T] int64``."""
    position_ids: Tensor
    """``[T] int64``, restarting at 0 in each sequence."""
    layout: Layout
    targets: Tensor
    """``[K] int64``: packed index of each completion token."""
    predictors: Tensor
    """``[K] int64``: packed index of the token before it, whose output predicts it: the shift by one."""
    cells: Tensor
    """``[K] int64``: flat cell of each completion token in ``[B, C]``."""
    shape: tuple[int, int]
    """``(B, C)``: rows and longest completion."""


class PolicyModel(nn.Module):
    """A causal language model that answers with log-probs of given tokens instead of logits."""

    def __init__(self, model: nn.Module, sampled: Sampled) -> None:
        super().__init__()
        self.model = model
        self.sampled = sampled

    @classmethod
    def load(cls, config: Config) -> PolicyModel:
        """Return the configured model from disk, in its own type, with packed attention. Raises ``InputError`` E411.

        At ZeRO-3 it is this rank's share, and all ranks load together.
        """
        register_attention()
        sharded = config.learner.zero_stage == 3 and torch.distributed.is_initialized()
        model = load_model(
            config.model.path,
            deepspeed_config(config) if sharded else None,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=config.model.trust_remote_code,
        )
        rollout = config.rollout
        return cls(model, Sampled(rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p))

    @property
    def head(self) -> Tensor:
        """Weight of the output head, ``[V, D]``."""
        return self.model.get_output_embeddings().weight

    @property
    def has_dropout(self) -> bool:
        """True if two training passes over the same tokens may differ."""
        layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())
        return layers or float(getattr(self.model.config, "attention_dropout", 0.0) or 0.0) > 0

    def forward(
        self,
        tokens: PackedTokens,
        reference: tuple[Tensor, Tensor] | None = None,
        hidden_only: bool = False,
        with_entropy: bool = True,
        plain: bool = False,
    ) -> tuple[Tensor, ...]:
        """``(logprobs, entropy, kl)``, each ``[B, C] float32``, 0 outside the completions.

        ``kl`` is that to the distributions of ``reference = (hidden [K, D], head [V, D])``, else 0. With
        ``hidden_only`` the hidden states ``[K, D]`` that predict the completion tokens, for such a reference.
        ``with_entropy`` False spares the entropies, which are then 0, unless ``reference`` needs their terms anyway.
        With ``plain`` the logits ``[T, V]`` of the model's own forward over one sequence (see ``packing_proof.py``).
        """
        if plain:
            return (self.model(input_ids=tokens.token_ids[None], use_cache=False).logits[0],)
        hidden = self.model.base_model(
            input_ids=tokens.token_ids[None],
            position_ids=tokens.position_ids[None],
            attention_mask=None,
            use_cache=False,
            layout=tokens.layout,
        ).last_hidden_state[0]
        predictors = hidden.index_select(0, tokens.predictors)
        if hidden_only:
            return (predictors,)
        labels = tokens.token_ids[tokens.targets]
        flat = _TokenLogProbs.apply(predictors, self.head, labels, self.sampled, reference, with_entropy)
        cells = flat[0].new_zeros(tokens.shape[0] * tokens.shape[1])
        return tuple(cells.index_copy(0, tokens.cells, values).view(tokens.shape) for values in flat)
