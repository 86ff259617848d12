"""The planner: hand-worked steps, limits, agreement with the simulator, calibration, data sheets, the verb."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from launch import plan, simulate
from launch.hardware import DEVICES, Shape, memory_report, timings_of
from launch.plan_model import calibrated, predict, splits, staleness_needed
from launch.timings import Lengths, Timings
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
    score_call_s=0.0,
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


@pytest.mark.parametrize(("admitted", "room"), [(4, 0), (256, 4), (4, 10)])
def test_an_engine_has_only_so_many_places(admitted, room):
    """4 places: 14 ms for 4 tokens; then the weights' 0.1 s, which staleness hides."""
    timings = replace(EVEN, train_step_s=0, train_token_s=0, room=room)
    changes = {"rollout.vllm": {"max_num_seqs": admitted}}
    found = predict(config(**changes), timings, 1, 1)
    assert found.step_s == pytest.approx(2000 / 4 * 0.014 + 0.1)
    assert found.engine_idle == pytest.approx(0.1 / found.step_s, abs=0.01)
    later = predict(config(staleness=4, **changes), timings, 1, 1)
    assert (later.bound, later.step_s) == ("engines", pytest.approx(2000 / 4 * 0.014))
    assert (later.engine_idle, later.running) == (pytest.approx(0, abs=0.01), pytest.approx(4))


def test_a_split_does_not_depend_on_the_engines_that_are_configured():
    timings = replace(EVEN, train_step_s=0.0, train_token_s=1e-6, publish_s=0.0)
    found = {predict(config(512, 8, 4, **{"rollout.num_engines": n}), timings, 4, 1) for n in (1, 4, 64)}
    assert len(found) == 1
    # 20,480 sequences are in flight: no engine admits more than 1,024 of them.
    assert found.pop().step_s == pytest.approx(1024 * 100 / 1024 * (0.01 + 1.024), rel=0.01)


