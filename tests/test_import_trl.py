"""``millrace import-trl``: samples become configurations that load, sizes by hand, and every field of GRPOConfig has a fate."""

from __future__ import annotations

import inspect
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cli, import_trl
from launch.import_trl import read
from launch.preflight import prepare
from launch.trl import settings as trl_settings
from launch.trl.found import BUILTINS as TRL_REWARDS
from launch.trl.found import builtin_reward
from launch.trl.rules import ADAMW, ADAPTIVE, ARGUMENTS, LOSSES, NEVER
from learner.choices import Choices
from learner.coefficients import ENTROPY_BONUSES
from learner.losses import AGGREGATIONS, POLICY_LOSSES
from learner.schedules import SCHEDULES
from rollout.rewards import BUILTINS
from shared.config_loader import known_keys, load_config
from shared.errors import InputErrors
from tests.fakes import make_config

SAMPLES = Path(__file__).parent / "data" / "trl"
PAGE = Path(__file__).parent.parent / "docs" / "import-trl.md"
KNOWN = json.loads((SAMPLES / "grpo_config_fields.json").read_text())
FILES = sorted(p for p in SAMPLES.iterdir() if p.name != "grpo_config_fields.json")
COMMIT = "9213176726f574b556790deb65791e0c5aa438b6"
REST = {"model_name_or_path": "m", "datasets": [{"path": "json", "data_files": "rows.jsonl"}]}
REST |= {"reward_funcs": "accuracy_reward"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No file lies where the samples say, unless a test puts it there."""
    monkeypatch.chdir(tmp_path)


def imported(path, *options):
    """``(loaded configuration, everything that was said)`` of a file that translates."""
    output = Path("my.toml")
    output.unlink(missing_ok=True)
    assert import_trl.main([str(path), "--output", str(output), *options]) == 0
    text = output.read_text()
    config = load_config([str(output)])
    Choices(config, "my.toml")
    return config, text


def from_settings(settings, *options):
    """The same for a few settings of GRPOConfig."""
    Path("a.json").write_text(json.dumps(REST | settings))
    return imported("a.json", *options)


def from_script(text, *options):
    """The same for a script."""
    Path("train.py").write_text(text)
    return imported("train.py", *options)


def refused(capsys, path, *options):
    """The one error of a file that does not translate."""
    capsys.readouterr()
    assert import_trl.main([str(path), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.removesuffix("exit code 2\n").strip()


# --- the table ---


def test_every_field_of_grpo_config_is_in_the_table_with_its_default():
    ours = {row.name: row.default for row in trl_settings.rows() if row.section.startswith("GRPOConfig")}
    assert set(ours) == set(KNOWN["fields"])
    assert ours == KNOWN["fields"]
    assert f"TRL {KNOWN['trl']}" == trl_settings.VERSION


def test_every_argument_of_the_trainer_is_in_the_table():
    named = "model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks"
    more = "optimizers quantization_config peft_config tools rollout_func environment_factory"
    assert set(trl_settings.trainer_arguments()) == set(f"{named} {more}".split())


def test_every_row_says_how_or_why_and_names_are_unique():
    rows = trl_settings.rows()
    assert [row.name for row in rows if row.fate.startswith("no ") and not row.text] == []
    for kept in (trl_settings.settings(), trl_settings.trainer_arguments()):
        assert len(kept) == sum((row.section == "GRPOTrainer") == (kept is not trl_settings.settings()) for row in rows)
    assert {row.fate for row in rows} == {"copied", "mapped", "no equal", "no meaning"}
    assert all(row.keys[0] in known_keys() for row in rows if row.fate == "copied")


def test_the_page_of_the_documentation_has_the_table():
    assert PAGE.read_text().endswith(markdown()), "python -m tests.test_import_trl writes it"


def test_the_names_that_rules_write_exist():
    assert {policy for policy, _ in LOSSES.values()} == set(ARGUMENTS) <= set(POLICY_LOSSES)
    assert {aggregation for _, aggregation in LOSSES.values()} <= set(AGGREGATIONS)
    for name, arguments in ARGUMENTS.items():
        assert set(arguments) <= set(inspect.signature(POLICY_LOSSES[name]).parameters)
        assert set(arguments.values()) <= set(KNOWN["fields"])
    assert set(ADAPTIVE) <= set(inspect.signature(ENTROPY_BONUSES["adaptive"]).parameters)
    for name in TRL_REWARDS:
        table = builtin_reward(name, [100, 20] if name.startswith("get_") else [], {})
        assert set(table.get("args", {})) <= set(inspect.signature(BUILTINS[table["function"]]).parameters)


def test_neither_trl_nor_the_script_is_imported():
    before = set(sys.modules)
    imported(SAMPLES / "minimal.py")
    assert not {"trl", "minimal", "datasets"} & (set(sys.modules) - before)


# --- samples ---


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_sample_becomes_a_configuration_that_a_run_accepts(path, capsys):
    config, text = imported(path)
    assert capsys.readouterr().out.startswith("written: my.toml")
    assert config.rollout.max_staleness == 0
    assert tomllib.loads(text)["model"]["path"]
    assert import_trl.main([str(path)]) == 0  # The printed text too is a configuration, comments and all.
    assert tomllib.loads(capsys.readouterr().out)["run"] == tomllib.loads(text)["run"]


def test_the_least_script_has_trls_defaults():
    config, text = imported(SAMPLES / "minimal.py", "--rows", "20")
    assert config.algorithm.policy_loss.args == {"low": 0.2, "high": 0.2}
    assert config.algorithm.aggregation.name == "token_mean"
    assert config.algorithm.advantage.model_dump() == {"name": "grpo"}
    assert config.algorithm.kl.coef == 0.0
    assert config.learner.schedule.model_dump() == {"name": "linear"}
    assert (config.learner.prompts_per_step, config.run.steps, config.run.seed) == (1, 60, 42)  # 8 x 1 / 8; 3 x 20.
    assert (config.learner.gradient_checkpointing, config.model.dtype) == (True, "bfloat16")
    assert config.rollout.colocate
    assert config.reward.functions[0].function == "math_accuracy"
    assert 'train = { path = "trl-lib/DeepMath-103K", split = "train" }  # train_dataset' in text
    assert 'aggregation = { name = "token_mean" }  # TRL\'s default; Millrace\'s is { name = "sequence_mean" }' in text


def test_a_script_with_a_server_on_two_processes():
    config, text = imported(SAMPLES / "vllm_server.py", "--processes", "2", "--rows", "100")
    learner = config.learner
    assert learner.prompts_per_step == 8  # 8 x 4 x 2 / 8
    assert config.run.steps == 24  # 2 epochs of 100 // 8 = 12 batches
    assert learner.schedule.args == {"warmup_steps": 3, "warmup_from_zero": True}  # ceil(0.1 x 24)
    assert (learner.lr, learner.betas, learner.max_grad_norm, learner.num_ranks) == (2e-6, [0.9, 0.99], 0.2, 2)
    kl, sampling = config.algorithm.kl, config.algorithm.importance_sampling
    assert (kl.coef, kl.estimator, kl.corrected) == (0.001, "k3", True)
    assert (sampling.level, sampling.mode, sampling.high) == ("sequence", "mask", 3.0)
    assert not config.rollout.colocate
    assert config.run.output_dir == "runs/Qwen/Qwen2.5-1.5B-Instruct-GRPO"
    first, second = config.reward.functions
    assert (first.function, second.weight) == ("my_rewards.py:right_number", 0.25)
    assert "- model_init_kwargs.attn_implementation = 'flash_attention_2'" in text
    assert "- vllm_server_host, vllm_server_timeout, run_name" in text  # Without meaning, and so without its value.
    assert "set learner.zero_stage" in text


def test_a_script_that_starts_at_import_gives_up_its_rewards_to_a_file(capsys):
    config, text = imported(SAMPLES / "dapo.py")
    assert [f.function for f in config.reward.functions] == ["my_rewards.py:boxed", "think_format", "soft_overlong"]
    assert config.reward.functions[2].args == {"limit": 4096, "buffer": 1024}
    own = Path("my_rewards.py").read_text()
    scope: dict = {}
    exec(compile(own, "my_rewards.py", "exec"), scope)
    assert scope["boxed"]([[{"content": "\\boxed{1}"}], [{"content": "1"}]]) == [1.0, 0.0]
    assert "trl" not in own.split("\n", 1)[1]
    assert config.learner.steps_per_batch == 2  # steps_per_generation 4 / accumulation 2
    assert config.learner.prompts_per_step == 2  # 16 x 2 / 16
    assert config.run.steps == 102
    assert "- run.steps: 101 steps become 102" in text
    assert (config.rollout.max_prompt_tokens, config.rollout.max_new_tokens) == (1024, 4096)
    assert (config.rollout.top_p, config.rollout.truncated_sampling) == (0.95, "renormalise")
    assert config.algorithm.mask_truncated
    assert config.algorithm.policy_loss.args == {"low": 0.2, "high": 0.28}
    assert config.algorithm.importance_sampling.high == 2.0
    assert config.learner.lr == 1e-6
    assert "- generation_kwargs = {'stop': ['</answer>']" in text
    (source,) = config.data.train
    assert (source.path, source.subset, source.split) == ("open-r1/DAPO-Math-17k-Processed", "en", "train")
    assert (source.max_rows, source.columns) == (2000, {"prompt": "question"})
    capsys.readouterr()
    assert import_trl.main([str(SAMPLES / "dapo.py")]) == 0
    assert "and must not start to train then: --output writes them" in capsys.readouterr().out


def test_gspo():
    config, text = imported(SAMPLES / "gspo.py", "--processes", "4")
    assert config.algorithm.policy_loss.model_dump() == {"name": "sequence_clip", "low": 3e-4, "high": 4e-4}
    assert config.algorithm.aggregation.name == "sequence_mean"
    assert config.algorithm.advantage.args == {"scale": "batch"}
    assert (config.algorithm.kl.coef, config.algorithm.kl.corrected) == (0.04, False)
    assert (config.algorithm.reference_sync_steps, config.algorithm.reference_sync_alpha) == (100, 0.6)
    assert (config.learner.prompts_per_step, config.learner.steps_per_batch) == (32, 4)  # 32 x 1 x 4 / 4
    assert (config.rollout.num_engines, config.rollout.tensor_parallel_size, config.rollout.colocate) == (2, 2, False)
    assert (config.run.checkpoint_every, config.run.keep_checkpoints) == (100, 3)  # 0.25 x 400
    assert (config.data.eval[0].path, config.eval.every_steps) == ("held_out.csv", 50)
    assert config.reward.functions[0].function == "my_rewards:judged"
    assert "engines have one GPU each" in text


def test_dr_grpo_with_what_has_no_equal():
    config, text = imported(SAMPLES / "dr_grpo.py")
    assert config.algorithm.advantage.args == {"scale": "none"}
    assert config.algorithm.aggregation.args == {"length": 300}
    assert (config.learner.epochs_per_batch, config.run.steps, config.model.dtype) == (2, 50, "float32")
    assert (config.rollout.temperature, config.rollout.min_p, config.rollout.colocate) == (0.9, 0.05, False)
    assert config.algorithm.entropy.args == {"coef": 0.001}
    assert [(f.function, f.model) for f in config.reward.functions] == [
        ("rewards.math:equal", None),
        (None, "my-org/reward"),
    ]
    for line in (
        "- peft_config (line 38): no adapters",
        "- callbacks (line 39)",
        "- optim = 'adamw_8bit'",
        "- repetition_penalty = 1.1",
        "- learning_rte = 1e-05: unknown to TRL 1.16.0; did you mean learning_rate?",
        "- dr_grpo.py:33: LoggingGRPOTrainer is not GRPOTrainer",
    ):
        assert line in text, line


def test_a_yaml_file_with_a_reward_model():
    config, _ = imported(SAMPLES / "reward_model.yaml")
    assert config.model.path == f"meta-llama/Llama-3.2-1B-Instruct@{COMMIT}"
    assert [f.model or f.function for f in config.reward.functions] == [
        "my-org/reward-model",
        "think_format",
        "soft_overlong",
        "my_lib.rewards:polite",
    ]
    assert [f.weight for f in config.reward.functions] == [1.0, 0.2, 0.1, 0.5]
    assert config.algorithm.combine == "normalize_then_sum"
    assert config.algorithm.policy_loss.model_dump() == {"name": "cispo", "cap": 5.0}
    assert config.algorithm.importance_sampling.level == "none"
    assert config.learner.prompts_per_step == 4  # 8 x 2 x 4 / 16
    assert config.learner.steps_per_batch == 2  # 128 / (8 x 4) = 4 passes of 2
    assert (config.learner.num_ranks, config.learner.zero_stage, config.rollout.num_engines) == (4, 2, 4)
    assert config.learner.lr == 1e-6  # YAML reads 1e-6 as text.
    assert config.learner.schedule.args == {"final_fraction": 0.1, "warmup_steps": 10, "warmup_from_zero": True}
    assert not config.learner.gradient_checkpointing
    assert ([sink.name for sink in config.run.sinks], config.run.samples_every) == (["tensorboard", "wandb"], 5)
    assert config.data.train[0].model_dump(exclude_defaults=True) == {"path": "my-org/questions", "split": "train"}


def test_arguments_in_json():
    config, text = imported(SAMPLES / "arguments.json")
    assert (config.learner.prompts_per_step, config.learner.steps_per_batch) == (8, 1)  # 4 x 16 / 8
    assert config.learner.zero_stage == 3
    assert config.algorithm.policy_loss.args == {"tau_pos": 1.0, "tau_neg": 1.1}
    assert config.algorithm.entropy.args == {"target": 0.5, "delta": 0.005, "lowest": 0.0, "highest": 1.0}
    assert config.learner.schedule.args["warmup_steps"] == 2  # 0.1 x 20
    assert config.rollout.max_prompt_tokens == 256
    assert "HUB_TOKEN" not in text
    assert "lr_scheduler_type = 'polynomial'" in text


def test_what_training_arguments_write_of_themselves():
    """Every field at its default: the same as none at all, and nothing to complain about."""
    given = {"max_steps": 8, "output_dir": "o"}
    bare, _ = from_settings(given)
    full, text = from_settings(KNOWN["fields"] | given | {"generation_batch_size": 8, "steps_per_generation": 1})
    assert full == bare
    assert "No equal" not in text


# --- sizes and steps by hand ---


@pytest.mark.parametrize(
    ("settings", "processes", "prompts", "cut", "passes"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 2, 8, 1, 1),
        ({"per_device_train_batch_size": 8, "num_generations": 4}, 1, 2, 1, 1),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 3}, 1, 1, 3, 1),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 64}, 2, 2, 4, 1),
        ({"per_device_train_batch_size": 8, "num_iterations": 3}, 1, 1, 1, 3),
        # Four passes of 8 in a step, two of them a batch: both batches come before the step.
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 1, 4, 1, 1),
        # The second pass over each batch falls into the same step there; here it is an update of its own, which is said.
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, 1, 4, 1, 2),
        # One group of 8 over two steps of 4: no such half group here.
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 1, 1, 1, 1),
        # A step of 3 passes over batches of 2: it holds a batch and a half.
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, 1, 3, 1, 1),
    ],
)
def test_batches(settings, processes, prompts, cut, passes):
    config, _ = from_settings(settings | {"max_steps": 36}, "--processes", str(processes))
    learner = config.learner
    assert (learner.prompts_per_step, learner.steps_per_batch, learner.epochs_per_batch) == (prompts, cut, passes)


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({"gradient_accumulation_steps": 4}, 10, 6),  # 10 // 4 = 2 batches of a step, 3 epochs; 2 rows are left out.
        ({"num_train_epochs": 0.5}, 9, 5),  # ceil(0.5 x 9)
        ({"num_iterations": 2, "num_train_epochs": 1}, 7, 14),
        ({"steps_per_generation": 4, "num_train_epochs": 1}, 9, 8),  # 2 batches of 4 prompts, 4 steps each.
        (
            {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1},
            10,
            3,
        ),  # ceil(5 x 2 / 4)
        ({"max_steps": 7, "num_train_epochs": 9}, 10, 7),
        ({"steps_per_generation": 3, "max_steps": 7}, 10, 9),
    ],
)
def test_epochs_become_steps(settings, rows, steps):
    config, text = from_settings(settings, "--rows", str(rows))
    assert config.run.steps == steps
    assert "not known" not in text


def test_without_the_number_of_rows_that_is_said():
    config, text = from_settings({"steps_per_generation": 3})
    assert config.run.steps == 102
    assert "run.steps should be 3 x (ROWS // 3 x 3); --rows N works it out" in text


@pytest.mark.parametrize(
    ("kind", "kwargs", "warmup"),
    [
        ("linear", {}, 0),
        ("linear", {}, 5),
        ("cosine", {}, 4),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 3),
        ("cosine_with_min_lr", {"min_lr": 1e-6}, 0.25),
        ("constant", {}, 5),
        ("constant_with_warmup", {}, 5),
    ],
)
def test_the_rates_are_those_of_transformers(kind, kwargs, warmup):
    import torch
    from transformers import get_scheduler

    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup, "max_steps": 20}
    config, _ = from_settings(settings | {"learning_rate": 5e-6})
    chosen = config.learner.schedule
    ours = [config.learner.lr * SCHEDULES[chosen.name](s, 20, **chosen.args) for s in range(20)]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=5e-6)
    count = int(warmup) if warmup >= 1 else int(20 * warmup)
    theirs = get_scheduler(kind, optimizer, count, 20, scheduler_specific_kwargs=kwargs)
    for rate in ours:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-15)
        optimizer.step()
        theirs.step()


# --- the loss ---


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_type_is_translated(kind, level):
    config, text = from_settings({"loss_type": kind, "importance_sampling_level": level, "epsilon_high": 0.3})
    policy = config.algorithm.policy_loss
    by_row = level == "sequence" and kind not in ("cispo", "sapo", "vespo")
    assert policy.name == ("sequence_clip" if by_row else LOSSES[kind][0])
    assert policy.args.get("unit") == ("sequence" if level == "sequence" and kind in ("cispo", "sapo") else None)
    assert "No equal" not in text
    if policy.name in ("clip", "sequence_clip"):
        assert policy.args == {"low": 0.2, "high": 0.3}


# (loss_type, importance_sampling_level) -> whether a corrected KL takes the row's ratio: TRL's is that of the level.
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_corrected_kl_takes_the_ratio_of_the_level(kind, level):
    settings = {"loss_type": kind, "importance_sampling_level": level, "beta": 0.1}
    config, _ = from_settings(settings)
    loss = Choices(config).loss
    assert (loss.kl_corrected, loss.kl_by_row) == (True, level == "sequence")
    plain, _ = from_settings(settings | {"use_bias_correction_kl": False})
    assert not Choices(plain).loss.kl_corrected


def test_a_level_that_trl_has_not_is_said():
    _, text = from_settings({"importance_sampling_level": "sequence_token"})
    assert "- importance_sampling_level = 'sequence_token': token and sequence are there; written as token" in text


CUT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4}


@pytest.mark.parametrize(
    ("settings", "name", "args"),
    [
        ({"loss_type": "dapo"}, "token_mean", {}),
        ({"loss_type": "dapo"} | CUT, "batch_token_mean", {}),
        ({"loss_type": "cispo"} | CUT, "batch_token_mean", {}),
        ({"loss_type": "vespo"} | CUT, "batch_token_mean", {}),
        ({"loss_type": "grpo"} | CUT, "sequence_mean", {}),
        ({"loss_type": "bnpo"} | CUT, "chunk_token_mean", {"sequences": 8}),
        ({"loss_type": "bnpo", "per_device_train_batch_size": 16}, "chunk_token_mean", {"sequences": 16}),
        ({"loss_type": "dr_grpo", "max_completion_length": 99}, "constant", {"length": 99}),
    ],
)
def test_a_mean_is_over_what_trl_divides_by(settings, name, args):
    config, _ = from_settings(settings)
    assert (config.algorithm.aggregation.name, config.algorithm.aggregation.args) == (name, args)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "bnpo"}, "loss_type: bnpo averages micro-batches of shuffled sequences; here a chunk holds"),
        (
            {"top_entropy_quantile": 0.2},
            "top_entropy_quantile: threshold of the whole step; there of every micro-batch",
        ),
        ({"mask_truncated_completions": True}, "mask_truncated_completions: TRL's number of tokens includes"),
    ],
)
def test_what_is_averaged_otherwise_is_said(settings, said):
    assert f"- {said}" in from_settings(settings)[1].partition("Means something else")[2]
    assert said not in from_settings({})[1]


def test_where_nothing_is_counted_in_tokens_masked_completions_mean_the_same():
    assert (
        "number of tokens includes" not in from_settings({"loss_type": "grpo", "mask_truncated_completions": True})[1]
    )


def test_arguments_of_a_loss():
    assert from_settings({"loss_type": "cispo"})[0].algorithm.policy_loss.args == {"cap": 0.2}
    assert from_settings({"delta": 4.0})[0].algorithm.policy_loss.args == {"low": 0.2, "high": 0.2, "delta": 4.0}
    assert from_settings({"loss_type": "vespo"})[0].algorithm.policy_loss.args["lam_neg"] == 2.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("sequence", "mask", None, 3.0)),
        ({"vllm_importance_sampling_mode": "token_truncate"}, ("token", "truncate", None, 3.0)),
        ({"vllm_importance_sampling_cap": 2.0}, ("sequence", "mask", None, 2.0)),
        (
            {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": None},
            ("sequence", "mask", 0.5, 1e9),
        ),
        ({"vllm_importance_sampling_correction": False}, ("none", "truncate", None, 3.0)),
    ],
)
def test_the_correction_of_what_vllm_sampled(settings, expected):
    config, _ = from_settings(settings | {"use_vllm": True})
    found = config.algorithm.importance_sampling
    assert (found.level, found.mode, found.low, found.high) == expected


def test_a_kl_term_without_correction_is_one_where_it_was_switched_off():
    config, text = from_settings({"beta": 0.1})
    assert config.algorithm.kl.corrected
    assert 'kl = { coef = 0.1, estimator = "k3", corrected = true }' in text
    config, text = from_settings({"beta": 0.1, "use_bias_correction_kl": False})
    assert not config.algorithm.kl.corrected


COSINE = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-6}
LEAST_RATE = pytest.approx({"final_fraction": 0.1})


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"scale_rewards": True}, "algorithm.advantage.name", "grpo"),
        ({"max_grad_norm": 0}, "learner.max_grad_norm", NEVER),
        ({"top_k": -1}, "rollout.top_k", 0),
        ({"fp16": True}, "model.dtype", "bfloat16"),
        ({"bf16": False}, "model.dtype", "float32"),
        ({"save_strategy": "no"}, "run.checkpoint_every", 0),
        ({"deepspeed": "missing.json"}, "learner.zero_stage", 0),
        ({"max_completion_length": None, "vllm_max_model_length": 2048}, "rollout.max_new_tokens", 1536),
        ({"off_policy_mask_threshold": 0.5}, "algorithm.off_policy_threshold", 0.5),
        ({"use_cpu": True}, "rollout.colocate", False),
        ({"trust_remote_code": True}, "model.trust_remote_code", True),
        ({"learning_rate": "3e-6"}, "learner.lr", 3e-6),
        ({"use_vllm": True}, "rollout.vllm", {"gpu_memory_utilization": 0.3}),
        ({"max_prompt_length": "1024"}, "rollout.max_prompt_tokens", 1024),
        ({"eval_steps": "50", "eval_strategy": "steps", "datasets": [], "dataset_name": "a/b"}, "eval.every_steps", 50),
        ({"bf16": "true"}, "model.dtype", "bfloat16"),
        ({"bf16": False, "model_init_kwargs": '{"dtype": "bfloat16"}'}, "model.dtype", "bfloat16"),
        ({"deepspeed": '{"zero_optimization": {"stage": 3}}'}, "learner.zero_stage", 3),
        (COSINE | {"lr_scheduler_kwargs": '{"min_lr": 1e-7}'}, "learner.schedule.args", LEAST_RATE),
        (COSINE | {"lr_scheduler_kwargs": {"min_lr": "1e-7"}}, "learner.schedule.args", LEAST_RATE),
    ],
)
def test_single_settings(settings, key, value):
    config, _ = from_settings(settings)
    found = config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_deepspeeds_own_file_is_read(capsys):
    Path("ds.json").write_text(
        '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "wall_clock_breakdown": true}'
    )
    config, _ = from_settings({"deepspeed": "ds.json"})
    assert config.learner.zero_stage == 2
    Path("ds.json").write_text('{"zero_optimization": {"stage": 2},}')
    error = "error[E105] cannot parse DeepSpeed's configuration — a.json:deepspeed. Found ds.json: "
    assert refused(capsys, "a.json").startswith(error)


@pytest.mark.parametrize("name", ADAMW)
def test_builds_of_adamw_have_an_equal(name):
    assert "No equal" not in from_settings({"optim": name})[1]


def test_secrets_are_not_shown():
    _, text = from_settings({"env": {"HF_TOKEN": "hf_abc"}, "wandb_api_key": "abcdef", "hub_token": "hf_def"})
    assert "- wandb_api_key: unknown" in text
    assert "hf_" not in text
    assert "abcdef" not in text


# --- scripts ---

FRAME = """
from trl import GRPOConfig, GRPOTrainer
from datasets import load_dataset
{before}
if __name__ == "__main__":
    rows = load_dataset("json", data_files="rows.jsonl")
    GRPOTrainer(model="m", reward_funcs={rewards}, args=GRPOConfig({args}), train_dataset=rows["train"]).train()
"""
F = "def f(completions, **kwargs):\n    return [0.0 for _ in completions]\n"


def script(before=F, rewards="f", args=""):
    return FRAME.format(before=before, rewards=rewards, args=args)


@pytest.mark.parametrize(
    ("before", "rewards", "expected"),
    [
        (F, "f", {"function": "my_rewards.py:f"}),
        (F, "[f]", {"function": "my_rewards.py:f"}),
        (F + "all_ = [f]", "all_", {"function": "my_rewards.py:f"}),
        ("from a.b import c as d", "d", {"function": "a.b:c"}),
        ("import a.b", "a.b.c", {"function": "a.b:c"}),
        ("from trl.rewards import think_format_reward as t", "t", {"function": "think_format"}),
        ("from trl import rewards", "rewards.accuracy_reward", {"function": "math_accuracy"}),
        ("", "'org/judge'", {"model": "org/judge"}),
        (
            "def make(n):\n    return len",
            "make(3)",
            {"function": "my_rewards.py:make", "factory": True, "args": {"n": 3}},
        ),
        ("from a.b import make", "make(n=3)", {"function": "a.b:make", "factory": True, "args": {"n": 3}}),
        (
            "from trl.rewards import get_repetition_penalty_reward as g",
            "g(2, max_penalty=-0.5)",
            {"function": "repetition", "args": {"ngram": 2, "worst": -0.5}},
        ),
    ],
)
def test_rewards_of_a_script(before, rewards, expected):
    config, _ = from_script(script(before, rewards))
    function = config.reward.functions[0].model_dump(exclude_defaults=True)
    assert function == expected


OWN = """
from __future__ import annotations
import os
from typing import TYPE_CHECKING
from trl import GRPOConfig, GRPOTrainer
if TYPE_CHECKING:
    from somewhere import Texts
try:
    from no_such_package import parse
except ImportError:
    def parse(text):
        return text.strip()
if os.sep:
    HIGH = 1.0
with open("words.txt") as file:
    WORDS = file.read().split()
for LAST in WORDS:
    pass
LOW, (MIDDLE, *_) = 0.0, (0.5, 0.6)
MIDDLE += 0.25
with open("rows.txt") as file:
    text = file.read()
def f(completions: Texts, **kwargs):
    return [HIGH if parse(text) == LAST else MIDDLE if text in WORDS else LOW for text in completions]
if __name__ == "__main__":
    file = load_dataset("json", data_files="rows.jsonl", split="train")
    GRPOTrainer("m", f, GRPOConfig(), file).train()
"""


def test_what_a_reward_uses_is_written_along_wherever_it_is_bound():
    from_script(OWN)
    own = Path("my_rewards.py").read_text()
    Path("words.txt").write_text("a b")
    scope: dict = {}
    exec(compile(own, "my_rewards.py", "exec"), scope)
    assert scope["f"]([" b ", "a", "c"]) == [1.0, 0.75, 0.0]
    assert "rows.txt" not in own  # Its text is another one than that of the function.
    assert "GRPO" not in own


@pytest.mark.parametrize("rewards", ["lambda **k: [0.0]", "unknown", "make_them(1)", "sys.argv[1]"])
def test_a_reward_that_cannot_be_read_is_left_to_fill_in(rewards):
    config, said = from_script(script(rewards=f"[f, {rewards}]"))
    assert [f.function for f in config.reward.functions] == ["my_rewards.py:f", "FILL-IN"]
    assert "is not read: write package.module:function for FILL-IN" in said


def test_what_a_file_lacks_is_left_to_fill_in():
    Path("a.json").write_text('{"learning_rate": 1e-5}')
    config, said = imported("a.json")
    assert (config.model.path, config.data.train[0].path) == ("FILL-IN", "FILL-IN")
    for name in ("model", "train_dataset", "reward_funcs"):
        assert f"- {name} is not in the file: write it for FILL-IN" in said


@pytest.mark.parametrize(
    ("before", "args", "expected"),
    [
        ("LR = 2e-6", "learning_rate=LR", 2e-6),
        ("LR = 1e-6", "learning_rate=2 * LR", 2e-6),
        ("LR: float = 4e-6\nHALF = LR / 2", "learning_rate=HALF", 2e-6),
        ("common = {'learning_rate': 2e-6}", "**common", 2e-6),
        ("common = dict(learning_rate=2e-6)", "**common", 2e-6),
        ("LR = 1.0\nLR = 2e-6", "learning_rate=LR", 2e-6),
        ("import os", "learning_rate=float(os.environ['LR'])", None),
        ("import sys\nif sys.argv:\n    LR = 2e-6", "learning_rate=LR", None),
        ("LR = 2e-6\nLR += 1e-6", "learning_rate=LR", None),
        ("", "learning_rate=1 / 0", None),
        ("x = y; y = x", "learning_rate=x", None),
        ("", "learning_rate=float('inf')", None),
        ("", "**unknown", None),
    ],
)
def test_values_of_a_script(before, args, expected):
    config, text = from_script(script(F + before, args=args))
    assert config.learner.lr == (expected or 1e-6)
    assert ("is not read; TRL's default stands here" in text) == (expected is None)


def test_arguments_that_come_from_the_command_line_are_said():
    text = "from trl import *\nGRPOTrainer('m', 'r', args=parser.parse()[1], train_dataset=load_dataset('json', data_files='a.jsonl'))"
    _, said = from_script(text)
    assert "train.py:2: args come from the command line or a file" in said


GSM8K = "load_dataset('openai/gsm8k', 'main', split='train')"
HUB = {"path": "openai/gsm8k", "subset": "main", "split": "train"}
QUESTION = {"columns": {"prompt": "question"}}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("load_dataset('json', data_files='a.jsonl', split='train')", {"path": "a.jsonl"}),
        ("load_dataset('csv', data_files={'train': 'a.csv', 'test': 'b.csv'})['test']", {"path": "b.csv"}),
        (GSM8K, HUB),
        ("load_dataset('openai/gsm8k', 'main')['test']", HUB | {"split": "test"}),
        (f"load_dataset('a/b', revision='{COMMIT}')['train']", {"path": f"a/b@{COMMIT}", "split": "train"}),
        ("load_dataset('a/b', data_files='x/*.json', split='train')", {"path": "a/b", "split": "x/*.json"}),
        ("load_dataset('./folder', split='train')", {"path": "./folder", "split": "train"}),
        ("load_dataset('a/b', split='train[:100]')", {"path": "a/b", "split": "train", "max_rows": 100}),
        (f"{GSM8K}.select(range(50)).remove_columns('x')", HUB | {"max_rows": 50}),
        (f"{GSM8K}.rename_column('question', 'prompt')", HUB | QUESTION),
        (f"{GSM8K}.rename_columns({{'question': 'q'}}).rename_column('q', 'prompt')", HUB | QUESTION),
        (f"{GSM8K}.map(lambda r: {{'prompt': r['question'], 'answer': r['answer']}})", HUB | QUESTION),
        ("load_dataset('json', data_files='https://x/a.jsonl')['train']", {"path": "FILL-IN"}),
        ("Dataset.from_list([])", {"path": "FILL-IN"}),
        ("load_dataset('a/b', split=['train', 'test'])", {"path": "FILL-IN"}),
        ("load_dataset('a/b-v1.5', split='train')", {"path": "a/b-v1.5", "split": "train"}),
        (f"{GSM8K}.map(g).select(range(2))", {"path": "data/train.jsonl"}),
        (f"{GSM8K}.map(lambda r: {{'prompt': r['question'] + '?'}})", {"path": "data/train.jsonl"}),
        (f"{GSM8K}.filter(g)", {"path": "data/train.jsonl"}),
        (f"{GSM8K}.shuffle(seed=42)", HUB),
        (f"{GSM8K}.select(range(50)).shuffle(seed=42)", HUB | {"max_rows": 50}),
        (f"{GSM8K}.shuffle(seed=42).select(range(1000))", {"path": "data/train.jsonl"}),
        (f"{GSM8K}.shuffle(seed=42).rename_column('question', 'prompt').take(9)", {"path": "data/train.jsonl"}),
        (f"concatenate_datasets([{GSM8K}, {GSM8K}]).select(range(1000))", {"path": "data/train.jsonl"}),
        (f"concatenate_datasets([{GSM8K}.shuffle()]).take(9)", {"path": "data/train.jsonl"}),
        ("load_dataset('json', data_files=['a.jsonl', 'b.jsonl'])['train'].take(9)", {"path": "data/train.jsonl"}),
    ],
)
def test_rows_of_a_script(rows, expected):
    config, said = from_script(f"from trl import GRPOTrainer\nGRPOTrainer('m', 'r', None, {rows})")
    assert [one.model_dump(exclude_defaults=True) for one in config.data.train] == [expected]
    assert ("To do first" in said) == (expected["path"] in ("FILL-IN", "data/train.jsonl"))
    assert (".to_json('data/train.jsonl')" in said) == (expected["path"] == "data/train.jsonl")


@pytest.mark.parametrize(
    ("moves", "said"),
    [
        (".to('cuda')", ""),
        (".to(device).eval()", ""),
        (".cuda().train()", ""),
        (".to(torch.bfloat16)", "train.py:3: .to(torch.bfloat16): write it as model.dtype"),
        (".half()", "train.py:3: .half(): write it as model.dtype"),
    ],
)
def test_a_model_that_is_moved_keeps_its_name(moves, said):
    text = f"import torch\nm = AutoModelForCausalLM.from_pretrained('a/b'){moves}\nGRPOTrainer(m, 'r', None, {GSM8K})"
    config, report = from_script(text)
    assert config.model.path == "a/b"
    assert said in report
    assert ("write it as model.dtype" in report) == bool(said)


UNPACKED = "train, test = load_dataset('a/b', split=['train[:5%]', 'test[:5%]'])\n"
HELPER = """
def questions(split="train", size=None):
    data = load_dataset("openai/gsm8k", "main")[split]
    data = data.map(lambda row: {"prompt": row["question"], "answer": row["answer"]})
    return data
"""


@pytest.mark.parametrize(
    ("before", "rows", "expected"),
    [
        (UNPACKED, "train", {"path": "a/b", "split": "train"}),
        (UNPACKED, "test", {"path": "a/b", "split": "test"}),
        ("train, test = load_dataset('a/b')\n", "train", {"path": "FILL-IN"}),
        ("train, *test = load_dataset('a/b', split=['train', 'test'])\n", "train", {"path": "FILL-IN"}),
        (HELPER, "questions()", HUB | QUESTION),
        (HELPER, "questions('test')", HUB | QUESTION | {"split": "test"}),
        (HELPER, "questions(split='test').select(range(9))", HUB | QUESTION | {"split": "test", "max_rows": 9}),
        (f"{HELPER}rows = questions()\n", "rows", HUB | QUESTION),
        ("def f():\n    return f()\n", "f()", {"path": "FILL-IN"}),
        ("def f(x):\n    if x:\n        return 1\n    return 2\n", "f(1)", {"path": "FILL-IN"}),
        ("", "unknown()", {"path": "FILL-IN"}),
    ],
)
def test_rows_behind_unpacked_names_and_functions_of_the_script(before, rows, expected):
    config, _ = from_script(f"{before}GRPOTrainer('m', 'r', None, {rows})")
    assert [one.model_dump(exclude_defaults=True) for one in config.data.train] == [expected]


def test_what_was_not_filled_in_is_told_before_anything_is_looked_for(tmp_path):
    config = make_config(**{"model.path": "FILL-IN", "data.train": "FILL-IN"})
    functions = [config.reward.functions[0].model_copy(update={"function": "FILL-IN"})]
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"functions": functions})})
    with pytest.raises(InputErrors) as caught:
        prepare(config, "my.toml", tmp_path)
    assert [(p.code, p.place, p.fix) for p in caught.value.problems] == [
        ("E401", "my.toml:model.path", "FILL-IN from import-trl: write the model here"),
        ("E201", "my.toml:data.train", "FILL-IN from import-trl: write the file or dataset of rows here"),
        ("E301", "my.toml:reward.functions[0].function", "FILL-IN from import-trl: write the reward function here"),
    ]


@pytest.mark.parametrize("split", ["train[:10%]", "train[5:]", "train+test"])
def test_slices_that_have_no_equal_are_said(split):
    config, said = from_script(f"GRPOTrainer('m', 'r', None, load_dataset('a/b', split='{split}'))")
    assert (config.data.train[0].split, config.data.train[0].max_rows) == ("train", None)
    assert f'split "{split}": all rows of "train" are taken' in said


def test_a_function_that_makes_conversations_of_columns():
    before = "SYSTEM = 'Think.'\ndef talk(row):\n    return {'prompt': [{'role': 'system', 'content': SYSTEM}, "
    before += "{'role': 'user', 'content': row['question']}], 'answer': row['answer']}\n"
    config, _ = from_script(f"{before}GRPOTrainer('m', 'r', None, {GSM8K}.map(talk))")
    assert (config.data.chat, config.data.system_prompt) == (True, "Think.")
    assert config.data.train[0].columns == {"prompt": "question"}


def test_several_datasets_are_several_sources():
    rows = f"concatenate_datasets([{GSM8K}, load_dataset('json', data_files=['a.jsonl', 'b.jsonl'])['train']])"
    config, _ = from_script(f"GRPOTrainer('m', 'r', None, {rows})")
    assert [one.path for one in config.data.train] == ["openai/gsm8k", "a.jsonl", "b.jsonl"]
    config, _ = from_settings({"datasets": [{"path": "a/b", "name": "c"}, {"path": "d/e", "split": "train[:5]"}]})
    assert [(one.path, one.subset, one.max_rows) for one in config.data.train] == [("a/b", "c", None), ("d/e", None, 5)]


def test_a_held_out_part_that_nobody_evaluates_is_left_out():
    text = "rows = load_dataset('json', data_files='a.jsonl').train_test_split(0.1)\n"
    text += "GRPOTrainer('m', 'r', GRPOConfig({}), rows['train'], rows['test'])"
    config, said = from_script(text.format(""))
    assert config.data.eval is None
    assert "eval_dataset: never evaluated" in said
    config, said = from_script(text.format("eval_strategy='steps', eval_steps=5"))
    paths = (config.data.train[0].path, config.data.eval[0].path)
    assert (*paths, config.eval.every_steps) == ("data/train.jsonl", "data/eval.jsonl", 5)


def test_defaults_of_the_scripts_own_options_are_taken_and_said():
    before = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', '-l', type=float, default=1e-5)\n"
    before += "p.add_argument('--max-steps', default='7')\np.add_argument('--smoke', action='store_true')\n"
    before += "p.add_argument('--seed', required=True)\nargs = p.parse_args()\n"
    given = "learning_rate=args.lr, max_steps=args.max_steps, bf16=args.smoke, use_vllm=not args.smoke, seed=args.seed"
    config, said = from_script(script(F + before, args=given))
    assert (config.learner.lr, config.run.steps, config.model.dtype) == (1e-5, 7, "float32")
    assert config.algorithm.importance_sampling.level == "sequence"
    assert "the defaults of its own options stand for args.lr, args.max_steps, args.smoke" in said
    assert "seed = args.seed is not read" in said


def test_the_configuration_that_the_trainer_takes_is_read():
    text = "cfg = GRPOConfig(loss_type='dr_grpo')\nGRPOConfig(loss_type='grpo')\ncfg.beta = 0.5\n"
    text += "t = GRPOTrainer('m', 'r', args=cfg, train_dataset=load_dataset('json', data_files='a.jsonl'), eval_dataset=g())\n"
    config, said = from_script(text + "if x:\n    cfg.seed = 3\n")
    assert (config.algorithm.aggregation.name, config.algorithm.kl.coef, config.run.seed) == ("constant", 0.5, 42)
    assert "train.py:2: a second GRPOConfig: it is not read" in said
    assert "train.py:6: cfg.seed is set under a condition" in said
    assert "eval_dataset = g() is not read; data.eval is left out" in said


def test_a_script_with_a_second_assignment_over_lines_is_followed():
    text = "rows = load_dataset('json', data_files='a.jsonl')\nrows = (\n    rows\n    .filter(g)\n)\nGRPOTrainer('m', 'r', None, rows)"
    config, said = from_script(text)
    assert config.data.train[0].path == "data/train.jsonl"
    assert "train.py:4: .filter(...) is not run" in said


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.py", "x = 1", "error[E105] no GRPO script — a.py"),
        ("a.py", "def f(:", "error[E105] cannot parse script — a.py:1"),
        ("a.json", "{", "error[E105] cannot parse arguments — a.json"),
        ("a.yaml", "- 1", "error[E105] cannot parse arguments — a.yaml. Found list"),
        ("a.toml", "x = 1", "error[E105] cannot parse arguments — a.toml. Found str"),
        (
            "a.json",
            '{"learning_rate": "fast"}',
            "error[E102] bad value — a.json:learning_rate. Found 'fast', expected a number",
        ),
        (
            "a.json",
            '{"save_steps": Infinity}',
            "error[E102] bad value — a.json:save_steps. Found inf, expected a number",
        ),
        ("a.json", '{"use_vllm": 1}', "error[E102] bad value — a.json:use_vllm. Found 1, expected true or false"),
        ("a.json", '{"max_prompt_length": "long"}', "error[E102] bad value — a.json:max_prompt_length. Found 'long'"),
        ("a.json", '{"eval_steps": [5]}', "error[E102] bad value — a.json:eval_steps. Found [5], expected a number"),
        (
            "a.json",
            '{"epsilon_high": "x"}',
            "error[E102] bad value — a.json:epsilon_high. Found 'x', expected a number",
        ),
        (
            "a.json",
            '{"reward_weights": 0.5}',
            "error[E102] bad value — a.json:reward_weights. Found 0.5, expected a list",
        ),
        ("a.json", '{"reward_weights": [1, "x"]}', "error[E102] bad value — a.json:reward_weights[1]. Found 'x'"),
        ("a.json", '{"lr_scheduler_kwargs": "{a"}', "error[E102] bad value — a.json:lr_scheduler_kwargs. Found '{a'"),
        (
            "a.json",
            '{"loss_type": ["dapo"]}',
            "error[E102] bad value — a.json:loss_type. Found ['dapo'], expected text",
        ),
        ("a.json", '{"reward_funcs": 5}', "error[E102] bad value — a.json:reward_funcs. Found 5, expected a name"),
        ("a.json", '{"datasets": 5}', "error[E102] bad value — a.json:datasets. Found 5, expected a list"),
        ("a.json", '{"reward_funcs": ["nice"]}', "error[E102] unknown reward — a.json:reward_funcs. Found nice"),
    ],
)
def test_a_file_that_cannot_be_read(name, text, error, capsys):
    Path(name).write_text(text)
    assert refused(capsys, name).startswith(error)


def test_a_missing_file_and_a_wrong_encoding(capsys):
    Path("train.py").write_bytes(b"\xff")
    assert refused(capsys, "train.py").startswith("error[E105] cannot parse script — train.py. Found byte 0xff")
    assert "Fix: did you mean train.py?" in refused(capsys, "trains.py")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_generations": 6}, "error[E104] batch does not divide — a.json:num_generations. Found 8 completions"),
        ({"generation_batch_size": 12}, "error[E104] batch does not divide — a.json:num_generations. Found 12"),
        ({"gradient_accumulation_steps": 0}, "error[E104] batch does not divide — a.json:num_generations"),
        ({"loss_type": "ppo"}, "error[E107] "),
        ({"scale_rewards": "all"}, "error[E107] "),
        ({"beta": -1.0}, "error[E102] bad value — a.toml:algorithm.kl.coef"),
        (
            {"use_vllm": True, "vllm_importance_sampling_mode": "x"},
            "error[E102] bad value — a.toml:algorithm.importance",
        ),
        ({"temperature": 0.0}, "error[E102] bad value — a.toml:rollout.temperature"),
        ({"epsilon": 1.5}, "error[E107] policy loss clip refuses — a.toml:algorithm.policy_loss.low"),
        ({"delta": 1.1}, "error[E107] policy loss clip refuses — a.toml:algorithm.policy_loss.delta"),
        (
            COSINE | {"lr_scheduler_kwargs": {"min_lr": "low"}},
            "error[E102] bad value — a.json:lr_scheduler_kwargs.min_lr. Found 'low', expected a number",
        ),
        ({"deepspeed": "{zero"}, "error[E105] cannot parse DeepSpeed's configuration — a.json:deepspeed. Found {zero:"),
    ],
)
def test_settings_that_no_run_accepts(settings, error, capsys):
    Path("a.json").write_text(json.dumps(REST | settings))
    assert refused(capsys, "a.json").startswith(error)


def test_an_asynchronous_trainer_is_told_by_what_differs():
    _, text = from_script(
        F + "args = AsyncGRPOConfig('x', learning_rate=1e-5)\n"
        "AsyncGRPOTrainer('m', f, AsyncGRPOConfig('x'), load_dataset('json', data_files='rows.jsonl', split='train'))\n"
    )
    assert "- train.py:4: AsyncGRPOTrainer is not GRPOTrainer: what it overrides has no equal" in text
    assert "- train.py:4: AsyncGRPOConfig is not GRPOConfig and is not read: TRL's defaults stand here" in text
    assert '- write algorithm.advantage = { name = "grpo", ddof = 0, eps = 1e-8 }: AsyncGRPOTrainer divides' in text


def test_no_other_file_is_written_over(capsys):
    Path("my.toml").write_text("[run]\n")
    options = [str(SAMPLES / "minimal.py"), "--output", "my.toml"]
    assert "my.toml is there already" in refused(capsys, *options)
    assert Path("my.toml").read_text() == "[run]\n"
    assert import_trl.main([*options[:2], "new.toml"]) == import_trl.main([*options[:2], "new.toml"]) == 0


def test_an_option_that_is_wrong(capsys):
    Path("a.yaml").write_text("max_steps: 4\n")
    assert refused(capsys, "a.yaml", "--processes", "0").startswith("error[E106]")


def test_it_is_a_verb(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["millrace", "import-trl", "--help"])
    assert cli.main() == 0
    assert "--processes" in capsys.readouterr().out


def test_texts_are_quoted_as_toml_wants_them():
    text = 'a "b"\\c\n\x7f\té\U0001f600'
    assert from_settings({"output_dir": text})[0].run.output_dir == text


def test_the_reader_alone_runs_nothing():
    Path("train.py").write_text(script(before=F + "open('ran', 'w')"))
    found = read(Path("train.py"))
    assert not Path("ran").exists()
    assert SimpleNamespace(**vars(found)).rewards == [{"function": ":f"}]


def markdown():
    """The table for the documentation, one part a section."""
    lines, section = [], ""
    for row in trl_settings.rows():
        if row.section != section:
            section = row.section
            head = ["| TRL | its default | Millrace | how, or why not |", "|---|---|---|---|"]
            lines += ["", f"### {section}", "", *head]
        keys = ", ".join(f"`{key}`" for key in row.keys) or row.fate
        lines.append(f"| `{row.name}` | `{row.default!r}` | {keys} | {row.text} |")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
