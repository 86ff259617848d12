"""Batching: what is scheduled where, how a micro-batch is laid out, and that no split changes the gradient."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import grpo
from learner.batching import Row, build_rows, collate, plan_steps, split
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, LossInputs, LossSettings, grpo_loss
from shared.types import Completion, Prompt, RolloutGroup

VOCABULARY = 11
CPU = torch.device("cpu")
torch.set_num_threads(1)

# A new aggregation is one row: (name, arguments, weight of row i given lengths n, sizes of its group, and counts).
AGGREGATION_ROWS = [
    ("token_mean", {}, lambda n, group, rows, groups, tokens: 1 / tokens),
    ("sequence_mean", {}, lambda n, group, rows, groups, tokens: 1 / (rows * n)),
    ("constant", {"length": 9}, lambda n, group, rows, groups, tokens: 1 / (rows * 9)),
    ("sequence_sum", {}, lambda n, group, rows, groups, tokens: 1 / rows),
    ("prompt_mean", {}, lambda n, group, rows, groups, tokens: 1 / (groups * group)),
    ("token_sum", {}, lambda n, group, rows, groups, tokens: 1),
    ("batch_token_mean", {"batch_tokens": 50.0}, lambda n, group, rows, groups, tokens: 1 / 50),
    (
        "chunk_token_mean",
        {"sequences": 3},
        lambda n, group, rows, groups, tokens: 1 / (groups * group),
    ),  # A group each.
    ("sequence_mean", {"skip_empty": True}, lambda n, group, rows, groups, tokens: 1 / (8 * n)),  # 8 of 12 have tokens.
]

# Prompt length and completion lengths of each group; a negative length is a truncated completion, 0 an empty one.
STEP = [(3, [4, 1, 6]), (1, [2, 0, 3]), (5, [-7, 1, 2]), (2, [3, -2, -1])]
STEPS = st.integers(1, 4).flatmap(
    lambda size: st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(-4, 8), min_size=size, max_size=size)), min_size=1, max_size=5
    )
)
LONGEST = 6 + 8


def groups_of(step=STEP, seed=0):
    random = np.random.default_rng(seed)

    def completion(length):
        ids = random.integers(0, VOCABULARY, abs(length)).astype(np.int32)
        logprobs = (-random.random(abs(length)) - 0.1).astype(np.float32)
        return Completion(ids, logprobs, "", "length" if length < 0 else "stop")

    def group(i, prompt, lengths):
        ids = random.integers(0, VOCABULARY, prompt).astype(np.int32)
        rewards = random.random(len(lengths)).astype(np.float32)
        return RolloutGroup(i, Prompt(i, ids, ""), tuple(map(completion, lengths)), rewards)

    return [group(i, *shape) for i, shape in enumerate(step)]


def weights_of(name, args, lengths, groups):
    return AGGREGATIONS[name](lengths, **args | ({"groups": groups} if name == "prompt_mean" else {}))


def rows_of(groups):
    return build_rows(groups, mask_truncated=True)


def factors(groups, name="sequence_mean", args={}):  # noqa: B006
    """Advantages and weights ``[M]`` of all sequences of ``groups``, as one optimizer step."""
    advantages = grpo(torch.tensor(np.stack([group.rewards for group in groups]))).flatten()
    rows = rows_of(groups)
    lengths, numbers = (torch.tensor([getattr(row, name) for row in rows]) for name in ("trainable", "group"))
    return advantages, weights_of(name, args, lengths, numbers)


def packed_tokens(rows):
    return len(collate(rows, CPU).tokens.token_ids)


def policy_tables():
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator)
    return policy.requires_grad_(), reference


def bigram(table, tokens):
    """Log-probs ``[B, C]`` of a model that sees only the token before: its logits are a row of ``table``."""
    log_p = torch.log_softmax(table[tokens.token_ids[tokens.predictors]], -1)
    values = log_p.gather(1, tokens.token_ids[tokens.targets, None])[:, 0]
    cells = torch.zeros(tokens.shape[0] * tokens.shape[1], dtype=values.dtype)
    return cells.index_copy(0, tokens.cells, values).view(tokens.shape)


def micro_batch_gradient(batch, advantages, weights):
    table, reference = policy_tables()
    logprobs = bigram(table, batch.tokens)
    x = LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        rollout_logprobs=batch.rollout_logprobs,
        ref_logprobs=bigram(reference, batch.tokens),
        advantages=batch.pick(advantages),
        weights=batch.pick(weights),
        mask=batch.mask,
    )
    sampling = {"level": "token", "mode": "truncate", "low": None, "high": 3.0}
    chosen = LossSettings(POLICY_LOSSES["clip"], KL_ESTIMATORS["k3"], kl_coef=0.1, importance_sampling=sampling)
    loss, _ = grpo_loss(x, chosen)
    return torch.autograd.grad(loss, table)[0]


def gradient_by_hand(groups, weight):
    """The same gradient from the formulas of the maths, sequence by sequence, token by token."""
    table, reference = policy_tables()
    advantages = grpo(torch.tensor(np.stack([group.rewards for group in groups])))
    trained = [[len(c.token_ids) * (c.finish_reason == "stop") for c in group.completions] for group in groups]
    rows, tokens, loss = sum(map(len, trained)), sum(map(sum, trained)), 0.0
    for group, lengths, group_advantages in zip(groups, trained, advantages, strict=True):
        for completion, n, advantage in zip(group.completions, lengths, group_advantages, strict=True):
            previous = group.prompt.token_ids[-1]
            for token, rollout in zip(completion.token_ids[:n], completion.logprobs[:n], strict=True):
                now, ref = (torch.log_softmax(x[previous], 0)[token] for x in (table, reference))
                ratio, importance = torch.exp(now - now.detach()), torch.exp(now.detach() - rollout).clamp(max=3)
                kl = torch.exp(ref - now) - (ref - now) - 1
                share = weight(n, sum(lengths), rows, len(groups), tokens)
                loss = loss + share * (0.1 * kl - ratio * advantage * importance)
                previous = token
    return torch.autograd.grad(loss, table)[0]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- rows ---


def test_rows_carry_index_group_and_length():
    groups = groups_of([(2, [4, 2]), (3, [1, 3])])
    rows = build_rows(groups, mask_truncated=False)
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert [row.group for row in rows] == [0, 0, 1, 1]
    assert [row.trainable for row in rows] == [4, 2, 1, 3]
    assert [row.prompt for row in rows] == [g.prompt for g in groups for _ in range(2)]
    assert [row.completion for row in rows] == [c for g in groups for c in g.completions]


def test_a_micro_batch_picks_and_places_what_belongs_to_its_rows():
    groups = groups_of([(2, [4, 2]), (3, [1, 3])])
    rows = rows_of(groups)
    filler = Row(rows[0].prompt, rows[0].completion, -1, 0, 0)
    batch = collate([rows[2], filler, rows[1]], CPU)
    assert batch.index.tolist() == [2, -1, 1]
    assert batch.pick(torch.tensor([0.1, 0.2, 0.3, 0.4])).tolist() == torch.tensor([[0.3], [0], [0.2]]).tolist()
    placed = batch.place(torch.tensor([5.0, 7.0, 9.0]), 4)
    assert (placed.tolist(), placed.dtype) == ([0, 9, 5, 0], torch.float64)
    given = [[np.arange(4), np.array([10, 11])], [np.array([20]), np.arange(3)]]
    assert batch.lay_out(given).tolist() == [[20, 0, 0, 0], [0, 0, 0, 0], [10, 11, 0, 0]]


def test_truncated_rows_leave_the_mask_but_still_count():
    groups = groups_of([(2, [4, -2])])
    for mask_truncated, expected in [(True, [(4, 1 / 8), (0, 0)]), (False, [(4, 1 / 8), (2, 1 / 4)])]:
        rows = build_rows(groups, mask_truncated=mask_truncated)
        (step,) = plan_steps(rows, 1, 100, 0, 1, CPU)
        weights = weights_of("sequence_mean", {}, step.lengths, step.groups)
        assert list(zip(step.lengths.tolist(), weights.tolist(), strict=True)) == expected
        assert [row.trainable for row in rows] == [n for n, _ in expected]


# --- steps ---


@pytest.mark.parametrize(
    ("count", "groups"),
    [(1, [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]), (2, [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1]]),
     (5, [[0, 0]] * 5), (6, [[0, 0]] * 5 + [[]])],
)  # fmt: skip
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_whole_groups_and_each_sequence_is_in_one(count, groups, ranks):
    rows = rows_of(groups_of([(2, [4, -2]), (1, [0, 3]), (3, [5, 5]), (2, [-1, -1]), (4, [1, 2])]))
    per_rank = [plan_steps(rows, count, 14, rank, ranks, CPU) for rank in range(ranks)]
    steps = per_rank[0]
    assert [step.groups.tolist() for step in steps] == groups
    assert [i for step in steps for i in step.members.tolist()] == list(range(10))
    assert [n for step in steps for n in step.lengths.tolist()] == [4, 0, 0, 3, 5, 5, 0, 0, 1, 2]
    for i, step in enumerate(steps):
        batches = [other[i].batches for other in per_rank]
        assert len({len(mine) for mine in batches}) == 1
        real = [int(j) for mine in batches for batch in mine for j in batch.index if j >= 0]
        trained = [j for j, n in zip(step.members.tolist(), step.lengths.tolist(), strict=True) if n]
        assert sorted(real) == trained
        assert all(torch.equal(step.members, other[i].members) for other in per_rank)


# --- split ---


@given(step=STEPS, budget=st.integers(LONGEST, 60), ranks=st.integers(1, 4))
def test_split_keeps_its_promises(step, budget, ranks):
    rows = rows_of(groups_of(step))
    plan = split(rows, budget, ranks)
    assert len(plan) == ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    scheduled = [row for micro_batches in plan for rows in micro_batches for row in rows]
    real = [row for row in scheduled if any(row is r for r in rows)]
    assert sorted(map(id, real)) == sorted(id(row) for row in rows if row.trainable)
    for batch in itertools.chain(*plan):
        assert packed_tokens(batch) <= budget
        fillers = [row for row in batch if not any(row is r for r in rows)]
        assert not fillers or len(batch) == 1
        assert all((row.index, row.trainable) == (-1, 0) for row in fillers)
        assert collate(batch, CPU).mask.any() or fillers


def test_split_needs_no_more_micro_batches_than_tokens_ask_for():
    rows = rows_of(groups_of([(2, [4, 4])] * 4))
    assert [len(x) for x in split(rows, 40, 1)] == [1]
    assert [len(x) for x in split(rows, 39, 1)] == [2]
    assert [len(x) for x in split(rows, 20, 2)] == [1, 1]
    assert [[[packed_tokens(b)] for b in x] for x in split(rows, 20, 2)] == [[[20]], [[20]]]
    assert [len(x) for x in split(rows, 10, 1)] == [4]


def test_split_balances_tokens():
    rows = rows_of(groups_of([(1, [length]) for length in (19, 3, 11, 7, 2, 15, 5, 9)]))
    loads = [sum(map(packed_tokens, micro_batches)) for micro_batches in split(rows, 1000, 2)]
    assert sum(loads) == 79
    assert max(loads) - min(loads) <= 3


def test_split_keeps_a_group_together_while_it_fits():
    rows = rows_of(groups_of([(5, [2, 2, 2])] * 3))
    for batch in itertools.chain(*split(rows, 11, 2)):
        assert len({row.group for row in batch}) == 1
    for batch in itertools.chain(*split(rows, 10, 2)):
        assert packed_tokens(batch) <= 10


def test_fillers_make_ranks_equal():
    groups = groups_of([(2, [3, 3]), (2, [4, 4]), (2, [5, 5])])
    plan = split(rows_of(groups)[::2], 7, 2)
    assert [len(micro_batches) for micro_batches in plan] == [2, 2]
    fillers = [batch for micro_batches in plan for batch in micro_batches if batch[0].trainable == 0]
    assert len(fillers) == 1
    batch = collate(fillers[0], CPU)
    assert not batch.mask.any()
    assert batch.pick(torch.ones(6)).tolist() == [[0.0]]
    assert batch.place(torch.ones(1), 6).tolist() == [0.0] * 6
    unmasked = replace(batch, mask=torch.ones_like(batch.mask))  # Its weight alone already silences it.
    for silent in (batch, unmasked):
        found = micro_batch_gradient(silent, *factors(groups))
        assert torch.equal(found, torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64))


def test_rows_without_trainable_tokens_cost_nothing():
    rows = rows_of(groups_of())
    plan = split(rows, 1000, 1)
    assert [sorted(row.trainable for row in batch) for batch in plan[0]] == [[1, 1, 2, 2, 3, 3, 4, 6]]
    assert packed_tokens(plan[0][0]) == (3 + 1 + 5 + 2) + (1 + 1 + 2 + 2 + 3 + 3 + 4 + 6)


@pytest.mark.parametrize("step", [[(3, [0, 0])], [(3, [-4, 0]), (2, [-1, -2])]])
def test_nothing_to_train_is_no_micro_batch(step):
    assert split(rows_of(groups_of(step)), 100, 3) == [[], [], []]


def test_a_sequence_over_the_budget_gets_a_micro_batch_of_its_own():
    (plan,) = split(rows_of(groups_of([(2, [30, 1]), (2, [3, 2])])), 12, 1)
    found = [[row.trainable for row in batch if row.trainable] for batch in plan]
    assert [30] in found
    assert sorted(itertools.chain(*found)) == [1, 2, 3, 30]


def test_every_rank_computes_the_same_plan():
    def lengths():
        plan = split(rows_of(groups_of()), 16, 2)
        return [[[(row.group, row.index, row.trainable) for row in batch] for batch in x] for x in plan]

    assert lengths() == lengths()


# --- collate ---


def test_a_micro_batch_in_full():
    shared = Prompt(0, np.array([7, 8], np.int32), "")
    other = Prompt(1, np.array([9], np.int32), "")
    answers = [([1, 2, 3], [-0.1, -0.2, -0.3]), ([4], [-0.4]), ([5, 6], [-0.5, -0.6])]
    first, second, third = (Completion(np.int32(ids), np.float32(p), "", "stop") for ids, p in answers)
    batch = collate([Row(shared, first, 3, 0, 3), Row(shared, second, 4, 0, 0), Row(other, third, 7, 1, 2)], CPU)
    tokens = batch.tokens
    assert tokens.token_ids.tolist() == [7, 8, 1, 2, 3, 4, 9, 5, 6]
    assert tokens.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]
    assert tokens.targets.tolist() == [2, 3, 4, 5, 7, 8]
    assert tokens.predictors.tolist() == [1, 2, 3, 1, 6, 7]
    assert tokens.cells.tolist() == [0, 1, 2, 3, 6, 7]
    assert tokens.shape == (3, 3)
    assert tokens.layout.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8]
    assert tokens.layout.blocks == ((1, 5), (2, 3))
    assert batch.mask.tolist() == [[True] * 3, [False] * 3, [True, True, False]]
    torch.testing.assert_close(
        batch.rollout_logprobs, torch.tensor([[-0.1, -0.2, -0.3], [-0.4, 0, 0], [-0.5, -0.6, 0]])
    )
    assert batch.index.tolist() == [3, 4, 7]
    assert batch.advantages is batch.weights is batch.old_logprobs is batch.ref_logprobs is None


# --- the gradient ---


@pytest.mark.parametrize(("name", "args", "weight"), AGGREGATION_ROWS)
def test_one_batch_has_the_gradient_of_the_formulas(name, args, weight):
    groups = groups_of()
    found = micro_batch_gradient(collate(rows_of(groups), CPU), *factors(groups, name, args))
    assert relative(found, gradient_by_hand(groups, weight)) < 1e-6


@pytest.mark.parametrize(("name", "args"), [row[:2] for row in AGGREGATION_ROWS])
@pytest.mark.parametrize(("budget", "ranks"), [(1000, 1), (1000, 2), (30, 1), (16, 1), (16, 2), (11, 3), (9, 7)])
def test_the_gradient_does_not_depend_on_the_split(name, args, budget, ranks):
    groups = groups_of()
    rows, known = rows_of(groups), factors(groups, name, args)
    steps = [plan_steps(rows, 1, budget, rank, ranks, CPU)[0] for rank in range(ranks)]
    parts = [micro_batch_gradient(batch, *known) for step in steps for batch in step.batches]
    assert len(parts) >= ranks
    assert relative(sum(parts), micro_batch_gradient(collate(rows, CPU), *known)) < 1e-6


def test_every_aggregation_is_tried():
    assert {row[0] for row in AGGREGATION_ROWS} == set(AGGREGATIONS)
