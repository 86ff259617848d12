"""The learner on real DeepSpeed: the same groups give the same weights however the step is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.stack
ROOT = Path(__file__).resolve().parent.parent

# One process per rank, because DeepSpeed joins one process group per process; started without Ray on purpose.
RANK = """
import json, sys
import numpy as np
from learner.learner import Learner
from learner.weight_sender import full_tensors
from shared.config import Config
from tests_groups import make_groups

options = json.loads(sys.argv[1])
config = Config.model_validate(options["config"])
learner = Learner(config, options["rank"], options["ranks"], ("127.0.0.1", options["port"]))
groups = make_groups(options["seed"])
if options.get("equal_rewards"):
    for group in groups:
        group.rewards[:] = 1.0
reports = []
for _ in range(options["steps"]):
    report = learner.train_step(groups)
    reports.append([report.policy_version, report.applied, report.metrics])
state = {name: tensor.detach().float().numpy().copy() for name, tensor in full_tensors(learner.engine)}
if options["rank"] == 0:
    np.savez(options["out"], **state)
    json.dump(reports, open(options["out"] + ".json", "w"))
if options.get("save"):
    learner.save(options["save"])
"""

GROUPS = """
import numpy as np
import torch
from shared.types import Completion, Prompt, RolloutGroup, VersionSpan

def make_groups(seed, count=6, size=4):
    rng = np.random.default_rng(seed)
    def completion():
        ids = rng.integers(5, 17, size=int(rng.integers(1, 9))).astype(np.int32)
        logprobs = (-3 * rng.random(len(ids))).astype(np.float32)
        return Completion(ids, logprobs, "", "stop", (VersionSpan(0, 0, len(ids)),))
    return [
        RolloutGroup(i, Prompt(i, rng.integers(5, 17, size=int(rng.integers(2, 7))).astype(np.int32), ""),
                     tuple(completion() for _ in range(size)), rng.random(size).astype(np.float32))
        for i in range(count)
    ]

def nan_loss(log_ratio, advantages, mask, *, logprobs=None):
    return logprobs * torch.nan
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory, model_dir):
    """``train(ranks=1, learner={...}, algorithm={...}) -> (weights, reports)`` after two optimizer steps."""
    work = tmp_path_factory.mktemp("learner")
    (work / "tests_groups.py").write_text(GROUPS)
    (work / "rank.py").write_text(RANK)

    def run(ranks: int = 1, learner: dict | None = None, algorithm: dict | None = None, steps: int = 2, **options):
        from learner.distributed import free_port

        config = {
            "run": {"steps": 10},
            "model": {"path": str(model_dir)} | options.pop("model", {}),
            "data": {"train": "unused"},
            "rollout": {"group_size": 4, "max_prompt_tokens": 8, "max_new_tokens": 8},
            "reward": {"functions": [{"function": "exact_match"}]},
            "algorithm": {"kl": {"coef": 0.05}} | (algorithm or {}),
            "learner": {"prompts_per_step": 6, "lr": 1e-3, "num_ranks": ranks} | (learner or {}),
        }
        out, port = str(work / "weights"), free_port()
        children = []
        for rank in range(ranks):
            arguments = {
                "config": config,
                "rank": rank,
                "ranks": ranks,
                "port": port,
                "seed": 3,
                "steps": steps,
                "out": out,
            }
            command = [sys.executable, str(work / "rank.py"), json.dumps(arguments | options)]
            environment = {"PYTHONPATH": f"{ROOT}:{work}", "OMP_NUM_THREADS": "1", "DS_LOG_LEVEL": "error"}
            children.append(subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True))
        for child in children:
            _, errors = child.communicate(timeout=200)
            assert child.returncode == 0, errors[-3000:]
        weights = dict(np.load(out + ".npz"))
        return weights, json.loads(Path(out + ".json").read_text())

    return run


@pytest.fixture(scope="module")
def one_rank(train):
    return train()


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
        learner=learner | {"lr": 1e-3}, algorithm={"policy_loss": {"name": "tests_groups:nan_loss"}}
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

    weights, _ = train(save=str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    state = model.state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in weights.items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")("12+34=")["input_ids"]) == 6
