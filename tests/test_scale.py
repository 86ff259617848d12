"""``millrace scale``: the wish, the run's answer, refusals, and a run that is not there; and room made for a lost learner."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from launch import parts as launch_parts
from launch import scale
from launch.parts import Parts
from launch.resume import take_lock
from shared.errors import InputError, LearnerLost


class Engines:
    """Knows how many it has."""

    scalable = True

    def __init__(self, size=2):
        self.size, self.asked, self.resets = size, [], 0

    async def scale(self, engines):
        if engines == 13:
            raise RuntimeError("no control plane")
        if engines < 1:
            raise InputError("E507", "cannot scale", "command line:--engines", str(engines), ">= 1", "--engines 1")
        self.asked.append(engines)
        before, self.size = self.size, engines
        return f"{before} -> {engines} engines"

    async def reset(self):
        self.resets += 1


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A run folder whose run obeys, in a thread of its own."""
    monkeypatch.setattr(scale, "LOOK_EVERY_S", 0.01)
    lock, engines, ended = take_lock(tmp_path), Engines(), threading.Event()

    async def run():
        task = asyncio.create_task(scale.obey(tmp_path, engines))
        while not ended.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    yield tmp_path, engines
    ended.set()
    thread.join()
    lock.close()


def test_a_run_is_scaled(live, capsys):
    folder, engines = live
    assert scale.main([str(folder), "--engines", "5"]) == 0
    assert scale.main([str(folder), "--engines", "1"]) == 0
    assert engines.asked == [5, 1]
    assert capsys.readouterr().out.splitlines()[-1] == "5 -> 1 engines"


def test_what_the_run_refuses_is_told(live, capsys):
    folder, _ = live
    assert scale.main([str(folder), "--engines", "0"]) == 2
    assert capsys.readouterr().err.startswith(
        "error[E507] cannot scale — command line:--engines. Found 0, expected >= 1"
    )


def test_what_goes_wrong_in_the_run_is_told_and_the_run_goes_on(live, capsys):
    folder, engines = live
    assert scale.main([str(folder), "--engines", "13"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "not scaled: RuntimeError: no control plane"
    assert scale.main([str(folder), "--engines", "4"]) == 0
    assert engines.asked == [4]


def test_without_a_run_there_is_nothing_to_scale(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert scale.main([str(folder), "--engines", "3"]) == 2
        assert capsys.readouterr().err.startswith(f"error[E603] no such run — command line:{folder}")
    take_lock(tmp_path).close()  # One that has ended.
    assert scale.main([str(tmp_path), "--engines", "3"]) == 2


def test_a_run_that_does_not_answer(tmp_path, capsys):
    with take_lock(tmp_path):
        assert scale.main([str(tmp_path), "--engines", "3", "--timeout-s", "0.2"]) == 1
    assert "no answer within 0.2 s" in capsys.readouterr().err


# --- a learner whose host is lost ---


class Learners:
    """Has a place once so few engines are left."""

    def __init__(self, engines, fits_beside):
        self.engines, self.fits_beside, self.events = engines, fits_beside, []

    def end(self):
        self.events.append("end")

    async def has_place(self, limit_s):
        assert self.engines.resets == 1, "engines that come back meanwhile would ask for weights that are gone"
        await asyncio.sleep(0)
        return self.engines.size <= self.fits_beside

    async def start(self):
        self.events.append("start")


@pytest.mark.parametrize(("size", "fits", "asked"), [(2, 2, []), (3, 2, [2, 3]), (4, 1, [3, 2, 1, 4])])
async def test_engines_make_room_for_a_lost_learner_and_come_back_later(size, fits, asked, capsys):
    engines = Engines(size)
    learners = Learners(engines, fits)
    await Parts(engines, None, learners, False).rebuild_learner()
    assert engines.asked == asked
    assert (learners.events, engines.resets) == (["end", "start"], 1)
    shown = capsys.readouterr().out
    assert ("it makes room for the learner" in shown) == bool(asked)


@pytest.mark.parametrize("scalable", [True, False])
async def test_a_learner_without_a_place_is_lost_in_the_end(monkeypatch, scalable):
    monkeypatch.setattr(launch_parts, "ROOM_LIMIT_S", 50.0)
    engines = Engines(2)
    engines.scalable = scalable
    with pytest.raises(LearnerLost, match="no place for the learner's ranks within 50 s"):
        await Parts(engines, None, Learners(engines, 0), False).rebuild_learner()
    assert engines.asked == ([1] if scalable else [])


async def test_a_learner_that_was_lost_is_linked_with_the_engines_again():
    engines = Engines(2)
    learners = Learners(engines, 2)

    async def complete(limit_s):
        learners.events.append("the engines run")

    engines.link, engines.workers = SimpleNamespace(join="join", complete=complete), 2

    async def connect(join, workers):
        learners.events.append((join, workers))

    learners.connect = connect
    await Parts(engines, None, learners, True).rebuild_learner()
    assert learners.events == ["end", "start", "the engines run", ("join", 2)]


def test_an_answer_that_cannot_be_written_does_not_end_the_obedience(live, monkeypatch, capsys):
    folder, engines = live
    write = scale._write

    def full(path, content):
        if path.name == scale.ANSWERED:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(scale, "_write", full)
    assert scale.main([str(folder), "--engines", "5", "--timeout-s", "1"]) == 1
    assert "warning[W601] no answer written" in capsys.readouterr().out
    monkeypatch.setattr(scale, "_write", write)
    assert scale.main([str(folder), "--engines", "4", "--timeout-s", "10"]) == 0
    assert engines.asked == [5, 4]
