"""Every recipe that ships loads, names functions that exist, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.choices import Choices
from rollout.rewards import load_reward
from shared.config_loader import known_keys, load_config

RECIPES = sorted((Path(__file__).parent.parent / "launch" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete(path):
    config = load_config([str(path)])
    Choices(config, path.name)
    for i, spec in enumerate(config.reward.functions):
        assert callable(load_reward(spec, f"reward.functions[{i}]"))
    assert path.read_text().startswith("# ")
    assert config.run.output_dir == f"runs/{path.stem}"


def test_the_readme_names_every_recipe():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert [path.name for path in RECIPES if path.name not in readme] == []


def test_our_own_settings_stay_few_and_documented():
    keys = known_keys()
    assert len(keys) <= 80
    assert all(field.description for field in keys.values())


def test_the_sample_of_gsm8k_ships_with_its_licence():
    folder = RECIPES[0].parent.parent / "data" / "gsm8k"
    assert len((folder / "sample.jsonl").read_text().splitlines()) == 100
    assert "MIT License" in (folder / "LICENSE").read_text()
