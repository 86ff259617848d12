"""From a name in the configuration to a callable: kinds that load, what is refused and how it is said."""

from __future__ import annotations

import inspect
import sys

import pytest

from rollout import reward_loading
from rollout.reward_calls import invoke_now
from rollout.reward_loading import default_column, isolation_of, load_reward, missing_column, reward_name, visible_files
from rollout.rewards import BUILTINS
from shared.config_reward import RewardFunction
from shared.errors import InputError
from tests.fakes import REWARD_CODE

CODE = (
    REWARD_CODE
    + """
class Later(Brevity):
    async def __call__(self, completions, **kwargs):
        return super().__call__(completions)
def make(target):
    def made(completions, **kwargs):
        return [target - len(c) for c in completions]
    return made
def make_instance(target):
    return Later(target)
def make_number():
    return 3
"""
)


def spec(function: str | None = None, **fields) -> RewardFunction:
    return RewardFunction(function=function, **fields)


@pytest.fixture
def code(tmp_path, monkeypatch) -> str:
    """A user's file of reward functions, also importable as module ``my_rewards``."""
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield str(path)
    for name in ("my_rewards", "millrace_reward_my_rewards"):
        sys.modules.pop(name, None)


@pytest.fixture
def forgotten(monkeypatch):
    """Modules and folders that a test imports are forgotten after it."""
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr(reward_loading, "OPENED", set())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def call(function) -> list:
    payload = {
        "prompts": ["q", "q"],
        "completions": ["a", "bb"],
        "completion_ids": [[], []],
        "columns": {"answer": ["a", "a"]},
        "state": {},
    }
    return invoke_now(function, payload)["values"]


@pytest.mark.parametrize(
    ("function", "fields", "expected"),
    [
        ("{file}:plain", {}, [1, 2]),
        ("my_rewards:plain", {}, [1, 2]),
        ("{file}:patient", {}, [2, 2]),
        ("{file}:scaled", {"args": {"factor": 2.0}}, [2, 4]),
        ("{file}:Brevity", {"args": {"target": 2}}, [-1, 0]),
        ("{file}:Later", {"args": {"target": 2}}, [-1, 0]),
        ("{file}:instance", {}, [0, -1]),
        ("{file}:bound", {}, [3, 6]),
        ("{file}:make", {"args": {"target": 5}, "factory": True}, [4, 3]),
        ("{file}:make_instance", {"args": {"target": 2}, "factory": True}, [-1, 0]),
        ("exact_match", {}, [1, 0]),
    ],
)
def test_functions_classes_instances_partials_and_factories_load(code, function, fields, expected):
    assert call(load_reward(spec(function.format(file=code), **fields), "key")) == expected


@pytest.mark.parametrize(
    ("function", "fields", "place", "said"),
    [
        ("exact_mach", {}, "key.function", 'Fix: "exact_match"'),
        ("plain", {}, "key.function", "expected one of"),
        ("no_such_module:f", {}, "key.function", "no_such_module"),
        ("no_such_file.py:f", {}, "key.function", "no_such_file.py"),
        ("{file}:plane", {}, "key.function", ":plain"),
        ("{file}:plane", {}, "key.function", 'no attribute "plane"'),
        ("{file}:LIMIT", {}, "key", "LIMIT"),
        ("{file}:Brevity", {}, "key.args", "target"),
        ("{file}:Brevity", {"args": {"goal": 1}}, "key.args", "goal"),
        ("{file}:Brevity", {"args": {"target": -1}}, "key.args", "target must be >= 0"),
        ("{file}:plain", {"args": {"goal": 1}}, "key.args", "goal"),
        ("{file}:make", {"factory": True}, "key.args", "target"),
        ("{file}:make_number", {"factory": True}, "key.function", "int"),
    ],
)
def test_what_cannot_be_loaded_is_e301(code, function, fields, place, said):
    with pytest.raises(InputError) as excinfo:
        load_reward(spec(function.format(file=code), **fields), "key")
    assert excinfo.value.code == "E301"
    assert place in excinfo.value.place
    assert said in str(excinfo.value)


