"""Evaluation: pass@k by its formula, what is sampled and how, and what a model directory scores by itself."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from launch import evaluate as verb
from launch.failures import FailureBudget
from launch.held_out import Judges, evaluate, pass_at_k, pass_reward
from rollout.scores import Scores
from shared.errors import GroupFailed, NothingToLearn
from tests.fakes import make_completion, make_config, make_prompt, write_config

NAN = float("nan")
TWO = [{"function": "regex", "name": "form", "weight": 0.2, "args": {"pattern": "x"}}, {"function": "exact_match"}]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        passed = np.arange(n) < right
        draws = list(itertools.combinations(passed, k))
        assert pass_at_k(passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_by_hand():
    assert pass_at_k(np.array([True, False, False, False]), 2) == pytest.approx(0.5)  # 3 of 6 pairs have it.


async def run(values, prompts=2, failures=(), **changes):
    """Evaluate rows whose sampled completions score ``values`` in turn, and greedy ones 1; what was asked for."""
    config = make_config(**changes)
    asked = []

    async def generate(number, prompt, sampling):
        asked.append((number, sampling))
        if number in failures:
            raise GroupFailed(number, "generation_timeout", "late")
        return tuple(make_completion(tokens=5) for _ in range(sampling.n))

    async def score(number, prompt, completions):
        row = values[prompt.prompt_id] if len(completions) > 1 else [1.0]
        return Scores({"exact_match": np.array(row, np.float32)})

    budget = FailureBudget(config.reward, lambda *_: None)
    rows = [make_prompt(i) for i in range(prompts)]
    return await evaluate(config, rows, Judges(generate, score), budget), asked


async def test_greedy_alone_unless_samples_are_wanted():
    metrics, asked = await run([])
    assert [(number, s.n, s.temperature) for number, s in asked] == [(-1, 1, 0.0), (-2, 1, 0.0)]
    assert not [name for name in metrics if "pass@" in name or "sampled" in name]
    assert (metrics["eval/reward"], metrics["eval/mean_length"], metrics["eval/clipped_ratio"]) == (1.0, 5.0, 0.0)


async def test_sampled_completions_give_pass_at_powers_of_two_and_all():
    values = [[1, 0, 0, 0, 0, 0], [0.5, 1, 1, 0, 0, 0]]  # 1 and 2 of 6 pass.
    metrics, asked = await run(values, **{"eval.samples": 6, "eval.temperature": 0.6, "eval.max_new_tokens": 7})
    assert [name for name in metrics if "pass@" in name] == ["eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/pass@6"]
    assert metrics["eval/pass@1"] == pytest.approx((1 / 6 + 2 / 6) / 2)
    assert metrics["eval/pass@2"] == pytest.approx(((1 - 10 / 15) + (1 - 6 / 15)) / 2)
    assert metrics["eval/pass@6"] == 1.0
    assert metrics["eval/sampled/reward"] == pytest.approx(3.5 / 12)
    assert metrics["eval/reward"] == 1.0
    sampled = [(number, s.n, s.temperature, s.max_new_tokens) for number, s in asked[2:]]
    assert sampled == [(-3, 6, 0.6, 7), (-4, 6, 0.6, 7)]


async def test_evaluations_of_the_same_weights_draw_the_same():
    values = [[1, 0]] * 2
    (_, first), (_, again) = [await run(values, **{"eval.samples": 2}) for _ in range(2)]
    seeds = [sampling.seed for _, sampling in first[2:]]
    assert seeds == [sampling.seed for _, sampling in again[2:]]
    assert len(set(seeds)) == 2


async def test_completions_without_a_reward_are_left_out_of_pass_at_k():
    metrics, _ = await run([[1, NAN, 0], [NAN, NAN, NAN]], **{"eval.samples": 3})
    assert metrics["eval/pass@1"] == pytest.approx(0.5)
    assert metrics["eval/pass@2"] == 1.0
    assert "eval/pass@3" not in metrics


async def test_what_passes_is_a_setting():
    metrics, _ = await run([[0.5, 0.4]], prompts=1, **{"eval.samples": 2, "eval.pass_value": 0.5})
    assert metrics["eval/pass@1"] == 0.5
    assert pass_reward(make_config(**{"reward.functions": TWO})) == "exact_match"  # The heaviest.
    assert pass_reward(make_config(**{"reward.functions": TWO, "eval.pass_reward": "form"})) == "form"


async def test_a_row_that_fails_is_left_out_and_counted():
    metrics, _ = await run([[1, 1]] * 2, failures=[-2, -3], **{"eval.samples": 2})
    assert metrics["eval/failed"] == 2.0
    assert metrics["eval/pass@1"] == 1.0
    with pytest.raises(NothingToLearn, match="not one of 1"):
        await run([], prompts=1, failures=[-1])


# --- an evaluation's own reward worker ---

MOODY = """
calls = []

