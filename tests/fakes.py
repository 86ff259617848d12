"""Stand-ins for engines, rewards, learner, recorder and Ray, and builders of small configurations, groups and models."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from rollout.scores import Scores
from shared.actors import Call
from shared.config import Config
from shared.ledger import TimeBook
from shared.sample_ledger import SampleLedger
from shared.types import Completion, Prompt, RolloutGroup, StepReport, VersionSpan
from shared.weights import Canary, Publication, TensorMeta

# --- builders ---


def config_table(**changes: Any) -> dict[str, Any]:
    """A small valid configuration as nested tables; ``changes`` are dotted keys, with None to remove one."""
    table: dict[str, Any] = {
        "model": {"path": "model"},
        "data": {"train": "train.jsonl"},
        "rollout": {"group_size": 2, "max_prompt_tokens": 16, "max_new_tokens": 4},
        "reward": {"functions": [{"function": "exact_match"}]},
        "learner": {"prompts_per_step": 2},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = table
        for part in path:
            inner = inner.setdefault(part, {})
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    return table


def make_config(**changes: Any) -> Config:
    """A small configuration without reading a file; no check beyond types."""
    return Config.model_validate(config_table(**changes))


def write_config(path: Path, **changes: Any) -> Path:
    """``config_table`` as a TOML file."""
    path.write_text(tomli_w.dumps(config_table(**changes)), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(path: Path, task: str = "addition", **shape: Any) -> Path:
    """A Qwen2 directory as preflight sees it: configuration, tokenizer, and safetensors full of zeros."""
    from launch.builtin import TASKS, make_tokenizer

    path.mkdir(parents=True, exist_ok=True)
    defaults = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    table = defaults | shape
    table.setdefault("num_key_value_heads", table["num_attention_heads"])
    (path / "config.json").write_text(json.dumps(table), encoding="utf-8")
    write_tensors(path / "model.safetensors", qwen2_shapes(table))
    make_tokenizer(TASKS[task]).save_pretrained(path)
    return path


def qwen2_shapes(table: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the weights of a Qwen2 with a tied head, by its configuration."""
    hidden, wide = table["hidden_size"], table["intermediate_size"]
    head = table.get("head_dim") or hidden // table["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": [table["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(table["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            rows = table[heads] * head
            shapes |= {f"{at}.self_attn.{name}_proj.weight": [rows, hidden], f"{at}.self_attn.{name}_proj.bias": [rows]}
        shapes[f"{at}.self_attn.o_proj.weight"] = [hidden, table["num_attention_heads"] * head]
        shapes |= {f"{at}.mlp.{name}_proj.weight": [wide, hidden] for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = [hidden, wide]
        shapes |= {f"{at}.{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    return shapes


def write_tensors(path: Path, shapes: dict[str, list[int]], dtype: str = "F32") -> None:
    """A safetensors file of zeros, which take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * (4 if dtype == "F32" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_safetensors(path: Path, missing: int = 0) -> None:
    """One float32 tensor of 16 zeros; the last ``missing`` bytes of the file are cut off."""
    write_tensors(path, {"w": [16]})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing)


def make_prompt(index: int = 0, **columns: Any) -> Prompt:
    """Prompt number ``index``: three tokens and a text."""
    return Prompt(index, np.arange(3, dtype=np.int32) + index, f"prompt {index}", columns)


def make_completion(
    text: str = "", tokens: int = 3, spans: tuple[tuple[int, int, int], ...] | None = None
) -> Completion:
    """A completion of ``tokens`` tokens; by default sampled whole under version 0."""
    spans = ((0, 0, tokens),) if spans is None and tokens else spans or ()
    ids = np.arange(tokens, dtype=np.int32)
    return Completion(ids, np.zeros(tokens, np.float32), text, "stop", tuple(VersionSpan(*span) for span in spans))


def make_group(
    group_id: int = 0, rewards: Sequence[float] = (0.0, 1.0), version: int = 0, source: str = ""
) -> RolloutGroup:
    """A scored group whose completions were sampled under ``version``."""
    completions = tuple(make_completion(f"c{i}", 3, ((version, 0, 3),)) for i in range(len(rewards)))
    values = np.array(rewards, dtype=np.float32)
    prompt = replace(make_prompt(group_id), source=source)
    return RolloutGroup(group_id, prompt, completions, values, {"r": values})


# --- the controller's four partners ---

Hook = Callable[[int], Any]


class FakePart:
    """Actors that keep no ledger."""

    @property
    def slices(self) -> list:
        return []

    async def close_books(self) -> None:
        return None


class FakeEngines(FakePart):
    """Samples after ``delay(group_id)`` seconds; half of the tokens under the version at the end."""

    size = 1

    def __init__(self, delay: Hook = lambda _: 0.0, fail: Hook = lambda _: None, receive_delay: float = 0.0) -> None:
        self.delay, self.fail, self.receive_delay = delay, fail, receive_delay
        self.version, self.active, self.started = -1, 0, 0
        self.received: list[int] = []
        self.proved: list[int] = []
        self.sampled: list[tuple[int, Any]] = []
        self.hold: dict[int, int] = {}
        """Groups that do not end before the engines have a version."""
        self.updated = asyncio.Event()
        self.crash_on: dict[tuple[str, int], Exception] = {}
        """Exceptions for ``("receive" | "prove", version)``."""

    def check(self) -> None:
        return None

    async def generate(self, group_id: int, prompt: Prompt, sampling: Any) -> tuple[Completion, ...]:
        assert self.version >= 0, "generation before the first publication"
        born = self.version
        self.active, self.started = self.active + 1, self.started + 1
        self.sampled.append((group_id, sampling))
        try:
            await asyncio.sleep(self.delay(group_id))
            while self.version < self.hold.get(group_id, 0):
                await self.updated.wait()
            if error := self.fail(group_id):
                raise error
        finally:
            self.active -= 1
        spans = ((born, 0, 2), (self.version, 2, 4))
        return tuple(make_completion(f"{group_id}.{i}", 4, spans) for i in range(sampling.n))

    async def receive(self, publication: Publication) -> dict[str, float]:
        await asyncio.sleep(self.receive_delay)
        if error := self.crash_on.get(("receive", publication.version)):
            raise error
        self.version = publication.version
        self.updated.set()
        self.updated = asyncio.Event()
        self.received.append(publication.version)
        return {"sync/seconds": 0.0}

    async def prove(self, publication: Publication, digest: str) -> dict[str, float]:
        if error := self.crash_on.get(("prove", publication.version)):
            raise error
        self.proved.append(publication.version)
        return {"sync/canary_gap": 0.0}

    def metrics(self) -> dict[str, float]:
        return {}


class FakeRewards(FakePart):
    """Rewards 0, 1, 0, 1 ... within a group, all 1 where ``barren``; ``fail(group_id)`` may name an exception."""

    def __init__(self, fail: Hook = lambda _: None, barren: Hook = lambda _: False) -> None:
        self.fail, self.barren = fail, barren
        self.counters: Counter[str] = Counter()
        self.state: dict[str, Any] = {}

    async def score(self, group_id: int, prompt: Prompt, completions: tuple[Completion, ...]) -> Scores:
        await asyncio.sleep(0)
        if error := self.fail(group_id):
            raise error
        values = [1.0 if self.barren(group_id) else float(i % 2) for i in range(len(completions))]
        return Scores({"exact_match": np.array(values, dtype=np.float32)})

    def metrics(self) -> dict[str, float]:
        return {name: float(n) for name, n in self.counters.items()}


class FakeLearners(FakePart):
    """Takes ``delay`` seconds a step and measures staleness itself; ``refuse(call)`` leaves a step unapplied."""

    def __init__(
        self, delay: float = 0.0, refuse: Callable[[int], bool] = lambda _: False, fail: Hook = lambda _: None
    ) -> None:
        self.delay, self.refuse, self.fail = delay, refuse, fail
        self.version, self.calls, self.publications = 0, 0, 0
        self.updates = 1
        """Optimizer steps in a call."""
        self.saved: list[tuple[str, int]] = []
        """Directory and policy version of every save."""
        self.fail_save: Hook = lambda _: None
        self.trained: list[list[int]] = []
        """Group ids of every call."""
        self.staleness: list[int] = []
        self.unapplied_metrics: dict[str, float] = {}
        self.during: Callable[[], Any] = lambda: None
        """Called at the start and the end of a step; the pairs of results are kept."""
        self.observed: list[tuple[Any, Any]] = []

    @property
    def order(self) -> list[int]:
        """Group ids in the order of training."""
        return [group_id for step in self.trained for group_id in step]

    async def train_step(self, groups: list[RolloutGroup], canary: np.ndarray) -> tuple[StepReport, Publication | None]:
        report = await self._train(groups)
        return report, await self.publish(canary) if report.applied else None

    async def _train(self, groups: list[RolloutGroup]) -> StepReport:
        call, self.calls = self.calls, self.calls + 1
        before = self.during()
        await asyncio.sleep(self.delay)
        self.observed.append((before, self.during()))
        if error := self.fail(call):
            raise error
        self.trained.append([group.group_id for group in groups])
        self.staleness += [group.staleness(self.version) for group in groups]
        if self.refuse(call):
            return StepReport(self.version, False, self.unapplied_metrics)
        self.version += self.updates
        trained = {group.group_id: [1.0] * len(group.rewards) for group in groups}
        return StepReport(self.version, True, {"advantages/abs_mean": 1.0, "train_tokens": 8.0}, trained)

    async def publish(self, canary: np.ndarray) -> Publication:
        self.publications += 1
        meta = TensorMeta("w", "float32", (1,), 0, 4)
        proof = Canary(canary, np.zeros(len(canary) - 1, np.float32))
        return Publication(self.version, "fake", "", (meta,), "", proof)

    async def send(self, publication: Publication) -> str:
        return publication.digest

    async def save(self, directory: str) -> None:
        if error := self.fail_save(len(self.saved)):
            raise error
        self.saved.append((directory, self.version))


class FakeRecorder:
    """Keeps what the controller records."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(dir=os.environ["RAY_TMPDIR"]))
        self.book = TimeBook()
        self.room = None
        self.samples = SampleLedger(self.folder / "samples.jsonl")
        self.summaries: list[dict[str, Any]] = []
        self.steps: list[tuple[int, dict[str, float], list[RolloutGroup]]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.failures: list[Any] = []
        self.refusals: list[tuple[int, list[RolloutGroup]]] = []
        self.commits: list[tuple[Path, dict[str, Any], list[RolloutGroup]]] = []
        self.unsaved_steps: list[int] = []
        self.fail: Hook = lambda _: None

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup], digest: str) -> None:
        if error := self.fail(step):
            raise error
        self.steps.append((step, metrics, groups))

    def evaluated(self, step: int, metrics: dict[str, float], story: str) -> None:
        self.evaluations.append((step, metrics))

    def failed(self, failure: Any, prompt: Prompt) -> None:
        self.failures.append(failure)

    def refused(self, step: int, groups: list[RolloutGroup]) -> Path:
        self.refusals.append((step, groups))
        return Path(f"failed/step-{step}")

    def draft(self, step: int) -> Path:
        return self.folder / f"draft-{step}"

    async def commit(self, draft: Path, state: dict[str, Any], queued: list[RolloutGroup]) -> bool:
        await asyncio.sleep(0)
        self.commits.append((draft, json.loads(json.dumps(state)), queued))
        return True

    def cut_short(self) -> None:
        pass

    def unsaved(self, step: int, error: OSError) -> None:
        self.unsaved_steps.append(step)

    def summary(self, summary: dict[str, Any]) -> None:
        self.summaries.append(summary)


# --- a user's file of reward functions ---

REWARD_CODE = """
import asyncio, functools
SEEN = {}
LIMIT = 3
def plain(prompts, completions):
    return [float(len(c)) for c in completions]
def everything(**kwargs):
    SEEN.update(kwargs)
    return [0.0] * len(kwargs["completions"])
def conversational(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]
def columns(completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]
def scaled(completions, factor, **kwargs):
    return [factor * len(c) for c in completions]
def logging(completions, log_extra, log_metric, **kwargs):
    log_extra("length", [len(c) for c in completions])
    log_metric("seen", 2); log_metric("seen", 4)
    return [1.0] * len(completions)
def logs_then_raises(completions, log_extra, log_metric, **kwargs):
    log_extra("lost", [0] * len(completions)); log_metric("lost", 1)
    raise ValueError("bad\\nfraction")
async def patient(completions, **kwargs):
    await asyncio.sleep(0)
    return [2.0] * len(completions)
def sometimes(completions, **kwargs):
    return [None if c == "a" else 1.0 for c in completions]
def rude(prompts, completions, completion_ids, gold, **kwargs):
    prompts[0] = completions[0] = completion_ids[0] = None
    gold[0].append(1)
    return [0.0] * len(completions)
def short(completions, **kwargs):
    return [0.0] * (len(completions) - 1)
def wants_gold(completions, gold, **kwargs):
    return [float(len(g)) for g in gold]
class Brevity:
    def __init__(self, target, weight=1.0):
        if target < 0: raise ValueError("target must be >= 0")
        self.target = target * weight
    def __call__(self, completions, **kwargs):
        return [-abs(len(c) - self.target) for c in completions]
bound = functools.partial(scaled, factor=3.0)
instance = Brevity(1)
"""


# --- actors ---


class FakeActor:
    """Answers a call with what its async method of that name returns or raises; a killed one answers no more."""

    killed = released = False

    def call(self, method: str, *arguments: Any) -> Call:
        work = asyncio.ensure_future(getattr(self, method)(*arguments))
        work.add_done_callback(lambda task: task.cancelled() or task.exception())

        async def answer() -> Any:
            return await asyncio.shield(work)

        return Call(asyncio.ensure_future(answer()), work.cancel)

    async def node(self) -> str:
        return ""

    def kill(self) -> None:
        self.killed = True

    def release(self) -> None:
        self.released = True
        self.kill()


class FakeSlot:
    """A place whose actors ``spawn`` makes from the arguments; ``there`` is set while the place exists."""

    def __init__(self, spawn: Callable[..., Any]) -> None:
        self._spawn, self.there, self.freed = spawn, asyncio.Event(), False
        self.there.set()

    async def ready(self) -> None:
        await self.there.wait()

    def spawn(self, kind: type, *arguments: Any, environment: dict[str, str], concurrency: int = 1) -> Any:
        return self._spawn(*arguments)

    def free(self) -> None:
        self.freed = True


class FakePlaces:
    """Places for engines that ``spawn`` makes; further ones are there at once unless ``full``."""

    def __init__(self, engines: int, spawn: Callable[..., Any]) -> None:
        self._spawn, self.full = spawn, False
        self.engines = [FakeSlot(spawn) for _ in range(engines)]

    def another_engine(self) -> FakeSlot:
        self.engines.append(FakeSlot(self._spawn))
        if self.full:
            self.engines[-1].there.clear()
        return self.engines[-1]


def fake_ray(monkeypatch: Any, cpus: float = 8, gpus: float = 0, nodes: list[dict[str, float]] | None = None) -> Any:
    """Put a module ``ray`` in place that knows a cluster's ``nodes``, by default one, and makes no actor.

    Where a node has GPUs, the packages count as those for GPUs.
    """
    calls: Counter[str] = Counter()
    have = [{"CPU": cpus} | ({"GPU": gpus} if gpus else {})] if nodes is None else nodes
    module = types.SimpleNamespace(
        init=lambda **_: calls.update(["init"]),
        calls=calls,
        shutdown=lambda: calls.update(["shutdown"]),
        nodes=lambda: [
            {"Alive": True, "NodeID": f"{i:056x}", "NodeManagerAddress": f"10.0.0.{i}", "Resources": resources}
            for i, resources in enumerate(have, 1)
        ],
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    if any("GPU" in resources for resources in have):  # Those for CPUs would leave the GPUs alone.
        monkeypatch.setattr("launch.environment.made_for_gpus", lambda: True)
    return module
