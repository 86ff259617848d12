"""A small run that a test spoils, for ``test_inputs.py`` and ``test_input_rows.py``: its files, and what the user reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import run
from launch.cluster import connect  # The real one, before any test forbids it.
from tests.fakes import fake_ray, write_config, write_model, write_rows

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
REWARDS = "def plain(completions): return [0.0] * len(completions)\n"
Said = tuple[int, str, str]
"""Exit code, stdout, stderr."""


def forbid_cluster(monkeypatch: Any) -> None:
    """Whoever imports Ray or connects fails the test."""

    def refuse(_: Any) -> None:
        pytest.fail("the cluster was touched before the input was checked")

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("launch.cluster.connect", refuse)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def write_run(folder: Path, monkeypatch: Any) -> Path:
    """Make ``folder`` the working directory, with a model, training rows and a reward file."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MILLRACE_CACHE", str(folder / "cache"))
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", ROWS)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def answering(place: Path, capsys: Any) -> Callable[..., Said]:
    """``answer(*flags, **changes)``: the start of a run in ``place`` with a changed configuration."""

    def call(*flags: str, **changes: Any) -> Said:
        config = write_config(place / "run.toml", **{"run.output_dir": str(place / "out")} | changes)
        code = run.main([str(config), *flags])
        return code, *capsys.readouterr()

    return call


def fake_cluster(monkeypatch: Any, error: Exception | None = None, **size: Any) -> Any:
    """A fake Ray in place of the forbidden one, without actors; to join it may end in ``error``."""
    ray = fake_ray(monkeypatch, **size)
    if error:
        ray.init = lambda **_: (_ for _ in ()).throw(error)
    monkeypatch.setattr("launch.cluster.connect", connect)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    return ray
