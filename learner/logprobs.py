"""From packed tokens to per-token log-probs and entropy, in float32: the only place with the shift by one.

Sequences lie end to end in one row without padding, and a prompt lies there once for all its completions. Attention
is separate by construction: tokens are laid out as right-padded rows inside the attention alone, where causality
already hides the padding, so no mask exists that could leak. The output head runs in chunks over completion tokens; no ``[tokens, vocabulary]`` matrix is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATTENTION_NAME = "millrace_packed"
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Layout:
    """Where each of ``T`` packed tokens goes in ``[B, L]`` right-padded rows, one row per completion.

    Completions of one prompt share its tokens: they are packed once and occur in every such row. Keys and values are
    read by all rows; the output of a shared token, which cannot depend on what follows, is taken from the first.
    """

    gather: Tensor
    """``[B, L] int64``: packed index of each cell; T for padding."""
    scatter: Tensor
    """``[T] int64``: flat cell that gives each packed token its output."""

    @classmethod
    def of(cls, rows: list[list[range]]) -> Layout:
        """The layout of ``rows``, each a list of ranges of packed indices (its prompt, its completion)."""
        count = max(part.stop for row in rows for part in row)
        longest = max(sum(map(len, row)) for row in rows)
        gather = np.full((len(rows), longest), count, dtype=np.int64)
        for cells, row in zip(gather, rows, strict=True):
            tokens = np.concatenate([np.arange(part.start, part.stop) for part in row])
            cells[: len(tokens)] = tokens
        packed, first_cell = np.unique(gather, return_index=True)
        return cls(torch.from_numpy(gather), torch.from_numpy(first_cell[packed < count]))

    def to(self, device: torch.device) -> Layout:
        """The layout on another device."""
        return Layout(self.gather.to(device), self.scatter.to(device))


def _pad(packed: Tensor, layout: Layout) -> Tensor:
    """``[T, ...] -> [B, L, ...]``, zeros in the padding."""
    padded = torch.cat([packed, packed.new_zeros((1, *packed.shape[1:]))])
    return padded.index_select(0, layout.gather.flatten()).view(*layout.gather.shape, *packed.shape[1:])


def _pack(padded: Tensor, layout: Layout) -> Tensor:
    """``[B, L, ...] -> [T, ...]``."""
    return padded.flatten(0, 1).index_select(0, layout.scatter)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sequence; query ``[1, H, T, D]``, key and value ``[1, H_kv, T, D]``."""
    if sliding_window is not None and sliding_window < layout.gather.shape[1]:
        raise ValueError(f"sequences of {layout.gather.shape[1]} tokens exceed the sliding window of {sliding_window}")
    q, k, v = (_pad(x[0].transpose(0, 1), layout).transpose(1, 2) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return _pack(out.transpose(1, 2), layout)[None], None


def register_attention() -> None:
    """Make ``packed_attention`` known to transformers under ``ATTENTION_NAME``."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)


class _TokenLogProbs(torch.autograd.Function):
    """Chunked ``log_softmax(hidden @ weight.T / temperature)`` at the labels, with its entropy.

    The backward pass recomputes each chunk: d logprob / d logits = onehot - p, d H / d logits = -p (ln p + H).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(hidden, weight, labels)
        ctx.temperature = temperature
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), len(weight)):
            log_p = _log_softmax(hidden[rows], weight, temperature)
            logprobs[rows] = log_p.gather(1, labels[rows, None])[:, 0]
            entropy[rows] = -(log_p.exp() * log_p).sum(1)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        with_entropy = bool(grad_entropy.any())
        for rows in _chunks(len(hidden), len(weight)):
            log_p = _log_softmax(hidden[rows], weight, ctx.temperature)
            p = log_p.exp()
            grad = p * -grad_logprobs[rows, None]
            grad.scatter_add_(1, labels[rows, None], grad_logprobs[rows, None])
            if with_entropy:
                entropy = -(p * log_p).sum(1, keepdim=True)
                grad -= grad_entropy[rows, None] * p * (log_p + entropy)
            grad = (grad / ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)


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

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
        """``(logprobs, entropy)``, each ``[B, C] float32``, 0 outside the completions."""
        hidden = self.model.base_model(
            input_ids=tokens.token_ids[None],
            position_ids=tokens.position_ids[None],
            attention_mask=None,
            use_cache=False,
            layout=tokens.layout,
        ).last_hidden_state[0]
        predictors = hidden.index_select(0, tokens.predictors)
        labels = tokens.token_ids[tokens.targets]
        weight = self.model.get_output_embeddings().weight
        flat = _TokenLogProbs.apply(predictors, weight, labels, self.temperature)
        cells = predictors.new_zeros(tokens.shape[0] * tokens.shape[1], dtype=torch.float32)
        logprobs, entropy = (cells.index_copy(0, tokens.cells, values).view(tokens.shape) for values in flat)
        return logprobs, entropy
