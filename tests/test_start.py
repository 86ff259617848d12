"""The start of a run: what the screen says, what every host must have, and that nothing is compiled for the learner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import parts, run
from launch.cluster import connect, ray_session
from launch.parts import started
from launch.placement import Needs
from launch.shared_memory import check_hosts, shared_memory_bytes
from shared.errors import InputError, InputErrors, MillraceError
from tests.bad_input import write_run
from tests.conftest import ROOT
from tests.fakes import fake_ray, make_config, write_config

# --- the screen ---


@asynccontextmanager
async def nothing(*_):
    yield SimpleNamespace(where=nowhere, engines=None)


async def nowhere(*_):
    return "here: learner-0"


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """``start(*flags, **changes)``: what a start prints, without a Ray and with parts that are there at once."""
    write_run(tmp_path, monkeypatch)
    monkeypatch.setattr("launch.cluster.ray_session", nothing)
    monkeypatch.setattr("launch.cluster.check_resources", lambda config, _: Needs.of(config, on_gpu=False))
    monkeypatch.setattr("launch.cluster.claim", lambda _: None)
    monkeypatch.setattr("launch.parts.started", nothing)
    monkeypatch.setattr("launch.scale.obey", nowhere)
    monkeypatch.setattr("launch.room.room_of", lambda _: None)
    monkeypatch.setattr(run.Session, "_lives", nowhere)

    def call(*flags, **changes):
        config = write_config(tmp_path / "run.toml", **{"run.output_dir": str(tmp_path / "out")} | changes)
        assert run.main([str(config), *flags]) == 0
        return capsys.readouterr().out.splitlines()

    return call


PARAMETERS = 67968
"""Of the model that ``write_model`` makes."""
PHASES = (
    r"checking run\.toml: settings, model, data and rewards",
    r"model of 68 thousand parameters, 4 rows to train on, 0 to evaluate on",
    r"starting a private Ray",
    r"starting 1 engine, 1 learner rank and 2 reward workers; what they print is in .*/out/logs",
    r"engines compile the model as they start; rollout\.vllm\.enforce_eager = true leaves it out",
    r"engines, learner and reward workers up after \d+ s \(here: learner-0\)",
)


def test_each_phase_of_a_start_is_a_line_once_and_in_order(start):
    lines = start(**{"reward.workers": 2})
    places = [[i for i, line in enumerate(lines) if re.fullmatch(phase, line)] for phase in PHASES]
    assert [len(found) for found in places] == [1] * len(PHASES), "\n".join(lines)
    assert places == sorted(places)


def test_a_start_names_the_cluster_it_waits_for_and_no_compiler_that_is_not_used(start, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    lines = start(**{"rollout.vllm": {"enforce_eager": True}, "rollout.num_engines": 2})
    assert "waiting for Ray at 10.0.0.1:6379" in lines
    assert any(line.startswith("starting 2 engines, 1 learner rank") for line in lines)
    assert not [line for line in lines if "private Ray" in line or "compile" in line]


def test_a_dry_run_tells_no_phases(start):
    assert not [line for line in start("--dry-run") if line.startswith(("checking ", "starting ", "waiting "))]


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_start_that_overwrites_says_which_run_it_replaces(start, tmp_path, flags):
    said = f'replaces a run of 100 steps in {tmp_path}/out, once it has a checkpoint (run.resume = "overwrite")'
    assert said not in start(*flags, **{"run.resume": "overwrite"})
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 100, "reward": 0.5}\n')
    assert start(*flags, **{"run.resume": "overwrite"}).count(said) == 1
    assert said not in start(*flags)


@pytest.mark.parametrize("told", [True, False])
def test_each_part_says_when_it_is_ready_if_the_run_has_a_folder(monkeypatch, tmp_path, capsys, told):
    async def reserved(needs):
        return SimpleNamespace(needs=needs, ranks=[], engines=[], rewards=[])

    pool = SimpleNamespace(start=nowhere, close=nowhere)
    monkeypatch.setattr(parts, "reserve", reserved)
    monkeypatch.setattr(parts, "check_files", nowhere)
    for name in ("RewardPool", "LearnerGroup", "EnginePool"):
        monkeypatch.setattr(parts, name, lambda *_: pool)

    async def go():
        config = make_config()
        async with started(config, Needs.of(config, on_gpu=False), tmp_path if told else None):
            pass

    asyncio.run(go())
    said = ["engines ready after 0 s", "learner ready after 0 s", "reward workers ready after 0 s"]
    assert sorted(capsys.readouterr().out.splitlines()) == (said if told else [])


def test_a_long_start_says_again_who_is_missing_and_where_the_logs_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parts, "START_TOLD_EVERY_S", 0.1)

    async def slow(*_):
        await asyncio.sleep(0.35)

    async def reserved(needs):
        await slow()
        return SimpleNamespace(needs=needs, ranks=[], engines=[], rewards=[])

    monkeypatch.setattr(parts, "reserve", reserved)
    monkeypatch.setattr(parts, "check_files", nowhere)
    for name, wait in (("RewardPool", nowhere), ("LearnerGroup", slow), ("EnginePool", slow)):
        monkeypatch.setattr(parts, name, lambda *_, wait=wait: SimpleNamespace(start=wait, close=nowhere))

    async def go(place):
        async with started(make_config(), Needs.of(make_config(), on_gpu=False), place):
            await asyncio.sleep(0.2)  # Nothing is missing any more.

    asyncio.run(go(None))
    assert capsys.readouterr().out == ""
    asyncio.run(go(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    again = [line for line in lines if line.startswith("still waiting for ")]
    assert re.fullmatch(r"still waiting for room on the cluster, \d+ s so far \(logs: .*/logs\)", again[0])
    assert re.fullmatch(r"still waiting for engines and learner, \d+ s so far \(logs: .*/logs\)", again[-1])
    assert lines[-1].startswith(("engines ready", "learner ready"))


def test_colocated_the_learner_is_up_before_any_engine_starts(monkeypatch, tmp_path):
    async def reserved(needs):
        return SimpleNamespace(needs=needs, ranks=[], engines=[], rewards=[])

    events = []

    def pool(name):
        async def start():
            events.append(f"{name} starts")
            await asyncio.sleep(0.01)
            events.append(f"{name} up")

        return lambda *_: SimpleNamespace(start=start, close=nowhere)

    monkeypatch.setattr(parts.Parts, "link", nowhere)
    monkeypatch.setattr(parts, "reserve", reserved)
    monkeypatch.setattr(parts, "_sized", lambda config, _: config)
    for name, word in (("RewardPool", "rewards"), ("LearnerGroup", "learner"), ("EnginePool", "engines")):
        monkeypatch.setattr(parts, name, pool(word))

    async def go():
        config = make_config(**{"rollout.colocate": True})
        async with started(config, Needs.of(config, on_gpu=True)):
            pass

    asyncio.run(go())
    assert events.index("learner up") < events.index("engines starts")
    assert "rewards up" in events


def test_a_private_ray_that_does_not_start_is_one_line_with_its_logs(monkeypatch, tmp_path):
    def overloaded(**_):
        raise Exception("The current node timed out during startup.\nThis could happen ...")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("launch.cluster.check_temporary_folder", lambda: None)  # That of a test is long.
    fake_ray(monkeypatch).init = overloaded
    with pytest.raises(MillraceError) as caught:
        connect(make_config())
    assert caught.value.exit_code == 1
    said = "a private Ray did not start: The current node timed out during startup. This could happen ..."
    found = re.fullmatch(rf"{re.escape(said)} \(logs: ({tmp_path}/ray-\w+)/r/session_latest/logs\)", str(caught.value))
    assert found
    assert Path(found[1]).is_dir()


@pytest.mark.parametrize(("error", "kept"), [(None, False), (InputError("E1", *"abcde"), False), (OSError("x"), True)])
def test_the_folder_of_a_private_ray_is_closed_to_others_and_removed_when_it_ends_well(
    monkeypatch, tmp_path, capsys, error, kept
):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "made"))
    monkeypatch.setattr("launch.cluster.check_temporary_folder", lambda: None)  # That of a test is long.
    monkeypatch.setattr("launch.cluster.keep_private", lambda: None)
    used = []

    def init(_temp_dir, **_):
        used.append(Path(_temp_dir))
        used[0].mkdir()
        used[0].chmod(0o777)  # As Ray does.

    fake_ray(monkeypatch).init = init

    async def go() -> None:
        async with ray_session(make_config()):
            assert used[0].parent.stat().st_mode & 0o777 == 0o700
            if error:
                raise error

    with contextlib.suppress(OSError, InputError):
        asyncio.run(go())
    assert used[0].parent.parent == tmp_path / "made"
    assert used[0].parent.exists() is kept
    assert (f"Ray's own logs: {used[0]}/session_latest/logs" in capsys.readouterr().out) is kept


# --- shared memory on the hosts of a cluster ---


@pytest.mark.parametrize(
    ("changes", "on_gpu", "size"),
    [
        ({}, False, 2 * PARAMETERS * 4),
        ({"model.dtype": "bfloat16"}, False, 2 * PARAMETERS * 2),
        ({}, True, 0),
        ({"rollout.weights": "host"}, True, 2 * PARAMETERS * 4),
        ({"rollout.colocate": True}, True, 0),
    ],
)
def test_shared_memory_that_a_run_takes(tmp_path, monkeypatch, changes, on_gpu, size):
    write_run(tmp_path, monkeypatch)
    assert shared_memory_bytes(make_config(**changes), on_gpu) == size


@pytest.mark.parametrize(("address", "refused"), [("10.0.0.1:6379", ["b", "d"]), ("", [])])
def test_every_host_that_gets_weights_must_have_room_for_them(tmp_path, monkeypatch, address, refused):
    write_run(tmp_path, monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", address)

    def slot(host, free):
        async def there(_):
            return host, free

        return SimpleNamespace(run=there)

    needs = Needs.of(make_config(), on_gpu=False)
    need = 2 * PARAMETERS * 4
    ranks = [slot("a", need), slot("c", 0)]  # The second rank sends nothing.
    engines = [slot("a", need), slot("b", need - 1), slot("b", need - 1), slot("d", need // 2)]
    problems = []
    try:
        asyncio.run(check_hosts(make_config(), SimpleNamespace(needs=needs, ranks=ranks, engines=engines)))
    except InputErrors as errors:
        problems = errors.problems
    assert [problem.code for problem in problems] == ["E505"] * len(refused)
    assert all(f" on {host}" in problem.found for host, problem in zip(refused, problems, strict=True))


# --- the learner ---

JOIN = """
import os
from learner.distributed import join_group
from tests.fakes import make_config
join_group(make_config(), 0, 1, ("127.0.0.1", 0))
import deepspeed, torch
assert deepspeed.comm.is_initialized() and torch.distributed.get_backend() == "gloo"
values = torch.arange(3.0)
deepspeed.comm.all_reduce(values)
print("joined", values.tolist(), flush=True)
os._exit(0)
"""


@pytest.mark.process
def test_a_learner_on_cpus_compiles_nothing_and_waits_for_nobodys_lock(tmp_path):
    locks = [tmp_path / "set" / "deepspeed_shm_comm" / "lock"]
    locks.append(tmp_path / ".cache" / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock")
    for lock in locks:  # As a build that was killed leaves them.
        lock.parent.mkdir(parents=True)
        lock.touch()
    (tmp_path / "empty").mkdir()
    common = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    tools = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=os.environ | common | extra,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for extra in (
            {"TORCH_EXTENSIONS_DIR": str(tmp_path / "set"), "PATH": tools},
            {"PATH": str(tmp_path / "empty")},  # No compiler, no ninja.
        )
    ]
    try:
        for process in starts:
            out, _ = process.communicate(timeout=100)
            assert "joined [0.0, 1.0, 2.0]" in out, out
    finally:
        for process in starts:
            process.kill()
    for lock in locks:
        assert list(lock.parent.iterdir()) == [lock]
