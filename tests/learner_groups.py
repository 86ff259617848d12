"""Groups of random tokens, the same in a test and in the ranks that it starts."""

import numpy as np
import torch

from shared.types import Completion, Prompt, RolloutGroup, VersionSpan


def make_groups(seed, count=6, size=4):
    rng = np.random.default_rng(seed)

    def completion():
        ids = rng.integers(5, 17, size=int(rng.integers(1, 9))).astype(np.int32)
        logprobs = (-3 * rng.random(len(ids))).astype(np.float32)
        return Completion(ids, logprobs, "", "stop", (VersionSpan(0, 0, len(ids)),))

    return [
        RolloutGroup(
            i,
            Prompt(i, rng.integers(5, 17, size=int(rng.integers(2, 7))).astype(np.int32), ""),
            tuple(completion() for _ in range(size)),
            rng.random(size).astype(np.float32),
        )
        for i in range(count)
    ]


def nan_loss(log_ratio, advantages, mask, *, logprobs=None):
    return logprobs * torch.nan
