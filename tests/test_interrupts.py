"""What ends a command from outside: signals, what a run saves then, what it says, and what becomes of a run it replaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from launch import interrupts, keeper, replaced
from launch.interrupts import Ended, Interrupted, cancelling, kept, raised, story
from launch.options import Options, guarded
from launch.resume import undo_unfinished
from launch.run_folder import RunFolder
from shared.checkpoints import all_of
from shared.errors import FleetExhausted
from tests.fakes import FakeEngines, FakeLearners, make_config, make_group, write_model
from tests.test_controller import Loop

METRICS = {"reward": 0.5, "advantages/abs_mean": 1.0, "throughput/rollout_tokens_per_second": 1234.5}


@pytest.fixture(autouse=True)
def handlers():
    """Signals behave as they did before the test."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield before
    assert {number: signal.getsignal(number) for number in interrupts.SIGNALS} == before


# --- how a verb ends ---


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_verb_in_two_lines(number, code, capsys):
    def verb(_):
        os.kill(os.getpid(), getattr(signal, number))
        raise AssertionError("it went on")

    assert guarded([], verb, Options("x", "Text.")) == code
    assert capsys.readouterr().err == f"interrupted\nexit code {code}\n"


def test_a_signal_that_is_ignored_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    try:
        assert guarded([], lambda _: os.kill(os.getpid(), signal.SIGHUP), Options("x", "Text.")) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_an_interrupted_run_says_is_its_last_line_but_one(capsys):
    def verb(_):
        raise Interrupted(signal.SIGTERM, "step 3 is saved")

    assert guarded([], verb, Options("x", "Text.")) == 143
    assert capsys.readouterr().err == "interrupted by SIGTERM; step 3 is saved\nexit code 143\n"


def test_ray_s_handlers_do_not_stay_and_its_processes_outlive_a_terminal(handlers):
    with raised():
        ours = signal.getsignal(signal.SIGTERM)
        assert ours != handlers[signal.SIGTERM]
        with kept():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # Children inherit that.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is ours


# --- a run ---


