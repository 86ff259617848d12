"""Choices: names and arguments of the configuration become bound functions, or an E107 that says what to write."""

import inspect

import pytest
import torch

from learner.advantages import ADVANTAGES, normalize_then_sum
from learner.choices import Choices
from learner.coefficients import ENTROPY_BONUSES, KL_CONTROLS, AdaptiveKl
from learner.losses import AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES
from learner.rejection import REJECTIONS
from learner.schedules import SCHEDULES
from shared.choices import SUPPLIED, bind
from shared.config import Choice, Config
from shared.errors import InputError, InputErrors

TABLES = {
    "advantage": ADVANTAGES,
    "policy_loss": POLICY_LOSSES,
    "aggregation": AGGREGATIONS,
    "schedule": SCHEDULES,
    "kl": KL_ESTIMATORS,
    "kl_control": KL_CONTROLS,
    "entropy": ENTROPY_BONUSES,
    "rejection": REJECTIONS,
}
REQUIRED = {
    ("aggregation", "constant"): {"length": 8},
    ("kl_control", "adaptive"): {"target": 6.0},
    ("entropy", "bonus"): {"coef": 0.1},
}

# (section, its value, place, found, words of what was expected, fix)
WRONG = [
    ("advantage", {"name": "gprto"}, "algorithm.advantage.name", "gprto", "one of grpo, dr_grpo", '"grpo"'),
    ("advantage", {"name": "zzz"}, "algorithm.advantage.name", "zzz", "opo", "choose one of these"),
    ("policy_loss", {"name": "dualclip"}, "algorithm.policy_loss.name", "dualclip", "one of clip", '"dual_clip"'),
    ("aggregation", {"name": "token_men"}, "algorithm.aggregation.name", "token_men", "token_mean", '"token_mean"'),
    ("schedule", {"name": "cosin"}, "learner.schedule.name", "cosin", "one of constant, linear, cosine", '"cosine"'),
    ("advantage", {"name": "grpo", "scael": "batch"}, "algorithm.advantage.scael", "scael", "one of scale, eps",
     "algorithm.advantage.scale"),
    ("policy_loss", {"name": "clip", "hgih": 0.3}, "algorithm.policy_loss.hgih", "hgih", "one of low, high, delta",
     "algorithm.policy_loss.high"),
    ("policy_loss", {"name": "clip", "logprobs": 1}, "algorithm.policy_loss.logprobs", "logprobs",
     "one of low, high, delta", "remove it"),
    ("aggregation", {"name": "token_mean", "length": 8}, "algorithm.aggregation.length", "length", "no arguments",
     "remove it"),
    ("aggregation", {"name": "prompt_mean", "groups": 2}, "algorithm.aggregation.groups", "groups", "no arguments",
     "remove it"),
    ("aggregation", {"name": "constant"}, "algorithm.aggregation", "nothing", "length",
     "set algorithm.aggregation.length"),
    ("schedule", {"name": "linear", "warmup": 5}, "learner.schedule.warmup", "warmup",
     "one of warmup_steps, final_fraction", "learner.schedule.warmup_steps"),
    ("advantage", {"name": "no_such_module:f"}, "algorithm.advantage.name", "No module named 'no_such_module'",
     "an importable function", "correct the name"),
    ("policy_loss", {"name": "math:nope"}, "algorithm.policy_loss.name", "has no attribute 'nope'",
     "an importable function", "correct the name"),
    ("kl", {"estimator": "k33"}, "algorithm.kl.estimator", "k33", "one of k1, k2", '"k3"'),
    ("rejection", {"name": "tokenk1"}, "algorithm.rejection.name", "tokenk1", "one of none, token_k1", '"token_k1"'),
    ("rejection", {"name": "seq_max_k2", "low": 0.5}, "algorithm.rejection.low", "low", "one of high", "remove it"),
]  # fmt: skip

OWN_FUNCTIONS = """
def halves(rewards, *, share=0.5, lengths):
    return rewards * share + lengths

def own_loss(log_ratio, advantages, mask, *, logprobs=None, slope):
    return slope * advantages * log_ratio
"""