def moody(completions, **_):
    calls.append(len(completions))
    if "bad" in completions:
        raise ValueError("no mood")
    return [float(len(calls))] * len(completions)
"""


async def test_groups_go_some_at_a_time_and_one_that_fails_is_tried_alone_and_then_left_out(tmp_path):
    (tmp_path / "moody.py").write_text(MOODY)
    function = {"function": f"{tmp_path / 'moody.py'}:moody", "isolation": "actor"}
    changes = {"reward.functions": [function], "reward.groups_per_call": 2, "reward.retries": 1}
    scorer = verb.Scorer(make_config(**changes).reward)
    texts = ["good", "bad", "fine", "late"]
    wanted = [scorer.score(i, make_prompt(i), (make_completion(text=text),)) for i, text in enumerate(texts)]
    answers = await asyncio.gather(*wanted, return_exceptions=True)
    scorer.close()
    failed = answers.pop(1)
    assert isinstance(failed, GroupFailed)
    assert (failed.group_id, failed.cause) == (1, "E304")
    # good alone, for nobody else has come; bad and fine together, then bad twice and fine; late.
    assert [answer.parts["moody"].tolist() for answer in answers] == [[1.0], [5.0], [6.0]]


def test_the_names_of_scores_move_no_terminal(tmp_path, monkeypatch, capsys):
    async def score(config, rows):
        return {"eval/rewards/a\x1b[2J/mean": 0.5, "eval/reward": 0.5}

    prepared = SimpleNamespace(config=make_config(), held_out=[make_prompt()])
    monkeypatch.setattr("launch.preflight.prepare", lambda *_: prepared)
    monkeypatch.setattr(verb, "score", score)
    assert verb.main([str(write_config(tmp_path / "run.toml"))]) == 0
    out = capsys.readouterr().out
    assert "eval/rewards/a\\x1b[2J/mean  0.5000" in out
    assert "\x1b" not in out


# --- which checkpoint ---


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Steps 10, 20 and 30, of which 20 was the best."""
    for step in (10, 20, 30):
        state = tmp_path / "checkpoints" / f"step-{step:06d}" / "state"
        state.mkdir(parents=True)
        table = {"version": step, "stopping": {"best_version": 20}}
        (state / "run.json").write_text(json.dumps(table))
    monkeypatch.setattr("shared.checkpoints.verify", lambda place: {})
    return tmp_path


@pytest.mark.parametrize(("which", "step"), [("best", 20), ("newest", 30), ("10", 10)])
def test_the_checkpoint_of_a_run(checkpoints, which, step):
    assert verb._checkpoint(checkpoints, which) == checkpoints / "checkpoints" / f"step-{step:06d}" / "hf"


@pytest.mark.parametrize(
    ("which", "said"), [("40", "Found steps 30, 20, 10,"), ("latest", "Found latest, expected best")]
)
def test_a_checkpoint_that_is_not_there_is_one_line(checkpoints, capsys, which, said):
    (checkpoints / "config.toml").write_text("")
    assert verb.main([str(checkpoints), "--checkpoint", which]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error[E{'603' if which == '40' else '106'}]")
    assert said in line
    assert "run.resume" not in line


def test_a_configuration_has_no_checkpoints(capsys):
    assert verb.main(["quickstart", "--checkpoint", "newest"]) == 2
    assert "E106] bad option — command line:--checkpoint. Found quickstart" in capsys.readouterr().err