def test_engines_and_ranks_on_the_same_devices_are_not_planned(tmp_path, capsys):
    changes = {"rollout.colocate": True, "rollout.num_engines": 2, "learner.num_ranks": 2}
    file = str(write_config(tmp_path / "run.toml", **changes))
    for verb, arguments in ((plan, ["--devices", "4", "--device", "h200"]), (simulate, [])):
        assert verb.main([file, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error[E108] cannot be planned — run.toml:rollout.colocate. Found true")
        assert "Fix: rollout.colocate = false" in error


def test_shared_cores_bound_the_whole():
    alone = predict(config(staleness=4), EVEN, 1, 1)
    shared = predict(config(staleness=4), replace(EVEN, cores=1, control_s=0.3, together=1.2), 1, 1)
    assert shared.bound == "cores"
    assert shared.step_s > 1.2 * (TRAIN + 2.0) + 0.3 > alone.step_s


def mostly_slow(cases, fast):
    """All ``cases`` as parameters; those that are not ``fast`` too take long together and are marked slow."""
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("cores", "staleness", "factor"),
    mostly_slow(product([0, 1, 2], [0, 1, 4], [0.7, 1.0, 1.4]), [(0, 0, 0.7), (1, 1, 1.4), (2, 4, 1.0)]),
)
def test_a_real_loop_calibrates_what_is_predicted(cores, staleness, factor):
    run, timings = config(staleness=staleness), replace(EVEN, cores=cores)
    measured = factor * predict(run, timings, 1, 1).step_s
    found = calibrated(run, timings, 1, 1, measured)
    assert predict(run, found, 1, 1).step_s == pytest.approx(measured, rel=1e-3)
    assert found.together == pytest.approx(factor, rel=1e-3)
    # Everything else is slower with it, whatever bounds it.
    assert predict(run, found, 2, 2).step_s == pytest.approx(factor * predict(run, timings, 2, 2).step_s, rel=1e-3)
    ranks = calibrated(run, found, 1, 2, 2 * predict(run, timings, 1, 2).step_s)
    assert (ranks.together, ranks.ranks_together) == (found.together, pytest.approx(2, rel=1e-3))
    assert predict(run, ranks, 2, 1) == predict(run, found, 2, 1)
    assert predict(run, ranks, 2, 2).step_s == pytest.approx(2 * predict(run, timings, 2, 2).step_s, rel=1e-3)


def test_the_driver_is_not_calibrated_twice():
    timings = replace(EVEN, cores=1, control_s=1.0)
    fast, slow = (calibrated(config(staleness=4), timings, 1, 1, step_s) for step_s in (8.0, 9.0))
    assert slow.together / fast.together == pytest.approx((9 - 1) / (8 - 1), rel=1e-3)


def test_rewards_can_be_the_bound():
    found = predict(config(staleness=4, **{"reward.workers": 2}), replace(EVEN, score_s=5.0), 4, 1)
    assert (found.bound, found.step_s) == ("rewards", 10.0)


def test_groups_that_end_together_wait_for_a_worker():
    timings = replace(EVEN, score_call_s=0.6, score_s=1.0)
    # Four groups end at the same time: with a worker each, with two rounds of two, and with one call of three after the first.
    for workers, at_once, scored in ((4, 1, 1.6), (2, 1, 3.2), (1, 3, 1.6 + 3 * 1.2)):
        found = predict(config(**{"reward.workers": workers, "reward.groups_per_call": at_once}), timings, 1, 1)
        assert found.step_s == pytest.approx(ROLLOUT + scored + TRAIN)


def test_groups_that_end_one_by_one_wait_less():
    timings = replace(EVEN, score_s=0.01, lengths=(10, 100))  # One in 32 groups of 5 ends at 10 tokens.
    alone, together = (
        predict(config(64, group, **{"reward.workers": 1}), timings, 64, 1).step_s
        - predict(config(64, group, **{"reward.workers": 64}), timings, 64, 1).step_s
        for group in (1, 5)
    )
    assert together == pytest.approx(0.01 * (64 * 31 / 32 - 1))
    assert alone == pytest.approx(0.01 * (64 / 2 - 1))


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
    assert drawn.live == pytest.approx(50, rel=0.03)  # Whoever sees a running one, sees a long one.
    assert given.live == pytest.approx((1 + 4 + 9 + 100) / (2 * 16))
    assert Lengths(Timings(lengths=(8,))).longest_left(1) == pytest.approx(4.0)
    assert Lengths(Timings(lengths=(8,))).longest_left(3) == pytest.approx(6.0, rel=1e-3)
    assert Lengths(Timings(mean_length=1.0, longest=5)).mean == 1.0


@pytest.mark.parametrize(("mean", "longest"), [(1, 1), (3000, 4096), (2048, 4096), (3000, 16384), (128, 512), (64, 64)])
def test_lengths_have_the_mean_that_was_asked_for_once_they_are_cut(mean, longest):
    timings = Timings(mean_length=float(mean), longest=longest)
    assert Lengths(timings).mean == pytest.approx(mean, rel=0.002)
    drawn = timings.sample(np.random.default_rng(0), 200_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert (drawn.min() >= 1, drawn.max() <= longest) == (True, True)


@pytest.mark.parametrize(
    ("engines", "ranks", "staleness", "mean"),
    mostly_slow([(4, 2, 0, 128), (4, 2, 1, 128), (8, 2, 2, 400), (8, 8, 4, 128)], [(4, 2, 1, 128)]),
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


@pytest.mark.parametrize(
    ("engines", "staleness", "workers", "score_s", "longest"),
    mostly_slow(
        [(4, 0, 2, 0.1, 2048), (4, 0, 1, 0.02, 48), (4, 2, 4, 0.1, 2048), (4, 2, 1, 0.02, 48), (1, 1, 1, 0.1, 200)],
        [(1, 1, 1, 0.1, 200)],
    ),
)
def test_the_simulator_agrees_where_rewards_are_slow(engines, staleness, workers, score_s, longest):
    given = {"mean_length": min(128.0, 0.9 * longest), "longest": longest, "score_s": score_s}
    timings = replace(Timings(), decode_sequence_s=100e-6, train_token_s=1e-6, **given)
    changes = {"rollout.num_engines": engines, "learner.num_ranks": 2, "run.steps": 30, "run.checkpoint_every": 0}
    whole = config(16, 8, staleness, **changes | {"run.samples_every": 0, "reward.workers": workers})
    with contextlib.redirect_stdout(io.StringIO()):
        simulated = simulate.simulate(whole, timings)
    assert predict(whole, timings, engines, 2).step_s == pytest.approx(simulated["simulated_step_s"], rel=0.12)


@pytest.mark.parametrize(
    ("staleness", "room"), mostly_slow([(0, 3), (0, 8), (0, 20), (1, 3), (1, 8), (4, 3), (4, 8)], [(1, 3)])
)
def test_the_simulator_agrees_where_memory_is_short(staleness, room):
    timings = replace(Timings(), mean_length=128.0, longest=2048, room=room)
    changes = {"rollout.num_engines": 4, "learner.num_ranks": 2, "run.steps": 30, "run.checkpoint_every": 0}
    whole = config(16, 8, staleness, **changes | {"run.samples_every": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        simulated = simulate.simulate(whole, timings)
    found = predict(whole, timings, 4, 2)
    assert found.step_s == pytest.approx(simulated["simulated_step_s"], rel=0.12)
    assert 1 - found.engine_idle == pytest.approx(simulated["simulated_engine_busy"], abs=0.12)


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
    many = splits(config(), EVEN, 10**9)  # At once: of the ranks, not of the devices.
    assert sorted(p.ranks for p in many) == [1, 2, 4, 5, 10, 20]


def test_the_staleness_that_is_needed():
    assert staleness_needed(config(), replace(EVEN, train_token_s=1.0), 1, 1) == 0
    needed = staleness_needed(config(), EVEN, 1, 1)
    best = predict(config(), EVEN, 1, 1, 32).samples_per_s
    assert predict(config(), EVEN, 1, 1, needed).samples_per_s >= 0.95 * best
    assert predict(config(), EVEN, 1, 1, needed - 1).samples_per_s < 0.95 * best


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


@pytest.mark.parametrize(("dtype", "number"), [("bfloat16", 2), ("float32", 4)])
def test_a_model_by_its_shape(model, dtype, number):
    shape = Shape.of(make_config(**{"model.path": model, "model.dtype": dtype}))
    assert shape.parameters == pytest.approx(7.62e9, rel=0.01)
    assert shape.weights == number * shape.parameters
    assert shape.kv_bytes == 2 * 28 * 4 * 128 * number


def test_float32_takes_four_bytes_and_other_multipliers(model):
    changes, device = {"model.path": model, "learner.prompts_per_step": 12}, DEVICES["h200"]
    found, lines = {}, {}
    for dtype in ("bfloat16", "float32"):
        run = make_config(**changes | {"model.dtype": dtype})
        found[dtype] = timings_of(run, device, 1000, 4096, 256)
        lines[dtype] = memory_report(run, device, 1, 100, found[dtype])
    half, whole = found["bfloat16"], found["float32"]
    assert whole.decode_step_s - 2e-3 == pytest.approx(2 * (half.decode_step_s - 2e-3))
    for name in ("ranks_s", "publish_s", "prepare_s", "pause_s"):
        assert getattr(whole, name) == pytest.approx(2 * getattr(half, name)), name
    assert whole.train_token_s == pytest.approx(half.train_token_s * 989 / 67)
    assert whole.room < half.room / 2
    assert lines["bfloat16"][0].startswith("engine: weights 15.2 GB")
    assert lines["float32"][0].startswith("engine: weights 30.5 GB")


def test_a_device_by_its_data_sheet(model):
    changes = {"model.path": model, "model.dtype": "bfloat16"}
    timings = timings_of(make_config(**changes), DEVICES["h100-80"], 1000, 1000, 500)
    assert timings.decode_step_s == pytest.approx(15.2e9 / (0.75 * 3.35e12) + 2e-3, rel=0.01)
    full = 58.4e9 / (57344 * 1000)  # Sequences at a mean context of 1000 in what the weights leave of 73.6 GB.
    assert timings.room == pytest.approx(full, rel=0.01)
    # The rate at full memory that the paper arithmetic gives: some 31,000 tokens/s.
    assert 24_000 < full / timings.decode_s(full) < 33_000
    assert 1 / timings.train_token_s == pytest.approx(989e12 * 0.4 / (6 * 7.62e9), rel=0.1)
    lines = memory_report(make_config(**changes), DEVICES["l40s"], 1, 100, timings)
    assert lines[0].endswith("fits")
    assert lines[1].endswith("DOES NOT FIT")


QWEN_32B = QWEN_7B | {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
}


def test_no_faster_than_the_memory_allows(tmp_path):
    """At most (M - W) / (kappa c) sequences run: a device gives no more than 1 / (1 / r + 1 / lambda)."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_32B))
    changes = {"model.path": str(tmp_path), "model.dtype": "bfloat16", "rollout.max_new_tokens": 32768}
    run, device = config(512, 16, 4, **changes), DEVICES["h100-80"]
    timings, shape = timings_of(run, device, 3000, 32768, 500), Shape.of(run)
    most = (0.92 * device.memory - shape.weights) / (shape.kv_bytes * (500 + Lengths(timings).live))
    assert timings.room == int(most)
    rate, learner = most / timings.decode_s(most), 1 / timings.train_token_s
    best = splits(run, timings, 64)[0]
    assert best.tokens_per_s <= 64 / (1 / rate + 1 / learner)
    assert best.running <= most


def test_an_engine_fits_where_the_weights_and_one_sequence_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_32B))
    device, said = DEVICES["h100-80"], {}
    for longest in (8192, 65536):  # At 262 kB a token: 2.1 and 17 GB beside weights of 65.5 GB, in 72 GB.
        changes = {"model.path": str(tmp_path), "model.dtype": "bfloat16", "rollout.max_new_tokens": longest}
        run = make_config(**changes)
        timings = timings_of(run, device, 1000, longest, 48)
        said[longest] = memory_report(run, device, 1, 5000, timings)[0]
    assert said[8192].endswith("fits")
    assert said[65536].endswith("DOES NOT FIT")
    run = make_config(**changes | {"model.dtype": "float32"})
    timings = timings_of(run, device, 1000, 8192, 48)
    assert timings.room == 1  # 0 would be: no limit.
    assert "room for 0 sequences" in (line := memory_report(run, device, 1, 1, timings)[0])
    assert line.endswith("DOES NOT FIT")


@pytest.mark.parametrize("kind", ["7B", "8B heads"])
def test_a_decoding_step_of_running_sequences(tmp_path, kind):
    """Naive lock step: 256 places always taken, geometric lengths, the data sheet's bytes: long ones run the longest."""
    shape = QWEN_7B if kind == "7B" else QWEN_7B | {"num_key_value_heads": 8, "num_attention_heads": 28}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    run = make_config(**{"model.path": str(tmp_path), "model.dtype": "bfloat16"})
    device, sizes, places, rng = DEVICES["h200"], Shape.of(run), 256, np.random.default_rng(0)
    timings = timings_of(run, device, 3000, 16384, 256)
    lengths, gained, total, steps = timings.sample(rng, places), np.zeros(places, int), 0.0, 30_000
    for step in range(10_000 + steps):
        read = sizes.weights + sizes.kv_bytes * (256 * places + gained.sum())
        total += (read / (0.75 * device.bandwidth) + 2e-3) * (step >= 10_000)
        gained += 1
        over = gained >= lengths
        lengths[over], gained[over] = timings.sample(rng, int(over.sum())), 0
    assert timings.decode_s(places) == pytest.approx(total / steps, rel=0.05)


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
        given = make_config(**{"model.path": model, "model.dtype": "bfloat16", "learner.zero_stage": stage})
        line = memory_report(given, DEVICES["b200"], 8, 100, Timings())[1]
        needed.append(float(line.rsplit(": ", 1)[1].split()[0]))
    parameters = Shape.of(given).parameters / 1e9
    saved = -np.diff(needed) / (parameters * 7 / 8)
    whole = (2 * 1.5e9 + 2 * 152064 * 3584) / 1e9  # At stage 3 layers, a bucket and the head are whole for a while.
    assert saved + np.array([0, 0, whole / (parameters * 7 / 8)]) == pytest.approx([12, 2, 2], abs=0.05)