def config(**algorithm):
    schedule = {"schedule": algorithm.pop("schedule")} if "schedule" in algorithm else {}
    return Config.model_validate(
        {
            "model": {"path": "model"},
            "data": {"train": "train.jsonl"},
            "reward": {"functions": [{"function": "exact"}]},
            "algorithm": algorithm,
            "learner": schedule,
        }
    )


def problems_of(**sections) -> list[InputError]:
    with pytest.raises(InputErrors) as caught:
        Choices(config(**sections))
    return caught.value.problems


@pytest.fixture
def own_functions(tmp_path, monkeypatch):
    (tmp_path / "own_functions_of_a_test.py").write_text(OWN_FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_functions_of_a_test"


@pytest.mark.parametrize(("section", "value", "place", "found", "expected", "fix"), WRONG)
def test_a_wrong_choice_says_what_to_write(section, value, place, found, expected, fix):
    (problem,) = problems_of(**{section: value})
    assert problem.code == "E107"
    assert problem.place == place
    assert found in problem.found
    assert expected in problem.expected
    assert problem.fix == fix
    assert str(problem).startswith("error[E107]")
    assert "\n" not in str(problem)


def test_all_wrong_choices_are_reported_together():
    problems = problems_of(
        advantage={"name": "nope"},
        policy_loss={"name": "clip", "lo": 0.1},
        aggregation={"name": "constant"},
        kl={"estimator": "k9"},
        schedule={"name": "step"},
    )
    assert {problem.code for problem in problems} == {"E107"}
    assert len({problem.place for problem in problems}) == len(problems) == 5


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_entry_takes_its_own_arguments_and_no_other(kind, name):
    required = REQUIRED.get((kind, name), {})
    parameters = inspect.signature(TABLES[kind][name]).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in SUPPLIED} | required
    bound = bind(Choice(name=name, **own), TABLES[kind], kind, kind)
    assert bound.func is TABLES[kind][name]
    assert bound.keywords == own
    with pytest.raises(InputError, match="E107"):
        bind(Choice(name=name, surely_unknown=1, **own), TABLES[kind], kind, kind)


def test_the_defaults_are_grpo():
    choices = Choices(config())
    rewards, lengths = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(choices.advantages(rewards, rewards[..., None], lengths), ADVANTAGES["grpo"](rewards))
    assert torch.equal(choices.weights(lengths[0], torch.zeros(4)), AGGREGATIONS["sequence_mean"](lengths[0]))
    assert choices.loss.policy_loss.func is POLICY_LOSSES["clip"]
    assert choices.loss.kl_estimator is KL_ESTIMATORS["k3"]
    assert (choices.loss.kl_coef, choices.loss.kl_corrected, choices.loss.kl_straight_through) == (0.0, False, False)
    assert (choices.loss.off_policy_threshold, choices.loss.entropy_coef) == (None, 0.0)
    assert (choices.loss.sequence_level, choices.loss.folds_weights) == (False, False)
    assert (choices.loss.clip_low, choices.loss.clip_high) == (0.2, 0.2)
    assert not choices.truncates
    assert not choices.needs_old_pass
    assert choices.kl_control(0.5).value == 0.5
    assert choices.entropy_bonus().value == 0
    assert choices.kl_schedule(50, 100) == 1
    assert choices.loss.importance_sampling == {"level": "token", "mode": "truncate", "low": None, "high": 3.0}
    assert choices.schedule(50, 100) == 1


