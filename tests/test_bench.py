"""The bench verbs without their runs: options, arithmetic, the workloads' models and prompts."""

from __future__ import annotations

import argparse
import asyncio
import json

import numpy as np
import pytest

from launch import bench, bench_check, bench_learner, bench_loop, bench_rewards, bench_sync, bench_workloads
from shared.errors import InputError
from tests.fakes import make_config


def options(module, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    return parser.parse_args(arguments)


def step(number: int, seconds: float, length: float, flat: float) -> dict:
    row = {"step": number, "time/step": seconds, "completions/mean_length": length, "frac_reward_zero_std": flat}
    row |= {"goodput": (1 - flat) * 4 * length / seconds / 2}
    row |= {"staleness/mean": 1.0, "staleness/max": number % 3, "sync/pause_seconds": 0.06, "sync/canary_gap": 1e-6}
    return row | {"time/controller/train": 0.5, "time/controller/wait_for_groups": 0.0}


def test_the_figures_of_a_run_leave_out_its_first_steps():
    rows = [{"step": 0, "eval/reward": 0.1}, *(step(i, 100.0, 1.0, 0.0) for i in (1, 2, 3))]
    rows += [step(4, 1.0, 10.0, 0.5), step(5, 3.0, 30.0, 0.0)]
    found = bench_loop.summary(rows, make_config(), "mine")  # 2 prompts x 2 samples a step
    assert (found["system"], found["workload"], found["steps"]) == ("millrace", "mine", 2)
    assert found["samples_per_s"] == pytest.approx(8 / 4)
    assert found["response_tokens_per_s"] == pytest.approx((4 * 10 + 4 * 30) / 4)
    assert found["mean_len"] == pytest.approx(20)
    assert found["step_s_median"] == 2
    assert found["goodput"] == pytest.approx((4 * 10 * 0.5 + 4 * 30) / 4 / 2)
    assert found["staleness_max"] == 2


def test_a_workload_is_a_valid_configuration(tmp_path):
    chosen = options(bench_loop, "--shape", "tail", "--steps", "9", "--max-staleness", "4", "--set", "learner.lr=0.5")
    config = bench_loop._config(chosen, tmp_path)
    assert (config.groups_per_batch, config.rollout.group_size, config.rollout.max_new_tokens) == (16, 8, 256)
    assert (config.run.steps, config.rollout.max_staleness, config.learner.lr) == (9, 4, 0.5)
    shape = json.loads((tmp_path / "model" / "config.json").read_text())
    assert shape["vocab_size"] == 72
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 512
    assert {len(prompt) for prompt in prompts} == set(range(8, 25))


def test_a_model_and_prompts_of_ones_own_are_used(tmp_path):
    given = ["--model", "m", "--prompts", str(tmp_path / "p.jsonl"), "--prompt-column", "input", "--reward", "r.py:f"]
    config = bench_loop._config(options(bench_loop, *given, "--group-size", "3", "--kl-coef", "0"), tmp_path)
    assert (config.model.path, config.data.prompt_column, config.rollout.group_size) == ("m", "input", 3)
    assert config.reward.functions[0].function.endswith("/r.py:f")
    assert not config.needs_reference


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["lop"], "E107"),
        (["loop", "--shape", "tall"], "E106"),
        (["loop", "--bogus", "1"], "E106"),
        (["loop", "--steps", "3"], "E102"),
        (["loop", "--model", "m"], "E108"),
        (["loop", "--set", "rollout.group_sise=2"], "E106"),
        (["loop", "--max-staleness", "-1"], "E102"),
        (["loop", "--model", "m", "--prompts", "p.jsonl", "--ceilings"], "E108"),
        (["rewards", "--workers", "none"], "E106"),
        (["sync", "--megabytes", "7"], "E106"),
        (["rollout", "--set", "rollout.max_staleness=-1"], "E106"),
        (["learner", "--set", "learner.max_tokens_per_microbatch=8"], "E108"),
    ],
)
def test_wrong_options_are_one_line(arguments, code, capsys):
    assert bench.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"error[{code}]" in said
    assert "Traceback" not in said


def test_help_names_the_options(capsys):
    assert bench.main(["loop", "--help"]) == 0
    assert "--max-staleness" in capsys.readouterr().out


def test_faulty_groups_are_the_asked_share_in_a_fixed_order():
    chosen = options(bench_rewards, "--completions", "800", "--hang", "0.05", "--crash", "0.1")
    modes = bench_rewards._modes(chosen)
    assert (len(modes), modes.count("hang"), modes.count("crash")) == (100, 5, 10)
    assert modes == bench_rewards._modes(chosen)
    assert len(set(np.flatnonzero(np.array(modes) == "hang"))) == 5


def test_a_row_is_held_against_its_limit():
    chosen = options(bench_rewards, "--completions", "1000")
    row = bench_rewards._row(2, "subprocess", "some", 4.0, chosen, 3.0, 7)
    assert (row["completions_per_s"], row["ms_per_completion"], row["of_limit"]) == (250, 8, 0.75)
    assert (row["limit_per_s"], row["dropped"], row["groups"]) == (pytest.approx(1000 / 3), 7, 125)


def test_a_steps_groups_have_the_lengths_of_a_random_model():
    shape = bench_workloads.WORKLOADS["tail"]
    groups = [g for seed in range(20) for g in bench_workloads.make_groups(shape, seed)]
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    assert len(groups) == 20 * 16
    assert np.mean(lengths) == pytest.approx(71, rel=0.1)  # Geometric with mean 72, cut at 256.
    assert max(lengths) == 256
    assert all(g.has_signal() for g in groups)


