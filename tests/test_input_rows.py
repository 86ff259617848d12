"""Every row of the table of bad input: what is wrong, and the exact lines that the user reads.

Each is tried as a start and, where it can be found beforehand, as a dry run, which must say the same. No row prints a
traceback, makes an actor, or ends otherwise than with exit code 2; with 0 where the lines are warnings alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import cluster, run
from launch.controller import Controller
from launch.environment import VERSIONS
from launch.failures import FailureBudget
from launch.preflight import prepare
from launch.resume import NOTHING, STATE, model_digest, take_lock
from learner.distributed import join_group
from rollout.reward_pool import RewardPool
from rollout.reward_worker import RewardWorker
from rollout.rewards import BUILTINS
from shared import checkpoints
from shared.config import Rollout
from shared.config_loader import load_config
from shared.errors import GroupFailed
from tests.bad_input import fake_cluster, forbid_cluster, write_run
from tests.fakes import (
    FakeActor,
    FakeEngines,
    FakeLearners,
    FakeRecorder,
    FakeRewards,
    FakeSlot,
    make_completion,
    write_config,
    write_model,
    write_rows,
    write_safetensors,
)


@dataclass
class World:
    """The run that a row spoils."""

    folder: Path
    monkeypatch: Any
    changes: dict[str, Any]
    ray: Any = None

    def config(self) -> Path:
        """The configuration file, written."""
        changes = {"run.output_dir": str(self.folder / "out")} | self.changes
        return write_config(self.folder / "run.toml", **changes)

    def instead(self, session: Callable[[Any], Any]) -> None:
        """``session(Session)`` is what a checked run does, in place of Ray and all."""
        self.monkeypatch.setattr("launch.run.Session.run", session)


Spoil = Callable[[World], Any]


@dataclass(frozen=True)
class Case:
    """One way to get it wrong."""

    changes: dict[str, Any] = field(default_factory=dict)
    said: str = ""
    """Warnings and infos of stdout, then all of stderr but its last line, the exit code."""
    spoil: Spoil = lambda world: None
    arguments: tuple[str, ...] = ("run.toml",)
    code: int = 2
    rehearsed: bool = True
    """A dry run finds it."""
    verb: Callable[[list[str]], int] = run.main


# --- ways to spoil a run ---


def file(name: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode()

    def spoil(world: World) -> None:
        (world.folder / name).parent.mkdir(exist_ok=True)
        (world.folder / name).write_bytes(data)

    return spoil


def rows(*prompts: str, name: str = "train.jsonl") -> Spoil:
    return lambda world: write_rows(world.folder / name, [{"prompt": p, "answer": "1"} for p in prompts])


def model(spoil: Callable[[Path], Any] = lambda path: None, **shape: Any) -> Spoil:
    return lambda world: spoil(write_model(world.folder / "model", **shape))


def edit(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Change a JSON file of the model; None removes a key."""

    def spoil(path: Path) -> None:
        table = json.loads((path / name).read_text()) | changes
        (path / name).write_text(json.dumps({k: v for k, v in table.items() if v is not None}))

    return spoil


def patch(target: str, value: Any) -> Spoil:
    return lambda world: world.monkeypatch.setattr(target, value)


def variable(name: str, value: str) -> Spoil:
    return lambda world: world.monkeypatch.setenv(name, value)


def score(**fields: Any) -> dict[str, Any]:
    """Settings with the function ``score`` of the file ``rewards.py``; see ``scoring``."""
    return {"reward.functions": [{"function": "rewards.py:score", **fields}]}


def scoring(body: str) -> Spoil:
    return file("rewards.py", f"import time\ndef score(completions):\n{body}\n")


def in_the_run(body: str) -> Spoil:
    """``score`` fails on the completion "odd", which no canned sample is: the third of group 12 in the run itself."""

    def spoil(world: World) -> None:
        scoring(f"    if 'odd' in completions:\n        {body}\n    return [len(c) * 5 % 7 / 7 for c in completions]")(
            world
        )
        world.instead(score_group_12)

    return spoil


class LocalWorker(FakeActor):
    """A reward worker in this process."""

    def __init__(self, *arguments: Any) -> None:
        self._worker = RewardWorker(*arguments)

    async def score(self, groups: Any, state: Any) -> Any:
        return await asyncio.to_thread(self._worker.score, groups, state)

    def kill(self) -> None:
        self._worker.close()


async def score_group_12(session: Any) -> None:
    config, prompt = session.prepared.config, session.prepared.train.prompts[0]
    pool = RewardPool(config, [FakeSlot(LocalWorker)], {})
    try:
        await pool.score(12, prompt, tuple(make_completion(text) for text in ("a", "bb", "ccc", "odd")))
    except GroupFailed as failure:
        FailureBudget(config.reward, lambda *_: None).failed(failure, prompt)
    finally:
        pool.close()


async def barren_run(session: Any) -> None:
    config = session.prepared.config
    parts = (FakeEngines(), FakeRewards(barren=lambda _: True), FakeLearners(), FakeRecorder())
    await Controller(config, session.stream, [], *parts).run()


def small_shared_memory(world: World) -> None:
    """A model of 16 million parameters, in a container with the usual 64 MiB."""
    world.monkeypatch.setattr("launch.shared_memory.count_parameters", lambda _: 16 << 20)
    world.monkeypatch.setattr("launch.shared_memory.shared_memory_free", lambda: 64 << 20)


async def join_as_a_learner(session: Any) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

    def init_distributed(**_: Any) -> None:
        print("info:", *(f"{name}={os.environ[name]}" for name in names))

    with pytest.MonkeyPatch.context() as patched:
        for name in (*names, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "DS_ACCELERATOR", "PATH"):
            patched.setenv(name, os.environ.get(name, ""))
        for name in names:
            patched.delenv(name)
        deepspeed = SimpleNamespace(init_distributed=init_distributed, ops=SimpleNamespace())
        patched.setitem(sys.modules, "deepspeed", deepspeed)
        patched.setattr("torch.distributed.is_initialized", lambda: False)  # A learner may live in this process.
        join_group(session.prepared.config, 0, 1, ("127.0.0.1", 0))


async def on_two_hosts(session: Any) -> None:
    class There:
        async def run(self, _: Any, paths: list[str]) -> tuple[str, list[str]]:
            return "10.0.0.2", paths

    session.output.mkdir()
    reservation = cluster.Reservation([There()], [There()], [], None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster, "nodes", lambda: [None, None])
        await cluster.check_files(session.prepared.config, session.output, reservation)


