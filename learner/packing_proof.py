"""The proof, once at the start, that the learner's log-probs are the model's own and that packing changes nothing.

Packed attention keeps sequences apart, but a model may mix tokens in other ways: a convolution, a recurrent state, positions
of its own. Then every packed sequence but the first would be trained on wrong log-probs, without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.batching import Row, collate
from learner.logprobs import PolicyModel, Sampled
from shared.errors import ModelRefused, one_line
from shared.types import Completion, Prompt

EXACT = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Largest difference between a sequence packed and alone, in nats, unless ``ROUNDING`` allows more."""
PLAIN = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference between the learner's log-probs of a sequence alone and those of transformers, in nats."""
ROUNDING = 2.0
"""A deep model rounds more: packing may change log-probs by this many times what another attention kernel changes them."""
BUGS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError)
"""What a model raises that does not know the calls of the learner."""
PLACES = ("as the first in its row", "behind another completion of its prompt", "behind another prompt")


def prove_packing(engine: Any, device: torch.device) -> None:
    """Compare three sequences packed, each alone, and in transformers' own forward. Raises ``ModelRefused``.

    ``engine`` is a DeepSpeed engine around a ``PolicyModel``; all ranks call it together.
    """
    policy: PolicyModel = engine.module
    training, sampled = engine.training, policy.sampled
    engine.eval()
    policy.sampled = Sampled()
    try:
        with torch.no_grad():
            _prove(engine, policy, device)
    except BUGS as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ModelRefused(f"model refused: {_name(policy)} cannot be run on packed sequences ({what})") from error
    finally:
        policy.sampled = sampled
        engine.train(training)


def _prove(forward: Callable[..., tuple[Tensor, ...]], policy: PolicyModel, device: torch.device) -> None:
    head = policy.head
    rows = _rows(int(getattr(head, "ds_shape", head.shape)[0]))
    alone = [_completion(forward(collate([row], device).tokens)[0][0], row) for row in rows]
    with plain_attention(policy.model):
        plain = [_plain(forward(collate([row], device).tokens, plain=True)[0], row) for row in rows]
    rounding = max(map(_gap, alone, plain))
    if not rounding <= PLAIN[head.dtype]:
        raise ModelRefused(
            f"model refused: log-probs of {_name(policy)} in the learner differ from its own forward by {rounding:.3g} nats "
            f"(allowed {PLAIN[head.dtype]:g}); use another model"
        )
    together = forward(collate(rows, device).tokens)[0]
    gaps = [_gap(_completion(values, row), one) for values, row, one in zip(together, rows, alone, strict=True)]
    limit = max(EXACT[head.dtype], ROUNDING * rounding)
    leaks = [f"{place} by {gap:.3g}" for place, gap in zip(PLACES, gaps, strict=True) if not gap <= limit]
    if leaks:
        raise ModelRefused(
            f"model refused: packed sequences leak into each other in {_name(policy)}: log-probs of a completion change "
            f"{', '.join(leaks)} nats (allowed {limit:.2g}); use a model that mixes tokens by attention only"
        )


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """While open, ``model`` computes attention as transformers does without any kernel."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _rows(vocabulary: int) -> list[Row]:
    """Two completions of one prompt and one of another, of random tokens below ``vocabulary``; 33 tokens packed."""
    random = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return random.integers(0, vocabulary, count).astype(np.int32)

    def row(prompt: Prompt, count: int, index: int) -> Row:
        completion = Completion(tokens(count), np.zeros(count, np.float32), "", "stop")
        return Row(prompt, completion, index, prompt.prompt_id, count)

    first, second = Prompt(0, tokens(7), ""), Prompt(1, tokens(4), "")
    return [row(first, 11, 0), row(first, 6, 1), row(second, 5, 2)]


def _completion(values: Tensor, row: Row) -> Tensor:
    """``[C]``: the row of ``[B, C]`` without its padding."""
    return values[: len(row.completion.token_ids)]


def _plain(logits: Tensor, row: Row) -> Tensor:
    """Log-probs ``[C]`` of the completion of ``row`` by ``logits [P + C, V]``."""
    start, labels = len(row.prompt.token_ids), torch.from_numpy(row.completion.token_ids.astype(np.int64))
    log_p = torch.log_softmax(logits[start - 1 : -1].float(), dim=-1)
    return log_p.gather(1, labels.to(logits.device)[:, None])[:, 0]


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _name(policy: PolicyModel) -> str:
    """The model's class, and its kinds of layers where it says them."""
    kinds = sorted(set(getattr(policy.model.config, "layer_types", None) or ()))
    return type(policy.model).__name__ + (f" (layers: {', '.join(kinds)})" if kinds else "")
