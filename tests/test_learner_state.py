"""What a learner saves and loads: bit for bit at every ZeRO stage, and on other numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.learner_groups import learner_config

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def train(tmp_path_factory, model_dir, ranks_of):
    """``train(ranks, begin, end, ...) -> (weights, metrics)``: optimizer steps ``begin`` to ``end``, perhaps from a save."""
    out = str(tmp_path_factory.mktemp("state") / "weights")

    def run(ranks: int, begin: int, end: int, learner: dict | None = None, algorithm: dict | None = None, **options):
        settings = {"lr": 1e-2, "weight_decay": 0.1} | (learner or {})
        config = learner_config(model_dir, ranks, options.pop("model", None), algorithm, **settings)
        ranks_of(ranks).run("resume", {"config": config, "from": begin, "to": end, "out": out} | options)
        return dict(np.load(out + ".npz")), json.loads(Path(out + ".json").read_text())

    return run


def same_bits(one, other):
    assert sorted(one) == sorted(other)
    return all(np.array_equal(one[name], other[name]) for name in one)


MOVING = {"kl": {"coef": 0.05, "control": {"name": "adaptive", "target": 0.01}}, "reference_sync_steps": 2}
ENTROPY = {"entropy": {"name": "adaptive", "target": 10.0, "delta": 0.01}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_training_goes_on_bit_for_bit(train, tmp_path, ranks, stage, dtype):
    settings = {"learner": {"zero_stage": stage}, "model": {"dtype": dtype}, "algorithm": MOVING | ENTROPY}
    whole = train(ranks, 0, 6, **settings, save=str(tmp_path), save_at=3)
    rest = train(ranks, 3, 6, **settings, load=str(tmp_path), at=3)
    assert same_bits(whole[0], rest[0])
    assert whole[1][3:] == rest[1]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 0)), ((2, 3), (1, 0)), ((1, 0), (2, 3)), ((1, 2), (2, 1))])
def test_training_goes_on_with_another_number_of_ranks_and_another_stage(train, tmp_path, before, after):
    (ranks, stage), (others, other_stage) = before, after
    whole = train(ranks, 0, 6, {"zero_stage": stage}, MOVING, save=str(tmp_path), save_at=3)
    rest = train(others, 3, 6, {"zero_stage": other_stage}, MOVING, load=str(tmp_path), at=3)
    largest = max(float(np.max(np.abs(whole[0][name] - rest[0][name]))) for name in whole[0])
    assert largest < 1e-5