async def test_the_first_signal_cancels_and_the_second_ends_the_process(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(interrupts.os, "_exit", codes.append)
    task = asyncio.ensure_future(asyncio.sleep(60))
    with cancelling(task) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert (task.cancelled(), caught.number, codes) == (True, signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]
    shown = capfd.readouterr()
    assert shown.out == "SIGTERM: ending the run; a second signal ends it at once\n"
    assert shown.err == "interrupted again: ended at once\nexit code 130\n"


async def cut(loop, moment=lambda loop: True):
    """Run ``loop`` and cancel it at the first ``moment``."""
    task = asyncio.ensure_future(loop.run())
    for _ in range(10_000):
        if moment(loop) or task.done():
            break
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_interrupted_run_finishes_the_step_under_way_and_saves_it(capsys):
    loop = Loop(learners=FakeLearners(delay=0.05), **{"run.steps": 50})
    await cut(loop, lambda loop: loop.learners.calls == 3)
    (_, state, _) = loop.recorder.commits[-1]
    assert state["version"] == loop.learners.version == 3
    assert [step for step, *_ in loop.recorder.steps] == [1, 2, 3]
    assert "saving what was learned, the step under way included, within 120 s" in capsys.readouterr().out


async def test_nothing_is_saved_where_nothing_was_learned(capsys):
    loop = Loop(FakeEngines(receive_delay=5.0))
    await cut(loop)
    assert (loop.recorder.commits, loop.learners.saved, capsys.readouterr().out) == ([], [], "")


async def test_an_interrupt_waits_for_the_checkpoint_under_way_and_begins_no_other():
    loop = Loop(**{"run.steps": 50, "run.checkpoint_every": 2})
    begun = []
    write = loop.learners.save

    async def save(directory):
        begun.append(directory)
        await asyncio.sleep(0.05)
        await write(directory)

    loop.learners.save = save
    await cut(loop, lambda _: begun)
    assert [state["version"] for _, state, _ in loop.recorder.commits] == [2]
    assert len(begun) == len(loop.learners.saved) == 1


async def test_an_interrupt_has_a_limit_of_time(monkeypatch, capsys):
    monkeypatch.setattr(keeper, "INTERRUPT_LIMIT_S", 0.05)
    loop = Loop(learners=FakeLearners(delay=20.0))
    await cut(loop, lambda loop: loop.learners.calls)
    assert loop.recorder.commits == []
    assert "warning[W903] not all was saved before the end: no answer within 0.05 s" in capsys.readouterr().out


async def test_a_run_that_is_cut_short_says_so_to_its_folder_first():
    for failure in (None, FleetExhausted("gone")):
        loop, told = Loop(learners=FakeLearners(delay=0.01), **{"run.steps": 50}), []
        loop.recorder.cut_short = lambda told=told, loop=loop: told.append(len(loop.recorder.commits))
        if failure is None:
            await cut(loop, lambda loop: loop.learners.calls == 2)
        else:
            loop.learners.during = lambda loop=loop, failure=failure: setattr(loop.engines, "fail", lambda _: failure)
            with pytest.raises(FleetExhausted):
                await loop.run()
        assert told == [0]
        assert len(loop.recorder.commits) == 1


@pytest.mark.parametrize(
    ("saved", "learned", "old", "resume", "said"),
    [
        (None, 0, "", "auto", "nothing was learned yet. The same command begins again"),
        (None, 7, "", "auto", "no checkpoint was written: 7 steps are lost. The same command begins again"),
        (7, 7, "", "auto", "step 7 is saved, nothing is lost. To go on: the same command, or millrace resume {run}"),
        (7, 8, "", "7", "step 7 is saved, 1 step is after it lost. To go on: millrace resume {run}"),
        (7, 7, "", "overwrite", "step 7 is saved, nothing is lost. To go on: millrace resume {run}"),
        (
            None,
            0,
            "run of 100 steps",
            "overwrite",
            "the run of 100 steps that it was to replace is back in {path}, and nothing was learned yet. "
            "The same command begins again",
        ),
        (
            4,
            4,
            "run of 100 steps",
            "overwrite",
            "the run of 100 steps that it was to replace is back in {path}, and step 4 of this one is saved, "
            "nothing is lost. To go on: millrace resume {run}/unfinished",
        ),
    ],
)
def test_what_an_interrupt_leaves_is_said_and_true(tmp_path, monkeypatch, saved, learned, old, resume, said):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "my"
    if saved is not None:
        (folder / ("unfinished" if old else "") / "checkpoints" / f"step-{saved:06d}").mkdir(parents=True)
    assert story(folder, learned, old, resume) == said.format(run="runs/my", path=folder)


def test_a_path_with_a_space_is_quoted_for_the_shell(tmp_path):
    (tmp_path / "a b" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert story(tmp_path / "a b", 1, "", "auto").endswith(f"millrace resume '{tmp_path}/a b'")


# --- a run that takes another's place ---


@pytest.fixture
def place(tmp_path):
    """``place(**changes)`` opens the folder ``out``, with a model on disk."""
    write_model(tmp_path / "model")
    return lambda **changes: RunFolder(
        make_config(**{"model.path": str(tmp_path / "model"), **changes}), tmp_path / "out"
    )


STATE = {"version": 3, "stopping": {}}


def trained(folder, steps, saved=True):
    """Steps of a run, and a checkpoint."""
    for step in range(1, steps + 1):
        folder.step(step, METRICS, [make_group()])
    if saved:
        asyncio.run(folder.commit(folder.draft(steps), STATE | {"version": steps}, []))
    return folder


def content(folder: Path):
    """Every file of a folder, but the lock."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def old_run(place):
    """A finished run of three steps, and its files."""
    old = trained(place(), 3)
    old.finish()
    return content(old.path)


def test_an_old_run_stays_until_the_new_one_has_a_checkpoint(place, capsys):
    files = old_run(place)
    new = place(**{"run.resume": "overwrite"})
    assert (new.replaced, content(new.path / "replaced")) == ("run of 3 steps", files)
    trained(new, 2, saved=False)
    assert content(new.path / "replaced") == files
    trained(new, 2)
    assert not list(new.path.glob("replaced*"))
    new.finish()
    assert [path.name for path in all_of(new.path / "checkpoints")] == ["step-000002"]
    assert "is back" not in capsys.readouterr().out
    assert not (new.path / "unfinished").exists()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_new_run_that_ends_before_its_first_checkpoint_gives_the_place_back(place, capsys, steps):
    files = old_run(place)
    new = place(**{"run.resume": "overwrite"})
    if steps:  # What an interrupted run saves is no reason to remove the old one.
        new.cut_short()
        trained(new, steps)
    new.finish()
    assert {path: data for path, data in content(new.path).items() if path.parts[0] != "unfinished"} == files
    unfinished = new.path / "unfinished"
    assert len(all_of(unfinished / "checkpoints")) == bool(steps)
    said = capsys.readouterr().out
    assert f"the run of 3 steps is back in {new.path}: this one did not come to its first checkpoint" in said
    assert f"run folder: {unfinished} (" in said
    again = place(**{"run.resume": "overwrite"})  # And the next one begins like the first.
    assert content(again.path / "replaced") == files
    assert not unfinished.exists()
    again.close()


def test_a_learner_that_was_built_again_does_not_keep_the_old_run_for_ever(place):
    old_run(place)
    new = place(**{"run.resume": "overwrite"})
    new.cut_short()
    new.rewind(None)
    trained(new, 2)
    assert not list(new.path.glob("replaced*"))
    new.close()


def test_files_of_a_start_that_came_to_nothing_are_not_kept(place, capsys):
    place().finish()
    new = place(**{"run.resume": "overwrite"})
    assert (new.replaced, list(new.path.glob("replaced*"))) == ("", [])
    new.finish()
    assert "is back" not in capsys.readouterr().out


class Killed(BaseException):
    pass


def killed_at(monkeypatch, moment, work):
    """Do ``work`` until the change number ``moment`` of a file; whether it came to its end."""
    count = 0

    def stop(call):
        def counted(*arguments, **named):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return call(*arguments, **named)

        return counted

    with monkeypatch.context() as patch:
        for name in ("rename", "mkdir", "rmdir", "unlink"):
            patch.setattr(Path, name, stop(getattr(Path, name)))
        patch.setattr(replaced.shutil, "rmtree", stop(shutil.rmtree))
        try:
            work()
        except Killed:
            return False
    return True


def test_whatever_moment_a_replacement_is_killed_at_the_old_run_comes_back_whole(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def write(name):
        for file in ("checkpoints/step-000001/x", "samples/s.parquet", "metrics.jsonl", "config.toml"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps({"step": 1, "run": name}))

    def replace():
        replaced.set_aside(folder)
        write("new")
        replaced.bring_back(folder)

    for first in range(100):
        for second in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            write("old")
            ended = killed_at(monkeypatch, first, replace)
            back = killed_at(monkeypatch, second, lambda: replaced.bring_back(folder))
            replaced.bring_back(folder)
            own = {path: data for path, data in content(folder).items() if path.parts[0] != "unfinished"}
            assert {json.loads(data)["run"] for data in own.values()} == {"old"}, (first, second)
            assert len(own) == 4
            assert not list(folder.glob("replaced*"))
            if back:
                break
        if ended:
            return
    raise AssertionError("it never ended")


def test_the_next_start_brings_back_what_a_killed_one_was_to_replace(place, capsys):
    files = old_run(place)
    new = trained(place(**{"run.resume": "overwrite"}), 2, saved=False)
    new._metrics.close()
    new._lock.close()  # As a kill does.
    undo_unfinished(new.path)
    assert {path: data for path, data in content(new.path).items() if path.parts[0] != "unfinished"} == files
    assert f"the run of 3 steps is back in {new.path}: what was to replace it was killed" in capsys.readouterr().out
    undo_unfinished(new.path)
    assert capsys.readouterr().out == ""


def test_ended_is_told_apart_from_ctrl_c():
    assert isinstance(Ended(signal.SIGTERM), KeyboardInterrupt)
    assert Ended().number == signal.SIGINT
