"""What all tests share: a private Ray, a private cache, a tiny model, and one trained base model for the stack tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests import budget
from tests.pace import scaled

# Set before any library is imported: nothing may reach a hub, a cluster or a home folder that is not ours.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
PRIVATE = Path(tempfile.mkdtemp(prefix="mr-"))  # Short: Ray's socket paths are limited to about 107 bytes.
os.environ["RAY_TMPDIR"] = str(PRIVATE)
# Ray's own choice is 15: engines and learners would starve beside tests that compute.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
os.environ["HOME"] = str(PRIVATE / "home")
for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ.pop(variable, None)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(PRIVATE / "inductor")
(PRIVATE / "home").mkdir()
(PRIVATE / "home" / "letter").write_text("private")
# With xdist the first process of a session makes the folder, and all of them share what is made once in it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["MILLRACE_CACHE"] = str(PRIVATE / "cache")
ROOT = Path(__file__).resolve().parent.parent

# `make test` tries properties on a few examples, `make test-thorough` on many (--hypothesis-profile=thorough).
settings.register_profile("quick", max_examples=15, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser):
    budget.add_options(parser)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that are of the stack as a whole where its tests are not asked for: to import vLLM takes seconds."""
    return True if collection_path.name.endswith("_stack.py") and "not stack" in config.option.markexpr else None


def pytest_configure(config: pytest.Config):
    # Hooks of this file would not be called for fixtures of the session, which belong to the folder above.
    config.pluginmanager.register(budget, "budget")


def pytest_sessionfinish():
    shutil.rmtree(PRIVATE, ignore_errors=True)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A random tiny Qwen2 (tied, grouped-query attention) with the addition tokenizer, on disk."""
    import torch

    from launch.builtin import TASKS, make_tokenizer, random_qwen2

    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(TASKS["addition"])
    torch.manual_seed(0)
    model = random_qwen2(
        tokenizer,
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def run_millrace():
    """``run(*arguments) -> CompletedProcess`` of ``python launch/run.py``, from the root, with a time limit."""
    import subprocess

    def run(*arguments: str, timeout: float = scaled(280.0)) -> subprocess.CompletedProcess:
        command = [sys.executable, "launch/run.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture
def private_ray():
    """Ray in this process with two counted GPUs. Tests that use it run one after the other, and none of them ends it."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=8, num_gpus=2, include_dashboard=False, namespace="tests", log_to_driver=False
        )
    return ray


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A whole run of the quickstart that all tests of a session look at, a ``WatchedRun``."""
    from tests.whole_run import watched_run

    yield from watched_run(tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="session")
def ranks_of(tmp_path_factory):
    """``ranks_of(count) -> Ranks``: learner ranks on real DeepSpeed that all tests of a session share."""
    from tests.learner_groups import Ranks

    made: dict[int, Ranks] = {}

    def of(count: int) -> Ranks:
        if count not in made:
            made[count] = Ranks(tmp_path_factory.mktemp("ranks"), count)
        return made[count]

    yield of
    for ranks in made.values():
        ranks.close()


@pytest.fixture
async def make_pool(monkeypatch):
    """``make_pool(engines, **changes) -> (pool, world)`` of scripted engines; see ``tests/engine_worlds.py``."""
    from tests.engine_worlds import pools

    async with pools(monkeypatch) as build:
        yield build
