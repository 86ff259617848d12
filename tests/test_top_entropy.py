"""Tokens of the highest entropy: the quantile, ties that rounding would break, and what several ranks see of each other."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import top_entropy
from learner.batching import build_rows, plan_steps
from learner.top_entropy import contexts, mark, quantile
from shared.types import Completion, Prompt, RolloutGroup

ROUNDING = 1e-6
CPU = torch.device("cpu")


def groups_of(*groups):
    """``(prompt, completions)`` of token ids each."""
    return [
        RolloutGroup(
            i,
            Prompt(i, np.array(prompt, np.int32), ""),
            tuple(Completion(np.array(c, np.int32), np.zeros(len(c), np.float32), "", "stop") for c in completions),
            np.zeros(len(completions), np.float32),
            {},
        )
        for i, (prompt, completions) in enumerate(groups)
    ]


def steps_of(groups, num_ranks=1, budget=1000):
    """The one step of each rank."""
    rows = build_rows(groups_of(*groups), mask_truncated=False)
    return [plan_steps(rows, 1, budget, rank, num_ranks, CPU)[0] for rank in range(num_ranks)]


def kept_by(step, values, share):
    """``mark`` of ``values``, one list a sequence; which tokens are kept, likewise."""
    entropies = []
    for batch in step.batches:
        laid = torch.zeros(batch.mask.shape)
        for line, row in zip(laid, batch.rows, strict=True):
            if row.index >= 0:
                line[: len(values[row.index])] = torch.tensor(values[row.index])
        entropies.append(laid)
    marked = mark(step, entropies, share, ROUNDING)
    found = {
        row.index: line[: len(row.completion.token_ids)].tolist()
        for batch in marked.batches
        for row, line in zip(batch.rows, batch.entropy_keep, strict=True)
        if row.index >= 0
    }
    return found, marked.entropy_tokens


def test_entropies_that_are_nearly_equal_are_told_apart():
    # The median of 3.6823683 and 3.6823876 lies between them: two of four are kept. They differ by 5e-6 of themselves.
    (step,) = steps_of([([1], [[1, 2], [3, 4]])])
    assert kept_by(step, [[1.0, 3.6823683], [3.6823876, 4.0]], 0.5) == ({0: [False, False], 1: [True, True]}, 2)


# (tokens of two completions of one prompt, entropies, share, kept). The next float32 after 3 is 3.0000002.
TIES = [
    # Both first tokens have one context: what differs is rounding, and both stay.
    ([[1, 2], [3, 4]], [[3.0, 1.0], [3.0000002, 2.0]], 0.1, [[True, False], [True, False]]),
    ([[1, 2], [3, 4]], [[3.0000002, 1.0], [3.0, 2.0]], 0.1, [[True, False], [True, False]]),
    # The second tokens follow different ones: theirs are two entropies.
    ([[1, 2], [3, 4]], [[1.0, 3.0], [2.0, 3.0000002]], 0.1, [[False, False], [False, True]]),
    # They follow the same one.
    ([[1, 2], [1, 4]], [[1.0, 3.0], [1.0, 3.0000002]], 0.1, [[False, True], [False, True]]),
    # One context, but more than rounding apart: the model's numbers are not what is assumed, and the quantile decides.
    ([[1, 2], [3, 4]], [[3.0, 1.0], [3.1, 2.0]], 0.1, [[False, False], [True, False]]),
    # Exact ties, as in torch.quantile.
    ([[1, 2], [3, 4]], [[3.0, 1.0], [3.0, 3.0]], 0.1, [[True, False], [True, True]]),
]


@pytest.mark.parametrize(("completions", "entropies", "share", "kept"), TIES)
@pytest.mark.parametrize("budget", [4, 1000])
def test_rounding_separates_no_tokens_of_one_context(completions, entropies, share, kept, budget):
    (step,) = steps_of([([7], completions)], budget=budget)
    found, count = kept_by(step, entropies, share)
    assert [found[0], found[1]] == kept
    assert count == sum(map(sum, kept))


def test_one_context_in_two_groups_is_one():
    (step,) = steps_of([([7], [[1], [2]]), ([7], [[1], [2]]), ([8], [[1], [2]])])
    found, _ = kept_by(step, [[3.0], [3.0], [3.0000002], [3.0], [3.0], [1.0]], 0.0)
    assert found == {0: [True], 1: [True], 2: [True], 3: [True], 4: [False], 5: [False]}


def test_an_entropy_that_is_no_number_is_kept_and_moves_nothing():
    (step,) = steps_of([([1], [[1, 2, 3], [4, 5]])])
    found, count = kept_by(step, [[float("nan"), 1.0, 2.0], [3.0, float("inf")]], 0.5)
    assert (found, count) == ({0: [True, False, True], 1: [True, True]}, 4)
    nothing = mark(step, [torch.full(batch.mask.shape, torch.nan) for batch in step.batches], 0.5, ROUNDING)
    assert [batch.entropy_keep for batch in nothing.batches] == [None]


@pytest.mark.parametrize("budget", [3, 6, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.99])
def test_where_every_context_differs_it_is_torchs_quantile(share, budget):
    random = np.random.default_rng(3)
    groups = [([i], [[10 * i + 1, 1], [10 * i + 2]]) for i in range(9)]
    (step,) = steps_of(groups, budget=budget)
    # Values of a coarse grid, so that many are equal.
    values = {i: (random.integers(0, 9, n) / 8).astype(np.float32).tolist() for i, n in enumerate([2, 1] * 9)}
    found, count = kept_by(step, values, share)
    flat = torch.tensor([value for i in range(18) for value in values[i]])
    expected = flat >= torch.quantile(flat, 1 - share)
    assert [keep for i in range(18) for keep in found[i]] == expected.tolist()
    assert count == int(expected.sum())


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 12, width=32), min_size=1, max_size=50), share=st.floats(0, 1))
def test_beyond_torchs_limit_the_quantile_is_the_same(values, share):
    values = torch.tensor(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_entropy, "QUANTILE_LIMIT", 0)
        own = quantile(values, share)
    assert values.min() <= own <= values.max()
    torch.testing.assert_close(own, torch.quantile(values, share), rtol=1e-5, atol=1e-5)


SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(groups=st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=2), SEQUENCES), max_size=3))
def test_contexts_have_one_number_where_and_only_where_they_are_equal(groups):
    rows = build_rows(groups_of(*groups), mask_truncated=False)
    found = contexts(rows)
    before: dict = {}
    for row in rows:
        tokens = row.completion.token_ids
        assert len(found[row.index]) == len(tokens)
        for t, number in enumerate(found[row.index]):
            context = (tuple(row.prompt.token_ids), tuple(tokens[:t]))
            assert before.setdefault(context, number) == number
    assert len(set(before.values())) == len(before)


def test_token_ids_are_compared_as_numbers():
    rows = build_rows(groups_of(([300], [[256, 1], [1, 1], [256, 2]])), mask_truncated=False)
    found = contexts(rows)
    assert found[0][1] == found[2][1]
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[1][1] not in found[0]


class Ranks:
    """Two ranks as threads: what they gather or sum waits for both."""

    def __init__(self, count):
        self._barrier, self._local, self._shared = (
            threading.Barrier(count, timeout=20),
            threading.local(),
            [None] * count,
        )

    def run(self, *works):
        found = [None] * len(works)

        def one(rank, work):
            self._local.rank = rank
            found[rank] = work()

        threads = [threading.Thread(target=one, args=item) for item in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def _all(self, values):
        self._shared[self._local.rank] = values
        self._barrier.wait()
        everyone = list(self._shared)
        self._barrier.wait()
        return everyone

    def gather(self, values):
        return torch.cat(self._all(values))

    def sum(self, values):
        return torch.stack([part.double() for part in self._all(values)]).sum(0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_ranks_keep_what_one_rank_keeps(share, monkeypatch):
    groups = [([7], [[1, 2, 3], [4, 5, 6]]), ([7], [[1, 2, 4], [1, 5]])]
    values = [[3.0, 1.0, 0.5], [3.0000002, 2.0, 0.1], [3.0, 1.0000001, 0.4], [3.0000002, 1.0]]
    (whole,) = steps_of(groups)
    expected = kept_by(whole, values, share)
    halves = steps_of(groups, num_ranks=2, budget=8)
    assert all(len([r for b in half.batches for r in b.rows if r.index >= 0]) == 2 for half in halves)
    ranks = Ranks(2)
    monkeypatch.setattr(top_entropy, "gather_values", ranks.gather)
    monkeypatch.setattr(top_entropy, "sum_over_ranks", ranks.sum)
    first, second = ranks.run(*(lambda half=half: kept_by(half, values, share) for half in halves))
    assert (first[0] | second[0], first[1], second[1]) == (expected[0], expected[1], expected[1])
