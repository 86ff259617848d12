"""Settings that must agree: each disagreement with its keys and a fix that works; warnings; recipes under a file."""

from __future__ import annotations

import tomllib

import pytest

from shared.config_checks import disagreements, warnings
from shared.config_loader import load_config, recipes
from shared.errors import InputError, InputErrors
from tests.fakes import make_config, write_config

ROLLOUT = {"algorithm.old_logprobs": "rollout", "algorithm.importance_sampling.level": "none"}
CURRENT = {"algorithm.old_logprobs": "current"}
NUCLEUS = {"rollout.top_p": 0.9, "rollout.truncated_sampling": "renormalise"}
BY_PART = {"algorithm.combine": "normalize_then_sum"}
REWARD_KL = {"algorithm.kl.reward_coef": 0.1}
LOSS_KL = {"algorithm.kl.coef": 0.1}
ADAPTIVE = {"algorithm.kl.control": {"name": "adaptive", "target": 6.0}}
PATIENCE = {"eval.early_stopping": {"name": "patience"}}
OLD, AUTO = "algorithm.old_logprobs", 'algorithm.old_logprobs = "auto"'
NO_KL, SOME_KL = "algorithm.kl.reward_coef = 0.0", "algorithm.kl.coef = 0.001"
OR_FILTER = 'remove it, or rollout.truncated_sampling = "renormalise"'
K3 = 'algorithm.kl.estimator = "k3", or rollout.top_p at its default'
NORMALISE = "algorithm.importance_sampling.normalise"

# (settings, keys, what was found, fix)
DISAGREE = [
    ({"run.steps": 9, "learner.steps_per_batch": 2, "learner.epochs_per_batch": 2},
     "run.steps, learner.epochs_per_batch", "9", "run.steps = 8"),
    ({"run.steps": 1, "learner.epochs_per_batch": 3}, "run.steps, learner.epochs_per_batch", "1", "run.steps = 3"),
    ({"learner.max_tokens_per_microbatch": 19}, "learner.max_tokens_per_microbatch", "19",
     "learner.max_tokens_per_microbatch = 20"),
    ({"rollout.colocate": True, "rollout.num_engines": 2}, "rollout.colocate, rollout.num_engines",
     "2 engines of 1 GPUs, 1 learner ranks", "rollout.num_engines = 1"),
    ({"rollout.cpu_cores": "0|1"}, "rollout.cpu_cores", "2 lists", 'rollout.cpu_cores = "nobind"'),
    ({"rollout.cpu_cores": "0-1|3", "rollout.num_engines": 2, "rollout.tensor_parallel_size": 2},
     "rollout.cpu_cores, rollout.tensor_parallel_size", "0-1|3", 'rollout.cpu_cores = "nobind"'),
    ({"rollout.top_p": 0.9}, "rollout.top_p", "0.9", OR_FILTER),
    ({"rollout.top_k": 5}, "rollout.top_k", "5", OR_FILTER),
    ({"rollout.min_p": 0.1}, "rollout.min_p", "0.1", OR_FILTER),
    (NUCLEUS | LOSS_KL | {"algorithm.kl.estimator": "full"}, "algorithm.kl, rollout.top_p",
     "full with truncated sampling", K3),
    (BY_PART | REWARD_KL, "algorithm.combine, algorithm.kl.reward_coef",
     "normalize_then_sum with KL in the reward", NO_KL),
    (BY_PART | {"algorithm.advantage.name": "rloo"}, "algorithm.combine, algorithm.advantage.name",
     "normalize_then_sum with rloo", 'algorithm.advantage.name = "grpo"'),
    (REWARD_KL | {"algorithm.zero_variance": "drop"}, "algorithm.zero_variance, algorithm.kl.reward_coef", "drop",
     'algorithm.zero_variance = "keep"'),
    (REWARD_KL | {"algorithm.zero_variance": "resample"}, "algorithm.zero_variance, algorithm.kl.reward_coef",
     "resample", 'algorithm.zero_variance = "keep"'),
    ({OLD: "rollout"}, f"{OLD}, algorithm.importance_sampling.level", "rollout with token",
     'algorithm.importance_sampling.level = "none"'),
    *(({OLD: "rollout", "algorithm.importance_sampling.level": level},
       f"{OLD}, algorithm.importance_sampling.level", f"rollout with {level}",
       'algorithm.importance_sampling.level = "none"') for level in ("sequence", "sequence_geometric")),
    (CURRENT | {"learner.steps_per_batch": 2}, f"{OLD}, learner.steps_per_batch, learner.epochs_per_batch", "current",
     AUTO),
    (CURRENT | {"learner.epochs_per_batch": 2}, f"{OLD}, learner.steps_per_batch, learner.epochs_per_batch",
     "current", AUTO),
    (CURRENT | REWARD_KL, f"{OLD}, algorithm.kl.reward_coef", "current", AUTO),
    (CURRENT | {"algorithm.top_entropy_quantile": 0.2}, f"{OLD}, algorithm.top_entropy_quantile", "current", AUTO),
    (ROLLOUT | {"algorithm.top_entropy_quantile": 0.2}, f"{OLD}, algorithm.top_entropy_quantile", "rollout", AUTO),
    (ROLLOUT | REWARD_KL | {"algorithm.kl.reward_estimator": "full"}, f"{OLD}, algorithm.kl.reward_estimator",
     "rollout", AUTO),
    (CURRENT | NUCLEUS, f"{OLD}, rollout.truncated_sampling", "current", AUTO),
    (ROLLOUT | NUCLEUS, f"{OLD}, rollout.truncated_sampling", "rollout", AUTO),
    (CURRENT | {NORMALISE: True}, f"{OLD}, {NORMALISE}", "current", AUTO),
    (ROLLOUT | {"algorithm.rejection.name": "token_k1"}, f"{OLD}, algorithm.rejection", "rollout with token_k1", AUTO),
    ({NORMALISE: True, "algorithm.importance_sampling.level": "none"},
     f"{NORMALISE}, algorithm.importance_sampling.level", "normalise without weights", f"{NORMALISE} = false"),
    (LOSS_KL | ADAPTIVE | {"algorithm.kl.schedule.name": "linear"}, "algorithm.kl.control, algorithm.kl.schedule",
     "adaptive with linear", 'algorithm.kl.schedule.name = "constant"'),
    ({"algorithm.reference_sync_steps": 5}, "algorithm.reference_sync_steps, algorithm.kl.coef", "no reference model",
     SOME_KL),
    (ADAPTIVE, "algorithm.kl.control, algorithm.kl.coef", "no reference model", SOME_KL),
    ({"algorithm.kl.corrected": True}, "algorithm.kl.corrected, algorithm.kl.coef", "no reference model", SOME_KL),
    ({"algorithm.kl.straight_through": True}, "algorithm.kl.straight_through, algorithm.kl.coef",
     "no reference model", SOME_KL),
    (PATIENCE | {"eval.every_steps": 5}, "eval.early_stopping, data.eval", "no evaluation rows", "set data.eval"),
    (PATIENCE | {"data.eval": "rows.jsonl"}, "eval.early_stopping, eval.every_steps", "0", "eval.every_steps = 10"),
]  # fmt: skip

