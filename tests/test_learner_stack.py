"""The learner on real DeepSpeed: the same groups give the same weights however the step is cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from learner.losses import AGGREGATIONS
from tests.learner_groups import Ranks, learner_config, make_groups
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.stack

RANK = """
import gc, json, sys
import numpy as np
from learner.learner import Learner
from learner.weight_sender import full_tensors
from shared.config import Config
from shared.config_algorithm import Choice
from shared.weights import Segment, views
from tests.learner_groups import make_groups

def gradients(config, options, aggregation, groups):
    # Adam's first moment after one step is the gradient, scaled.
    algorithm = config.algorithm.model_copy(update={"aggregation": Choice.model_validate(aggregation)})
    learner = Learner(config.model_copy(update={"algorithm": algorithm}), options["rank"], options["ranks"])
    learner.train_step(groups)
    names = {id(p): n.removeprefix("model.") for n, p in learner.engine.module.named_parameters()}
    scale = 1 - config.learner.betas[0]
    return {f"{aggregation['name']}/{names[id(p)]}": (s["exp_avg"] / scale).numpy() for p, s in learner.optimizer.state.items()}

def publish(learner):
    publication = learner.publish(np.array([5, 6, 7], np.int32))
    if publication is None:
        return {}
    chunks = views(Segment(publication.segment).bytes, publication.tensors)
    return {m.name: chunk.copy().view(m.dtype).reshape(m.shape) for m, chunk in zip(publication.tensors, chunks)}

def work(options):
    config = Config.model_validate(options["config"])
    learner = Learner(config, options["rank"], options["ranks"], ("127.0.0.1", options["port"]))
    groups = make_groups(3)
    if options.get("equal_rewards"):
        for group in groups:
            group.rewards[:] = 1.0
    reports = []
    if options.get("publish"):
        learner.open_sender(f"ranks-{options['port']}")
        publish(learner)
    for _ in range(options["steps"]):
        report = learner.train_step(groups)
        reports.append([report.policy_version, report.applied, report.metrics])
    if options.get("aggregations"):
        found = [gradients(config, options, aggregation, groups) for aggregation in options["aggregations"]]
        np.savez(options["out"] + "-grad", **{name: value for part in found for name, value in part.items()})
    state = {name: tensor.detach().float().numpy().copy() for name, tensor in full_tensors(learner.engine)}
    if options["rank"] == 0:
        np.savez(options["out"], **state)
        json.dump(reports, open(options["out"] + ".json", "w"))
    if options.get("save"):
        learner.save(options["save"])
    if options.get("publish"):
        found = publish(learner)
        if options["rank"] == 0:
            np.savez(options["publish"], **found)
        learner._sender.close()

for line in sys.stdin:
    work(json.loads(line))
    gc.collect()
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory, model_dir):
    """``train(ranks=1, learner={...}, algorithm={...}) -> (weights, reports)`` after two optimizer steps."""
    work = tmp_path_factory.mktemp("learner")
    groups: dict[int, Ranks] = {}

    def run(ranks: int = 1, learner: dict | None = None, algorithm: dict | None = None, steps: int = 2, **options):
        config = learner_config(model_dir, ranks, options.pop("model", None), algorithm, **(learner or {}))
        if ranks not in groups:
            groups[ranks] = Ranks(work, ranks, RANK)
        out = str(work / "weights")
        groups[ranks].run({"config": config, "steps": steps, "out": out} | options)
        if options.get("aggregations"):
            return dict(np.load(out + "-grad.npz"))
        weights = dict(np.load(out + ".npz"))
        return weights, json.loads(Path(out + ".json").read_text())

    yield run
    for group in groups.values():
        group.close()


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
    loss = torch.zeros((), dtype=torch.float64)
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
            }[aggregation]
            current = logprobs(policy, group.prompt.token_ids, completion.token_ids)
            with torch.no_grad():
                gap = current - logprobs(reference, group.prompt.token_ids, completion.token_ids)
            d = current - (current.detach() - gap)
            ratio = torch.exp(current - current.detach())
            loss = loss + weight * (-advantage * ratio + 0.05 * (torch.exp(-d) + d - 1)).sum()
    loss.backward()
    return {name: p.grad.numpy() for name, p in policy.named_parameters()}


@pytest.mark.parametrize(("ranks", "budget"), [(1, 8192), (1, 16), (2, 24)])
def test_the_gradient_is_the_textbooks(train, model_dir, ranks, budget):
    aggregations = [{"name": name} | ({"length": 8} if name == "constant" else {}) for name in AGGREGATIONS]
    algorithm = {"importance_sampling": {"level": "none"}}
    limits = {"max_grad_norm": 1e9, "max_tokens_per_microbatch": budget}
    found = train(ranks, limits, algorithm, steps=0, aggregations=aggregations)
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
