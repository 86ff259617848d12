"""Advantages: the worked values, the exact zeros, NaN and infinity, and what may not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import ADVANTAGES, normalize_then_sum

NAN = float("nan")
TWO_GROUPS = [[1, 0, 0, 0], [3, 3, 5, 5]]

# maths.md section 14, rows 1-6; below the line: by hand from section 3. (name, arguments, rewards, advantages)
WORKED = [
    ("grpo", {}, [[2, 4, 4, 6]], [[-1.224670, 0, 0, 1.224670]]),
    ("grpo", {"scale": "group"}, TWO_GROUPS, [[1.499700, *[-0.499900] * 3], [*[-0.865950] * 2, *[0.865950] * 2]]),
    ("grpo", {"scale": "batch"}, TWO_GROUPS, [[0.346065, *[-0.115355] * 3], [*[-0.461420] * 2, *[0.461420] * 2]]),
    ("grpo", {"scale": "none"}, TWO_GROUPS, [[0.75, *[-0.25] * 3], [-1, -1, 1, 1]]),
    ("dr_grpo", {}, TWO_GROUPS, [[0.75, *[-0.25] * 3], [-1, -1, 1, 1]]),
    ("rloo", {}, [[1, 0, 0, 0]], [[1, *[-0.333333] * 3]]),
    ("maxrl", {}, [[1, 0, 0, 0]], [[3, -1, -1, -1]]),
    ("reinforce_pp_baseline", {}, TWO_GROUPS, [[0.910465, *[-0.303488] * 3], [*[-1.213954] * 2, *[1.213954] * 2]]),
    ("grpo", {}, [[1, 4, 3, 6]], [[-1.200903, 0.240181, -0.240181, 1.200903]]),
    ("grpo", {}, [[4, NAN, 1, 1]], [[1.154634, 0, -0.577317, -0.577317]]),
    ("grpo", {}, [[1.5, 0, 1, 0.5]], [[1.161715, -1.161715, 0.387238, -0.387238]]),
    # ---
    ("grpo", {"eps": 1.0}, [[2, 4, 4, 6]], [[-0.759592, 0, 0, 0.759592]]),
    ("rloo", {}, [[1, NAN, 0, 0]], [[1, 0, -0.5, -0.5]]),
    ("maxrl", {}, [[0, 0, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 0], [1, 1, -1, -1]]),
    ("reinforce_pp", {}, TWO_GROUPS, [[-0.519121, *[-0.980562] * 3], [*[0.403761] * 2, *[1.326643] * 2]]),
    ("opo", {"lengths": [[10, 20, 30]]}, [[1, 0, 4]], [[-1.166667, -2.166667, 1.833333]]),
    ("opo", {"lengths": [[10, 20, 30]]}, [[1, 0, NAN]], [[0.666667, -0.333333, 0]]),
    ("grpo", {"ddof": 0}, [[2, 4, 4, 6]], [[-1.414114, 0, 0, 1.414114]]),
    (
        "grpo",
        {"ddof": 0, "scale": "batch"},
        TWO_GROUPS,
        [[0.369958, *[-0.123319] * 3], [*[-0.493277] * 2, *[0.493277] * 2]],
    ),
    # 3 tokens of 1, 1 of 0, 2 of 0, 2 of 1: mean 5/8, squares 5 (3/8)^2 + 3 (5/8)^2 = 1.875, deviation sqrt(1.875/7).
    ("reinforce_pp", {"lengths": [[3, 1], [2, 2]]}, [[1, 0], [0, 1]], [[0.724569, -1.207615], [-1.207615, 0.724569]]),
    (
        "reinforce_pp",
        {"lengths": [[3, 1], [2, 2]], "unit": "sequence"},
        [[1, 0], [0, 1]],
        [[0.866025, -0.866025], [-0.866025, 0.866025]],
    ),
    # The third has no tokens: it moves nothing.
    (
        "reinforce_pp",
        {"lengths": [[3, 1, 0], [2, 2, 0]]},
        [[1, 0, 9], [0, 1, NAN]],
        [[0.724569, -1.207615, 0], [-1.207615, 0.724569, 0]],
    ),
    # Centred +-0.5 and +-1; by token their mean is 1/8, their squares 4.875, the deviation sqrt(4.875/7).
    (
        "reinforce_pp_baseline",
        {"lengths": [[3, 1], [2, 2]]},
        [[1, 0], [3, 1]],
        [[0.449358, -0.748931], [1.048503, -1.348075]],
    ),
    (
        "reinforce_pp_baseline",
        {"lengths": [[3, 1], [2, 2]], "unit": "sequence"},
        [[1, 0], [3, 1]],
        [[0.547723, -0.547723], [1.095445, -1.095445]],
    ),
    (
        "reinforce_pp_baseline",
        {"lengths": [[3, 1], [2, 2], [7, 7]]},
        [[1, 0], [3, 1], [5, 5]],
        [[0.935804, -1.122965], [1.965189, -2.152350], [0, 0]],
    ),
    (
        "grpo_passk",
        {},
        [[1, 0, 0, 0], [0, 2, 5, NAN], [5, 3, 5, 1]],
        [[1.999600, 0, 0, 0], [0, 0, 1.192032, 0], [0] * 4],
    ),
    (
        "grpo_passk",
        {"scale": "none"},
        [[1, 0, 0, 0], [0, 2, 5, NAN], [5, 3, 5, 1]],
        [[1, 0, 0, 0], [0, 0, 3, 0], [0] * 4],
    ),
    ("grpo_passk", {"scale": "batch"}, TWO_GROUPS, [[0.461420, 0, 0, 0], [0] * 4]),
    ("batch_mean", {}, TWO_GROUPS, [[-1.125, *[-2.125] * 3], [*[0.875] * 2, *[2.875] * 2]]),
    ("batch_mean", {}, [[1], [NAN], [0]], [[0.5], [0], [-0.5]]),
]

# normalize_then_sum, by hand from section 3; row 5 first. (parts by completion, one group a line; weights, advantages)
ROW_6 = [[(1, 0.5), (0, NAN), (1, NAN), (0, 0.5)]]
BY_PART = [
    ([[(0, 10), (1, 30), (2, 10), (3, 30)]], [1, 0.1], [[-1.190585, -0.286741, 0.286741, 1.190585]]),
    # The second function is constant where it applies, so the first alone decides.
    (ROW_6, [1, 1], [[0.865939, -0.865939, 0.865939, -0.865939]]),
    ([[(0, 7), (1, 7), (2, 7)]], [1, 5], [[-0.9999, 0, 0.9999]]),
    ([[(7, 7), (7, 7), (7, 7)]], [1, 5], [[0, 0, 0]]),
    # The second completion has no reward at all: it gets 0 and is not in the statistics of the step.
    ([[(0, 0), (NAN, NAN), (2, 2)]], [1, 1], [[-0.707071, 0, 0.707071]]),
    # Every group by itself first: scores +-0.7071 in both groups, then the deviation 0.8165 of the step.
    ([[(0,), (1,)], [(10,), (30,)]], [1], [[-0.865861, 0.865861], [-0.865978, 0.865978]]),
    ([[(0, 3), (1, 2)]], [1, -1], [[-0.707071, 0.707071]]),
]

GROUP_RELATIVE = [
    ("grpo", {"scale": "group"}),
    ("grpo", {"scale": "batch"}),
    ("grpo", {"scale": "none"}),
    ("dr_grpo", {}),
    ("rloo", {}),
    ("maxrl", {}),
    ("reinforce_pp_baseline", {}),
    ("opo", {}),
    ("grpo_passk", {}),
]
ALL = [*GROUP_RELATIVE, ("reinforce_pp", {}), ("batch_mean", {})]
ids = [f"{name}-{'-'.join(map(str, args.values()))}".strip("-") for name, args in ALL]
every_entry = pytest.mark.parametrize(("name", "args"), ALL, ids=ids)
every_group_relative = pytest.mark.parametrize(("name", "args"), GROUP_RELATIVE, ids=ids[:-2])

# Quarters up to 8 in a step of up to 3 groups of up to 6: sums are exact in float32, so tolerances can be tight.
REWARDS = st.tuples(st.integers(1, 3), st.integers(2, 6)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 32).map(lambda n: n / 4), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


def advantages(name, args, rewards, lengths=None):
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    lengths = args.get("lengths", lengths)
    if name in ("opo", "reinforce_pp", "reinforce_pp_baseline"):
        lengths = torch.ones_like(rewards) if lengths is None else torch.as_tensor(lengths)
        args = args | {"lengths": lengths}
    return ADVANTAGES[name](rewards, **args)


def lengths_like(rewards):
    return torch.arange(1, rewards.numel() + 1).view(rewards.shape)


def close(found, expected, atol=2e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float32), rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "args", "rewards", "expected"), WORKED)
def test_worked_values(name, args, rewards, expected):
    found = advantages(name, args, rewards)
    assert found.dtype == torch.float32
    close(found, expected)


def test_every_entry_has_a_worked_value_and_the_invariants():
    assert {row[0] for row in WORKED} == {name for name, _ in ALL} == set(ADVANTAGES)


@every_group_relative
@pytest.mark.parametrize(("reward", "size"), [(0.1, 7), (1000.1, 30), (0.0, 4), (0.7, 3)])
def test_equal_rewards_give_exactly_zero(name, args, reward, size):
    assert torch.equal(advantages(name, args, [[reward] * size]), torch.zeros(1, size))


# The rounded centred rewards of the second group do not add up to 0; whitening over the step must not spread that.
@every_group_relative
def test_equal_rewards_give_exactly_zero_beside_groups_with_variance(name, args):
    found = advantages(name, args, [[0.1] * 7, [0.1, 0.2, 0.7, 0.3, 0.9, 0.4, 1 / 3]])
    assert found[1].abs().max() > 1e-3
    assert torch.equal(found[0], torch.zeros(7))


@every_group_relative
@pytest.mark.parametrize("rewards", [[[NAN, NAN, NAN]], [[NAN, 3.3, NAN]], [[2.0]], [[NAN]]])
def test_fewer_than_two_valid_rewards_give_zero(name, args, rewards):
    assert torch.equal(advantages(name, args, rewards), torch.zeros(1, len(rewards[0])))


def test_reinforce_pp_works_with_one_completion_per_prompt():
    close(advantages("reinforce_pp", {}, [[1], [0], [0], [0]]), [[1.5], [-0.5], [-0.5], [-0.5]])


@every_entry
def test_a_completion_without_reward_gets_zero_and_leaves_the_others_alone(name, args):
    rewards = torch.tensor(TWO_GROUPS, dtype=torch.float32)
    lengths = lengths_like(rewards)
    with_gap = torch.cat([rewards[:, :2], torch.full((2, 1), NAN), rewards[:, 2:]], 1)
    longer = torch.cat([lengths[:, :2], torch.full((2, 1), 99), lengths[:, 2:]], 1)
    found = advantages(name, args, with_gap, longer)
    assert torch.equal(found[:, 2], torch.zeros(2))
    close(found[:, [0, 1, 3, 4]], advantages(name, args, rewards, lengths))


# Without a group baseline no group stands out, so nothing may be left of the rounding of their mean either.
@pytest.mark.parametrize("name", ["reinforce_pp", "batch_mean"])
@pytest.mark.parametrize("rewards", [[[0.1] * 7], [[0.1] * 3, [0.1, NAN, 0.1]], [[1000.1]] * 30, [[NAN, NAN]], [[2.0]]])
def test_without_a_group_baseline_an_all_equal_step_is_exactly_zero(name, rewards):
    lengths = lengths_like(torch.as_tensor(rewards))
    assert torch.equal(advantages(name, {}, rewards, lengths), torch.zeros(len(rewards), len(rewards[0])))


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
@pytest.mark.parametrize("seed", range(4))
def test_by_token_the_advantage_is_that_of_a_whitened_tensor_of_tokens(name, seed):
    random = np.random.default_rng(seed)
    rewards, lengths = random.normal(size=(5, 4)).astype(np.float32), random.integers(0, 9, (5, 4))
    values = rewards - rewards.mean(1, keepdims=True) if "baseline" in name else rewards
    tokens = np.repeat(values.flatten().astype(np.float64), lengths.flatten())
    expected = (values - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
    found = advantages(name, {}, rewards, lengths).numpy()
    assert np.allclose(found[lengths > 0], expected[lengths > 0], atol=2e-6)
    assert not np.allclose(found, advantages(name, {"unit": "sequence"}, rewards, lengths), atol=1e-2)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_without_lengths_every_completion_weighs_one(name):
    rewards = torch.tensor(TWO_GROUPS, dtype=torch.float32)
    assert torch.equal(ADVANTAGES[name](rewards), ADVANTAGES[name](rewards, unit="sequence"))
    with pytest.raises(ValueError, match="'row'"):
        ADVANTAGES[name](rewards, unit="row")


@pytest.mark.parametrize("name", ["grpo", "grpo_passk"])
def test_without_an_epsilon_equal_rewards_still_give_zero(name):
    found = advantages(name, {"eps": 0.0}, [[0.1] * 7, [NAN, 1.0, *[NAN] * 5]])
    assert torch.equal(found, torch.zeros(2, 7))


@every_entry
@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
def test_an_infinite_reward_is_refused(name, args, infinity):
    with pytest.raises(ValueError, match="finite"):
        advantages(name, args, [[1.0, infinity, 0.0], [1.0, 2.0, NAN]])


def test_maxrl_refuses_negative_rewards():
    with pytest.raises(ValueError, match=">= 0"):
        advantages("maxrl", {}, [[1.0, -0.5, NAN]])


def test_grpo_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="'Batch'"):
        advantages("grpo", {"scale": "Batch"}, [[1.0, 0.0]])


@every_entry
@given(rewards=REWARDS, data=st.data())
def test_permuting_completions_permutes_advantages(name, args, rewards, data):
    rewards = torch.tensor(rewards)
    lengths = lengths_like(rewards)
    order = data.draw(st.permutations(range(rewards.shape[1])))
    found = advantages(name, args, rewards[:, order], lengths[:, order])
    close(found, advantages(name, args, rewards, lengths)[:, order], atol=1e-5)


# maxrl divides by the mean; scale="batch" sees the raw rewards, so only one shift for the whole step leaves it alone.
@pytest.mark.parametrize(
    ("name", "args", "shifts"),
    [(name, args, [5, 5, 5] if name in ("reinforce_pp", "batch_mean") or args == {"scale": "batch"} else [5, -3, 40])
     for name, args in ALL if name != "maxrl"],
)  # fmt: skip
@given(rewards=REWARDS)
def test_shifting_rewards_changes_nothing(name, args, shifts, rewards):
    rewards = torch.tensor(rewards)
    shifted = rewards + torch.tensor(shifts)[: len(rewards), None]
    lengths = lengths_like(rewards)
    close(advantages(name, args, shifted, lengths), advantages(name, args, rewards, lengths), atol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "maxrl"])
@given(rewards=REWARDS)
def test_each_group_sums_to_zero(name, rewards):
    close(advantages(name, {}, rewards).sum(1), torch.zeros(len(rewards)), atol=1e-4)


@every_entry
@given(
    rewards=st.lists(
        st.lists(st.one_of(st.floats(0, 2.0**50, width=32), st.just(NAN)), min_size=3, max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_extreme_rewards_stay_finite_and_nan_gives_zero(name, args, rewards):
    rewards = torch.tensor(rewards)
    found = advantages(name, args, rewards, lengths_like(rewards))
    assert found.isfinite().all()
    assert torch.equal(found[rewards.isnan()], torch.zeros(int(rewards.isnan().sum())))


@every_group_relative
@given(rewards=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=6))
def test_a_group_of_one_gives_exactly_zero(name, args, rewards):
    assert torch.equal(advantages(name, args, [[reward] for reward in rewards]), torch.zeros(len(rewards), 1))


@every_group_relative
@given(
    level=st.floats(0, 1e6, width=32),
    gaps=st.lists(st.booleans(), min_size=2, max_size=9),
    other=st.lists(st.floats(0, 8, width=32), min_size=9, max_size=9),
)
def test_a_group_of_equal_rewards_gets_exactly_zero(name, args, level, gaps, other):
    equal = [NAN if gap else level for gap in gaps]
    found = advantages(name, args, [equal, other[: len(equal)]])
    assert torch.equal(found[0], torch.zeros(len(equal)))


# --- several reward functions, each normalised first ---


def by_part(parts, weights, **args):
    return normalize_then_sum(torch.as_tensor(parts, dtype=torch.float32), torch.as_tensor(weights), **args)


@pytest.mark.parametrize(("parts", "weights", "expected"), BY_PART)
def test_worked_values_by_part(parts, weights, expected):
    found = by_part(parts, weights)
    assert found.dtype == torch.float32
    close(found, expected)


def test_by_part_has_the_same_eps_twice():
    # One function, [0, 2]: z = -+1 / (1.414214 + 1), and then again over the step.
    close(by_part([[(0,), (2,)]], [1], eps=1.0), [[-0.261204, 0.261204]])


@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
def test_an_infinite_part_is_refused(infinity):
    with pytest.raises(ValueError, match="finite"):
        by_part([[(1, infinity), (2, 0)]], [1, 1])


PARTS = st.lists(
    st.lists(
        st.tuples(*[st.one_of(st.integers(-16, 16).map(lambda n: n / 4), st.just(NAN))] * 2), min_size=4, max_size=4
    ),
    min_size=1,
    max_size=3,
)


@given(parts=PARTS, order=st.permutations(range(4)), shift=st.integers(-5, 5))
def test_by_part_permutes_with_completions_and_ignores_shifts(parts, order, shift):
    parts = torch.tensor(parts)
    found = by_part(parts, [1.0, 0.5])
    close(by_part(parts[:, order], [1.0, 0.5]), found[:, order], atol=2e-5)
    close(by_part(parts + torch.tensor([shift, -2 * shift]), [1.0, 0.5]), found, atol=1e-4)
    assert found.isfinite().all()
    assert torch.equal(found[parts.isnan().all(-1)], torch.zeros(int(parts.isnan().all(-1).sum())))
