"""The time ledger: exclusive states, contiguous slices, sums that equal the wall clock, and a trace that opens."""

from __future__ import annotations

import contextlib
import json
import random
import time

import pytest

from shared.ledger import TimeBook, TimeLedger, TimeSlice
from tests.pace import scaled


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def pass_time(ledger, clock, state, seconds):
    ledger.enter(state)
    clock.now += seconds


def test_the_state_that_began_work_on_a_gpu_has_its_time(clock):
    """A GPU works on when a call returns: whoever asks it first for a result would have the time of all that was begun."""
    begun = []

    def settle():
        clock.now += sum(begun)
        begun.clear()

    ledger = TimeLedger("learner-0", clock=clock, settle=settle)
    ledger.enter("forward")
    begun.append(3)
    ledger.enter("backward")
    begun.append(5)
    with ledger.during("send"):
        begun.append(7)
    begun.append(11)
    found = {}
    for state, start, end in ledger.take().intervals:
        found[state] = found.get(state, 0) + round(end - start)
    assert found == {"start": 0, "forward": 3, "backward": 16, "send": 7}


def test_states_follow_each_other_and_the_current_one_goes_on(clock):
    ledger = TimeLedger("engine-0", clock=clock)
    clock.now += 2
    pass_time(ledger, clock, "generate", 3)
    pass_time(ledger, clock, "generate", 1)  # The same state again is no new one.
    first = ledger.take()
    clock.now += 5
    second = ledger.take()
    assert [(s, pytest.approx(e - b)) for s, b, e in first.intervals] == [("start", 2), ("generate", 4)]
    assert [(s, pytest.approx(e - b)) for s, b, e in second.intervals] == [("generate", 5)]
    assert first.end == second.start
    assert second.end - first.start == pytest.approx(11)


def test_a_block_returns_to_the_state_before_it_also_after_an_error(clock):
    ledger = TimeLedger("learner-0", "wait", clock)
    with contextlib.suppress(ValueError), ledger.during("plan"):
        ledger.enter("forward")
        raise ValueError("x")
    assert ledger.state == "wait"
    with ledger.during("a"), ledger.during("b"):
        assert ledger.state == "b"
    assert ledger.state == "wait"


def test_slices_are_on_the_unix_clock():
    before = time.time()
    piece = TimeLedger("controller").take()
    assert before - 0.01 <= piece.start <= piece.end <= time.time() + 0.01


def test_a_book_sums_by_process_and_state_and_a_row_holds_what_is_new(clock):
    book, ledger = TimeBook(), TimeLedger("engine-0", "wait", clock)
    pass_time(ledger, clock, "generate", 3)
    book.add(ledger.take())
    assert book.row() == {"time/engine-0/wait": 0.0, "time/engine-0/generate": pytest.approx(3)}
    assert book.row() == {}
    pass_time(ledger, clock, "wait", 4)
    book.add(ledger.take())
    assert book.row() == {"time/engine-0/generate": 0.0, "time/engine-0/wait": pytest.approx(4)}
    assert book.totals["engine-0"] == {"wait": pytest.approx(4), "generate": pytest.approx(3)}
    assert book.walls() == {"engine-0": pytest.approx(7)}
    assert book.residues()["engine-0"] < 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_states_sum_to_the_wall_clock_whatever_happens(seed, clock):
    chance, book = random.Random(seed), TimeBook()
    ledgers = [TimeLedger(f"p-{i}", "start", clock) for i in range(3)]
    for _ in range(300):
        ledger = chance.choice(ledgers)
        if chance.random() < 0.2:
            book.add(ledger.take())
        else:
            ledger.enter(chance.choice("abc"))
        clock.now += chance.random()
    for ledger in ledgers:
        book.add(ledger.take())
    for process, states in book.totals.items():
        assert sum(states.values()) == pytest.approx(clock.now - 100, rel=1e-6), process
    assert max(book.residues().values()) < 1e-6


def test_a_lost_slice_shows_as_residue():
    book = TimeBook()
    book.add(TimeSlice("engine-0", 0.0, 10.0, (("generate", 0.0, 10.0),)))
    book.add(TimeSlice("engine-0", 20.0, 40.0, (("wait", 20.0, 40.0),)))
    assert book.residues() == {"engine-0": pytest.approx(0.25)}


def test_the_trace_opens_while_it_grows_and_at_the_end(tmp_path, clock):
    book = TimeBook(tmp_path / "trace.json")
    book.add(TimeSlice("engine-0", 1.0, 3.0, (("wait", 1.0, 1.0), ("generate", 1.0, 3.0))))
    book.add(TimeSlice("learner-0", 2.0, 2.5, (("forward", 2.0, 2.5),)))
    book._trace.flush()
    json.loads((tmp_path / "trace.json").read_text().rstrip().rstrip(",") + "]")  # What a viewer does.
    book.close()
    book.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [("engine-0", "generate", 1_000_000, 2_000_000), ("learner-0", "forward", 2_000_000, 500_000)]


def test_a_change_of_state_costs_microseconds():
    ledger = TimeLedger("x")
    started = time.process_time()
    for _ in range(1000):
        with ledger.during("y"):
            pass
    ledger.take()
    assert (time.process_time() - started) / 1000 < scaled(100e-6)


def test_between_two_lives_a_process_is_lost_and_a_missing_slice_is_no_life():
    book = TimeBook()
    book.add(TimeSlice("learner-0", 0.0, 10.0, (("start", 0.0, 4.0), ("forward", 4.0, 10.0))))
    book.add(TimeSlice("learner-0", 13.0, 20.0, (("start", 13.0, 18.0), ("forward", 18.0, 20.0))))
    assert book.totals["learner-0"] == {"start": 9.0, "forward": 8.0, "lost": 3.0}
    assert book.residues()["learner-0"] == 0
    book.add(TimeSlice("learner-0", 25.0, 40.0, (("forward", 25.0, 40.0),)))
    assert book.residues()["learner-0"] == 5 / 40