def test_arguments_reach_the_functions():
    choices = Choices(
        config(
            advantage={"name": "grpo", "scale": "none"},
            policy_loss={"name": "clip", "high": 0.5},
            aggregation={"name": "constant", "length": 5},
            kl={
                "estimator": "k1",
                "coef": 0.25,
                "corrected": True,
                "straight_through": True,
                "schedule": {"name": "linear"},
                "control": {"name": "adaptive", "target": 6.0, "horizon": 100.0},
            },
            off_policy_threshold=0.5,
            entropy={"name": "bonus", "coef": 0.01},
            schedule={"name": "linear", "final_fraction": 0.5},
            importance_sampling={"level": "none"},
        )
    )
    lengths = torch.tensor([1, 2])
    rewards = torch.tensor([[1.0, 0]])
    assert choices.advantages(rewards, rewards[..., None], lengths[None]).tolist() == [[0.5, -0.5]]
    assert choices.weights(lengths, torch.zeros(2)).tolist() == pytest.approx([0.1, 0.1])
    rho_two = torch.full((1, 1), 2.0).log()
    assert float(choices.loss.policy_loss(rho_two, torch.ones(1, 1), torch.ones(1, 1))) == -1.5
    assert choices.loss.kl_estimator is KL_ESTIMATORS["k1"]
    assert (choices.loss.kl_coef, choices.loss.kl_corrected, choices.loss.kl_straight_through) == (0.25, True, True)
    assert choices.loss.off_policy_threshold == 0.5
    assert (choices.loss.clip_low, choices.loss.clip_high) == (0.2, 0.5)
    assert choices.kl_schedule(50, 100) == 0.5
    control = choices.kl_control(0.1)
    control.observe(12.0, 1.0, 10)
    assert isinstance(control, AdaptiveKl)
    assert control.value == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    assert choices.entropy_bonus().value == 0.01
    assert choices.loss.importance_sampling is None
    assert choices.schedule(50, 100) == 0.75


def test_lengths_and_groups_reach_the_functions_that_ask():
    choices = Choices(config(advantage={"name": "opo"}, aggregation={"name": "prompt_mean"}))
    rewards, lengths = torch.tensor([[1.0, 0, 4]]), torch.tensor([[10, 20, 30]])
    found = choices.advantages(rewards, rewards[..., None], lengths)
    assert found.tolist()[0] == pytest.approx([-7 / 6, -13 / 6, 11 / 6])
    weights = choices.weights(torch.tensor([2, 3, 5]), torch.tensor([0, 1, 1]))
    assert weights.tolist() == pytest.approx([1 / 4, 1 / 16, 1 / 16])


def test_a_function_of_ones_own_works_by_its_dotted_name(own_functions):
    choices = Choices(
        config(
            advantage={"name": f"{own_functions}:halves", "share": 0.25},
            policy_loss={"name": f"{own_functions}:own_loss", "slope": 3.0},
        )
    )
    rewards = torch.tensor([[8.0, 4]])
    assert choices.advantages(rewards, rewards[..., None], torch.tensor([[1, 2]])).tolist() == [[3, 3]]
    one = torch.ones(1, 1)
    assert float(choices.loss.policy_loss(one, one, one, logprobs=one)) == 3


def test_arguments_of_a_function_of_ones_own_are_checked(own_functions):
    wrong, missing = problems_of(
        advantage={"name": f"{own_functions}:halves", "shar": 0.25}, policy_loss={"name": f"{own_functions}:own_loss"}
    )
    assert (wrong.place, wrong.fix) == ("algorithm.advantage.shar", "algorithm.advantage.share")
    assert (missing.place, missing.expected) == ("algorithm.policy_loss", "slope")


def test_parts_are_weighed_and_normalised_with_the_advantages_own_eps():
    functions = [{"function": "a", "weight": 2.0}, {"function": "b", "weight": -0.5}]
    base = config(advantage={"name": "grpo", "eps": 0.5}, combine="normalize_then_sum").model_dump()
    choices = Choices(Config.model_validate(base | {"reward": {"functions": functions}}))
    parts = torch.tensor([[[1.0, 5], [0, 7], [4, 7]]])
    expected = normalize_then_sum(parts, torch.tensor([2.0, -0.5]), eps=0.5)
    assert torch.equal(choices.advantages(torch.zeros(1, 3), parts, torch.ones(1, 3)), expected)
    assert not torch.allclose(expected, normalize_then_sum(parts, torch.tensor([2.0, -0.5])), atol=1e-2)