@pytest.mark.parametrize("size", list(bench_sync.SHAPES))
def test_the_models_of_the_sync_bench_have_their_size(size):
    shape = bench_sync.SHAPES[size]
    head_dim, kv = shape.hidden // shape.heads, shape.heads // 2
    assert shape.hidden % shape.heads == shape.heads % kv == 0
    assert head_dim in (32, 64, 80, 96, 112, 128)  # What vLLM's CPU attention knows.
    attention = shape.hidden * shape.hidden * 2 + shape.hidden * kv * head_dim * 2
    parameters = shape.vocabulary * shape.hidden + shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    assert 0.9 * size <= 4 * parameters / 1e6 <= 2.7 * size


def test_dtype_auto_is_one_that_the_machine_has():
    assert bench_workloads.dtype_of("float32") == "float32"
    assert bench_workloads.dtype_of("auto") in ("float32", "bfloat16")


def test_a_ratio_that_fell_is_named():
    stored = {"a": 1.0, "b": 2.0}
    assert bench_check.fell({"a": 0.86, "b": 1.71}, stored, 0.15) == []
    assert bench_check.fell({"a": 0.84, "b": 3.0}, stored, 0.15) == ["a: 0.840, was 1.000"]
    assert set(json.loads(bench_check.STORED.read_text())) == set(bench_check.MEASURES)


@pytest.mark.slow
@pytest.mark.stack
def test_the_loops_of_the_learner_bench_train_on_the_same_tokens(tmp_path):
    chosen = options(bench_learner, "--shape", "short", "--dtype", "float32")
    config = bench_workloads.workload_config(chosen, tmp_path)
    seconds = bench_learner.alternate(config, bench_workloads.WORKLOADS["short"], 4, ["ours", "bare", "padded"])
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 2, "bare": 2, "padded": 2}
    assert min(min(values) for values in seconds.values()) > 0


@pytest.mark.slow
@pytest.mark.stack
def test_rollouts_are_measured_beside_raw_vllm(tmp_path):
    from launch import bench_rollout

    config = bench_workloads.workload_config(options(bench_rollout, "--shape", "short"), tmp_path)
    ours, raw = asyncio.run(bench_rollout.alternate(config, 3, 16))
    assert len(ours) == len(raw) == 2
    assert min(ours) > 0.3 * max(raw), "the running system is far from raw vLLM"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """``bench check`` on one ratio that is 0.8 now and was 1.0."""
    stored = tmp_path / "ratios.json"
    stored.write_text('{"a": 1.0}')
    module = argparse.Namespace(add_options=lambda parser: parser.add_argument("--x"), run=lambda o: {"r": float(o.x)})
    monkeypatch.setattr(bench_check, "STORED", stored)
    monkeypatch.setattr(bench_check, "MEASURES", {"a": (module, ["--x", "0.8"], "r")})
    return stored


def test_a_check_fails_beyond_its_tolerance(measured):
    with pytest.raises(InputError, match=r"a: 0\.800, was 1\.000"):
        bench_check.run(options(bench_check))
    assert bench_check.run(options(bench_check, "--tolerance", "0.25"))["ratios"] == {"a": 0.8}
    assert json.loads(measured.read_text()) == {"a": 1.0}


def test_a_check_that_stores_makes_what_it_found_the_measure(measured):
    assert bench_check.run(options(bench_check, "--store"))["ratios"] == {"a": 0.8}
    assert json.loads(measured.read_text()) == {"a": 0.8}


@pytest.mark.parametrize(
    ("content", "threads"),
    [
        ('{"hidden_size": 256}', 5),
        ('{"hidden_size": 255}', 1),
        ("{}", 1),
        ("[]", 1),
        ("{", 1),
        (None, 1),
    ],
)
def test_wide_models_get_every_core(tmp_path, monkeypatch, content, threads):
    monkeypatch.setattr(bench_workloads.os, "cpu_count", lambda: 5)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert bench_workloads.learner_threads(tmp_path) == threads
    shape = bench_workloads.WORKLOADS["short"]
    table = bench_workloads.table_of(shape, tmp_path, tmp_path / "p.jsonl", tmp_path, "float32")
    assert table["learner"]["cpu_threads"] == threads


def test_the_first_two_rounds_and_what_prepares_them_are_off_the_clock(monkeypatch):
    clock, prepared, sent = [0.0], [], []
    pipe = argparse.Namespace(send=sent.append, close=lambda: None)

    def prepare(groups):
        clock[0] += 100
        prepared.append([c.token_ids.tobytes() for g in groups for c in g.completions])
        return len(prepared)

    def step(seconds):
        clock[0] += seconds

    monkeypatch.setattr(bench_learner.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench_learner, "_packed_loop", lambda config: (prepare, step))
    bench_learner._measure(make_config(), bench_workloads.WORKLOADS["short"], 5, ["bare"], pipe)
    assert sent == [{"bare": [3, 4, 5]}]
    assert len({str(tokens) for tokens in prepared}) == 5  # Other groups in every round.


def test_the_learner_bench_hands_its_rounds_on(monkeypatch):
    asked = []
    config = make_config()
    monkeypatch.setattr(bench_learner, "workload_config", lambda chosen, folder: config)
    monkeypatch.setattr(
        bench_learner,
        "alternate",
        lambda config, shape, rounds, loops: asked.append((rounds, loops)) or {"ours": [2.0, 4.0], "bare": [1.0, 1.0]},
    )
    found = bench_learner.run(options(bench_learner, "--rounds", "4"))
    assert (found["step_s"], found["samples_per_s"], found["of_bare"]) == (3, pytest.approx(4 / 3), 0.375)
    bench_learner.run(options(bench_learner))
    assert asked == [(4, ["ours", "bare"]), (8, ["ours", "bare"])]
