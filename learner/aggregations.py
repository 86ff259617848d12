"""Aggregations: the trainable tokens ``lengths [M]`` of all sequences of an optimizer step -> loss weights ``[M]``.

The loss of the step is ``sum_i w_i sum_t m_it l_it``. Invariant: a sequence without trainable tokens has weight 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_mean(lengths: Tensor) -> Tensor:
    """``1 / sum(n)``: every token equal (DAPO, arXiv 2503.14476)."""
    return _where_tokens(lengths, 1.0 / lengths.sum().clamp(min=1))


def sequence_mean(lengths: Tensor, *, skip_empty: bool = False) -> Tensor:
    """``1 / (M n_i)``: every sequence equal (GRPO, arXiv 2402.03300).

    M counts sequences without trainable tokens too, unless ``skip_empty``.
    """
    return _where_tokens(lengths, 1.0 / (_sequences(lengths, skip_empty) * lengths.clamp(min=1)))


def constant(lengths: Tensor, *, length: int, skip_empty: bool = False) -> Tensor:
    """``1 / (M length)``: no length in the weight (Dr. GRPO, arXiv 2503.20783).

    M counts sequences without trainable tokens too, unless ``skip_empty``.
    """
    return _where_tokens(lengths, torch.tensor(1.0 / (_sequences(lengths, skip_empty) * length)))


def sequence_sum(lengths: Tensor, *, skip_empty: bool = False) -> Tensor:
    """``1 / M``: sum over tokens, mean over sequences.

    M counts sequences without trainable tokens too, unless ``skip_empty``.
    """
    return _where_tokens(lengths, torch.tensor(1.0 / _sequences(lengths, skip_empty)))


def prompt_mean(lengths: Tensor, *, groups: Tensor) -> Tensor:
    """``1 / (N n_group)``: every prompt equal; ``groups [M]`` numbers the row's group from 0 to N - 1."""
    count = int(groups.max()) + 1
    tokens = torch.zeros(count, dtype=torch.float32).index_add(0, groups, lengths.float())
    return _where_tokens(lengths, 1.0 / (count * tokens[groups].clamp(min=1)))


def token_sum(lengths: Tensor) -> Tensor:
    """``1``: the sum over all tokens of the step; its size grows with the step's."""
    return _where_tokens(lengths, torch.ones(()))


def batch_token_mean(lengths: Tensor, *, batch_tokens: float | None = None) -> Tensor:
    """``token_mean`` for a batch that is cut into several steps: divide by the mean number of tokens of its steps.

    Every token of the batch is then equal, in whichever step it is.
    """
    return _where_tokens(lengths, torch.tensor(1.0 / max(batch_tokens or float(lengths.sum()), 1.0)))


def chunk_token_mean(lengths: Tensor, *, sequences: int = 8) -> Tensor:
    """The mean of the token means of chunks of ``sequences`` sequences, in their order (BNPO by micro-batch).

    ``1 / (C n_chunk)`` for C chunks. A token weighs more in a chunk of short sequences.
    """
    chunks = torch.arange(len(lengths)) // sequences
    count = -(-len(lengths) // sequences)
    tokens = torch.zeros(count, dtype=torch.float32).index_add(0, chunks, lengths.float())
    return _where_tokens(lengths, 1.0 / (count * tokens[chunks].clamp(min=1)))


def _sequences(lengths: Tensor, skip_empty: bool) -> int:
    """The number of sequences that a mean divides by, at least 1."""
    return max(int((lengths > 0).sum()) if skip_empty else len(lengths), 1)


def _where_tokens(lengths: Tensor, weights: Tensor) -> Tensor:
    return torch.where(lengths > 0, weights.float(), 0.0)


AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
    "sequence_sum": sequence_sum,
    "prompt_mean": prompt_mean,
    "token_sum": token_sum,
    "batch_token_mean": batch_token_mean,
    "chunk_token_mean": chunk_token_mean,
}