AGREE = [
    {},
    {"run.steps": 8, "learner.steps_per_batch": 2, "learner.epochs_per_batch": 2},
    {"learner.max_tokens_per_microbatch": 20},
    {"rollout.colocate": True},
    {"rollout.cpu_cores": "0|1", "rollout.num_engines": 2},
    NUCLEUS,
    {"rollout.truncated_sampling": "renormalise"},
    NUCLEUS | LOSS_KL,
    NUCLEUS | {"algorithm.kl.estimator": "full", "algorithm.kl.reward_estimator": "full"},  # Neither is in use.
    BY_PART | LOSS_KL,
    REWARD_KL | LOSS_KL,
    REWARD_KL | {OLD: "recompute", "learner.epochs_per_batch": 2},
    ROLLOUT | REWARD_KL,
    ROLLOUT | {"learner.epochs_per_batch": 2},
    CURRENT | LOSS_KL,
    {"algorithm.top_entropy_quantile": 0.2},
    REWARD_KL | ADAPTIVE,
    LOSS_KL | {"algorithm.kl.schedule.name": "linear", "algorithm.reference_sync_steps": 5},
    LOSS_KL | {"algorithm.kl.corrected": True, "algorithm.kl.straight_through": True},
    LOSS_KL | {"algorithm.kl.corrected": "token", "algorithm.kl.straight_through": "corrected"},
    {NORMALISE: True, "algorithm.rejection.name": "token_k1"},
    CURRENT | {"algorithm.rejection.name": "seq_mean_k1"},
    {"rollout.group_size": 1, "algorithm.advantage.name": "batch_mean"},
    PATIENCE | {"eval.every_steps": 5, "data.eval": "rows.jsonl"},
]


def leaves(table, prefix=""):
    """Dotted keys and values of nested tables."""
    for key, value in table.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


