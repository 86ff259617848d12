"""Starts that are killed at any moment, and terminals that close: what is left delays and costs nothing."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from shared.checkpoints import all_of
from shared.weights import orphans
from tests.conftest import ROOT
from tests.fakes import write_config, write_rows
from tests.pace import scaled
from tests.whole_run import own_environment, processes_of

pytestmark = [pytest.mark.stack, pytest.mark.chaos]
KILLS = 20
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own, which look for their control plane for a minute before they end; they hold nothing."""


@pytest.fixture(scope="module")
def session():
    """A folder for the Ray of these tests alone."""
    place = tempfile.mkdtemp(prefix="mk-")
    yield place
    for process in processes_of(place):
        with contextlib.suppress(psutil.Error):
            process.kill()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def begin(tmp_path_factory, model_dir, session):
    """``begin(folder, **changes) -> (process, log)``: a run of a tiny model, as the leader of a group of processes."""
    place = tmp_path_factory.mktemp("starts")
    write_rows(place / "train.jsonl", [{"prompt": f"{i}+{i}"} for i in range(20, 40)])

    def call(folder: Path, **changes):
        settings = {
            "run": {"output_dir": str(folder), "steps": 10_000, "checkpoint_every": 1000},
            "model.path": str(model_dir),
            "data.train": str(place / "train.jsonl"),
            "rollout": {"group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 12},
            "rollout.vllm": {"enforce_eager": True},
            "reward.functions": [{"function": "length"}],
            "learner.prompts_per_step": 2,
        }
        config = write_config(place / "run.toml", **settings | changes)
        log = place / "log"
        with log.open("wb") as stream:
            command = [sys.executable, "launch/run.py", str(config)]
            environment = own_environment(session)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        return process, log

    return call


def until(process, log: Path, words: str) -> float:
    """Seconds until the run has said ``words``."""
    began = time.monotonic()
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - began < scaled(240), log.read_text()
        time.sleep(0.05)
    return time.monotonic() - began


def ended(process, log: Path, number: int, everybody: bool = False) -> str:
    """Send the signal ``number``, to all of the group or the driver alone; what the run has said at its end."""
    (os.killpg if everybody else os.kill)(process.pid, number)
    assert process.wait(scaled(60)) == 128 + number, log.read_text()
    return log.read_text()


def left(session: str) -> list[str]:
    """Processes of ``session`` that still live, after a while."""
    for _ in range(100):
        lines = []
        for process in processes_of(session):
            try:
                lines.append(" ".join(process.cmdline()).strip())
            except psutil.Error:
                continue
        if not (found := [line for line in lines if line and line not in AGENTS]):
            return []
        time.sleep(0.1)
    return found


def test_a_terminal_that_closes_costs_nothing_that_was_learned(begin, session, tmp_path):
    """SIGHUP reaches every process of the terminal: those of Ray must outlive it until the learner has saved."""
    folder = tmp_path / "run"
    process, log = begin(folder)
    until(process, log, "step     1/")
    said = ended(process, log, signal.SIGHUP, everybody=True)
    step = int(all_of(folder / "checkpoints")[0].name.removeprefix("step-"))
    assert step >= 1
    assert f"interrupted by SIGHUP; step {step} is saved, nothing is lost. To go on: the same command, or " in said
    assert said.endswith("exit code 129\n")
    process, log = begin(folder)
    until(process, log, f"going on from {folder}/checkpoints/step-{step:06d}")
    said = ended(process, log, signal.SIGTERM)
    assert f"interrupted by SIGTERM; step {step} is saved" in said or f"step {step + 1} is saved" in said
    assert left(session) == []


@pytest.mark.timeout(900)
def test_a_start_killed_at_any_second_leaves_nothing_that_delays_the_next(begin, session, tmp_path):
    folder, chance, segments = tmp_path / "run", random.Random(0), set(orphans(older_than_s=0))
    process, log = begin(folder)
    usual = until(process, log, "up after")
    until(process, log, "step     1/")
    ended(process, log, signal.SIGTERM)
    saved = all_of(folder / "checkpoints")
    assert saved
    for _ in range(KILLS):  # Most of them early, where a start is a matter of many small things.
        process, log = begin(folder, **{"run.resume": "overwrite"})
        time.sleep(min(usual, scaled(25)) * chance.random() ** 4)
        process.kill()
        process.wait()
    process, log = begin(folder)
    assert until(process, log, "up after") < 2 * usual + scaled(10)
    assert until(process, log, f"going on from {saved[0]}") < scaled(10)
    ended(process, log, signal.SIGTERM)
    assert left(session) == []
    assert set(orphans(older_than_s=0)) <= segments
    assert not list(folder.glob("replaced*"))
