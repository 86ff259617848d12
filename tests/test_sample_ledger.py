"""The sample ledger: every group has one fate, the sums close, and a mark brings the whole state back."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.sample_ledger import LedgerBroken, SampleLedger


@pytest.fixture
def ledger(tmp_path):
    return SampleLedger(tmp_path / "samples.jsonl")


def lines(ledger: SampleLedger) -> list[dict]:
    ledger.flush()
    return [json.loads(line) for line in ledger._path.read_text().splitlines()]


def test_a_group_s_fate_is_one_line(ledger):
    for group in (0, 1, 2):
        ledger.admit(group)
    ledger.sampled(0, 8, 100)
    ledger.sampled(1, 8, 50)
    ledger.close(0, "trained", step=4)
    ledger.close(1, "failed", "timeout")
    assert lines(ledger) == [
        {"group": 0, "fate": "trained", "step": 4, "samples": 8, "tokens": 100},
        {"group": 1, "fate": "failed", "reason": "timeout", "samples": 8, "tokens": 50},
    ]
    assert ledger.open == {2: (0, 0)}
    metrics = ledger.metrics()
    assert (metrics["groups/trained"], metrics["samples/failed"], metrics["groups/timeout"]) == (1, 8, 1)
    text = "16 completions: 8 trained, 0 filtered, 0 stale, 8 failed, 0 lost, 0 not needed any more (groups: 1 timeout)"
    assert ledger.verdict() == text


def test_a_group_has_one_fate_alone(ledger):
    ledger.admit(0)
    ledger.close(0, "filtered", "no_signal")
    with pytest.raises(KeyError):
        ledger.close(0, "trained")
    with pytest.raises(KeyError):
        ledger.sampled(0, 1, 1)
    ledger.admit(1)
    with pytest.raises(AssertionError):
        ledger.admit(1)
    with pytest.raises(AssertionError):
        ledger.close(1, "vanished")


def test_the_law_is_checked_against_what_is_in_flight(ledger):
    for group in (0, 1):
        ledger.admit(group)
    ledger.check([0, 1])
    with pytest.raises(LedgerBroken, match=r"without a fate \[1\], unknown groups \[\]"):
        ledger.check([0])
    with pytest.raises(LedgerBroken, match=r"without a fate \[\], unknown groups \[7\]"):
        ledger.check([0, 1, 7])


@pytest.mark.parametrize("unit", ["groups", "samples", "tokens"])
def test_sums_that_do_not_close_are_named(ledger, unit):
    ledger.admit(0)
    ledger.sampled(0, 8, 100)
    ledger.counts[f"{unit}/sampled"] += 1
    with pytest.raises(LedgerBroken, match=f"{unit} sampled"):
        ledger.check([0])


def test_what_died_with_a_process_is_counted_as_lost(ledger):
    ledger.admit(0)
    ledger.sampled(0, 8, 100)
    ledger.lose(0)
    ledger.check([0])
    ledger.sampled(0, 8, 90)
    ledger.close(0, "trained", step=1)
    ledger.check([])
    assert (ledger.counts["samples/lost"], ledger.counts["samples/trained"], ledger.counts["groups/trained"]) == (
        8,
        8,
        1,
    )


class Life:
    """A ledger under random events, by seed."""

    def __init__(self, ledger: SampleLedger, seed: int) -> None:
        self.ledger, self.chance, self.next = ledger, random.Random(seed), 0

    def live(self, events: int) -> None:
        for _ in range(events):
            kind, known = self.chance.randrange(4), sorted(self.ledger.open)
            if kind == 0 or not known:
                self.ledger.admit(self.next)
                self.next += 1
            elif kind == 1:
                self.ledger.sampled(self.chance.choice(known), 4, self.chance.randrange(100))
            elif kind == 2:
                fate = self.chance.choice(("trained", "filtered", "failed", "stale"))
                self.ledger.close(self.chance.choice(known), fate, self.chance.choice(("", "reason")))
            else:
                self.ledger.lose(self.chance.choice(known))
            self.ledger.check(self.ledger.open)


@settings(derandomize=True)
@given(seed=st.integers(0, 2**32), before=st.integers(0, 40), after=st.integers(0, 40))
def test_a_mark_brings_everything_back(tmp_path_factory, seed, before, after):
    path = tmp_path_factory.mktemp("ledger") / "samples.jsonl"
    life = Life(SampleLedger(path), seed)
    life.live(before)
    mark, kept = json.loads(json.dumps(life.ledger.mark())), path.read_bytes()
    then = (life.ledger.counts.copy(), life.ledger.reasons.copy(), dict(life.ledger.open))
    life.live(after)
    life.ledger.flush()
    cut = path.read_bytes()[len(kept) :]
    again = SampleLedger(path)  # Another process.
    assert again.rewind(mark) == cut.count(b"\n")
    assert path.read_bytes() == kept
    assert (again.counts, again.reasons, again.open) == then
    assert not cut or path.with_suffix(".cut.jsonl").read_bytes() == cut
    assert again.mark() == mark
    Life(again, seed + 1).live(10) if not again.open else again.check(again.open)


def test_a_file_that_is_not_the_checkpoint_s_is_refused(ledger):
    ledger.admit(0)
    ledger.close(0, "trained", step=1)
    mark = ledger.mark()
    ledger._path.write_text(ledger._path.read_text().replace("trained", "tr4ined"))
    with pytest.raises(LedgerBroken, match="not those that the checkpoint saw"):
        ledger.rewind(mark)


def test_a_write_that_fails_half_way_is_taken_back(ledger, monkeypatch):
    for group in range(3):
        ledger.admit(group)
    ledger.close(0, "trained", step=1)
    ledger.flush()
    ledger.close(1, "trained", step=2)
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def writelines(self, lines):
            self.file.write(lines[0][:10])
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", lambda path, mode="r": Full(real(path, mode)))
    with pytest.raises(OSError, match="No space"):
        ledger.flush()
    monkeypatch.undo()
    mark = ledger.mark()
    assert [row["group"] for row in lines(ledger)] == [0, 1]
    assert SampleLedger(ledger._path).rewind(mark) == 0
