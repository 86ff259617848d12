"""Requests to vLLM and its answers, translated from and into the types of a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.stop_strings import stop_arguments
from shared.types import Completion, VersionSpan

if TYPE_CHECKING:
    from rollout.engine import Sampling


def sampling_parameters(sampling: Sampling, tokenizer: Any) -> Any:
    """``sampling`` as vLLM's ``SamplingParams``, with the log-probs of the sampled tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **stop_arguments(sampling.stop, tokenizer),
    )


def completion(output: Any, text: str) -> Completion:
    """vLLM's answer in ours."""
    spans = (VersionSpan(policy_version(s.version), s.start, s.end) for s in output.weight_versions or ())
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(output.logprobs.logprobs, dtype=np.float32),  # Of the sampled tokens alone.
        text=text,
        finish_reason=output.finish_reason,
        version_spans=tuple(spans),
    )


def policy_version(label: str) -> int:
    """The policy version that vLLM's label names; -1 for weights loaded from disk."""
    return -1 if label == "default" else int(label)
