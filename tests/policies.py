"""A policy that publishes its weights to engines, without a learner."""

from __future__ import annotations

import itertools
import os

import numpy as np

NUMBERS = itertools.count()


class Policy:
    """A policy in transformers that publishes to engines as the learner does."""

    def __init__(self, path):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.version = -1
        self._name = f"test-{os.getpid()}-{next(NUMBERS)}"
        self.segments = []

    def logprobs(self, token_ids, temperature=1.0):
        """``[T - 1]``: teacher-forced log-probs of ``token_ids[1:]``."""
        with self.torch.no_grad():
            logits = self.model(input_ids=self.torch.tensor(token_ids, dtype=self.torch.long)[None]).logits[0]
        logprobs = self.torch.log_softmax(logits.float() / temperature, -1)
        return logprobs[:-1].gather(1, self.torch.tensor(token_ids[1:], dtype=self.torch.long)[:, None])[:, 0].numpy()

    def change(self, scale):
        """Add noise to every weight."""
        with self.torch.no_grad():
            for parameter in self.model.parameters():
                parameter += scale * self.torch.randn_like(parameter)

    def publish(self):
        from shared.weights import Canary, Publication, Segment, describe, digest, segment_name, views

        named = list(self.model.named_parameters())
        metas = describe((name, p.dtype, tuple(p.shape)) for name, p in named)
        self.version += 1
        segment = Segment(segment_name(self._name, str(self.version)), metas[-1].offset + metas[-1].nbytes)
        self.segments.append(segment)
        for view, (_, p) in zip(views(segment.bytes, metas), named, strict=True):
            np.copyto(view, p.detach().contiguous().view(-1).view(self.torch.uint8).numpy())
        canary = Canary(np.array([5, 6, 15, 7, 8, 16, 9, 9, 1], np.int32), self.logprobs([5, 6, 15, 7, 8, 16, 9, 9, 1]))
        hashed = digest(views(segment.bytes, metas))
        return Publication(self.version, "millrace_shm", segment.name, metas, hashed, canary)