@pytest.mark.parametrize(("changes", "keys", "found", "fix"), DISAGREE)
def test_a_disagreement_names_its_keys_and_a_fix_that_works(changes, keys, found, fix):
    (problem,) = disagreements(make_config(**changes), "run.toml")
    assert (problem.code, problem.what, problem.place) == ("E108", "options disagree", f"run.toml:{keys}")
    assert (problem.found, problem.fix) == (found, fix)
    assert problem.expected
    if fix == "set data.eval":
        fix = 'data.eval = "rows.jsonl"'
    if fix == OR_FILTER:
        fix = fix.removeprefix("remove it, or ")
    fix = fix.removesuffix(", or rollout.top_p at its default")
    mended = changes | dict(leaves(tomllib.loads(fix)))
    assert disagreements(make_config(**mended), "run.toml") == []


@pytest.mark.parametrize("key", ["top_k", "min_p"])
def test_a_full_kl_in_the_reward_has_no_truncated_sampling_either(key):
    changes = {f"rollout.{key}": {"top_k": 3, "min_p": 0.1}[key], "rollout.truncated_sampling": "renormalise"}
    changes |= REWARD_KL | {"algorithm.kl.reward_estimator": "full"}
    (problem,) = disagreements(make_config(**changes), "run.toml")
    assert (problem.code, problem.place) == ("E108", f"run.toml:algorithm.kl, rollout.{key}")


@pytest.mark.parametrize("changes", AGREE)
def test_what_agrees_is_accepted(changes):
    assert disagreements(make_config(**changes), "run.toml") == []


@pytest.mark.parametrize(
    ("changes", "code", "key", "fix"),
    [
        ({"rollout.group_size": 1}, "E103", "rollout.group_size", "set 8; one completion has no group to compare with"),
        ({"learner.num_ranks": 3}, "E104", "learner.prompts_per_step", "learner.prompts_per_step = 3 (nearest)"),
        ({"model.dtype": "float16"}, "E405", "model.dtype", 'model.dtype = "bfloat16"'),
        ({"rollout.kv_cache_gib": 0.5}, "E504", "rollout.kv_cache_gib", "rollout.kv_cache_gib = 1"),
    ],
)
def test_a_value_that_does_not_fit_the_others(changes, code, key, fix):
    (problem,) = disagreements(make_config(**changes), "run.toml")
    assert (problem.code, problem.place, problem.fix) == (code, f"run.toml:{key}", fix)


def test_all_disagreements_are_found_in_one_pass(tmp_path):
    changes = CURRENT | REWARD_KL | {"learner.epochs_per_batch": 2, "algorithm.zero_variance": "drop"}
    with pytest.raises(InputErrors) as caught:
        load_config([str(write_config(tmp_path / "run.toml", **changes))])
    assert len({problem.place for problem in caught.value.problems}) == 3
    assert {problem.code for problem in caught.value.problems} == {"E108"}


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        (LOSS_KL, []),
        (LOSS_KL | {"algorithm.kl.estimator": "k1"}, ["W110"]),
        ({"algorithm.kl.estimator": "k1"}, []),
        (REWARD_KL | {"algorithm.kl.estimator": "k1"}, []),
        (LOSS_KL | {"algorithm.kl.estimator": "k1", "algorithm.kl.corrected": True}, []),
        (LOSS_KL | {"algorithm.kl.estimator": "k1", "algorithm.kl.straight_through": True}, []),
        (LOSS_KL | REWARD_KL, ["W111"]),
        (LOSS_KL | REWARD_KL | {"algorithm.kl.estimator": "k1"}, ["W110", "W111"]),
        ({"rollout.max_staleness": 1, "learner.steps_per_batch": 2}, ["W112"]),
        ({"rollout.max_staleness": 1, "rollout.vllm": {"max_num_seqs": 7}}, ["W113"]),
        ({"rollout.max_staleness": 1, "rollout.vllm": {"max_num_seqs": 8}}, []),
        ({"rollout.max_staleness": 255}, []),
        ({"rollout.max_staleness": 256}, ["W113"]),
        ({"rollout.max_staleness": 256, "rollout.num_engines": 2}, []),
        ({"rollout.max_staleness": 256, "rollout.vllm": {"max_num_seqs": 2048}}, []),
        ({"rollout.max_staleness": 3, "learner.steps_per_batch": 2, "learner.epochs_per_batch": 2}, ["W112"]),
        ({"rollout.max_staleness": 2, "learner.steps_per_batch": 2}, []),
        ({"rollout.max_staleness": 0, "learner.steps_per_batch": 2}, []),
    ],
)
def test_warnings(changes, codes):
    found = warnings(make_config(**changes), "run.toml")
    assert [line.split("]")[0].removeprefix("warning[") for line in found] == codes
    assert all("run.toml:" in line and "\n" not in line for line in found)