@pytest.mark.parametrize(
    ("chosen", "low", "high", "sequence_level", "folds"),
    [
        ({"name": "clip", "low": 0.1, "high": 0.28}, 0.1, 0.28, False, False),
        ({"name": "dual_clip", "c": 4.0}, 0.2, 0.2, False, False),
        ({"name": "cispo", "cap": 4.0}, 1.0, 3.0, False, False),  # Above the cap alone.
        ({"name": "sapo"}, 0.2, 0.2, False, False),
        ({"name": "sequence_clip"}, 3e-4, 4e-4, True, False),
        ({"name": "gmpo"}, 0.2, 0.2, True, False),
        ({"name": "vespo"}, 0.2, 0.2, True, True),
        ({"name": "cispo", "unit": "sequence"}, 1.0, 4.0, True, False),
        ({"name": "sapo", "unit": "sequence"}, 0.2, 0.2, True, False),
        ({"name": "gspo_token"}, 3e-4, 4e-4, True, False),
        ({"name": "dppo_tv"}, 0.2, 0.2, False, False),
    ],
)
def test_the_loss_is_told_what_its_policy_loss_is_like(chosen, low, high, sequence_level, folds):
    loss = Choices(config(policy_loss=chosen)).loss
    assert (loss.clip_low, loss.clip_high) == (low, high)
    assert (loss.sequence_level, loss.folds_weights) == (sequence_level, folds)


@pytest.mark.parametrize(
    ("policy_loss", "corrected", "by_row"),
    [
        ("clip", True, False),
        ("sequence_clip", True, True),
        ("gspo_token", True, True),
        ("gmpo", True, True),
        ("vespo", True, False),  # The KL of a token is corrected by its own ratio.
        ("vespo", "sequence", True),
        ("sequence_clip", "token", False),
        ("clip", "sequence", True),
        ({"name": "cispo", "unit": "sequence"}, True, True),
        ("cispo", True, False),
    ],
)
def test_a_corrected_kl_takes_the_ratio_that_is_asked_for(policy_loss, corrected, by_row):
    loss = Choices(config(policy_loss=policy_loss, kl={"coef": 0.1, "corrected": corrected})).loss
    assert (loss.kl_corrected, loss.kl_by_row) == (True, by_row)


def test_a_rejection_is_bound_and_none_is_none():
    assert Choices(config()).loss.rejection is None
    keep = Choices(config(rejection={"name": "token_k1", "low": 0.9, "high": 1.5})).loss.rejection
    gaps = torch.tensor([[0.3, 0.5, -0.2]])
    assert keep(gaps, torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [[True, False, False]]


def test_lengths_reach_whitening_and_tokens_of_the_batch_the_weights():
    choices = Choices(config(advantage={"name": "reinforce_pp"}, aggregation={"name": "batch_token_mean"}))
    rewards, lengths = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[3, 1], [2, 2]])
    found = choices.advantages(rewards, rewards[..., None], lengths)
    assert found.flatten().tolist() == pytest.approx([0.724569, -1.207615, -1.207615, 0.724569], abs=1e-6)
    assert choices.weights(torch.tensor([2, 3]), torch.zeros(2), 20.0).tolist() == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize(
    ("algorithm", "rollout", "truncates", "needed"),
    [
        ({}, {}, False, False),
        ({"top_entropy_quantile": 0.5}, {}, False, True),
        ({"kl": {"reward_coef": 0.1}}, {}, False, True),
        ({"kl": {"coef": 0.1}}, {}, False, False),
        ({"importance_sampling": {"normalise": True}}, {}, False, True),
        ({"rejection": {"name": "token_k1"}}, {}, False, False),  # The training pass has them.
        ({}, {"top_p": 0.9}, True, True),
        ({}, {"top_k": 3}, True, True),
        ({}, {"min_p": 0.1}, True, True),
        ({}, {"temperature": 0.5}, False, False),
    ],
)
def test_what_needs_a_pass_before_the_first_update(algorithm, rollout, truncates, needed):
    choices = Choices(Config.model_validate(config(**algorithm).model_dump() | {"rollout": rollout}))
    assert (choices.truncates, choices.needs_old_pass) == (truncates, needed)


