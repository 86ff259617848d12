"""The health of an engine: every state with every event, what counts and deadlines decide, and random walks."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from rollout.engine_health import BACKOFF_S, GRACE_S, MAX_BACKOFF_S, MISSES, TABLE, EngineHealth, Event, State

STATES, EVENTS = get_args(State), get_args(Event)

# Rows: states; columns: events in the order of ``Event``; "-" is a fault of ours.
EXPECTED = """
            ready synced  outdated progressed probe_ok probe_missed overdue stuck   died restarted
starting    stale -       -        -          -        -            -       -       dead -
stale       -     healthy stale    stale      stale    stale        stale   stale   dead -
healthy     -     healthy stale    healthy    healthy  suspect      suspect suspect dead -
suspect     -     suspect stale    suspect    healthy  suspect      suspect suspect dead -
dead        -     -       -        -          -        -            -       -       -    restarting
restarting  stale -       -        -          -        -            -       -       dead -
retired     -     -       -        -          -        -            -       -       -    -
"""

WAYS = {
    "starting": [],
    "stale": ["ready"],
    "healthy": ["ready", "synced"],
    "suspect": ["ready", "synced", "overdue"],
    "dead": ["died"],
    "restarting": ["died", "restarted"],
    "retired": ["died", "restarted", "died", "restarted", "died", "restarted"],
}


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lived(clock, *events, max_restarts=2):
    health = EngineHealth(max_restarts, clock)
    for event in events:
        health.on(event)
    return health


def expected():
    header, *rows = EXPECTED.strip().splitlines()
    assert header.split() == list(EVENTS)
    return {(row.split()[0], event): to for row in rows for event, to in zip(EVENTS, row.split()[1:], strict=True)}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_with_every_event(clock, state, event):
    health = lived(clock, *WAYS[state])
    assert health.state == state
    to = expected()[state, event]
    if to == "-":
        with pytest.raises(AssertionError, match=f"{event} while {state}"):
            health.on(event)
        assert health.state == state
    else:
        assert health.on(event) == health.state == to
        assert health.runs == (to in ("stale", "healthy", "suspect"))


def test_the_table_names_every_state_and_only_events():
    assert set(TABLE) == set(STATES)
    assert {event for row in TABLE.values() for event in row} == set(EVENTS)


@pytest.mark.parametrize("start", ["stale", "healthy"])
def test_probes_missed_in_a_row_are_the_end(clock, start):
    health = lived(clock, *WAYS[start])
    for _ in range(3):  # An answer in between begins the count anew.
        states = {health.on("probe_missed") for _ in range(MISSES - 1)}
        assert states == {"suspect" if start == "healthy" else "stale"}
        assert health.on("probe_ok") == start
    for _ in range(MISSES - 1):
        health.on("probe_missed")
    assert health.on("probe_missed") == "dead"


def test_a_new_life_begins_with_no_misses(clock):
    health = lived(clock, "ready", *["probe_missed"] * MISSES, "restarted", "ready")
    assert health.on("probe_missed") == "stale"


def test_an_engine_with_an_overdue_request_that_answers_serves_again(clock):
    health = lived(clock, "ready", "synced", "overdue", "overdue", "overdue")
    clock.now += 1
    assert health.on("probe_ok") == "healthy"


def test_an_overdue_request_and_no_answer_within_the_grace_is_the_end(clock):
    health = lived(clock, "ready", "synced", "overdue")
    clock.now += GRACE_S - 0.1
    assert health.on("probe_missed") == "suspect"
    clock.now += 0.2
    assert health.on("probe_missed") == "dead"


def test_one_stuck_request_is_forgiven_two_need_progress(clock):
    health = lived(clock, "ready", "synced", "stuck")
    assert health.on("probe_ok") == "healthy"
    assert health.on("stuck") == "suspect"
    assert health.on("probe_ok") == "suspect"
    clock.now += GRACE_S
    assert health.on("probe_ok") == "dead"


def test_progress_clears_a_stuck_engine(clock):
    health = lived(clock, "ready", "synced", "stuck", "stuck", "stuck", "probe_ok", "progressed")
    clock.now += GRACE_S
    assert health.on("probe_ok") == "healthy"
    assert health.on("stuck") == "suspect"
    assert health.on("probe_ok") == "healthy"


def test_the_grace_counts_from_the_first_suspicion_and_begins_anew_after_an_answer(clock):
    health = lived(clock, "ready", "synced", "overdue")
    clock.now += GRACE_S - 1
    health.on("overdue")
    clock.now += 1
    assert health.on("probe_ok") == "healthy"  # It answered: what it runs is too long, that is all.
    health.on("overdue")
    assert health.on("probe_missed") == "suspect"


def test_a_reset_aborts_what_was_stuck(clock):
    health = lived(clock, "ready", "synced", "stuck", "stuck", "outdated", "synced", "stuck")
    assert health.on("probe_ok") == "healthy"


def test_the_backoff_doubles_up_to_its_limit(clock):
    health, waits = lived(clock, "died", max_restarts=12), []
    for _ in range(12):
        health.on("restarted")
        waits.append(health.backoff_s)
        health.on("died")
    assert waits == [min(BACKOFF_S * 2**i, MAX_BACKOFF_S) for i in range(12)]
    assert waits[0] < 1
    assert waits[-1] == MAX_BACKOFF_S


def test_the_backoff_begins_anew_once_the_engine_has_served(clock):
    health = lived(clock, *["died", "restarted"] * 4, "ready", "synced", "died", "restarted", max_restarts=5)
    assert health.backoff_s == BACKOFF_S


@pytest.mark.parametrize("max_restarts", [0, 1, 5])
def test_the_budget_of_restarts(clock, max_restarts):
    health = lived(clock, max_restarts=max_restarts)
    for used in range(max_restarts):
        health.on("died")
        assert health.restarts_left == max_restarts - used
        assert health.on("restarted") == "restarting"
    health.on("died")
    assert health.on("restarted") == "retired"
    assert (health.restarts, health.restarts_left) == (max_restarts, 0)


@pytest.mark.parametrize("seed", range(30))
def test_random_walks_keep_the_invariants(seed):
    """Healthy only by a proof in this life; never more lives than granted; retired is the end."""
    source, clock = random.Random(seed), Clock()
    health = lived(clock, max_restarts=4)
    proved, lives, doubts = False, 1, 0
    for _ in range(400):
        clock.now += source.choice([0.1, 1.0, GRACE_S])
        # Deaths are rare enough for lives to be long.
        event = source.choice([e for e in TABLE[health.state] if e != "died" or source.random() < 0.2] or [None])
        if event is None and health.state == "retired":
            break
        if event is None:
            continue
        before, after = health.state, health.on(event)
        proved = (proved or event == "synced") and event not in ("ready", "outdated")
        lives += after == "restarting"
        doubts = 0 if event in ("probe_ok", "ready") else doubts + (event == "probe_missed")
        assert after != "healthy" or proved
        assert doubts < MISSES or not health.runs
        assert (before == "dead") == (after in ("restarting", "retired") and before != "restarting")
        assert lives == 1 + health.restarts <= 5