# --- recipes ---


@pytest.fixture
def load(tmp_path):
    """``load(overrides, **changes)`` reads the small configuration back from a file."""
    return lambda overrides=None, **changes: load_config(
        [str(write_config(tmp_path / "run.toml", **changes))], overrides
    )


def test_a_recipe_lies_under_the_files_own_keys(load):
    config = load(**{"algorithm.recipe": "dapo", "algorithm.zero_variance": "drop"})
    assert config.algorithm.policy_loss.args == {"low": 0.2, "high": 0.28}
    assert (config.algorithm.aggregation.name, config.algorithm.zero_variance) == ("token_mean", "drop")
    config = load(**{"algorithm.recipe": "dapo", "algorithm.policy_loss": {"high": 0.5}})
    assert config.algorithm.policy_loss.args == {"low": 0.2, "high": 0.5}
    config = load(**{"algorithm.recipe": "dapo", "algorithm.policy_loss": {"name": "cispo"}})
    assert config.algorithm.policy_loss.args == {}
    config = load(**{"algorithm.recipe": "grpo_deepseek", "algorithm.kl.estimator": "k2"})
    assert (config.algorithm.kl.coef, config.algorithm.kl.estimator) == (0.04, "k2")


def test_a_recipes_other_sections_lie_under_the_files_too(load):
    assert load(**{"algorithm.recipe": "ppo_kl_reward"}).learner.epochs_per_batch == 2
    config = load(**{"algorithm.recipe": "ppo_kl_reward", "learner.epochs_per_batch": 4})
    assert (config.learner.epochs_per_batch, config.learner.prompts_per_step) == (4, 2)


def test_a_recipe_may_come_from_any_file(tmp_path):
    first = write_config(tmp_path / "a.toml", **{"algorithm.recipe": "dapo", "algorithm.zero_variance": "drop"})
    second = tmp_path / "b.toml"
    second.write_text('[algorithm]\nrecipe = "cispo"\n')
    algorithm = load_config([str(first), str(second)]).algorithm
    assert (algorithm.recipe, algorithm.policy_loss.name, algorithm.zero_variance) == ("cispo", "cispo", "drop")


def test_a_recipe_on_the_command_line_replaces_the_files_algorithm(load):
    changes = {"algorithm.recipe": "dapo", "algorithm.mask_truncated": True, "algorithm.policy_loss": {"name": "sapo"}}
    config = load({"algorithm.recipe": "cispo"}, **changes, **{"learner.lr": 1e-5})
    assert config.algorithm.recipe == "cispo"
    assert (config.algorithm.policy_loss.name, config.algorithm.mask_truncated) == ("cispo", False)
    assert config.learner.lr == 1e-5


@pytest.mark.parametrize("order", [1, -1])
def test_other_overrides_beat_a_recipe_wherever_they_stand(load, order):
    overrides = {"algorithm.recipe": "dapo", "algorithm.policy_loss.high": "0.4", "learner.lr": "1e-5"}
    config = load(dict(list(overrides.items())[::order]))
    assert config.algorithm.policy_loss.args == {"low": 0.2, "high": 0.4}
    assert config.learner.lr == 1e-5


@pytest.mark.parametrize("by", ["file", "command line"])
@pytest.mark.parametrize(("name", "fix"), [("gropo", '"grpo"'), ("dapoo", '"dapo"'), ("zzz", "choose one of these")])
def test_an_unknown_recipe_suggests_the_nearest(load, name, fix, by):
    given = {"algorithm.recipe": name}
    with pytest.raises(InputError) as caught:
        load(given if by == "command line" else None, **(given if by == "file" else {}))
    error = caught.value
    assert (error.code, error.found, error.fix) == ("E107", name, fix)
    assert error.expected == f"one of {', '.join(recipes())}"
    assert error.place.startswith("run.toml:" if by == "file" else "command line:")
    assert error.place.endswith("algorithm.recipe")


def test_a_recipe_that_is_no_name_is_a_bad_value(load):
    with pytest.raises(InputErrors, match="E102"):
        load(**{"algorithm.recipe": 3})


def test_without_a_recipe_the_defaults_apply(load):
    assert load().algorithm.recipe is None
    assert load().algorithm == make_config().algorithm