@pytest.mark.parametrize(
    ("name", "args", "key"),
    [
        ("clip", {"low": 1.0}, "low"),
        ("clip", {"high": -0.1}, "high"),
        ("clip", {"high": 0.28, "delta": 1.28}, "delta"),
        ("dual_clip", {"c": 1.0}, "c"),
        ("cispo", {"cap": 0.0}, "cap"),
        ("cispo", {"unit": "row"}, "unit"),
        ("sapo", {"unit": "batch"}, "unit"),
        ("gspo_token", {"low": 1.0}, "low"),
        ("dppo_tv", {"high": -0.1}, "high"),
        ("dppo_kl", {"low": 1.5}, "low"),
        ("dppo_kl", {"cap": 0.0}, "cap"),
    ],
)
def test_arguments_without_meaning_are_refused(name, args, key):
    (problem,) = problems_of(policy_loss={"name": name, **args})
    assert problem.place == f"algorithm.policy_loss.{key}"


@pytest.mark.parametrize(
    ("section", "value", "place"),
    [
        ("kl", {"control": {"name": "adaptive"}}, "algorithm.kl.control"),
        ("kl", {"control": {"name": "adaptive", "target": 0.0}}, "algorithm.kl.control.target"),
        ("kl", {"control": {"name": "adaptive", "target": 1.0, "horizon": 0.0}}, "algorithm.kl.control.horizon"),
        ("kl", {"control": {"name": "adaptive", "target": 1.0, "unit": "batch"}}, "algorithm.kl.control.unit"),
        ("kl", {"control": {"name": "adaptve", "target": 1.0}}, "algorithm.kl.control.name"),
        ("kl", {"schedule": {"name": "linear", "warmup": 3}}, "algorithm.kl.schedule.warmup"),
        ("entropy", {"name": "bonus"}, "algorithm.entropy"),
        ("entropy", {"name": "bonus", "coef": -0.1}, "algorithm.entropy.coef"),
        ("entropy", {"name": "adaptive", "delta": 0.0}, "algorithm.entropy.delta"),
        ("entropy", {"name": "adaptive", "lowest": 0.5, "highest": 0.4}, "algorithm.entropy.highest"),
        ("entropy", {"name": "bonsu"}, "algorithm.entropy.name"),
        ("rejection", {"name": "token_k1", "low": 1.5}, "algorithm.rejection.low"),
        ("rejection", {"name": "seq_max_k2", "high": -1.0}, "algorithm.rejection.high"),
        ("rejection", {"name": "seq_max_k2", "high": "a"}, "algorithm.rejection.high"),
        ("aggregation", {"name": "chunk_token_mean", "sequences": 0}, "algorithm.aggregation.sequences"),
        ("aggregation", {"name": "chunk_token_mean", "sequences": 2.0}, "algorithm.aggregation.sequences"),
        ("aggregation", {"name": "sequence_mean", "skip_empty": 1}, "algorithm.aggregation.skip_empty"),
        ("advantage", {"name": "grpo", "ddof": 2}, "algorithm.advantage.ddof"),
        ("advantage", {"name": "grpo", "ddof": True}, "algorithm.advantage.ddof"),
        ("advantage", {"name": "reinforce_pp", "unit": "group"}, "algorithm.advantage.unit"),
        ("advantage", {"name": "grpo_passk", "scale": "row"}, "algorithm.advantage.scale"),
    ],
)
def test_coefficients_are_checked_before_the_run(section, value, place):
    (problem,) = problems_of(**{section: value})
    assert (problem.code, problem.place) == ("E107", place)


@pytest.mark.parametrize("name", ["math:pi", ":grpo", ".relative:f", "builtins:max"])
def test_what_is_not_an_importable_function_is_refused(name):
    (problem,) = problems_of(advantage={"name": name})
    assert (problem.code, problem.place) == ("E107", "algorithm.advantage.name")
