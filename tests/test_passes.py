"""Before the first update: what is planned, which passes are made, and what they put into the micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.advantages import ADVANTAGES, grpo, normalize_then_sum
from learner.choices import Choices
from learner.losses import AGGREGATIONS
from learner.passes import Given, Passes, plan_batch
from shared.ledger import TimeLedger
from shared.types import Completion, Prompt, RolloutGroup
from tests.fakes import make_config

CPU = torch.device("cpu")
NAN = float("nan")
# Completion lengths of six groups of two; a negative length is a completion that hit the limit.
LENGTHS = [(4, 2), (3, -1), (1, 5), (2, 2), (0, 6), (-3, 4)]
REWARDS = [(1.0, 0.0), (0.5, 2.0), (1.0, 4.0), (0.0, 1.0), (3.0, 1.0), (2.0, 0.0)]
BUDGETS = [8, 12, 1000]


def groups_of(rewards=REWARDS, lengths=LENGTHS, **parts):
    random = np.random.default_rng(0)

    def completion(length):
        size = abs(length)
        logprobs = (-random.random(size) - 0.1).astype(np.float32)
        return Completion(np.arange(size, dtype=np.int32), logprobs, "", "length" if length < 0 else "stop")

    return [
        RolloutGroup(
            i, Prompt(i, np.arange(2, dtype=np.int32), ""), tuple(map(completion, sizes)), np.float32(values),
            {name: np.float32(columns[i]) for name, columns in parts.items()},
        )
        for i, (values, sizes) in enumerate(zip(rewards, lengths, strict=False))
    ]  # fmt: skip


class Numbers:
    """A policy and a reference that know a fixed number for every token of every sequence; calls are noted."""

    def __init__(self, groups, seed=1):
        random = np.random.default_rng(seed)

        def made(sign):
            return [[np.float32(sign * random.random(len(c.token_ids))) for c in g.completions] for g in groups]

        self.logprobs_, self.entropy, self.kl, self.ref = made(-1), made(1), made(1), made(-1)
        self.forwards, self.hiddens, self.seen_against = [], 0, []

    def forward(self, batch, against):
        self.forwards.append(batch.index.tolist())
        self.seen_against.append(against)
        return tuple(batch.lay_out(values) for values in (self.logprobs_, self.entropy, self.kl))

    def logprobs(self, batch):
        return batch.lay_out(self.ref)

    def hidden(self, batch):
        self.hiddens += 1
        return torch.zeros(int(batch.mask.sum()), 3)

    def against(self, batch):
        return None if batch.ref_hidden is None else (batch.ref_hidden, torch.ones(5, 3))


def prepare(groups=None, given=None, eta=0.0, numbers=None, dropout=False, **changes):
    """``(steps, scored, numbers)`` after ``prepare``."""
    groups = groups_of() if groups is None else groups
    config = make_config(**{"learner.max_tokens_per_microbatch": 12} | changes)
    choices, numbers = Choices(config), numbers or Numbers(groups)
    choices.needs_old_pass |= dropout
    steps, scored = plan_batch(config, groups, 0, 1, CPU)
    reference = numbers if config.needs_reference else None
    passes = Passes(config, choices, numbers.forward, reference, TimeLedger("test"))
    return passes.prepare(steps, scored, given or Given(), eta), scored, numbers


def by_sequence(steps, field):
    """A ``[B, C]`` field on the mask, by sequence number."""
    return {
        row.index: line[mask].tolist()
        for step in steps
        for batch in step.batches
        for row, line, mask in zip(batch.rows, getattr(batch, field), batch.mask, strict=True)
        if row.index >= 0
    }


def columns(steps, field):
    """A ``[B, 1]`` field, by sequence number."""
    return {
        row.index: float(value)
        for step in steps
        for batch in step.batches
        for row, value in zip(batch.rows, getattr(batch, field)[:, 0], strict=True)
        if row.index >= 0
    }


def flat(values):
    return [np.asarray(v) for group in values for v in group]


def close(found, expected, atol=1e-6):
    assert np.allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=0, atol=atol)


# --- the plan ---


@pytest.mark.parametrize(("count", "members"), [(1, [12]), (2, [6, 6]), (3, [4, 4, 4]), (4, [4, 4, 2, 2])])
def test_a_batch_is_cut_into_steps_of_whole_groups(count, members):
    config = make_config(**{"learner.steps_per_batch": count})
    steps, scored = plan_batch(config, groups_of(), 0, 1, CPU)
    assert [len(step.members) for step in steps] == members
    assert [i for step in steps for i in step.members.tolist()] == list(range(12))
    assert [n for step in steps for n in step.lengths.tolist()] == [abs(n) for pair in LENGTHS for n in pair]
    assert scored.rewards.tolist() == [list(pair) for pair in REWARDS]
    assert scored.lengths.tolist() == [[abs(n) for n in pair] for pair in LENGTHS]
    assert scored.parts.shape == (6, 2, 1)


FLAT = [(1.0, 0.0), (2.0, 2.0), (NAN, 4.0), (0.0, 1.0), (0.1, 0.1), (2.0, 0.0)]


@pytest.mark.parametrize(
    ("mode", "trained", "members"),
    [("keep", 6, [6, 6]), ("drop", 3, [4, 2]), ("resample", 3, [4, 2])],
)
def test_groups_without_variance_are_kept_or_dropped_and_counted(mode, trained, members):
    changes = {"algorithm.zero_variance": mode, "learner.steps_per_batch": 2}
    steps, scored = plan_batch(make_config(**changes), groups_of(FLAT), 0, 1, CPU)
    assert [len(step.members) for step in steps] == members
    assert len(scored.rewards) == len(scored.lengths) == len(scored.parts) == trained
    names = ["groups", "groups/trained", "groups/zero_variance"]
    assert [scored.metrics[name] for name in names] == [6, trained, 3]


@pytest.mark.parametrize(("combine", "trained"), [("sum_then_normalize", 1), ("normalize_then_sum", 2)])
def test_by_part_a_group_of_equal_sums_may_have_a_signal(combine, trained):
    groups = groups_of([(1, 1), (0, 2), (3, 3)], a=[(1, 0), (0, 1), (2, 2)], b=[(0, 1), (0, 1), (1, 1)])
    two = [{"function": "exact_match", "name": name} for name in "ab"]
    changes = {"algorithm.zero_variance": "drop", "algorithm.combine": combine, "reward.functions": two}
    _, scored = plan_batch(make_config(**changes), groups, 0, 1, CPU)
    assert scored.metrics["groups/trained"] == trained
    assert scored.parts[-1].tolist() == [[0, 0], [1, 1]]  # [G, F]


def test_nothing_left_is_no_micro_batch():
    changes = {"algorithm.zero_variance": "drop", "learner.steps_per_batch": 2}
    steps, scored = plan_batch(make_config(**changes), groups_of([(1, 1)] * 6), 0, 1, CPU)
    assert [(len(step.members), step.batches) for step in steps] == [(0, ()), (0, ())]
    assert scored.metrics["groups/trained"] == scored.metrics["trainable_tokens"] == 0


def test_tokens_are_counted_of_what_is_trained():
    _, scored = plan_batch(make_config(**{"algorithm.mask_truncated": True}), groups_of(), 0, 1, CPU)
    assert scored.metrics["trainable_tokens"] == 4 + 2 + 3 + 1 + 5 + 2 + 2 + 6 + 4
    assert scored.metrics["train_tokens"] == 29 + 9 * 2  # The empty and the masked ones are not computed.
    _, scored = plan_batch(make_config(), groups_of(), 0, 1, CPU)
    assert scored.metrics["trainable_tokens"] == 33


# --- advantages and weights ---


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "prompt_mean"])
def test_weights_belong_to_the_step_and_advantages_to_the_batch(name, count, budget):
    changes = {"algorithm.aggregation": {"name": name}, "learner.steps_per_batch": count}
    steps, scored, _ = prepare(
        **changes, **{"algorithm.mask_truncated": True, "learner.max_tokens_per_microbatch": budget}
    )
    advantages, weights = columns(steps, "advantages"), columns(steps, "weights")
    expected = grpo(torch.tensor(REWARDS)).flatten()
    close([advantages[i] for i in sorted(advantages)], expected[sorted(advantages)])
    assert scored.metrics["advantages/abs_mean"] == pytest.approx(float(expected.abs().mean()))
    assert sorted(weights) == [0, 1, 2, 4, 5, 6, 7, 9, 11]
    for part in np.array_split(np.arange(6), count):
        rows = [i for g in part for i in (2 * g, 2 * g + 1)]
        lengths = torch.tensor([max(n, 0) for g in part for n in LENGTHS[g]])  # Masked rows count in M.
        groups = {"groups": torch.tensor([i // 2 for i in range(len(rows))])} if name == "prompt_mean" else {}
        by_hand = AGGREGATIONS[name](lengths, **groups).tolist()
        close([weights.get(i, 0.0) for i in rows], by_hand)


def test_the_advantage_sees_the_reward_of_a_masked_completion():
    steps, _, _ = prepare(**{"algorithm.mask_truncated": True, "algorithm.advantage.name": "dr_grpo"})
    assert columns(steps, "advantages")[2] == -0.75  # Rewards 0.5 and 2, the second truncated.


def test_parts_and_lengths_reach_the_advantage():
    parts = {"a": REWARDS, "b": [(1, 0)] * 6}
    functions = [{"function": "exact_match", "weight": 1.0, "name": "a"},
                 {"function": "exact_match", "weight": 0.25, "name": "b"}]  # fmt: skip
    changes = {"reward.functions": functions, "algorithm.combine": "normalize_then_sum"}
    steps, scored, _ = prepare(groups_of(**parts), **changes)
    expected = normalize_then_sum(scored.parts, torch.tensor([1.0, 0.25])).flatten()
    found = columns(steps, "advantages")
    close([found[i] for i in sorted(found)], expected[sorted(found)])
    steps, scored, _ = prepare(**{"algorithm.advantage.name": "opo"})
    expected = ADVANTAGES["opo"](scored.rewards, lengths=scored.lengths).flatten()
    found = columns(steps, "advantages")
    close([found[i] for i in sorted(found)], expected[sorted(found)])


# --- which steps get an old pass ---

REWARD_KL = {"algorithm.kl.reward_coef": 0.1}
NUCLEUS = {"rollout.top_p": 0.9, "rollout.truncated_sampling": "renormalise"}


@pytest.mark.parametrize(
    ("mode", "count", "changes", "with_pass"),
    [
        ("auto", 1, {}, []),
        ("auto", 3, {}, [1, 2]),
        ("current", 1, {}, []),
        ("recompute", 1, {}, [0]),
        ("recompute", 3, {}, [0, 1, 2]),
        ("rollout", 1, {}, []),
        ("rollout", 3, {}, []),
        ("auto", 1, REWARD_KL, [0]),
        ("auto", 3, REWARD_KL, [0, 1, 2]),
        ("rollout", 3, REWARD_KL, []),
        ("auto", 3, {"algorithm.top_entropy_quantile": 0.5}, [0, 1, 2]),
        ("auto", 3, NUCLEUS, [0, 1, 2]),
        ("auto", 1, {"dropout": True}, [0]),
        ("auto", 1, {"algorithm.kl.coef": 0.1}, []),
    ],
)
def test_old_logprobs_come_from_a_pass_exactly_where_they_must(mode, count, changes, with_pass):
    groups = groups_of()
    steps, _, numbers = prepare(groups, **{"algorithm.old_logprobs": mode, "learner.steps_per_batch": count} | changes)
    passed = [steps[i].members.tolist() for i in with_pass]
    assert sorted(i for batch in numbers.forwards for i in batch) == sorted(
        i for members in passed for i in members if len(flat(numbers.ref)[i])
    )
    rollout = [c.logprobs for g in groups for c in g.completions]
    for number, step in enumerate(steps):
        found = [batch.old_logprobs for batch in step.batches]
        if number in with_pass or mode == "rollout":
            expected = flat(numbers.logprobs_) if number in with_pass else rollout
            for i, values in by_sequence([step], "old_logprobs").items():
                close(values, expected[i])
        else:
            assert found == [None] * len(found)
        assert all((batch.ref_logprobs is None) is not any("kl" in key for key in changes) for batch in step.batches)


# --- KL in the reward ---


def kl_by_hand(name, policy, ref):
    d = policy.astype(np.float64) - ref
    return {"k1": d, "abs": np.abs(d), "mse": 0.5 * d**2}[name].sum()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("name", "mode"),
    [("k1", "auto"), ("abs", "auto"), ("mse", "auto"), ("full", "auto"), ("k1", "rollout"), ("abs", "rollout")],
)
def test_the_kl_is_taken_off_the_reward_before_the_group_statistics(name, budget, mode):
    groups = groups_of()
    numbers = Numbers(groups)
    changes = {"algorithm.kl.reward_estimator": name, "algorithm.old_logprobs": mode, "learner.steps_per_batch": 2}
    steps, scored, _ = prepare(
        groups, numbers=numbers, eta=0.3, **REWARD_KL, **changes, **{"learner.max_tokens_per_microbatch": budget}
    )
    policy = flat(numbers.logprobs_) if mode == "auto" else [c.logprobs for g in groups for c in g.completions]
    sums = [kl_by_hand(name, p, r) for p, r in zip(policy, flat(numbers.ref), strict=True)] if name != "full" else []
    sums = np.array(sums or [values.sum() for values in flat(numbers.kl)])
    penalised = torch.tensor(np.array(REWARDS) - 0.3 * sums.reshape(6, 2))
    close(scored.rewards, penalised)
    found = columns(steps, "advantages")
    close([found[i] for i in sorted(found)], grpo(penalised.float()).flatten()[sorted(found)], 1e-5)
    assert scored.metrics["reward_kl"] == pytest.approx(sums.mean(), abs=1e-6)
    assert scored.metrics["reward_kl_per_token"] == pytest.approx(sums.sum() / 33, abs=1e-6)
    assert numbers.hiddens == (sum(len(step.batches) for step in steps) if name == "full" else 0)
    assert all((against is None) is (name != "full") for against in numbers.seen_against)


def test_row_14_with_the_scores_group():
    groups = groups_of([(2.0, 0.0)], [(3, 0)])
    numbers = Numbers(groups)
    numbers.logprobs_, numbers.ref = [[[-1.0, -0.5, -2.0], []]], [[[-1.2, -0.5, -1.5], []]]
    _, scored, _ = prepare(groups, numbers=numbers, eta=0.1, **REWARD_KL)
    close(scored.rewards, [[2.03, 0]])  # The empty completion has its score alone.


def test_equal_scores_with_different_kl_carry_signal():
    steps, scored, _ = prepare(groups_of([(1.0, 1.0)] * 6), eta=0.1, **REWARD_KL)
    found = columns(steps, "advantages")
    assert all(abs(found[i]) > 0.1 for i in (0, 1, 4, 5))
    assert scored.metrics["groups/trained"] == 6


def test_a_masked_completion_has_its_score_and_no_kl():
    _, scored, _ = prepare(eta=0.3, **REWARD_KL, **{"algorithm.mask_truncated": True})
    assert (scored.rewards[1, 1], scored.rewards[5, 0]) == (2.0, 2.0)
    assert scored.rewards[0, 0] != 1.0


# --- tokens of high entropy ---


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 0.9])
@pytest.mark.parametrize("count", [1, 2])
def test_the_entropy_threshold_is_the_quantile_of_the_whole_step(share, count, budget):
    changes = {"algorithm.top_entropy_quantile": share, "learner.steps_per_batch": count}
    steps, _, numbers = prepare(
        **changes, **{"learner.max_tokens_per_microbatch": budget, "algorithm.mask_truncated": True}
    )
    for step in steps:
        trained = [i for i, n in zip(step.members.tolist(), step.lengths.tolist(), strict=True) if n]
        entropies = {i: torch.tensor(flat(numbers.entropy)[i]) for i in trained}
        threshold = torch.quantile(torch.cat([*entropies.values()]), 1 - share)
        found = by_sequence([step], "entropy_keep")
        assert {i: (entropies[i] >= threshold).tolist() for i in trained} == found
        assert step.entropy_tokens == sum(map(sum, found.values()))
        if share == 0:
            assert step.entropy_tokens == 1  # The maximum alone.


def test_without_a_quantile_every_token_counts():
    steps, _, _ = prepare(**{"learner.steps_per_batch": 2, "algorithm.mask_truncated": True})
    assert all(batch.entropy_keep is None for step in steps for batch in step.batches)
    assert [step.entropy_tokens for step in steps] == [15, 14]


# --- truncated sampling ---


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_token_outside_the_kept_set_leaves_mask_and_weights(budget):
    groups = groups_of()
    numbers = Numbers(groups)
    for i, t in ((0, 1), (0, 3), (3, 0)):  # The fourth sequence has one token alone.
        flat(numbers.logprobs_)[i][t] = -np.inf
    changes = NUCLEUS | {"learner.max_tokens_per_microbatch": budget, "algorithm.aggregation.name": "sequence_mean"}
    steps, scored, _ = prepare(groups, numbers=numbers, **changes)
    assert scored.metrics["truncated_sampling/outside"] == 3
    left = [abs(n) for pair in LENGTHS for n in pair]
    left[0], left[3] = 2, 0
    assert steps[0].lengths.tolist() == left
    assert steps[0].entropy_tokens == 30
    weights = columns(steps, "weights")
    close([weights.get(i, 0) for i in range(12)], [1 / (12 * n) if n else 0 for n in left])
    old = by_sequence(steps, "old_logprobs")
    close(old[0], flat(numbers.logprobs_)[0][[0, 2]])
    assert old[3] == []


def test_the_full_distribution_leaves_nothing_outside():
    _, scored, _ = prepare(**{"algorithm.old_logprobs": "recompute"})
    assert "truncated_sampling/outside" not in scored.metrics


# --- fixed from outside ---


def test_given_numbers_replace_our_own():
    groups = groups_of()
    other = Numbers(groups, seed=5)
    given = Given(torch.arange(12.0).view(6, 2), other.logprobs_, other.ref)
    changes = {"algorithm.kl.coef": 0.1, "algorithm.old_logprobs": "recompute"}
    steps, scored, numbers = prepare(groups, given, **changes)
    assert numbers.forwards == []
    for i, values in by_sequence(steps, "old_logprobs").items():
        close(values, flat(other.logprobs_)[i])
    for i, values in by_sequence(steps, "ref_logprobs").items():
        close(values, flat(other.ref)[i])
    assert columns(steps, "advantages") == {i: float(i) for i in range(12) if i != 8}
    assert scored.metrics["advantages/abs_mean"] == 5.5


@pytest.mark.parametrize("fixed", ["advantages", "old_logprobs", "ref_logprobs"])
def test_each_number_can_be_given_alone(fixed):
    groups = groups_of()
    other = Numbers(groups, seed=5)
    value = {"advantages": torch.ones(6, 2), "old_logprobs": other.logprobs_, "ref_logprobs": other.ref}[fixed]
    changes = {"algorithm.kl.coef": 0.1, "algorithm.old_logprobs": "recompute"}
    own, _, _ = prepare(groups, **changes)
    steps, _, numbers = prepare(groups, Given(**{fixed: value}), **changes)
    assert (numbers.forwards == []) is (fixed == "old_logprobs")
    for name, read in (("advantages", columns), ("old_logprobs", by_sequence), ("ref_logprobs", by_sequence)):
        assert (read(steps, name) == read(own, name)) is (name != fixed)


def test_a_given_old_policy_is_what_the_kl_in_the_reward_sees():
    groups = groups_of()
    numbers, other = Numbers(groups), Numbers(groups, seed=5)
    given = Given(old_logprobs=other.logprobs_)
    _, scored, _ = prepare(groups, given, eta=0.3, numbers=numbers, **REWARD_KL)
    pairs = zip(flat(other.logprobs_), flat(numbers.ref), strict=True)
    sums = np.array([kl_by_hand("k1", p, r) for p, r in pairs]).reshape(6, 2)
    close(scored.rewards, np.array(REWARDS) - 0.3 * sums)
