"""The fixed workloads of ``millrace bench``: random-weight models, random prompts, and what a step of each looks like."""

from __future__ import annotations

import argparse
import json
import os
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import Config
from shared.config_loader import load_config
from shared.types import Completion, Prompt, RolloutGroup, VersionSpan

LETTERS = string.ascii_letters + string.digits + "+-*/=()[]<>"
MAX_PROMPT_TOKENS = 64
WIDE = 256


@dataclass(frozen=True)
class Workload:
    """A random-weight model and the shape of a step."""

    prompts_per_step: int
    group_size: int
    max_new_tokens: int
    vocabulary: int
    """With random weights every token is about equally likely: the end token comes after this many, on average."""
    hidden: int
    layers: int
    heads: int
    intermediate: int


WORKLOADS = {
    "short": Workload(8, 8, 32, 512, 128, 3, 4, 384),
    "tail": Workload(16, 8, 256, 72, 128, 4, 4, 384),
    "big": Workload(8, 8, 64, 1024, 512, 7, 8, 1408),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all workloads share."""
    parser.add_argument(
        "--shape", choices=list(WORKLOADS), default="short", help="a model and prompts made on the spot"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 where it is fast"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, as on the command line"
    )


def dtype_of(choice: str) -> str:
    """``choice``, or what is fast on this machine: bfloat16 on GPUs and on CPUs that multiply it in hardware."""
    import torch

    if choice != "auto":
        return choice
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def configured(table: dict[str, Any], folder: Path, settings: list[str]) -> Config:
    """``table`` as a checked configuration, with ``settings`` like ``learner.cpu_threads=2`` over it."""
    import tomli_w

    (folder / "bench.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    return load_config([str(folder / "bench.toml")], dict(entry.split("=", 1) for entry in settings))


def table_of(shape: Workload, model: Path, prompts: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """The settings of a run of ``shape``."""
    return {
        "run": {"output_dir": str(folder / "run"), "steps": 1000, "samples_every": 0},
        "model": {"path": str(model), "dtype": dtype_of(dtype)},
        "data": {"train": str(prompts)},
        "rollout": {
            "group_size": shape.group_size,
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_new_tokens": shape.max_new_tokens,
            "max_staleness": 4,
            "vllm": {"enforce_eager": True},
        },
        "reward": {"functions": [{"function": "length"}], "groups_per_call": 8},
        "algorithm": {"kl": {"coef": 0.001, "estimator": "k3"}},
        "learner": {
            "prompts_per_step": shape.prompts_per_step,
            "lr": 1e-6,
            "cpu_threads": learner_threads(model),
            "max_tokens_per_microbatch": max(8192, MAX_PROMPT_TOKENS + shape.max_new_tokens),
        },
    }


def learner_threads(model: Path) -> int:
    """Every core for matrices wide enough to be worth it: the engine leaves its own idle now and then; else one."""
    file = model / "config.json"  # What is wrong with a missing or broken one is said by the checks of a run.
    try:
        wide = json.loads(file.read_text(encoding="utf-8"))["hidden_size"] >= WIDE
    except (OSError, ValueError, KeyError, TypeError):
        return 1
    return os.cpu_count() or 1 if wide else 1


def workload_config(options: argparse.Namespace, folder: Path) -> Config:
    """The configuration of ``options.shape``; its model and prompts are made in ``folder``."""
    shape = WORKLOADS[options.shape]
    model, prompts = make_model(shape, folder / "model"), make_prompts(folder / "prompts.jsonl")
    return configured(table_of(shape, model, prompts, folder, options.dtype), folder, options.set)


def make_model(shape: Workload, folder: Path) -> Path:
    """A random Qwen2 and a tokenizer."""
    import torch

    from launch.builtin import SPECIAL, TASKS, make_tokenizer, random_qwen2

    # Few tokens: a character each. Many: the bytes, and rows beyond them that no text uses.
    letters = LETTERS[: shape.vocabulary - len(SPECIAL) - 1] if shape.vocabulary < 256 else None
    tokenizer = make_tokenizer(replace(TASKS["addition"], alphabet=letters))
    torch.manual_seed(0)
    model = random_qwen2(
        tokenizer,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        max_position_embeddings=1024,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_prompts(path: Path) -> Path:
    """512 prompts of 8 to 24 letters."""
    rng = np.random.default_rng(0)
    rows = [{"prompt": "".join(rng.choice(list(LETTERS[:52]), rng.integers(8, 25)))} for _ in range(512)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_groups(shape: Workload, seed: int) -> list[RolloutGroup]:
    """One step's groups, with lengths as a random-weight model has them and random rewards."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(shape.prompts_per_step):
        prompt = Prompt(number, _tokens(rng, int(rng.integers(8, 25))), "")
        lengths = np.minimum(rng.geometric(1 / shape.vocabulary, shape.group_size), shape.max_new_tokens)
        completions = tuple(
            Completion(
                _tokens(rng, n), np.full(n, -np.log(shape.vocabulary), np.float32), "", "stop", (VersionSpan(0, 0, n),)
            )
            for n in map(int, lengths)
        )
        rewards = rng.normal(size=shape.group_size).astype(np.float32)
        groups.append(RolloutGroup(number, prompt, completions, rewards, {"length": rewards}))
    return groups


def _tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(4, 60, count).astype(np.int32)


def print_table(rows: list[dict[str, Any]]) -> None:
    """``rows`` as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