def on_ray(error: Exception | None = None, **size: Any) -> Spoil:
    def spoil(world: World) -> None:
        world.monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # Whatever token lies in this machine's home folder.
        world.ray = fake_cluster(world.monkeypatch, error, **size)

    return spoil


def open_dashboard(world: World) -> None:
    on_ray()(world)
    world.ray.init = lambda **_: SimpleNamespace(dashboard_url="10.0.0.1:8265")
    answer = SimpleNamespace(
        request=lambda *_: None, getresponse=lambda: SimpleNamespace(status=200), close=lambda: None
    )
    world.monkeypatch.setattr("http.client.HTTPConnection", lambda *_, **__: answer)


def on_a_laptop(world: World) -> None:
    """A private Ray on a machine of two cores, which a dry run does not start."""
    on_ray(cpus=2)(world)
    world.monkeypatch.delenv("RAY_ADDRESS")
    world.monkeypatch.setattr("os.cpu_count", lambda: 2)
    world.monkeypatch.setattr("socket.gethostname", lambda: "10.0.0.1")


def read_only(world: World) -> None:
    """To root everything is writable, so the system's answer is made up."""
    real = os.access
    world.monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and real(path, mode))


class AuthenticationError(Exception):
    """As Ray's own: of no kind that Python knows."""


def lived(*steps: int, **then: Any) -> Spoil:
    """A run folder with whole checkpoints of ``steps``, made with settings that were other ones ``then``."""

    def spoil(world: World) -> None:
        now, world.changes = world.changes, world.changes | then
        prepared = prepare(load_config([str(world.config())]), "run.toml", world.folder, probing=False)
        world.changes = now
        facts = {"config": prepared.config.model_dump(), "model": model_digest(prepared.config)}
        for step in steps:
            draft = checkpoints.begin(world.folder / "out" / "checkpoints", step)
            (draft / "state").mkdir()
            state = {
                "version": step,
                "data": prepared.train.stream(prepared.config).digest,
                "evaluated": step,
                "samples": NOTHING,
            }
            (draft / STATE).write_text(json.dumps(state))
            (draft / "optim_0.pt").write_bytes(bytes(64))
            checkpoints.commit(draft, step, facts)

    return spoil


def flipped(step: int, *steps: int) -> Spoil:
    """``lived(*steps)``, and a bit of the checkpoint of ``step`` has flipped since."""

    def spoil(world: World) -> None:
        lived(*steps)(world)
        place = world.folder / "out" / "checkpoints" / f"step-{step:06d}" / "optim_0.pt"
        place.write_bytes(b"\x01" + bytes(63))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda world: [spoil(world) for spoil in spoils]


def live(world: World) -> None:
    (world.folder / "out").mkdir()
    world.held = take_lock(world.folder / "out")  # type: ignore[attr-defined]


def installed(name: str, version: str) -> Spoil:
    """A package that is found before the real one."""

    def spoil(world: World) -> None:
        site = world.folder / "site"
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        if name == "torchvision":
            (site / name).mkdir()
            (site / name / "__init__.py").touch()
        world.monkeypatch.syspath_prepend(site)

    return spoil


BUDGET = {"reward.max_failed_groups": 0, "reward.retries": 0}

