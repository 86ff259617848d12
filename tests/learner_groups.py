"""Groups of random tokens, the same in a test and in the learner ranks that it starts; and those ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from shared.types import Completion, Prompt, RolloutGroup, VersionSpan

ROOT = Path(__file__).resolve().parent.parent


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


def learner_config(model_dir, ranks, model=None, algorithm=None, **learner):
    """A configuration table for ``make_groups``'s groups on ``ranks`` ranks."""
    return {
        "run": {"steps": 10},
        "model": {"path": str(model_dir)} | (model or {}),
        "data": {"train": "unused"},
        "rollout": {"group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 8},
        "reward": {"functions": [{"function": "exact_match"}]},
        "algorithm": {"kl": {"coef": 0.05}} | (algorithm or {}),
        "learner": {"prompts_per_step": 6, "lr": 1e-3, "num_ranks": ranks} | learner,
    }


class Ranks:
    """``count`` processes that run ``tests/learner_jobs.py``: one a rank, for DeepSpeed joins one process group a process.

    Started without Ray on purpose. They stay for the whole session: importing and joining take longer than most jobs.
    """

    def __init__(self, work: Path, count: int) -> None:
        from learner.distributed import free_port

        self.port = free_port()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_LOG_LEVEL": "error"}
        self.logs = [work / f"rank-{count}-{rank}.log" for rank in range(count)]
        self.children = []
        command = [sys.executable, "-m", "tests.learner_jobs"]
        for log in self.logs:
            with log.open("w") as stderr:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
                self.children.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))

    def run(self, job: str, options: dict) -> None:
        """The same job on every rank; ``options`` are those of the job's function."""
        for rank, child in enumerate(self.children):
            given = options | {"job": job, "rank": rank, "ranks": len(self.children), "port": self.port}
            child.stdin.write(json.dumps(given) + "\n")
            child.stdin.flush()
        for child, log in zip(self.children, self.logs, strict=True):
            said = iter(child.stdout.readline, "")
            assert "done\n" in said, log.read_text()[-3000:]

    def close(self) -> None:
        """End the processes."""
        for child in self.children:
            child.kill()
            child.communicate()
