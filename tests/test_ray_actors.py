"""Ray's exceptions in our words, and the end of a process on this host and on another, without a cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
)

from launch import ray_actors
from launch.ray_actors import RayActor, kill_process
from shared.actors import ActorDied, ActorUnreachable, ArgumentLost
from tests.pace import scaled


class Handle:
    """Calls end as ``script`` says, by method."""

    def __init__(self, script, place=(77, "this node")):
        self._script = script | {"__ray_call__": ray_actors._Process(*place)}

    def __getattr__(self, method):
        async def answer(*_):
            result = self._script[method]
            if isinstance(result, Exception):
                raise result
            return await result if asyncio.iscoroutine(result) else result

        return types.SimpleNamespace(remote=lambda *arguments: asyncio.ensure_future(answer(*arguments)))


@pytest.fixture
def killed(monkeypatch):
    """What was ended: process numbers, children of process numbers, and actors."""
    ended = []
    monkeypatch.setattr(ray, "kill", lambda handle: ended.append("actor"))
    monkeypatch.setattr(ray_actors, "kill_process", ended.append)
    monkeypatch.setattr(ray_actors, "kill_children", lambda pid: ended.append(-pid))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: types.SimpleNamespace(get_node_id=lambda: "this node"))
    return ended


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ActorUnavailableError("partition", b"x" * 16), ActorUnreachable),
        (RayActorError(error_msg="killed"), ActorDied),
        (ActorUnschedulableError("no such node"), ActorDied),
        (RayTaskError("save", "traceback", ObjectLostError("0", None, "")), ArgumentLost),
        (RayTaskError("save", "traceback", OSError(28, "full")), OSError),
        (RayTaskError("save", "traceback", ValueError("ours")), ValueError),
    ],
)
async def test_what_a_call_raises(killed, raised, expected):
    actor = RayActor(Handle({"save": raised}))
    with pytest.raises(expected):
        await actor.call("save").answer
    assert await RayActor(Handle({"save": 3})).call("save").answer == 3


@pytest.mark.parametrize(("node", "expected"), [("this node", [77, "actor"]), ("another", ["actor"])])
async def test_only_processes_of_this_host_are_ended_by_number(killed, node, expected):
    actor = RayActor(Handle({}, (77, node)))
    assert await actor.node() == node
    actor.kill()
    assert killed == expected
    actor.kill()  # Another process may have the number from now on.
    assert killed == [*expected, "actor"]


async def test_the_cause_of_a_death_is_not_cut_out(killed):
    frames = '  File "/x/a.py", line 3, in __init__\n    super().__init__(*arguments)\n' * 20
    text = (
        "The actor died because of an error raised in its creation task, \x1b[36mray::Engine.__init__()\x1b[39m (pid=8, "
        f"ip=127.0.0.1, actor_id=5f, repr=<launch.ray_actors.Engine object at 0x7f>)\n{frames}"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, Model architectures "
        f"['NewForCausalLM'] failed to be inspected. [type=value_error, input_value=ArgsKwargs({'x' * 600}), "
        "input_type=ArgsKwargs]\n    For further information visit https://errors.pydantic.dev/2.12/v/value_error"
    )
    with pytest.raises(ActorDied) as died:
        await RayActor(Handle({"save": RayActorError(error_msg=text)})).call("save").answer
    assert str(died.value) == (
        "The actor died because of an error raised in its creation task … pydantic_core._pydantic_core.ValidationError: "
        "1 validation error for ModelConfig Value error, Model architectures ['NewForCausalLM'] failed to be inspected."
    )


async def test_what_an_actor_that_did_not_come_up_raised_is_told(killed):
    text = "The actor died because of an error raised in its creation task\n  File x, line 3\nValueError: no such model"
    with pytest.raises(ActorDied, match=r"creation task … ValueError: no such model"):
        await RayActor(Handle({"save": RayActorError(error_msg=text)})).call("save").answer


async def test_a_process_that_ray_says_is_gone_is_not_ended_by_number(killed):
    actor = RayActor(Handle({"save": RayActorError(error_msg="killed")}))
    await actor.node()
    with pytest.raises(ActorDied):
        await actor.call("save").answer
    actor.kill()
    assert killed == ["actor"]


async def test_one_that_never_came_up_has_no_number(killed):
    handle = Handle({})
    handle._script["__ray_call__"] = asyncio.sleep(60)
    actor = RayActor(handle)
    await asyncio.sleep(0)
    actor.kill()
    assert killed == ["actor"]


async def test_a_wanted_end_leaves_the_process_to_ray(killed):
    actor = RayActor(Handle({}))
    await actor.node()
    actor.release()
    assert killed == [-77, "actor"]


def test_a_process_is_killed_with_its_children():
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    kill_process(parent.pid)
    parent.wait(5)
    psutil.wait_procs([child], timeout=scaled(5))
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    kill_process(parent.pid)  # Nothing is left to kill.


@pytest.mark.parametrize("running", [True, False])
async def test_nothing_is_cancelled_once_ray_is_shut_down(killed, monkeypatch, running):
    cancelled = []
    monkeypatch.setattr(ray, "is_initialized", lambda: running)
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    call = RayActor(Handle({"save": 3})).call("save")
    call.abort()
    assert len(cancelled) == running
    assert await call.answer == 3


def test_what_is_bound_to_a_node_goes_nowhere_else():
    where = ray_actors.RaySlot({"CPU": 2.0}, node="a" * 56)._options({})["scheduling_strategy"]
    assert (where.node_id, where.soft) == ("a" * 56, False)


LEAVES_MEMORY = """
import time
from multiprocessing.shared_memory import SharedMemory
print(SharedMemory(create=True, size=8).name, flush=True)
time.sleep(60)
"""


@pytest.mark.process
def test_shared_memory_of_a_process_that_is_ended_with_its_children_is_removed():
    child = subprocess.Popen([sys.executable, "-c", LEAVES_MEMORY], stdout=subprocess.PIPE, text=True)
    name = Path("/dev/shm") / child.stdout.readline().strip()
    assert name.exists()
    kill_process(child.pid)
    child.communicate()
    deadline = time.monotonic() + scaled(5)
    while name.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not name.exists()
