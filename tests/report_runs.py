"""Run folders made up for the tests of ``millrace report``: as long and as wide as one likes, without a run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from launch.run_folder import dump_config
from launch.stored_groups import write_groups
from shared.ledger import TimeBook, TimeSlice
from shared.metrics import MetricsWriter
from shared.types import Completion, RolloutGroup, VersionSpan
from tests.fakes import make_config, make_prompt, write_model

STATES = {
    "controller": ("wait_for_groups", "train", "wait_for_delivery"),
    "engine": ("wait_for_prompts", "generate", "pause", "receive"),
    "learner": ("wait_for_groups", "reference", "forward", "backward", "optimizer"),
    "reward": ("wait_for_groups", "score"),
}


def processes(engines: int = 1, ranks: int = 1) -> list[str]:
    """Names of a run's processes."""
    numbered = [*(f"engine-{i}" for i in range(engines)), *(f"learner-{i}" for i in range(ranks))]
    return ["controller", *numbered, "reward-0"]


def step_row(step: int, steps: int, names: list[str], chance: random.Random) -> dict[str, float]:
    """Some ninety figures of a step, as a real run records them."""
    gone = step / steps
    row = {
        "reward": 0.3 + 0.5 * gone + chance.gauss(0, 0.03),
        "reward_std": 0.5 - 0.2 * gone,
        "kl": 0.1 * gone + abs(chance.gauss(0, 0.01)),
        "entropy": 0.4 - 0.1 * gone + chance.gauss(0, 0.01),
        "grad_norm": 0.5 + abs(chance.gauss(0, 0.2)),
        "completions/mean_length": 250 + 30 * gone + chance.gauss(0, 4),
        "completions/clipped_ratio": 0.02 + abs(chance.gauss(0, 0.01)),
        "staleness/mean": 0.5 + chance.random() / 4,
        "staleness/max": 1.0,
        "frac_reward_zero_std": 0.2,
        "time/step": 1.0,
        "throughput/rollout_tokens_per_second": 5000 + chance.gauss(0, 200),
        "groups/trained": 8.0 * step,
        "samples/trained": 64.0 * step,
        "sync/seconds": 0.01 + chance.random() / 100,
    }
    row |= {f"other/metric_{i}": chance.random() for i in range(60)}
    for name in names:
        states = STATES[name.partition("-")[0]]
        row |= {f"time/{name}/{state}": (0.5 + chance.random()) / len(states) for state in states}
    return row


def write_times(path: Path, names: list[str], steps: int, pieces: int, ended: bool = True) -> None:
    """A trace in which each process changes its state ``pieces`` times a step, of a second each."""
    book, chance = TimeBook(path / "trace.json"), random.Random(1)
    for name in names:
        states, now, intervals = STATES[name.partition("-")[0]], 1e9, []
        for i in range(steps * pieces):
            begin, now = now, now + (0.2 + chance.random()) / pieces
            intervals.append((states[i % len(states)], begin, now))
        book.add(TimeSlice(name, 1e9, now, tuple(intervals)))
    walls = book.walls()
    if ended:
        book.close()
        states = {name: {"wall": walls[name], "residue": 0.0, "states": dict(book.totals[name])} for name in names}
        summary = {"processes": states, "training_seconds": float(steps), "verdict": "The learner bounds this run."}
        (path / "time.json").write_text(json.dumps(summary), encoding="utf-8")
    else:
        book._trace.flush()


def sampled(group_id: int, step: int, tokenizer: Any, texts: list[str], length: int) -> RolloutGroup:
    """A group whose completions say ``texts`` and go on for ``length`` tokens in all, over two policy versions."""
    chance, completions = random.Random(group_id), []
    for text in texts:
        words = text
        while len(tokenizer(words)["input_ids"]) < length:
            words += f" so {chance.randrange(100)} and {chance.randrange(100)} make {chance.randrange(200)}."
        ids = np.array(tokenizer(words)["input_ids"][: max(length, len(text))], np.int32)
        half = len(ids) // 2
        spans = (VersionSpan(step - 2, 0, half), VersionSpan(step - 1, half, len(ids)))
        logprobs = np.array([-abs(chance.gauss(0, 1.2)) for _ in ids], np.float32)
        finish = "length" if chance.random() < 0.1 else "stop"
        completions.append(Completion(ids, logprobs, tokenizer.decode(ids), finish, spans))
    rewards = np.array([chance.choice([0.0, 0.5, 1.0]) for _ in texts], np.float32)
    parts = {"answer": np.floor(rewards), "format": np.ceil(rewards)}
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    prompt = make_prompt(group_id)
    return RolloutGroup(group_id, prompt, tuple(completions), rewards, parts, advantages=advantages.astype(np.float32))


def write_run(
    folder: Path,
    steps: int = 20,
    samples_every: int = 10,
    length: int = 40,
    texts: list[str] | None = None,
    **options: Any,
) -> Path:
    """A run folder; ``options``: engines, ranks, groups a stored step, pieces of the trace a step, ended, settings."""
    from transformers import AutoTokenizer

    (folder / "ledger").mkdir(parents=True)
    names = processes(options.get("engines", 1), options.get("ranks", 1))
    model = write_model(folder / "model", "gsm8k")
    settings = {"run.steps": steps, "model.path": str(model), "reward.functions": [{"function": "exact_match"}]}
    config = make_config(**settings | options.get("settings", {}))
    (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
    chance, writer = random.Random(0), MetricsWriter(folder)
    ended = options.get("ended", True)
    for step in range(steps + 1):
        if step and (ended or step <= steps // 2):
            writer.write(step, step_row(step, steps, names, chance) | options.get("row", {}))
        if step % max(steps // 5, 1) == 0:
            writer.write(step, {"eval/reward": 0.4 + 0.4 * math.sqrt(step / steps)})
    writer.close()
    write_times(folder / "ledger", names, steps, options.get("pieces", 8), ended)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = texts or [f"Answer {i}:" for i in range(8)]
    for step in range(samples_every, steps + 1, samples_every) if samples_every else ():
        groups = [sampled(step * 100 + i, step, tokenizer, texts, length) for i in range(options.get("groups", 2))]
        write_groups(folder / "samples" / f"step-{step:06d}.parquet", groups, step)
    return folder