@pytest.mark.parametrize(("name", "argument"), [("exact_match", "ignorecase"), ("length", "units"), ("regex", "flag")])
def test_a_mistyped_argument_of_a_builtin_is_e301(name, argument):
    with pytest.raises(InputError, match=argument):
        load_reward(spec(name, args={argument: 1}), "key")


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("length", "unit", "token"),
        ("length_negative_abs", "unit", "words"),
        ("length_negative_abs", "target", "20"),
        ("length_exponential", "rate", -0.1),
        ("repetition", "ngram", 0),
        ("repetition", "worst", 1),
        ("soft_overlong", "buffer", -1),
        ("soft_overlong", "factor", -1.0),
        ("soft_overlong", "limit", True),
        ("cosine_length", "right", [1]),
        ("regex", "pattern", "(a"),
        ("exact_match", "column", 3),
    ],
)
def test_a_value_that_would_score_silently_wrong_is_e301(name, argument, value):
    with pytest.raises(InputError) as excinfo:
        load_reward(spec(name, args={argument: value}), "key")
    assert (excinfo.value.code, excinfo.value.place, excinfo.value.found) == (
        "E301",
        f"key.args.{argument}",
        repr(value),
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def f(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_raises_on_import_is_e301(tmp_path, source, said):
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(InputError) as excinfo:
        load_reward(spec(f"{tmp_path / 'broken.py'}:f"), "key")
    assert excinfo.value.code == "E301"
    assert said in excinfo.value.found


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"function": "a.b:f"}, "f"),
        ({"function": "x/y.py:Style"}, "Style"),
        ({"function": "regex"}, "regex"),
        ({"function": "a.b:f", "name": "g"}, "g"),
        ({"model": "org/nice-model"}, "nice-model"),
        ({"model": "/data/models/judge/"}, "judge"),
        ({"url": "https://user@scores.example:8443/v1/score?key=s3cret"}, "scores.example"),
        ({"url": ["http://127.0.0.1:1/a", "http://127.0.0.1:2/a"]}, "127.0.0.1"),
    ],
)
def test_the_metric_name_is_given_or_the_entrys_own(fields, name):
    assert reward_name(spec(**fields)) == name


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"function": "a.b:f"}, "subprocess"),
        ({"function": "x.py:f"}, "subprocess"),
        ({"function": "x.py:f", "isolation": "sandbox"}, "sandbox"),
        ({"function": "x.py:f", "isolation": "actor"}, "actor"),
        ({"function": "exact_match"}, "actor"),
        ({"function": "exact_match", "isolation": "sandbox"}, "sandbox"),
        ({"function": "regex"}, "subprocess"),
        ({"function": "math_accuracy"}, "subprocess"),
        ({"function": "reasoning_math_accuracy"}, "subprocess"),
        ({"function": "cosine_length"}, "subprocess"),
        ({"function": "code_tests"}, "sandbox"),
        ({"function": "code_tests", "isolation": "actor"}, "sandbox"),
        ({"model": "org/model"}, "actor"),
        ({"url": "https://host/score"}, "actor"),
    ],
)
def test_where_a_function_runs(fields, where):
    assert isolation_of(spec(**fields)) == where


def test_a_parameter_without_a_column_is_found(code):
    def missing(name, columns, **args):
        return missing_column(load_reward(spec(f"{code}:{name}", args=args), "key"), columns)

    assert missing("columns", []) == "answer"
    assert missing("columns", ["answer"]) is None
    assert missing("plain", []) is None
    assert missing("logging", []) is None
    assert missing("scaled", []) == "factor"
    assert missing("scaled", [], factor=1.0) is None
    assert missing("Brevity", [], target=1) is None
    needed = {missing_column(function, ["answer"]) for function in BUILTINS.values()}
    assert needed == {None, "pattern", "target", "limit"}


def test_the_columns_that_builtins_read_by_default():
    columns = {name: default_column(name) for name in BUILTINS}
    assert {name for name, column in columns.items() if column == "answer"} == {
        "exact_match", "final_number", "gsm8k_answer", "boxed_accuracy", "cosine_length"
    }  # fmt: skip
    assert {name for name, column in columns.items() if column == "solution"} == {
        "math_accuracy", "reasoning_math_accuracy"
    }  # fmt: skip
    assert (columns["code_tests"], default_column("a.b:f")) == ("tests", None)


def test_no_builtin_misses_what_the_documentation_promises():
    promised = "length_negative_abs length_reciprocal length_exponential length soft_overlong think_answer_format"
    promised += " think_format boxed_accuracy math_accuracy reasoning_math_accuracy final_number exact_match regex"
    promised += " cosine_length repetition code_tests"
    assert set(promised.split()) <= set(BUILTINS)
    assert all(inspect.getdoc(function) for function in BUILTINS.values())


# --- neighbours of a reward file ---

IMPORTING = """
import helper
from kit.parts import FACTOR
def f(completions, **columns):
    import late
    return [helper.VALUE * FACTOR + late.MORE for _ in completions]
"""


def with_neighbours(folder, value: int):
    """``folder/r.py`` with two files and a package beside it, and files that it does not import."""
    (folder / "kit").mkdir(parents=True)
    for name, code in {
        "r.py": IMPORTING,
        "helper.py": f"import base\nVALUE = base.VALUE + {value}\n",
        "base.py": "VALUE = 0\n",
        "late.py": "MORE = 5\n",
        "kit/__init__.py": "",
        "kit/parts.py": "FACTOR = 10\n",
        "secret.py": "",
        "json.py": "raise RuntimeError('not the standard library')\n",
        "shared.py": "raise RuntimeError('not ours')\n",
    }.items():
        (folder / name).write_text(code)
    return folder / "r.py"


def test_a_reward_file_imports_its_neighbours_and_each_file_its_own(tmp_path, forgotten):
    files = [with_neighbours(tmp_path / name, value) for name, value in (("one", 1), ("two", 2))]
    functions = [load_reward(spec(f"{file}:f"), "key") for file in files]
    assert [function(completions=["a"]) for function in functions] == [[15], [25]]
    assert sys.path.index(str(tmp_path / "one")) < next(i for i, e in enumerate(sys.path) if e.endswith("-packages"))


def test_only_what_a_reward_file_imports_is_shown_to_its_sandbox(tmp_path):
    file = with_neighbours(tmp_path, 1)
    shown = {str(path.relative_to(tmp_path)) for path in visible_files(file)}
    assert shown == {"r.py", "helper.py", "base.py", "late.py", "kit"}
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:")
    assert visible_files(broken) == [broken]
