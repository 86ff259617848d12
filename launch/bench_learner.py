"""``millrace bench learner``: seconds of a training step, and of a bare PyTorch loop on the same packed tokens.

The bare loop has the same model, attention, micro-batches (planned off the clock), reference pass and loss, with plain
AdamW and the plain ``[tokens, vocabulary]`` log-softmax: no DeepSpeed, no Ray, no metrics. A third loop pads its rows
as transformers does by default. All three take turns in one process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import bench_workloads
from launch.bench_workloads import WORKLOADS, Workload, make_groups, print_table, workload_config
from learner.distributed import learner_environment
from shared.config import Config
from shared.types import RolloutGroup


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this workload."""
    bench_workloads.add_options(parser)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each; the first two are left out")
    parser.add_argument("--padded", action="store_true", help="measure the padded loop too")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    loops = ["ours", "bare", "padded"] if options.padded else ["ours", "bare"]
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder:
        config = workload_config(options, Path(folder))
        seconds = alternate(config, WORKLOADS[options.shape], options.rounds, loops)
    samples = config.groups_per_batch * config.rollout.group_size
    ours, bare = seconds["ours"], seconds["bare"]
    result = {
        "bench": "learner",
        "workload": options.shape,
        "step_s": statistics.median(ours),
        "samples_per_s": samples / statistics.median(ours),
        "bare_step_s": statistics.median(bare),
        "of_bare": statistics.median(b / a for a, b in zip(ours, bare, strict=True)),
    }
    if options.padded:
        result["padded_step_s"] = statistics.median(seconds["padded"])
        result["over_padded"] = statistics.median(b / a for a, b in zip(ours, seconds["padded"], strict=True))
    result |= {"threads": config.learner.cpu_threads, "dtype": config.model.dtype}
    print_table([result])
    return result


Prepare = Callable[[list[RolloutGroup]], Any]
"""Groups to what a step takes; off the clock."""
Step = Callable[[Any], Any]


def alternate(config: Config, shape: Workload, rounds: int, loops: list[str]) -> dict[str, list[float]]:
    """Seconds of each round but the first two, by loop, measured in a process of its own."""
    # Threads and memory settings must be there before torch is.
    os.environ |= learner_environment(config)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(config, shape, rounds, loops, there))
    process.start()
    there.close()
    try:
        seconds: dict[str, list[float]] = here.recv()
        return seconds
    finally:
        process.join()


def _measure(config: Config, shape: Workload, rounds: int, loops: list[str], pipe: Any) -> None:
    from learner.learner import Learner

    def ours() -> tuple[Prepare, Step]:
        return lambda groups: groups, Learner(config).train_step

    makers = {"ours": ours, "bare": lambda: _packed_loop(config), "padded": lambda: _padded_loop(config)}
    made = {name: makers[name]() for name in loops}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        groups = make_groups(shape, number)
        for name, (prepare, step) in made.items():
            batch = prepare(groups)
            started = time.monotonic()
            step(batch)
            if number >= 2:
                seconds[name].append(time.monotonic() - started)
    pipe.send(seconds)
    pipe.close()


def _models(config: Config, attention: str) -> tuple[Any, Any, Any]:
    """Policy, reference and AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        dtype = getattr(torch, config.model.dtype)
        return AutoModelForCausalLM.from_pretrained(
            config.model.path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.model.trust_remote_code,
        )

    policy, reference = load(), load().requires_grad_(False)
    return policy, reference, torch.optim.AdamW(policy.parameters(), lr=config.learner.lr, fused=True)


def _loss(logprobs: Any, reference: Any, advantages: Any, weights: Any, kl_coef: float) -> Any:
    """On-policy GRPO with the k3 KL, over flat tokens."""
    gap = reference - logprobs
    kl = gap.exp() - gap - 1
    ratio = (logprobs - logprobs.detach()).exp()
    return ((-ratio * advantages + kl_coef * kl) * weights).sum()


def _finish(policy: Any, optimizer: Any) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _packed_loop(config: Config) -> tuple[Prepare, Step]:
    """The bare step on our own packed micro-batches."""
    import torch

    from learner.attention import ATTENTION_NAME
    from learner.logprobs import PolicyModel, Sampled
    from learner.passes import plan_batch

    policy, reference, optimizer = _models(config, ATTENTION_NAME)
    hidden = {model: PolicyModel(model, Sampled()) for model in (policy, reference)}

    def prepare(groups: list[RolloutGroup]) -> Any:
        (plan,), _ = plan_batch(config, groups, 0, 1, torch.device("cpu"))
        return plan.batches

    def logprobs(model: Any, tokens: Any) -> Any:
        logits = model.get_output_embeddings()(hidden[model](tokens, hidden_only=True)[0]).float()
        return logits.log_softmax(-1).gather(1, tokens.token_ids[tokens.targets, None])[:, 0]

    def step(batches: Any) -> None:
        for batch in batches:
            with torch.no_grad():
                old = logprobs(reference, batch.tokens)
            new = logprobs(policy, batch.tokens)
            _loss(new, old, torch.ones_like(new), torch.full_like(new, 1e-3), config.algorithm.kl.coef).backward()
        _finish(policy, optimizer)

    return prepare, step


def _padded_loop(config: Config) -> tuple[Prepare, Step]:
    """Rows of prompt and completion, in arrival order, padded to the longest of a micro-batch of the same budget."""
    import numpy as np
    import torch

    policy, reference, optimizer = _models(config, "sdpa")
    budget = config.learner.max_tokens_per_microbatch

    def logprobs(model: Any, ids: Any, mask: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    def prepare(groups: list[RolloutGroup]) -> Any:
        rows = [np.concatenate([g.prompt.token_ids, c.token_ids]) for g in groups for c in g.completions]
        prompts = [len(g.prompt.token_ids) for g in groups for _ in g.completions]
        longest = max(map(len, rows))
        size = max(1, budget // longest)
        batches = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            mask, trained = torch.zeros_like(ids), torch.zeros(len(part), longest - 1)
            for i, row in enumerate(part):
                ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row.astype(np.int64)), 1
                trained[i, prompts[start + i] - 1 : len(row) - 1] = 1e-3
            batches.append((ids, mask, trained))
        return batches

    def step(batches: Any) -> None:
        for ids, mask, trained in batches:
            with torch.no_grad():
                old = logprobs(reference, ids, mask)
            new = logprobs(policy, ids, mask)
            _loss(new, old, torch.ones_like(new), trained, config.algorithm.kl.coef).backward()
        _finish(policy, optimizer)

    return prepare, step