TABLE: dict[int, list[Case]] = {
    1: [
        Case(
            {"rollout.group_sise": 4},
            "error[E101] unknown key — run.toml:rollout.group_sise. "
            "Found group_sise, expected one of <its settings>. "
            "Fix: did you mean rollout.group_size?",
        )
    ],
    2: [
        Case(
            {"learner.lr": "abc"},
            'error[E102] bad value — run.toml:learner.lr. Found "abc", expected a number > 0. Fix: learner.lr = 1e-06',
        ),
        Case(
            {"learner.lr": -1.0},
            "error[E102] bad value — run.toml:learner.lr. Found -1.0, expected a number > 0. Fix: learner.lr = 1e-06",
        ),
        Case(
            {"rollout.temperature": 0.005},
            "error[E102] bad value — run.toml:rollout.temperature. Found 0.005, expected a number >= 0.01. "
            "Fix: rollout.temperature = 1.0",
        ),
        Case(
            {"eval.temperature": 0.0},
            "error[E102] bad value — run.toml:eval.temperature. Found 0.0, expected a number >= 0.01. "
            "Fix: set eval.temperature",
        ),
        Case(
            {"rollout.stop": [""]},
            'error[E102] bad value — run.toml:rollout.stop.0. Found "", expected at least 1 character. '
            "Fix: set rollout.stop.0",
        ),
    ],
    3: [
        Case(
            {"rollout.group_size": 1},
            "error[E103] group too small — run.toml:rollout.group_size. "
            "Found 1, expected >= 2. "
            "Fix: set 8; one completion has no group to compare with",
        )
    ],
    4: [
        Case(
            {"learner.num_ranks": 3},
            "error[E104] batch does not divide — run.toml:learner.prompts_per_step. "
            "Found 2 x rollout.group_size = 4 completions, expected a multiple of learner.num_ranks = 3. "
            "Fix: learner.prompts_per_step = 3 (nearest)",
        )
    ],
    5: [
        Case(
            said="error[E105] cannot parse config — broken.toml:4:6. "
            'Found "lr =" (Invalid value), expected valid TOML. '
            "Fix: correct that line",
            spoil=file("broken.toml", b"[model]\n\n[learner]\nlr = \n"),
            arguments=("broken.toml",),
        ),
        Case(
            said="error[E105] cannot parse config — broken.toml:1:9. "
            "Found \"[learner\" (Expected ']' at the end of a table declaration), expected valid TOML. "
            "Fix: correct that line",
            spoil=file("broken.toml", b"[learner"),
            arguments=("broken.toml",),
        ),
        Case(
            said="error[E105] cannot parse config — broken.toml. "
            "Found byte 0xe9 at offset 5, expected UTF-8. "
            "Fix: save it as UTF-8",
            spoil=file("broken.toml", b'a = "\xe9"'),
            arguments=("broken.toml",),
        ),
        Case(
            said="error[E105] cannot read config — rnu.toml. "
            "Found no such file, expected a TOML file. "
            "Fix: did you mean run.toml?",
            arguments=("rnu.toml",),
        ),
    ],
    6: [
        Case(
            said="error[E106] bad override — command line:--rollout.num_engine. "
            "Found num_engine, expected a known key. "
            "Fix: --rollout.num_engines",
            arguments=("run.toml", "--rollout.num_engine", "2"),
        ),
        Case(
            said="error[E106] bad override — command line:--learner.lr. "
            'Found "fast", expected a number > 0. '
            "Fix: --learner.lr 1e-06",
            arguments=("run.toml", "--learner.lr", "fast"),
        ),
        Case(
            said="error[E106] bad override — command line:--rollout.num_engine. "
            "Found num_engine, expected a known key. "
            "Fix: --rollout.num_engines",
            arguments=("run.toml", "--rollout.num-engine=2"),
        ),
    ],
    7: [
        Case(
            {"algorithm.policy_loss": {"name": "clipp"}},
            "error[E107] unknown policy loss — run.toml:algorithm.policy_loss.name. "
            "Found clipp, expected one of clip, dual_clip, reinforce, cispo, sapo, sequence_clip, gmpo, vespo, gspo_token, "
            "dppo_tv, dppo_kl. "
            'Fix: "clip"',
        ),
        Case(
            {"algorithm.kl": {"estimator": "k9"}},
            "error[E107] unknown KL estimator — run.toml:algorithm.kl.estimator. "
            "Found k9, expected one of k1, k2, mse, k3, abs, full. "
            'Fix: "k3"',
        ),
        Case(
            {"algorithm.aggregation": {"name": "mean"}},
            "error[E107] unknown aggregation — run.toml:algorithm.aggregation.name. "
            "Found mean, expected one of token_mean, sequence_mean, constant, sequence_sum, prompt_mean, token_sum, "
            "batch_token_mean, chunk_token_mean. "
            'Fix: "token_mean"',
        ),
        Case(
            {"algorithm.recipe": "gropo"},
            "error[E107] unknown recipe — run.toml:algorithm.recipe. "
            "Found gropo, expected one of cispo, dapo, dr_grpo, grpo, grpo_deepseek, gspo, ppo_kl_reward, rloo. "
            'Fix: "grpo"',
        ),
        Case(
            {"algorithm.policy_loss": {"name": "clip", "lwo": 1}},
            "error[E107] unknown argument of policy loss clip — run.toml:algorithm.policy_loss.lwo. "
            "Found lwo, expected one of low, high, delta. "
            "Fix: run.toml:algorithm.policy_loss.low",
        ),
    ],
    8: [
        Case(
            {"algorithm.old_logprobs": "current", "learner.epochs_per_batch": 2},
            "error[E108] options disagree — run.toml:algorithm.old_logprobs, learner.steps_per_batch, learner.epochs_per_batch. "
            "Found current, expected old log-probs from a pass before the first update. "
            'Fix: algorithm.old_logprobs = "auto"',
        ),
        Case(
            {"rollout.top_p": 0.9},
            "error[E108] options disagree — run.toml:rollout.top_p. "
            "Found 0.9, expected the full distribution, which the learner scores. "
            'Fix: remove it, or rollout.truncated_sampling = "renormalise"',
        ),
    ],
    9: [
        Case(
            {"data.train": "trian.jsonl"},
            "error[E201] dataset not found — run.toml:data.train. "
            'Found "trian.jsonl" (no such file), expected a .jsonl, .json, .csv, .parquet file. '
            "Fix: did you mean train.jsonl?",
        ),
        Case(
            {"data.train": "openai/gsm8k"},
            "error[E201] dataset not found — run.toml:data.train. "
            'Found "openai/gsm8k" (no copy on this machine, and HF_HUB_OFFLINE is set), expected a file, or a dataset of the hub. '
            "Fix: unset HF_HUB_OFFLINE, or give a folder on this machine",
        ),
        Case(
            {"data.train": [{"path": "train.jsonl"}, {"path": "more.jsonl"}]},
            "error[E201] dataset not found — run.toml:data.train[1]. "
            'Found "more.jsonl" (no such file), expected a .jsonl, .json, .csv, .parquet file. '
            "Fix: did you mean train.jsonl?",
        ),
    ],
    10: [
        Case(
            {"data.prompt_column": "question"},
            "error[E202] no such column — train.jsonl:question. "
            "Found prompt, answer in row 1, expected question. "
            'Fix: data.prompt_column = "prompt"',
        ),
        Case(
            {"data.train": {"path": "train.jsonl", "columns": {"prompt": "qestion"}}},
            "error[E202] no such column — train.jsonl:qestion. "
            "Found prompt, answer, expected qestion. "
            'Fix: run.toml:data.train.columns.prompt = "prompt"',
        ),
        Case(
            said="warning[W210] rows without answer — train.jsonl. "
            "Found no value in 1 of 3, expected one in each: exact_match gets None there.",
            spoil=file(
                "train.jsonl", '{"prompt": "1"}\n{"prompt": "2", "answer": "2"}\n{"prompt": "3", "answer": "3"}\n'
            ),
            code=0,
        ),
    ],
    11: [
        Case(
            said="error[E203] no rows — train.jsonl. Found 0 rows, expected at least 1. Fix: check the export",
            spoil=file("train.jsonl", ""),
        ),
        Case(
            {"learner.prompts_per_step": 5},
            "error[E203] too few rows — train.jsonl. "
            "Found 4 usable rows, expected >= learner.prompts_per_step (5). "
            "Fix: add rows or lower learner.prompts_per_step",
        ),
    ],
    12: [
        Case(
            said="error[E204] invalid JSON — train.jsonl:2. "
            "Found Unterminated string starting at column 12, expected one object per line. "
            "Fix: repair or remove line 2",
            spoil=file("train.jsonl", '{"prompt": "1+1="}\n{"prompt": "1+\n'),
        ),
        Case(
            said="error[E204] invalid JSON — train.jsonl:2. "
            "Found list, expected one object per line. "
            "Fix: repair or remove line 2",
            spoil=file("train.jsonl", '{"prompt": "1"}\n[]\n'),
        ),
    ],
    13: [
        Case(
            said="error[E205] not UTF-8 — train.jsonl:1. "
            "Found byte 0xe9, expected UTF-8. "
            "Fix: convert with iconv -f latin1 -t utf-8",
            spoil=file("train.jsonl", b'{"prompt": "caf\xe9"}\n'),
        ),
        Case(
            said="error[E205] not UTF-8 — train.jsonl:1. "
            "Found half a character (\\ud83d) in prompt, expected whole characters. "
            "Fix: write both halves, or none",
            spoil=file("train.jsonl", '{"prompt": "\\ud83d"}\n'),
        ),
    ],
    14: [
        Case(
            said="error[E206] mixed types — train.jsonl:answer. "
            "Found int in row 1 and str in row 2, expected one type. "
            "Fix: write all of answer as strings",
            spoil=file("train.jsonl", '{"prompt": "1", "answer": 1}\n{"prompt": "2", "answer": "2"}\n'),
        ),
        Case(
            said="error[E206] content is no text — train.jsonl:1. "
            "Found image in message 1, expected parts of type text. "
            "Fix: leave out the row, or the part; models are trained on text only",
            spoil=lambda w: write_rows(
                w.folder / "train.jsonl",
                [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}],
            ),
        ),
        Case(
            {"reward.functions": [{"function": "code_tests"}]},
            "error[E206] tests not understood — train.jsonl:3:tests (and 1 more). "
            'Found invalid syntax in line 1 of "assert f(1) =", '
            "expected statements that compile, check(candidate), inputs and outputs, or fn_name with both. "
            "Fix: write tests that compile",
            spoil=both(
                file(
                    "train.jsonl",
                    '{"prompt": "1", "tests": "f(1)"}\n\n{"prompt": "2", "tests": "assert f(1) ="}\n{"prompt": "3", "tests": "[]"}\n',
                ),
                patch("rollout.sandbox.sandbox_problem", lambda: None),
            ),
        ),
    ],
    15: [
        Case(
            said="error[E207] blank prompts — train.jsonl:2 (and 1 more). "
            "Found 2 empty prompts, expected text. "
            'Fix: remove them or data.on_bad_row = "drop"',
            spoil=rows("1", " ", "", "2"),
        ),
        Case(
            {"data.on_bad_row": "drop"},
            "info: 2 blank prompts of train.jsonl dropped",
            spoil=rows("1", " ", "", "2"),
            code=0,
        ),
    ],
    16: [
        Case(
            {"rollout.max_prompt_tokens": 3},
            "error[E208] prompts too long — train.jsonl:1 (and 3 more). "
            "Found up to 4 tokens, expected <= rollout.max_prompt_tokens = 3. "
            'Fix: raise it or data.on_long_prompt = "drop"',
        ),
        Case(
            {"data.on_long_prompt": "drop", "rollout.max_prompt_tokens": 4},
            "info: 1 long prompts of train.jsonl dropped",
            spoil=rows("1+1=", "1+2=", "11+11="),
            code=0,
        ),
    ],
    17: [
        Case(
            said="warning[W209] duplicate prompts — train.jsonl. Found 1, expected none.",
            spoil=rows("1+1=", "1+2=", "1+1="),
            code=0,
        ),
        Case(
            {"data.eval": "eval.jsonl"},
            "error[E209] eval rows in train — eval.jsonl:2. "
            "Found 2 shared prompts, expected 0. "
            "Fix: remove them or data.allow_overlap = true",
            spoil=rows("9+9=", "1+1=", "0+1=", name="eval.jsonl"),
        ),
    ],
    18: [
        Case(
            {"data.train": "train.py"},
            "error[E210] dataset script refused — run.toml:data.train. "
            "Found <here>/train.py, expected parquet, json, csv or jsonl. "
            "Fix: convert it once",
            spoil=file("train.py", ""),
        ),
        Case(
            {"data.train": "set"},
            "error[E210] dataset script refused — run.toml:data.train. "
            "Found <here>/set, expected parquet, json, csv or jsonl. "
            "Fix: convert it once",
            spoil=file("set/set.py", ""),
        ),
    ],
    19: [
        Case(
            score(),
            "error[E301] reward import failed — run.toml:reward.functions[0].function. "
            "Found ModuleNotFoundError: No module named 'sympyy', expected <here>/rewards.py:score. "
            "Fix: install it or correct the name",
            spoil=file("rewards.py", "import sympyy\n"),
        ),
        Case(
            {"reward.functions": [{"function": "rewards.py:plane"}]},
            "error[E301] reward import failed — run.toml:reward.functions[0].function. "
            'Found no attribute "plane" in <here>/rewards.py, expected one of plain. '
            'Fix: "<here>/rewards.py:plain"',
        ),
        Case(
            {"reward.functions": [{"function": "nothing.py:score"}]},
            "error[E301] reward import failed — run.toml:reward.functions[0].function. "
            "Found FileNotFoundError: no such file: <here>/nothing.py, expected <here>/nothing.py:score. "
            "Fix: install it or correct the name",
        ),
        Case(
            {"reward.functions": [{"function": "exact_mach"}]},
            "error[E301] unknown reward — run.toml:reward.functions[0].function. "
            "Found exact_mach, expected one of <the built-in ones>. "
            'Fix: "exact_match"',
        ),
    ],
    20: [
        Case(
            score(),
            "error[E302] wrong reward count — rewards.py:score, run.toml:reward.functions[0]. "
            "Found 1 values, expected 30 numbers (one per completion). "
            "Fix: return a flat list",
            spoil=scoring("    return [0.0]"),
        ),
        Case(
            score() | BUDGET,
            "error[E310] too many reward failures — reward. "
            "Found 1 dropped groups (1 E302), expected <= reward.max_failed_groups = 0 and <= 10% of the last 200. "
            "Fix: correct the function or raise timeout_s\n"
            "last: group 12 failed (E302): error[E302] wrong reward count — rewards.py:score, group 12. "
            "Found 1 values, expected 4 numbers (one per completion). "
            "Fix: return a flat list (saved: failed/12-0.json)",
            spoil=in_the_run("return [0.0]"),
            rehearsed=False,
        ),
    ],
    21: [
        Case(
            score(),
            "error[E303] bad reward value — rewards.py:score, run.toml:reward.functions[0]. "
            "Found nan for '', expected a finite number or None. "
            "Fix: handle this case, or return None where the reward does not apply",
            spoil=scoring("    return [float('nan') if not c else 0.0 for c in completions]"),
        ),
        Case(
            score() | BUDGET,
            "error[E310] too many reward failures — reward. "
            "Found 1 dropped groups (1 E303), expected <= reward.max_failed_groups = 0 and <= 10% of the last 200. "
            "Fix: correct the function or raise timeout_s\n"
            "last: group 12 failed (E303): error[E303] bad reward value — rewards.py:score, sample 3 of group 12. "
            "Found nan for 'odd', expected a finite number or None. "
            "Fix: handle this case, or return None where the reward does not apply (saved: failed/12-3.json)",
            spoil=in_the_run("return [0.0, 0.0, 0.0, float('nan')]"),
            rehearsed=False,
        ),
    ],
    22: [
        Case(
            score(),
            "error[E304] reward raised — rewards.py:score, run.toml:reward.functions[0]. "
            "Found ValueError: bad fraction on the gold completion '1', expected a number. "
            "Fix: correct the function for this sample",
            spoil=scoring("    raise ValueError('bad fraction')"),
        ),
        Case(
            score() | BUDGET,
            "error[E310] too many reward failures — reward. "
            "Found 1 dropped groups (1 E304), expected <= reward.max_failed_groups = 0 and <= 10% of the last 200. "
            "Fix: correct the function or raise timeout_s\n"
            "last: group 12 failed (E304): error[E304] reward raised — rewards.py:score, group 12. "
            "Found ValueError: bad fraction, expected a number. "
            "Fix: correct the function for this sample (saved: failed/12-0.json)\n"
            "first failure: <here>/rewards.py:4 in score: ValueError: bad fraction",
            spoil=in_the_run("raise ValueError('bad fraction')"),
            rehearsed=False,
        ),
    ],
    23: [
        Case(
            score(timeout_s=0.5),
            "error[E305] reward too slow — rewards.py:score, run.toml:reward.functions[0]. "
            "Found > 0.5 s on the gold completion '1', expected <= timeout_s = 0.5. "
            "Fix: speed it up or raise the limit (worker replaced)",
            spoil=scoring("    time.sleep(99)"),
        ),
        Case(
            score(timeout_s=0.5) | BUDGET,
            "error[E310] too many reward failures — reward. "
            "Found 1 dropped groups (1 timeout), expected <= reward.max_failed_groups = 0 and <= 10% of the last 200. "
            "Fix: correct the function or raise timeout_s\n"
            "last: group 12 failed (timeout): error[E305] reward too slow — rewards.py:score, group 12. "
            "Found > 0.5 s, expected <= timeout_s = 0.5. "
            "Fix: speed it up or raise the limit (worker replaced) (saved: failed/12-0.json)",
            spoil=in_the_run("time.sleep(99)"),
            rehearsed=False,
        ),
    ],
    24: [
        Case(
            score(memory_mb=512),
            "error[E306] reward over limit — rewards.py:score, run.toml:reward.functions[0]. "
            "Found > 512 MB on the gold completion '1', expected <= memory_mb = 512. "
            "Fix: use less memory or raise reward.functions.memory_mb",
            spoil=scoring("    bytearray(1 << 30)"),
        ),
        Case(
            score(memory_mb=512) | BUDGET,
            "error[E310] too many reward failures — reward. "
            "Found 1 dropped groups (1 E306), expected <= reward.max_failed_groups = 0 and <= 10% of the last 200. "
            "Fix: correct the function or raise timeout_s\n"
            "last: group 12 failed (E306): error[E306] reward over limit — rewards.py:score, group 12. "
            "Found > 512 MB, expected <= memory_mb = 512. "
            "Fix: use less memory or raise reward.functions.memory_mb (saved: failed/12-0.json)",
            spoil=in_the_run("bytearray(1 << 30)"),
            rehearsed=False,
        ),
        Case(
            score(),
            "warning[W306] score: stdout cut at 64 KB",
            spoil=in_the_run("print('x' * (1 << 20))"),
            rehearsed=False,
            code=0,
        ),
    ],
    25: [
        Case(
            {"algorithm.barren_limit": 30, "run.steps": 1000},
            "warning[W307] nothing to learn — reward.functions. "
            "Found 15 groups in a row with equal rewards, expected some spread. "
            "Fix: check the reward function and the difficulty of the prompts; at 30 (algorithm.barren_limit) the run ends\n"
            "error[E307] nothing to learn — reward.functions. "
            "Found 30 groups in a row with equal rewards, expected some spread within algorithm.barren_limit = 30. "
            "Fix: check the reward function and the difficulty of the prompts",
            spoil=lambda w: w.instead(barren_run),
            rehearsed=False,
        )
    ],
    26: [
        Case(
            {"reward.functions": [{"function": "rewards.py:plain", "isolation": "sandbox"}]},
            "error[E308] no sandbox — run.toml:reward.functions[0].isolation. "
            "Found no bubblewrap, expected bubblewrap and user namespaces. "
            "Fix: install bubblewrap (and allow user namespaces), or use a non-code reward",
            spoil=patch("rollout.sandbox.sandbox_problem", lambda: "no bubblewrap"),
        )
    ],
    27: [
        Case(
            {"data.train": "reasoning-gym:spiral_matrix"},
            "error[E309] unsafe task — run.toml:data.train.path. Found spiral_matrix (its scorer calls eval() on model text), "
            "expected a task off the denylist. Fix: choose another",
        )
    ],
    28: [
        Case(
            {"model.path": "models/nope"},
            "error[E401] model not found — run.toml:model.path. "
            'Found "models/nope" (no copy on this machine, and HF_HUB_OFFLINE is set), expected a folder, or a model of the hub. '
            "Fix: unset HF_HUB_OFFLINE, or give a folder on this machine",
        ),
        Case(
            {"model.path": "."},
            "error[E401] model not found — run.toml:model.path. "
            'Found "<here>" (no config.json), expected a Hugging Face model directory, or org/name of the hub. '
            "Fix: check the path",
        ),
        Case(
            {"model.path": "./nope"},
            "error[E401] model not found — run.toml:model.path. "
            'Found "nope" (no such directory), expected a Hugging Face model directory, or org/name of the hub. '
            "Fix: check the path",
        ),
    ],
    29: [
        Case(
            said="error[E402] tokenizer does not fit — run.toml:model.tokenizer. "
            'Found token 16 (=) in the prompt "0+1=", expected ids below 8, the embedding rows. '
            "Fix: use the model's own tokenizer",
            spoil=model(vocab_size=8),
        )
    ],
    30: [
        Case(
            {"data.chat": True},
            "error[E403] no chat template — run.toml:model.tokenizer. "
            "Found messages in train.jsonl:1, expected a template or plain prompts. "
            "Fix: set model.chat_template",
        ),
        Case(
            said="error[E403] no chat template — run.toml:model.tokenizer. "
            "Found messages in train.jsonl:1, expected a template or plain prompts. "
            "Fix: set model.chat_template",
            spoil=lambda w: write_rows(
                w.folder / "train.jsonl", [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}] * 2
            ),
        ),
        Case(
            {"data.chat": True, "model.chat_template": "{{ messages[0].role }}"},
            "error[E403] chat template drops text — run.toml:model.chat_template. "
            "Found no text of message 1 (user) in the prompt of train.jsonl:1, expected all that it says. "
            "Fix: change the messages, or model.chat_template",
        ),
        Case(
            {"data.chat": True, "rollout.max_prompt_tokens": 60, "rollout.max_new_tokens": 4, "data.date": "2026-11-28"}
            | {"model.chat_template": "{{ strftime_now('%Y+%m+%d') }}{{ messages[0].content }}"},
            "warning[W212] the chat template asks for today's date — run.toml:data.date. "
            "All prompts of the run say 2026-11-28, also when it is resumed on another day.",
            code=0,
        ),
    ],
    31: [
        Case(
            said="info: no pad token — run.toml:model.tokenizer. None is needed: sequences are packed, not padded",
            spoil=model(edit("tokenizer_config.json", pad_token=None)),
            code=0,
        )
    ],
    32: [
        Case(
            {"model.dtype": "float16"},
            "error[E405] dtype not supported — run.toml:model.dtype. "
            "Found float16, expected bfloat16 or float32. "
            'Fix: model.dtype = "bfloat16"',
        ),
        Case(
            {"model.dtype": "float8"},
            "error[E102] bad value — run.toml:model.dtype. "
            "Found \"float8\", expected 'float32', 'bfloat16' or 'float16'. "
            'Fix: model.dtype = "float32"',
        ),
    ],
    33: [
        Case(
            {"rollout.tensor_parallel_size": 4},
            "error[E406] heads do not split — run.toml:rollout.tensor_parallel_size. "
            "Found 4 for 14 heads, expected one of [1, 2]. "
            "Fix: use 2",
            spoil=model(num_attention_heads=14, head_dim=64),
        )
    ],
    34: [
        Case(
            {"rollout.max_new_tokens": 49},
            "error[E407] sequence too long — run.toml:rollout.max_new_tokens. "
            "Found 16 + 49 = 65, expected <= 64 (model context). "
            "Fix: at most 48 new tokens",
        )
    ],
    35: [
        Case(
            said="error[E408] custom code refused — run.toml:model.path. "
            "Found auto_map in its config.json, expected none. "
            "Fix: review the code, then model.trust_remote_code = true with a directory or org/name@COMMIT",
            spoil=model(auto_map={"AutoModel": "m.M"}),
        ),
        Case(
            {"model.trust_remote_code": True, "model.path": "org/name"},
            "error[E408] custom code not pinned — run.toml:model.path. "
            'Found code of "org/name" at whatever revision is newest, expected a directory, or org/name@COMMIT (40 hex digits). '
            "Fix: name the commit",
        ),
    ],
    36: [
        Case(
            said="error[E409] no safetensors — <here>/model. "
            "Found pytorch_model.bin, expected model.safetensors. "
            "Fix: convert it once on a trusted machine",
            spoil=model(lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin")),
        )
    ],
    37: [
        Case(
            said="error[E410] head_dim not supported — <here>/model/config.json:head_dim. "
            "Found 16, expected 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512 (CPU attention). "
            "Fix: use another model",
            spoil=model(head_dim=16),
        )
    ],
    38: [
        Case(
            said="error[E411] broken weights — <here>/model/model.safetensors. "
            "Found 127 bytes, expected 135 bytes by its header. "
            "Fix: download it again",
            spoil=model(lambda p: write_safetensors(p / "model.safetensors", missing=8)),
        ),
        Case(
            said="error[E411] broken weights — <here>/model/model.safetensors. "
            "Found 26 bytes without a header, expected a safetensors file. "
            "Fix: download it again",
            spoil=model(lambda p: (p / "model.safetensors").write_bytes(b"<html>404 not found</html>")),
        ),
    ],
    39: [
        Case(
            {"rollout.num_engines": 4},
            "error[E501] not enough GPUs — run.toml:rollout.num_engines. "
            "Found 4 in the cluster, expected 5 (engines 4 x 1, learner 1). "
            "Fix: rollout.num_engines = 3\n"
            "  role           actors  each              together\n"
            "  engine         4       1 GPU 1 CPU       4 GPU 4 CPU\n"
            "  learner rank   1       1 GPU 1 CPU       1 GPU 1 CPU\n"
            "  reward worker  1       nothing reserved\n"
            "  node                   has\n"
            "  10.0.0.1               4 GPU 64 CPU",
            spoil=on_ray(cpus=64, gpus=4),
        ),
        Case(
            {"rollout.num_engines": 4},
            "error[E501] not enough CPUs — run.toml:rollout.num_engines. "
            "Found 3 in the cluster, expected 5 (engines 4 x 1, learner 1). "
            "Fix: rollout.num_engines = 2\n"
            "  role           actors  each              together\n"
            "  engine         4       1 CPU             4 CPU\n"
            "  learner rank   1       1 CPU             1 CPU\n"
            "  reward worker  1       nothing reserved\n"
            "  node                   has\n"
            "  10.0.0.1               3 CPU",
            spoil=on_ray(cpus=3),
        ),
        Case(
            {"rollout.num_engines": 2, "rollout.tensor_parallel_size": 2},
            "error[E501] engines do not fit — run.toml:rollout.num_engines. "
            "Found room for 1 beside the learner (the largest node has 3 GPUs), expected 2 engines of 2 GPUs and 1 CPU, each on one node. "
            "Fix: rollout.num_engines = 1\n"
            "  role           actors  each              together\n"
            "  engine         2       2 GPU 1 CPU       4 GPU 2 CPU\n"
            "  learner rank   1       1 GPU 1 CPU       1 GPU 1 CPU\n"
            "  reward worker  1       nothing reserved\n"
            "  node                   has\n"
            "  10.0.0.1               3 GPU 8 CPU\n"
            "  10.0.0.2               1 GPU 8 CPU\n"
            "  10.0.0.3               1 GPU 8 CPU",
            spoil=on_ray(nodes=[{"CPU": 8.0, "GPU": gpus} for gpus in (3.0, 1.0, 1.0)]),
        ),
        Case(
            {"rollout.colocate": True},
            "error[E701] wrong packages — run.toml:rollout.colocate. "
            "Found packages for CPUs, expected those for GPUs, which engines and learner share. "
            "Fix: make install-gpu, and run with .venv-gpu/bin/millrace",
            spoil=on_a_laptop,
        ),
    ],
    40: [
        Case(
            said="error[E502] cannot reach Ray — RAY_ADDRESS=10.0.0.1:6379. "
            "Found connection refused, expected a live cluster. "
            "Fix: start it, or unset RAY_ADDRESS",
            spoil=on_ray(ConnectionError("connection refused")),
        ),
        Case(
            said="error[E502] cannot reach Ray — RAY_ADDRESS=10.0.0.1:6379. "
            "Found Token authentication is enabled but no token was found, expected a live cluster. "
            "Fix: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as the cluster has them",
            spoil=on_ray(AuthenticationError("Token authentication is enabled\nbut no token was found")),
        ),
    ],
    41: [
        Case(
            said="info: RANK=0 WORLD_SIZE=1 LOCAL_RANK=0",
            spoil=lambda w: w.instead(join_as_a_learner),
            rehearsed=False,
            code=0,
        )
    ],
    42: [
        Case(
            {"rollout.kv_cache_gib": 0.5},
            "error[E504] bad KV size — run.toml:rollout.kv_cache_gib. "
            "Found 0.5, expected an integer >= 1. "
            "Fix: rollout.kv_cache_gib = 1",
        ),
        Case(
            {"rollout.kv_cache_gib": 4, "rollout.num_engines": 2},
            "error[E504] bad KV size — run.toml:rollout.kv_cache_gib. "
            "Found 4 for each of 2 engines, expected together <= 6.5 GiB, which are free. "
            "Fix: rollout.kv_cache_gib = 3",
            spoil=patch("launch.dry_run.free_memory", lambda: 6.5 * 2**30),
        ),
        Case(
            {"rollout.num_engines": 4},
            "error[E504] bad KV size — run.toml:rollout.kv_cache_gib. "
            "Found 1 for each of 4 engines, expected together <= 2.5 GiB, which are free. "
            "Fix: rollout.num_engines = 2",
            spoil=patch("launch.dry_run.free_memory", lambda: 2.5 * 2**30),
        ),
        Case(
            said="error[E505] shared memory too small — /dev/shm. "
            "Found 64 MiB free, expected >= 128 MiB for 2 copies of the weights. "
            "Fix: docker run --shm-size=2g, or in Kubernetes an emptyDir with medium: Memory on /dev/shm",
            spoil=small_shared_memory,
        ),
    ],
    43: [
        Case(
            {"rollout.num_engines": 2, "rollout.cpu_cores": "0-1"},
            "warning[W505] engines share cores — run.toml:rollout.cpu_cores. "
            "Found 2 engines on cores 0, 1, expected separate lists. "
            'Fix: one list per engine separated by "|", or "nobind"',
            code=0,
        ),
        Case(
            {"rollout.num_engines": 2, "rollout.cpu_cores": "0-1|1-2"},
            "warning[W505] engines share cores — run.toml:rollout.cpu_cores. "
            "Found 2 engines on core 1, expected separate lists. "
            'Fix: one list per engine separated by "|", or "nobind"',
            code=0,
        ),
    ],
    44: [
        Case(
            said="error[E601] not enough disk — run.output_dir = <here>/out. "
            "Found 100 B free, expected ~2.17 MB for 2 checkpoints at a time. "
            "Fix: another place, or make room",
            spoil=patch("launch.dry_run.shutil.disk_usage", lambda _: SimpleNamespace(free=100)),
        ),
        Case(
            {"run.steps": 100, "run.checkpoint_every": 10, "run.keep_checkpoints": 6},
            "error[E601] not enough disk — run.output_dir = <here>/out. "
            "Found 4.35 MB free, expected ~7.61 MB for 7 checkpoints at a time. "
            "Fix: run.keep_checkpoints = 3",
            spoil=patch("launch.dry_run.shutil.disk_usage", lambda _: SimpleNamespace(free=4 * 16 * 67968)),
        ),
        Case(
            {"model.path": "builtin:addition"},
            "error[E601] cannot write the cache — /proc/none. "
            "Found [Errno 2] No such file or directory: '/proc/none', expected a writable folder for built-in models and rows. "
            "Fix: MILLRACE_CACHE=/a/writable/folder",
            spoil=variable("MILLRACE_CACHE", "/proc/none"),
        ),
        Case(
            {"run.output_dir": "train.jsonl/out"},
            "error[E601] cannot write the run folder — run.output_dir = <here>/train.jsonl/out. "
            "Found <here>/train.jsonl, which is no directory, expected a writable directory. "
            "Fix: another place",
        ),
        Case(
            said="error[E601] cannot write the run folder — run.output_dir = <here>/out. "
            "Found <here>, which is not writable, expected a writable directory. "
            "Fix: another place",
            spoil=read_only,
        ),
        Case(
            said="error[E601] not on every host — model.path = <here>/model. "
            "Found nothing there on 10.0.0.2, expected the same files. "
            "Fix: copy it there\n"
            "error[E601] not on every host — run.output_dir = <here>/out. "
            "Found nothing there on 10.0.0.2, expected the same files. "
            "Fix: a folder that all hosts share",
            spoil=lambda w: w.instead(on_two_hosts),
            rehearsed=False,
        ),
    ],
    45: [
        Case(
            {"run.resume": "never"},
            "error[E602] run exists — run.output_dir = <here>/out. "
            "Found step-000040, expected an empty directory. "
            "Fix: run.resume = auto or overwrite, or another name",
            spoil=lived(40),
        ),
        Case(
            {"run.resume": "never"},
            "error[E602] run exists — run.output_dir = <here>/out. "
            "Found 1 recorded rows, expected an empty directory. "
            "Fix: run.resume = auto or overwrite, or another name",
            spoil=file("out/metrics.jsonl", '{"step": 1}\n'),
        ),
        Case(
            said="error[E602] run is live — run.output_dir = <here>/out. "
            "Found pid <pid> on <host>, expected no other writer. "
            "Fix: wait for it, end it, or choose another run.output_dir",
            spoil=live,
        ),
    ],
    46: [
        Case(
            {"run.resume": "40"},
            "error[E603] nothing to resume — <here>/out/checkpoints. "
            "Found no checkpoint, expected step-000040. "
            "Fix: drop run.resume, or check run.output_dir",
        ),
        Case(
            {"run.resume": "30"},
            "error[E603] nothing to resume — <here>/out/checkpoints. "
            "Found checkpoints of steps 40, 20, expected step-000030. "
            "Fix: run.resume = 40",
            spoil=lived(20, 40),
        ),
        Case(
            said="error[E603] nothing to resume — nowhere. "
            "Found no config.toml, expected the folder of a run. "
            "Fix: check the path",
            arguments=("nowhere",),
            verb=run.resume,
        ),
        Case(
            said="warning[W603] no checkpoint in <here>/out yet: the run begins anew at step 0",
            spoil=file("out/metrics.jsonl", '{"step": 1}\n'),
            code=0,
        ),
    ],
    47: [
        Case(
            {"run.resume": "40"},
            "error[E604] checkpoint damaged — <here>/out/checkpoints/step-000040/optim_0.pt. "
            "Found sha256 <digest>…, expected <digest>…. "
            "Fix: run.resume = 30",
            spoil=flipped(40, 30, 40),
        ),
        Case(
            said="warning[W604] checkpoint damaged, skipped — <here>/out/checkpoints/step-000040/optim_0.pt. "
            "Found sha256 <digest>…, expected <digest>….",
            spoil=flipped(40, 30, 40),
            code=0,
        ),
        Case(
            said="warning[W604] checkpoint damaged, skipped — <here>/out/checkpoints/step-000040/optim_0.pt. "
            "Found sha256 <digest>…, expected <digest>….\n"
            "error[E604] no checkpoint is whole — <here>/out/checkpoints/step-000040/optim_0.pt. "
            "Found sha256 <digest>…, expected <digest>…. "
            "Fix: restore one from a copy, or begin anew with run.resume = overwrite",
            spoil=flipped(40, 40),
        ),
    ],
    48: [
        Case(
            {"rollout.group_size": 4},
            "error[E605] config does not match checkpoint — run.toml:rollout.group_size. "
            "Found 4, expected 2 as in <here>/out/checkpoints/step-000040. "
            "Fix: restore it, or start a new run (run.output_dir, or run.resume = overwrite)",
            spoil=lived(40, **{"rollout.group_size": 2}),
        ),
        Case(
            {"model.path": "other"},
            "error[E605] config does not match checkpoint — run.toml:model.path. "
            "Found <here>/other (digest <digest>), expected <here>/model (digest <digest>) as in <here>/out/checkpoints/step-000040. "
            "Fix: restore it, or start a new run (run.output_dir, or run.resume = overwrite)",
            spoil=both(
                lambda w: write_model(w.folder / "other", hidden_size=128), lived(40, **{"model.path": "model"})
            ),
        ),
        Case(
            {"data.train": "more.jsonl"},
            "error[E605] config does not match checkpoint — run.toml:data.train. "
            "Found more.jsonl (digest <digest>), expected train.jsonl (digest <digest>) as in <here>/out/checkpoints/step-000040. "
            "Fix: restore it, or start a new run (run.output_dir, or run.resume = overwrite)",
            spoil=both(rows("1", "2", "3", name="more.jsonl"), lived(40, **{"data.train": "train.jsonl"})),
        ),
    ],
    49: [
        Case(
            said="error[E701] mixed torch builds — environment. "
            "Found torchvision (CUDA), expected +cpu or none. "
            "Fix: pip uninstall torchvision torchaudio torchcodec",
            spoil=installed("torchvision", "0.28.0+cu130"),
        )
    ],
    50: [
        Case(
            said="error[E702] version out of range — transformers. "
            "Found 5.23.0, expected >=5.16.1,<5.20. "
            "Fix: reinstall from the lock file (make install)",
            spoil=installed("transformers", "5.23.0"),
        ),
        Case(
            said="error[E702] packages missing — environment. "
            "Found no nccl4py in <venv>, expected torch, ray, vllm, deepspeed, transformers, nccl4py. "
            "Fix: run in the environment that make install made",
            spoil=lambda w: w.monkeypatch.setitem(VERSIONS, "nccl4py", ">=1"),
        ),
    ],
    51: [
        Case(
            said="error[E703] no compiler — environment. "
            "Found no g++, expected g++ (engines on CPUs compile the model). "
            "Fix: install it, or rollout.vllm.enforce_eager = true",
            spoil=patch("launch.environment.shutil.which", lambda *_, **__: None),
        ),
        Case(
            {"rollout.vllm": {"enforce_eager": True}},
            spoil=patch("launch.environment.shutil.which", lambda *_, **__: None),
            code=0,
        ),
        Case(
            said="error[E503] temporary folder too long — environment:RAY_TMPDIR. "
            f"Found 100 bytes (/{'t' * 99}), expected at most {35 - len(str(os.getpid()))}: Ray keeps its sockets there. "
            "Fix: RAY_TMPDIR=/tmp",
            spoil=variable("RAY_TMPDIR", f"/{'t' * 99}"),
        ),
        Case(
            said="error[E503] no temporary folder — environment:RAY_TMPDIR. "
            "Found /proc: No such file or directory, expected a writable folder: Ray keeps its files there. "
            "Fix: RAY_TMPDIR=/tmp",
            spoil=variable("RAY_TMPDIR", "/proc/none"),
        ),
    ],
    52: [
        Case(
            said="error[E704] unsafe setting — environment:VLLM_ALLOW_INSECURE_SERIALIZATION. "
            "Found 1, expected unset. "
            "Fix: unset it",
            spoil=variable("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"),
        ),
        Case(
            said="error[E704] open dashboard — RAY_ADDRESS. "
            "Found 10.0.0.1:8265 gives its jobs to anyone, expected a token, or this machine alone. "
            "Fix: start Ray with RAY_AUTH_MODE=token or --dashboard-host=127.0.0.1, or set MILLRACE_ALLOW_OPEN_DASHBOARD=1",
            spoil=open_dashboard,
        ),
    ],
}


