"""Training from Python: functions of a notebook as a file, tables as configurations, and a run in its own thread."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launch import api, function_files, train_steps
from launch.api import _config, _with
from launch.function_files import write_functions
from rollout.rewards import BUILTINS
from shared.errors import InputError
from tests.fakes import make_config
from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"prompt": "1+1=", "answer": "2"}]


# --- functions as files ---


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """``notebook(code) -> namespace`` of a ``__main__`` with that code, as a cell would leave it."""

    def run(code: str) -> dict:
        path = tmp_path / "cell.py"
        path.write_text(textwrap.dedent(code))
        spec = importlib.util.spec_from_file_location("cell", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "cell", module)
        spec.loader.exec_module(module)
        elsewhere = function_files._home
        monkeypatch.setattr(function_files, "_home", lambda f: None if f.__module__ == "cell" else elsewhere(f))
        return vars(module)

    return run


def load(path: Path):
    """The module that a reward worker would import, without anything of ours."""
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(function, folder: Path):
    """``function`` as a reward worker would import it."""
    write_functions([function], folder)
    (file,) = folder.glob("rewards-*.py")
    return load(file)


def test_a_function_brings_all_that_it_uses(notebook, tmp_path):
    cell = notebook(
        """
        import math
        import re as regular
        from collections import Counter

        LIMIT = {"most": [3, 4]}
        NUMBER = regular.compile(r"\\d+", regular.I)

        def size(text):
            return min(len(text), LIMIT["most"][0])

        def score(completions, **_):
            return [math.sqrt(size(c)) + len(Counter(c)) if NUMBER.search(c) else 0.0 for c in completions]
        """
    )
    names = write_functions([cell["score"]], tmp_path)
    (file,) = tmp_path.glob("rewards-*.py")
    assert names == {cell["score"]: f"{file}:score"}
    assert load(file).score(completions=["1122", "x"]) == [math.sqrt(3) + 2, 0.0]


def test_a_function_made_by_another_brings_what_it_remembers(notebook, tmp_path):
    cell = notebook(
        """
        def at_most(limit):
            def brief(completions, **_):
                return [float(len(c) <= limit) for c in completions]
            return brief

        brief = at_most(2)
        """
    )
    assert written(cell["brief"], tmp_path).brief(completions=["ab", "abc"]) == [1.0, 0.0]


def test_functions_with_other_meanings_of_a_name_are_refused_and_not_mixed_up(notebook, tmp_path):
    cell = notebook(
        """
        def chars(limit):
            def short(completions, **_):
                return [float(len(c) < limit) for c in completions]
            return short

        def words(limit):
            def brief(completions, **_):
                return [float(len(c.split()) < limit) for c in completions]
            return brief

        short, brief, same = chars(200), words(30), words(200)
        """
    )
    with pytest.raises(InputError, match="limit, which means something else"):
        write_functions([cell["short"], cell["brief"]], tmp_path)
    names = write_functions([cell["short"], cell["same"]], tmp_path)
    assert [name.rpartition(":")[2] for name in names.values()] == ["short", "brief"]


def test_what_a_function_calls_its_own_is_not_the_notebooks(notebook, tmp_path):
    cell = notebook(
        """
        answer, rows, text = object(), object(), object()

        def tidy(text):
            return text.strip()

        clean = tidy

        def odd(n):
            return n > 0 and even(n - 1)

        def even(n):
            return n == 0 or odd(n - 1)

        def score(completions, answer, **_):
            rows = [clean(text) for text in completions]
            return [float(row == right and even(len(row))) for row, right in zip(rows, answer)]
        """
    )
    assert written(cell["score"], tmp_path).score(completions=[" ab", "abc"], answer=["ab", "abc"]) == [1.0, 0.0]


def test_a_function_of_a_file_is_named_by_it(tmp_path):
    function = BUILTINS["exact_match"]
    assert write_functions([function], tmp_path) == {function: f"{ROOT}/rollout/rewards.py:exact_match"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("score = lambda completions: []", "lambda"),
        ("class Judge:\n    def __call__(self, completions): ...\nscore = Judge()", "a lambda or an object"),
        ("import functools\nscore = functools.partial(print, end='')", "no source text"),
        ("model = object()\ndef score(completions):\n    return model", "model, a object"),
        ("class Judge: ...\njudge = Judge()\ndef score(completions):\n    return judge", "judge, a Judge"),
    ],
)
def test_what_cannot_be_written_down_is_one_line(notebook, tmp_path, code, found):
    with pytest.raises(InputError) as excinfo:
        write_functions([notebook(code)["score"]], tmp_path)
    assert excinfo.value.code == "E301"
    assert found in excinfo.value.found


# --- configurations ---


def test_a_table_a_file_and_an_object_are_configurations(tmp_path):
    table = make_config().model_dump()
    for given in (make_config(), table, "quickstart", ROOT / "launch" / "configs" / "quickstart.toml"):
        config = _config(given, {"run.steps": 7, "learner.lr": 3e-5, "run.output_dir": "x", "rollout.stop": ["a"]})
        assert (config.run.steps, config.learner.lr, config.run.output_dir) == (7, 3e-5, "x")
        assert config.rollout.stop == ["a"]
    assert table == make_config().model_dump()  # The caller's own.


def test_settings_are_values_or_as_on_the_command_line():
    settings = {"model.tokenizer": None, "data.eval": "none", "learner.betas": [0.8, 0.9], "learner.lr": "3e-5"}
    config = _config(make_config(), settings | {"algorithm.advantage": {"name": "rloo"}})
    assert (config.model.tokenizer, config.data.eval, config.learner.lr) == (None, None, 3e-5)
    assert list(config.learner.betas) == [0.8, 0.9]
    assert config.algorithm.advantage.name == "rloo"


def test_rewards_and_rows_replace_those_of_the_configuration(tmp_path):
    rewards = [BUILTINS["length"], "exact_match", {"function": "regex", "args": {"pattern": "x"}, "weight": 0.5}]
    config = _with(make_config(), rewards, ROWS, tmp_path)
    names = [(f.function.rpartition(":")[2], f.name, f.weight) for f in config.reward.functions]
    assert names == [("length", "length", 1.0), ("exact_match", None, 1.0), ("regex", None, 0.5)]
    assert Path(config.data.train[0].path).read_text() == '{"prompt": "1+1=", "answer": "2"}\n'
    # Another run in the folder keeps its own, also if this one is refused later.
    other = _with(make_config(), (), [{"prompt": "2+2=", "answer": "4"}], tmp_path)
    assert Path(config.data.train[0].path).read_text() == '{"prompt": "1+1=", "answer": "2"}\n'
    assert Path(other.data.train[0].path).read_text() == '{"prompt": "2+2=", "answer": "4"}\n'
    assert _with(make_config(), rewards, ROWS, tmp_path) == config


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"E204.*rows:2\. Found Object of type set"):
        _with(make_config(), (), [*ROWS, {"prompt": {1, 2}}], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="E601"):
        _with(make_config(), (), ROWS, tmp_path / "file" / "run")


def test_wrong_input_is_raised_at_once_and_named():
    with pytest.raises(Exception, match="E101"):
        next(train_steps({"modle": {}}))


# --- runs ---


def test_a_run_that_is_left_before_its_thread_has_begun_ends(tmp_path, monkeypatch):
    ended, run = [], asyncio.run

    class Session:
        async def run(self):
            try:
                await asyncio.sleep(20)
            finally:
                ended.append(True)

    def late(main):
        time.sleep(0.2)
        run(main)

    monkeypatch.setattr(api, "prepare_session", lambda *_: Session())
    monkeypatch.setattr(api.asyncio, "run", late)
    background = api._Background(make_config(**{"run.output_dir": str(tmp_path)}), (), (), {}, None)
    background.end()
    assert not background._thread.is_alive()
    assert ended == [True]


SCRIPT = """
import re
from launch import train, train_steps

NUMBER = re.compile(r"^[0-9]+$")

def numeric(completions, **_):
    return [float(bool(NUMBER.match(c))) for c in completions]

settings = {"run.output_dir": "OUT", "learner.prompts_per_step": 4, "eval.max_rows": 8}
for row in train_steps("quickstart", rewards=[numeric], settings=settings | {"run.steps": 400, "run.checkpoint_every": 1}):
    if row["step"] == 2:
        break
print("left early")
run = train("quickstart", rewards=[numeric], settings=settings | {"run.steps": 4, "run.resume": "auto"})
print([row["step"] for row in run.metrics if "reward" in row], run.model.name)
"""


@pytest.mark.slow
@pytest.mark.stack
def test_a_script_leaves_early_and_goes_on_to_the_end(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("OUT", str(tmp_path / "out")))
    command = [sys.executable, str(tmp_path / "script.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=scaled(280), check=False, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if re.match(r"\[|left", line)]
    assert lines == ["left early", "[1, 2, 3, 4] hf"], done
    assert re.search(r"going on from .*/checkpoints/step-00000[12]", done.stdout)
    assert done.returncode == 0
    (file,) = (tmp_path / "out").glob("rewards-*.py")
    assert "def numeric" in file.read_text()
