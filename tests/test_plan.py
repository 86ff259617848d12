"""The planner: hand-worked steps, limits, agreement with the simulator, data sheets, the fit of a profile, the verb."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from launch import plan, simulate
from launch.hardware import DEVICES, Shape, memory_report, timings_of
from launch.plan_model import Lengths, predict, splits, staleness_needed
from launch.profile import _fit
from launch.timings import Timings
from shared.errors import InputError
from tests.fakes import make_config, write_config

EVEN = Timings(
    decode_step_s=0.01,
    decode_sequence_s=0.001,
    prefill_token_s=0.0,
    request_s=0.0,
    train_step_s=1.0,
    train_token_s=0.001,
    ranks_s=0.5,
    publish_s=0.1,
    prepare_s=0.0,
    pause_s=0.0,
    score_s=0.0,
    lengths=(100,),
    prompt_tokens=50.0,
)
"""Every completion has 100 tokens: 10 + k milliseconds a token with k sequences."""


def config(prompts=4, group=5, staleness=0, **changes):
    return make_config(
        **{
            "learner.prompts_per_step": prompts,
            "rollout.group_size": group,
            "rollout.max_staleness": staleness,
            "reward.workers": 100,
        }
        | changes
    )


# 4 x 5 sequences: tokens 20 x 100 + 4 x 50 = 2200 a step.
ROLLOUT, TRAIN = 100 * (0.01 + 20 * 0.001), 1.0 + 2.2 + 0.1


def test_a_synchronous_step_is_rollouts_then_learning():
    found = predict(config(), EVEN, 1, 1)
    assert found.step_s == pytest.approx(ROLLOUT + TRAIN)
    assert found.engine_idle == pytest.approx(TRAIN / (ROLLOUT + TRAIN), abs=0.02)
    assert found.learner_idle == pytest.approx(ROLLOUT / (ROLLOUT + TRAIN))
    assert (found.samples_per_s, found.tokens_per_s) == (20 / found.step_s, 2000 / found.step_s)


def test_two_engines_and_two_ranks():
    found = predict(config(), EVEN, 2, 2)
    assert found.step_s == pytest.approx(100 * (0.01 + 10 * 0.001) + 1.0 + 0.5 + 1.1 + 0.1)


def test_with_enough_staleness_the_learner_alone_counts():
    found = predict(config(staleness=8), replace(EVEN, train_token_s=0.01), 1, 1)
    assert (found.bound, found.step_s) == ("learner", pytest.approx(1.0 + 22 + 0.1))
    assert found.learner_idle == 0


def test_with_enough_staleness_engines_reach_their_limit():
    """At one batch each step of 20 sequences, infinitely overlapped: a v with v -> 0, plus 1 ms for each of 2000 tokens."""
    fast = replace(EVEN, train_step_s=0.0, train_token_s=0.0, publish_s=0.0)
    rates = [predict(config(staleness=s), fast, 1, 1).step_s for s in (0, 1, 3, 7, 31)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(ROLLOUT)
    assert rates[-1] == pytest.approx(2.0 + 1.0 / 32, rel=0.02)


def test_an_engine_has_only_so_many_places():
    """4 places: 14 ms for 4 tokens."""
    found = predict(
        config(**{"rollout.vllm": {"max_num_seqs": 4}}), replace(EVEN, train_step_s=0, train_token_s=0), 1, 1
    )
    assert found.step_s == pytest.approx(2000 / 4 * 0.014)


def test_shared_cores_bound_the_whole():
    alone = predict(config(staleness=4), EVEN, 1, 1)
    shared = predict(config(staleness=4), replace(EVEN, cores=1, control_s=0.3, together=1.2), 1, 1)
    assert shared.bound == "cores"
    assert shared.step_s > 1.2 * (TRAIN + 2.0) + 0.3 > alone.step_s


def test_rewards_can_be_the_bound():
    found = predict(config(staleness=4, **{"reward.workers": 2}), replace(EVEN, score_s=5.0), 4, 1)
    assert (found.bound, found.step_s) == ("rewards", 10.0)


def test_several_updates_on_a_batch():
    changes = {"learner.steps_per_batch": 2, "learner.epochs_per_batch": 3, "run.steps": 60}
    found = predict(config(prompts=2, **changes), EVEN, 1, 1)
    assert found.step_s == pytest.approx((ROLLOUT + 6 * 1.0 + 3 * 2.2 + 0.1) / 6)


def test_lengths():
    given = Lengths(Timings(lengths=(1, 2, 3, 10)))
    assert (given.mean, given.capped(3), given.done(2), given.done(0.5)) == (4.0, 2.25, 0.5, 0.0)
    assert given.longest(1) == pytest.approx(4.0)
    assert given.longest(2) == pytest.approx((1 * 1 + 3 * 2 + 5 * 3 + 7 * 10) / 16)
    drawn = Lengths(Timings(mean_length=50, longest=100_000))
    assert drawn.mean == pytest.approx(50, rel=0.01)
    assert drawn.longest(64) == pytest.approx(50 * (np.log(64) + 0.577), rel=0.03)
    assert Lengths(Timings(mean_length=1.0, longest=5)).mean == 1.0


@pytest.mark.parametrize(
    ("engines", "ranks", "staleness", "mean"),
    [(4, 2, 0, 128), (4, 2, 1, 128), (8, 2, 2, 400), (8, 8, 4, 128)],
)
def test_the_simulator_agrees(engines, ranks, staleness, mean):
    timings = replace(Timings(), mean_length=float(mean), longest=2048)
    changes = {"rollout.num_engines": engines, "learner.num_ranks": ranks, "run.steps": 30, "run.checkpoint_every": 0}
    whole = config(16, 8, staleness, **changes | {"run.samples_every": 0, "rollout.max_prompt_tokens": 512})
    with contextlib.redirect_stdout(io.StringIO()):
        simulated = simulate.simulate(whole, timings)
    found = predict(whole, timings, engines, ranks)
    assert found.step_s == pytest.approx(simulated["simulated_step_s"], rel=0.12)
    assert 1 - found.learner_idle == pytest.approx(simulated["simulated_learner_busy"], abs=0.1)


def test_all_splits_the_fastest_first():
    found = splits(config(prompts=8, staleness=2), EVEN, 6)
    assert sorted((p.engines, p.ranks) for p in found) == [
        (1, 5),
        (2, 4),
        (4, 2),
        (5, 1),
    ]  # Three ranks do not divide 40.
    assert [p.samples_per_s for p in found] == sorted((p.samples_per_s for p in found), reverse=True)
    wide = splits(config(prompts=8, **{"rollout.tensor_parallel_size": 2}), EVEN, 6)
    assert sorted((p.engines, p.ranks) for p in wide) == [(1, 4), (2, 2)]
    assert splits(config(), EVEN, 1) == []


def test_the_staleness_that_is_needed():
    assert staleness_needed(config(), replace(EVEN, train_token_s=1.0), 1, 1) == 0
    needed = staleness_needed(config(), EVEN, 1, 1)
    best = predict(config(), EVEN, 1, 1, 32).samples_per_s
    assert predict(config(), EVEN, 1, 1, needed).samples_per_s >= 0.95 * best
    assert predict(config(), EVEN, 1, 1, needed - 1).samples_per_s < 0.95 * best


def test_a_fit_finds_what_made_the_seconds():
    rng = np.random.default_rng(0)
    rows = rng.uniform(1, 100, (40, 3))
    assert _fit(rows, rows @ [0.5, 0.02, 0.003]) == pytest.approx([0.5, 0.02, 0.003])
    assert _fit(rows, rows[:, 1] * 0.1 + rng.normal(0, 1e-4, 40)) == pytest.approx([0, 0.1, 0], abs=1e-3)
    assert (_fit(rows, np.maximum(rows @ [1.0, -0.02, 0.0], 0.1)) >= 0).all()


QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN_7B))
    return str(tmp_path / "model")


def test_a_model_by_its_shape(model):
    shape = Shape.of(make_config(**{"model.path": model}))
    assert shape.parameters == pytest.approx(7.62e9, rel=0.01)
    assert shape.kv_bytes == 2 * 28 * 4 * 128 * 2


def test_a_device_by_its_data_sheet(model):
    changes = {"model.path": model, "model.dtype": "bfloat16"}
    timings = timings_of(make_config(**changes), DEVICES["h100-80"], 1000, 4096, 500)
    assert timings.decode_step_s == pytest.approx(15.2e9 / (0.75 * 3.35e12) + 2e-3, rel=0.01)
    full = 57e9 / (57344 * 1000)  # Sequences at a mean context of 1000 in what the weights leave of 72 GB.
    # The rate at full memory that the paper arithmetic gives: some 31,000 tokens/s.
    assert 24_000 < full / timings.decode_s(full) < 33_000
    assert 1 / timings.train_token_s == pytest.approx(989e12 * 0.4 / (6 * 7.62e9), rel=0.1)
    lines = memory_report(make_config(**changes), DEVICES["l40s"], 1, 100, timings)
    assert lines[0].endswith("fits")
    assert lines[1].endswith("DOES NOT FIT")


def test_the_verb(tmp_path, model, capsys):
    file = write_config(
        tmp_path / "run.toml", **{"model.path": model, "model.dtype": "bfloat16", "learner.prompts_per_step": 12}
    )
    picture, saved = tmp_path / "plan.png", tmp_path / "timings.json"
    common = [str(file), "--devices", "8", "--picture", str(picture)]
    assert plan.main([*common, "--device", "h200", "--save", str(saved), "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(shown[-1])
    assert result["best"]["engines"] + result["best"]["ranks"] == 8
    assert sum("<- best" in line for line in shown) == 1
    assert any(line.startswith("learner rank, ZeRO 0") for line in shown)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert plan.main([*common, "--timings", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--devices", "1", "--device", "h200"], "E501"),
        (["--devices", "8", "--device", "h200", "--timings", "x.json"], "E108"),
        (["--devices", "8", "--timings", "missing.json"], "E105"),
        (["--devices", "many", "--device", "h200"], "E106"),
        (["--device", "h200"], "E106"),
    ],
)
def test_bad_input(tmp_path, model, capsys, arguments, code):
    file = write_config(tmp_path / "run.toml", **{"model.path": model})
    assert plan.main([str(file), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error[{code}]")


def test_a_model_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"config\.json of a decoder"):
        Shape.of(make_config(**{"model.path": str(tmp_path)}))


def test_staleness_counts_updates_and_not_batches():
    changes = {"learner.steps_per_batch": 2, "learner.epochs_per_batch": 3, "run.steps": 60}
    synchronous, within, ahead = (predict(config(2, 5, s, **changes), EVEN, 1, 1).step_s for s in (0, 5, 6))
    assert within == synchronous
    assert ahead < synchronous
    needed = staleness_needed(config(2, **changes), EVEN, 1, 1)
    assert needed > 0
    assert needed % 6 == 0


def test_more_cores_than_processes_make_nobody_faster():
    assert predict(config(), replace(EVEN, cores=8), 1, 1).step_s == pytest.approx(ROLLOUT + TRAIN)


def test_busy_engines_are_what_a_step_waits_for():
    fast = replace(EVEN, train_step_s=0.0, train_token_s=0.0, publish_s=0.0)
    assert predict(config(staleness=31), fast, 1, 1).bound == "engines"
    assert predict(config(), EVEN, 1, 1).bound == "latency"


def test_weights_through_host_memory_take_the_slower_way(model):
    linked, hosted = (
        timings_of(make_config(**{"model.path": model, "rollout.weights": way}), DEVICES["h200"], 1000, 4096, 500)
        for way in ("auto", "host")
    )
    for name in ("publish_s", "prepare_s", "pause_s"):
        assert getattr(hosted, name) == pytest.approx(2 * getattr(linked, name))


def test_each_stage_of_zero_spreads_more(model):
    needed = []
    for stage in range(4):
        given = make_config(**{"model.path": model, "learner.zero_stage": stage})
        line = memory_report(given, DEVICES["b200"], 8, 100, Timings())[1]
        needed.append(float(line.rsplit(": ", 1)[1].split()[0]))
    parameters = Shape.of(given).parameters / 1e9
    saved = -np.diff(needed) / (parameters * 7 / 8)
    assert saved == pytest.approx([12, 2, 2], abs=0.05)
