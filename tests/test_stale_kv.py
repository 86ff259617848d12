"""What a KV cache of older weights does to log-probs, measured apart from staleness; and when it is dropped."""

from __future__ import annotations

import asyncio

import pytest

from rollout.stale_kv import StaleKV
from tests.fakes import make_completion

CROSSING = make_completion(tokens=10, spans=((0, 0, 4), (1, 4, 10)))
WHOLE = make_completion(tokens=10, spans=((1, 0, 10),))


def measure(kv, completions, answer):
    """Positions at which the gap was taken; recorded log-probs are 0, ``answer(t)`` is what a fresh cache gives."""
    asked = []

    async def rescore(completion, position):
        assert completion is CROSSING
        asked.append(position)
        return answer(position)

    asyncio.run(kv.measure(completions, rescore))
    return asked


def test_only_tokens_of_the_last_version_in_a_crossing_completion_are_compared():
    kv = StaleKV(1.0)
    assert measure(kv, (WHOLE,), lambda t: (1, 9.0)) == []
    assert measure(kv, (WHOLE, CROSSING), lambda t: (1, -0.1 if t % 2 else 0.3)) == [4, 5, 7, 9]
    assert kv.take() == (pytest.approx(0.15), False)  # (0.3 + 0.1 + 0.1 + 0.1) / 4
    assert kv.take() == (0.0, False)


def test_one_completion_is_compared_between_two_publications():
    kv = StaleKV(1.0)
    assert measure(kv, (CROSSING,), lambda t: (1, 0.5))
    assert measure(kv, (CROSSING,), lambda t: (1, 9.0)) == []
    assert kv.take()[0] == 0.5
    assert measure(kv, (CROSSING,), lambda t: (1, 0.25))
    assert kv.take()[0] == 0.25


def test_log_probs_under_newer_weights_are_not_compared():
    kv = StaleKV(1.0)
    measure(kv, (CROSSING,), lambda t: (1, 0.5) if t < 6 else (2, 9.0))
    assert kv.take()[0] == 0.5
    measure(kv, (CROSSING,), lambda t: (2, 9.0))
    assert kv.take() == (0.0, False)


@pytest.mark.parametrize(
    ("limit", "gap", "dropped"),
    [(0.05, 0.06, True), (0.05, 0.05, False), (0.0, 0.0, True), (float("inf"), 99.0, False)],
)
def test_the_cache_is_dropped_above_the_limit_or_always_at_0(limit, gap, dropped):
    kv = StaleKV(limit)
    measure(kv, (CROSSING,), lambda t: (1, gap))
    assert kv.take() == (pytest.approx(gap), dropped)


def test_a_single_token_of_the_last_version_is_enough():
    kv = StaleKV(0.05)
    short = make_completion(tokens=5, spans=((0, 0, 4), (3, 4, 5)))

    async def rescore(completion, position):
        assert position == 4
        return 3, -0.2

    asyncio.run(kv.measure((short,), rescore))
    assert kv.take() == (pytest.approx(0.2), True)


def test_what_is_known_to_pass_the_limit_is_dropped_without_waiting_for_it():
    """Else every second publication would let it through: after a drop there is nothing to measure."""
    kv, dropped = StaleKV(0.05), [False]
    kv.take()
    for _ in range(10):
        measure(kv, (CROSSING,), lambda t: (1, 0.0 if dropped[-1] else 0.2))
        dropped.append(kv.take()[1])
    assert dropped[1:] == [True] * 10


def test_once_in_a_while_it_is_tried_again():
    kv, dropped = StaleKV(0.05), [False]
    kv.take()
    for publication in range(60):
        measure(kv, (CROSSING,), lambda t: (1, 0.0 if dropped[-1] or publication > 5 else 0.2))  # noqa: B023
        dropped.append(kv.take()[1])
    assert dropped[1:6] == [True] * 5
    assert not any(dropped[30:])


def test_a_token_outside_the_filter_counts_for_nothing():
    kv = StaleKV(0.05)
    measure(kv, (CROSSING,), lambda t: (1, -float("inf") if t == 5 else 0.01))
    assert kv.take() == (pytest.approx(0.01), False)


def test_a_measure_that_a_publication_overtook_counts_for_nothing():
    kv = StaleKV(0.05)

    async def rescore(completion, position):
        if position == 4:
            kv.take()
        return 1, 9.0

    asyncio.run(kv.measure((CROSSING,), rescore))
    assert kv.take() == (0.0, False)
