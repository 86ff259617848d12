"""The learner on real DeepSpeed: the same groups give the same weights however the step is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from learner.losses import AGGREGATIONS
from tests.learner_groups import learner_config, make_groups
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def train(tmp_path_factory, model_dir, ranks_of):
    """``train(ranks=1, learner={...}, algorithm={...}) -> (weights, reports)`` after two optimizer steps."""
    out = str(tmp_path_factory.mktemp("learner") / "weights")

    def run(ranks: int = 1, learner: dict | None = None, algorithm: dict | None = None, steps: int = 2, **options):
        config = learner_config(model_dir, ranks, options.pop("model", None), algorithm, **(learner or {}))
        ranks_of(ranks).run("train", {"config": config, "steps": steps, "out": out} | options)
        return dict(np.load(out + ".npz")), json.loads(Path(out + ".json").read_text())

    return run


@pytest.fixture(scope="module")
def one_rank(train):
    return train()


def textbook_gradient(model_dir, aggregation, groups):
    """float64 autograd of the GRPO loss with a k3 KL, one padded sequence at a time, without any of our code."""
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)

    def logprobs(model, prompt, answer):
        ids = torch.tensor(np.concatenate([prompt, answer]), dtype=torch.long)
        rows = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)[len(prompt) - 1 : -1]
        return rows.gather(1, ids[len(prompt) :, None])[:, 0]

    count = sum(len(g.completions) for g in groups)
    tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    chunks = [lengths[start : start + 8] for start in range(0, count, 8)]
    loss, seen = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        rewards = group.rewards.astype(np.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        of_group = sum(len(c.token_ids) for c in group.completions)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            n = len(completion.token_ids)
            weight = {
                "token_mean": 1 / tokens,
                "sequence_mean": 1 / (count * n),
                "constant": 1 / (count * 8),
                "sequence_sum": 1 / count,
                "prompt_mean": 1 / (len(groups) * of_group),
                "token_sum": 1.0,
                "batch_token_mean": 1 / tokens,
                "chunk_token_mean": 1 / (len(chunks) * sum(chunks[seen // 8])),
            }[aggregation]
            seen += 1
            current = logprobs(policy, group.prompt.token_ids, completion.token_ids)
            with torch.no_grad():
                gap = current - logprobs(reference, group.prompt.token_ids, completion.token_ids)
            d = current - (current.detach() - gap)
            ratio = torch.exp(current - current.detach())
            loss = loss + weight * (-advantage * ratio + 0.05 * (torch.exp(-d) + d - 1)).sum()
    loss.backward()
    return {name: p.grad.numpy() for name, p in policy.named_parameters()}


@pytest.mark.parametrize(("ranks", "budget"), [(1, 8192), (1, 16), (2, 24)])
def test_the_gradient_is_the_textbooks(ranks_of, tmp_path, model_dir, ranks, budget):
    aggregations = [{"name": name} | ({"length": 8} if name == "constant" else {}) for name in AGGREGATIONS]
    algorithm = {"importance_sampling": {"level": "none"}}
    limits = {"max_grad_norm": 1e9, "max_tokens_per_microbatch": budget}
    config = learner_config(model_dir, ranks, None, algorithm, **limits)
    options = {"config": config, "aggregations": aggregations, "out": str(tmp_path / "gradients")}
    ranks_of(ranks).run("gradients", options)
    found = dict(np.load(tmp_path / "gradients.npz"))
    for name in AGGREGATIONS:
        expected = textbook_gradient(model_dir, name, make_groups(3))
        assert {key.partition("/")[2] for key in found if key.startswith(name + "/")} == expected.keys()
        error = sum(float(((found[f"{name}/{k}"] - v) ** 2).sum()) for k, v in expected.items()) ** 0.5
        assert error / sum(float((v**2).sum()) for v in expected.values()) ** 0.5 < 1e-6, name


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest absolute difference over the largest absolute weight."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k] - b[k]).max()) for k in a) / max(float(np.abs(v).max()) for v in a.values())


@pytest.mark.parametrize(
    ("ranks", "learner"),
    [
        (1, {"max_tokens_per_microbatch": 16}),
        (1, {"zero_stage": 1}),
        (1, {"zero_stage": 2, "max_tokens_per_microbatch": 40}),
        (1, {"zero_stage": 3}),
        (2, {}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3, "max_tokens_per_microbatch": 24}),
        (1, {"gradient_checkpointing": True}),
    ],
)
def test_same_groups_give_the_same_weights(train, one_rank, ranks, learner):
    weights, reports = train(ranks, learner)
    assert [r[:2] for r in reports] == [[1, True], [2, True]]
    assert difference(weights, one_rank[0]) < 1e-5
    for name in ("loss", "kl", "entropy", "grad_norm", "sync/logprob_gap"):
        assert reports[1][2][name] == pytest.approx(one_rank[1][1][2][name], rel=1e-4, abs=1e-6), name


# Everything that has to be known of all sequences before an update, and several updates on one batch.
EVERYTHING = {
    "kl": {"coef": 0.05, "estimator": "full", "reward_coef": 0.1, "control": {"name": "adaptive", "target": 0.1}},
    "reference_sync_steps": 3,
    "top_entropy_quantile": 0.7,
    "entropy": {"name": "bonus", "coef": 0.01},
    "off_policy_threshold": 0.5,
    "policy_loss": {"name": "dual_clip"},
    "aggregation": {"name": "token_mean"},
}
UPDATES = {"prompts_per_step": 3, "steps_per_batch": 2, "epochs_per_batch": 2}


@pytest.fixture(scope="module")
def everything(train):
    return train(learner=UPDATES, algorithm=EVERYTHING)


def test_every_update_on_a_batch_counts_as_a_version(everything):
    _, reports = everything
    assert [r[:2] for r in reports] == [[4, True], [8, True]]
    metrics = reports[-1][2]
    assert metrics["updates"] == 4
    assert metrics["entropy_kept_frac"] == pytest.approx(0.7, abs=0.05)
    assert metrics["reward_kl"] > 0
    assert metrics["clip_ratio/saturated"] == 0
    assert metrics["kl_coef"] != 0.1


@pytest.mark.parametrize(
    ("ranks", "learner"),
    [(1, {"zero_stage": 2, "max_tokens_per_microbatch": 24}), (2, {}), (2, {"zero_stage": 3})],
)
def test_what_depends_on_all_sequences_is_the_same_for_any_split(train, everything, ranks, learner):
    weights, reports = train(ranks, UPDATES | learner, EVERYTHING)
    assert difference(weights, everything[0]) < 5e-5  # Eight Adam steps amplify rounding where gradients are tiny.
    for name in ("loss", "kl", "reward_kl", "kl_coef", "entropy", "advantages/abs_mean", "entropy_kept_frac"):
        assert reports[1][2][name] == pytest.approx(everything[1][1][2][name], rel=1e-3, abs=1e-6), name


# The rest of what has to be known of all sequences, or of all steps of the batch.
MORE = {
    "kl": {"coef": 0.05, "corrected": True, "straight_through": "corrected"},
    "advantage": {"name": "reinforce_pp"},
    "policy_loss": {"name": "gspo_token", "low": 0.2, "high": 0.2},
    "aggregation": {"name": "batch_token_mean"},
    "importance_sampling": {"level": "token", "normalise": True},
    "rejection": {"name": "token_binary_kl", "high": 0.5},
}


@pytest.fixture(scope="module")
def more(train):
    return train(learner=UPDATES, algorithm=MORE)


def test_normalised_and_rejected_tokens_train(more):
    metrics = more[1][-1][2]
    assert 0 < metrics["rejection/kept_frac"] < 1
    assert metrics["kl"] > 0
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(("ranks", "learner"), [(1, {"max_tokens_per_microbatch": 24}), (2, {"zero_stage": 2})])
def test_more_of_what_depends_on_all_sequences_is_the_same_for_any_split(train, more, ranks, learner):
    weights, reports = train(ranks, UPDATES | learner, MORE)
    assert difference(weights, more[0]) < 5e-5
    for name in ("loss", "kl", "importance_sampling/mean", "advantages/abs_mean", "rejection/kept_frac"):
        assert reports[1][2][name] == pytest.approx(more[1][1][2][name], rel=1e-3, abs=1e-6), name


def test_a_reference_that_follows_changes_what_is_learned(train, everything):
    weights, _ = train(learner=UPDATES, algorithm=EVERYTHING | {"reference_sync_steps": 0})
    assert difference(weights, everything[0]) > 1e-5


def test_a_batch_has_one_reference(train):
    """A reference that moved inside a batch would mix its new head with hidden states of the old."""
    every_update, _ = train(learner=UPDATES, algorithm=EVERYTHING | {"reference_sync_steps": 1})
    every_batch, _ = train(learner=UPDATES, algorithm=EVERYTHING | {"reference_sync_steps": 4})
    assert difference(every_update, every_batch) == 0.0


def test_training_moves_the_weights(train, one_rank):
    untouched, _ = train(steps=0)
    assert difference(one_rank[0], untouched) > 1e-4


def test_the_old_logprobs_of_the_first_update_are_the_current_ones(train, one_rank):
    weights, _ = train(algorithm={"old_logprobs": "recompute"})
    assert difference(weights, one_rank[0]) < 1e-5


@pytest.mark.parametrize("learner", [{}, {"zero_stage": 2}])
def test_a_non_finite_gradient_changes_nothing(train, learner):
    untouched, _ = train(steps=0, learner=learner)
    weights, reports = train(
        learner=learner | {"lr": 1e-3}, algorithm={"policy_loss": {"name": "tests.learner_groups:nan_loss"}}
    )
    assert [r[:2] for r in reports] == [[0, False], [0, False]]
    assert difference(weights, untouched) == 0.0


def test_a_step_without_signal_is_not_applied(train):
    _, reports = train(algorithm={"zero_variance": "drop"}, equal_rewards=True)
    assert [r[:2] for r in reports] == [[0, False], [0, False]]
    assert reports[0][2]["groups/trained"] == 0.0


def test_bfloat16_keeps_float32_masters(train):
    weights, reports = train(model={"dtype": "bfloat16"})
    assert [r[1] for r in reports] == [True, True]
    assert all(np.isfinite(w).all() for w in weights.values())


def test_the_saved_policy_loads_in_transformers(train, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights, _ = train(save=str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in weights.items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")("12+34=")["input_ids"]) == 6


@pytest.mark.parametrize(("ranks", "learner"), [(1, {}), (2, {"zero_stage": 3})])
def test_a_publication_is_what_a_checkpoint_file_would_be(train, tmp_path, ranks, learner):
    """Of a model whose experts transformers holds as one tensor; proved at the start, trained a step, and compared."""
    from safetensors.numpy import load_file

    model = {"path": str(write_tiny_model("Qwen3MoE", tmp_path / "model"))}
    out = {"publish": str(tmp_path / "published.npz"), "save": str(tmp_path / "saved")}
    train(ranks, learner, model=model, steps=1, **out)
    published, saved = np.load(out["publish"]), load_file(tmp_path / "saved" / "hf" / "model.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert set(published) == set(saved) == set(before)
    assert all(np.array_equal(published[name], saved[name]) for name in saved)
    assert any((saved[name] != before[name]).any() for name in saved if ".experts." in name)


def test_weights_are_published_only_after_a_step_that_changed_them(model_dir):
    from learner.learner import Learner
    from tests.fakes import make_config

    learner = Learner(make_config(**{"model.path": str(model_dir), "algorithm.zero_variance": "drop"}))
    learner.open_sender("publish-test")
    canary = np.array([5, 6, 7], np.int32)
    try:
        groups = make_groups(3)
        for group in groups:
            group.rewards[:] = 1.0
        report, publication = learner.train_and_publish(groups, canary)
        assert (report.policy_version, report.applied, publication) == (0, False, None)
        report, publication = learner.train_and_publish(make_groups(3), canary)
        assert (report.policy_version, report.applied, publication.version) == (1, True, 1)
        assert publication.digest == publication.hash_segment()
        assert publication.canary.logprobs == pytest.approx(learner.sequence_logprobs(canary))
    finally:
        learner._sender.close()