def test_every_row_of_the_table_is_here():
    assert sorted(TABLE) == list(range(1, 53))
    assert all(TABLE.values())


CHEAP = [number for number in TABLE if not 20 <= number <= 24]
"""Rows that start few processes."""
TRIES = [
    pytest.param(
        number,
        case,
        flags,
        id=f"{number}.{i}-{flags[0][2:] if flags else 'start'}",
        marks=[] if number in CHEAP else [pytest.mark.process],
    )
    for number, cases in TABLE.items()
    for i, case in enumerate(cases)
    for flags in ((), ("--dry-run",))[: 1 + case.rehearsed]
]


def shown(text: str, folder: Path) -> str:
    """``text`` without what is this machine's, its paths, processes, name and digests, and without the longest lists."""
    marks = {str(folder): "<here>", sys.prefix: "<venv>", socket.gethostname(): "<host>"}
    marks |= {", ".join(Rollout.model_fields): "<its settings>", ", ".join(BUILTINS): "<the built-in ones>"}
    for found, mark in marks.items():
        text = text.replace(found, mark)
    text = re.sub(r"\bpid \d+", "pid <pid>", text)
    return re.sub(r"\b[0-9a-f]{8,}\b", "<digest>", text)


@pytest.mark.parametrize(("number", "case", "flags"), TRIES)
def test_a_row(tmp_path, monkeypatch, capsys, number, case, flags):
    forbid_cluster(monkeypatch)
    world = World(write_run(tmp_path, monkeypatch), monkeypatch, dict(case.changes))
    if not case.code:
        world.instead(lambda _: asyncio.sleep(0))
    case.spoil(world)
    world.config()
    capsys.readouterr()
    code = case.verb([*case.arguments, *flags])
    out, err = capsys.readouterr()
    assert code == case.code
    assert "Traceback" not in out + err
    assert world.ray is None or world.ray.calls["actors"] == 0
    # W320 is what the doctor thinks of these functions, which are made to fail.
    told = [line for line in out.splitlines() if line.startswith(("warning[", "info:")) and "[W320]" not in line]
    lines = err.splitlines()
    assert lines[-1:] == ([f"exit code {code}"] if code else [])
    assert shown("\n".join([*told, *lines[:-1]]), tmp_path) == case.said
