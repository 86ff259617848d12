"""Every recipe that ships loads, names functions that exist, and says what it is."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from launch.preflight import load_reward
from learner.choices import Choices
from rollout import hub
from shared.config_loader import RECIPES as FOLDER
from shared.config_loader import load_config, recipes
from tests.fakes import write_config

RECIPES = sorted((Path(__file__).parent.parent / "launch" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete(path):
    config = load_config([str(path)])
    Choices(config, path.name)
    for i, spec in enumerate(config.reward.functions):
        assert callable(load_reward(spec, f"reward.functions[{i}]"))
    assert path.read_text().startswith("# ")
    assert config.run.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("by", ["file", "command line"])
def test_a_named_combination_is_complete(tmp_path, name, by):
    changes = {"algorithm.recipe": name}
    path = write_config(tmp_path / "run.toml", **(changes if by == "file" else {}))
    config = load_config([str(path)], changes if by == "command line" else None)
    Choices(config, path.name)
    text = (FOLDER / f"{name}.toml").read_text()
    assert text.startswith("# ")
    for section, settings in tomllib.loads(text).items():
        found = getattr(config, section).model_dump()
        for key, value in settings.items():
            kept = {k: found[key][k] for k in value} if isinstance(value, dict) else found[key]
            assert kept == value, f"{section}.{key}"


def test_the_combinations_that_ship():
    named = {"grpo", "grpo_deepseek", "dr_grpo", "dapo", "gspo", "rloo", "cispo", "ppo_kl_reward"}
    assert named <= set(recipes())
    assert recipes() == sorted(path.stem for path in (RECIPES[0].parent / "recipes").iterdir())


def test_the_readme_names_every_recipe():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert [path.name for path in RECIPES if path.name not in readme] == []


def test_the_sample_of_gsm8k_ships_with_its_licence():
    folder = RECIPES[0].parent.parent / "data" / "gsm8k"
    assert len((folder / "sample.jsonl").read_text().splitlines()) == 100
    assert "MIT License" in (folder / "LICENSE").read_text()


def test_the_rows_and_models_of_shipped_configurations_can_be_had_by_anybody():
    for path in RECIPES:
        config = load_config([str(path)])
        named = [config.model.path, *(source.path for source in [*config.data.train, *(config.data.eval or [])])]
        assert [name for name in named if not (hub.NAMED.fullmatch(name) or name.startswith("builtin:"))] == [], path
    gsm8k = load_config(["gsm8k"]).data
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f'path = "{gsm8k.train[0].path}"' in readme
    assert (gsm8k.train[0].subset, gsm8k.eval[0].subset) == ("main", "main")
