"""Generated tasks: their rows, what is refused, the answer in a completion, and scores through the sandbox."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight import prepare
from rollout import sandbox
from rollout.datasets import read
from rollout.generated_scoring import ReasoningGym, extracted, score, tasks_of
from rollout.generated_tasks import REFUSED, VERSION, packed, unpacked
from rollout.reward_calls import CallFailed, invoke_now
from rollout.reward_loading import isolation_of, load_reward, missing_column
from rollout.reward_worker import RewardWorker
from shared.config_data import Data, Source
from shared.config_reward import Reward, RewardFunction
from shared.errors import InputError, InputErrors
from tests.fakes import make_completion, make_config, make_prompt, write_model, write_rows

try:
    HAS = importlib.metadata.version("reasoning-gym")
except importlib.metadata.PackageNotFoundError:
    HAS = ""
needs_gym = pytest.mark.skipif(HAS != VERSION, reason=f"reasoning-gym {VERSION} is not installed")
has_wall = pytest.mark.skipif(bool(sandbox.sandbox_problem()), reason=f"no sandbox: {sandbox.sandbox_problem()}")
SPEC = RewardFunction(function="reasoning_gym")


@dataclass
class LegsConfig:
    size: int = 500
    seed: int | None = None
    most: int = 3

    def validate(self) -> None:
        assert self.most > 0, "most must be positive"


class Legs:
    def __init__(self, config: LegsConfig) -> None:
        config.validate()
        self.config = config

    def __getitem__(self, i: int) -> dict:
        if self.config.most == 99:
            raise RecursionError("no such animal")
        number = self.config.seed + i
        return {
            "question": f"{number} spiders?",
            "answer": str(8 * number),
            "metadata": {"animals": (number, "spider")},
        }


@pytest.fixture
def gym(monkeypatch):
    """A package of one task in the place of reasoning-gym."""
    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"leg_counting": (Legs, LegsConfig), "countdown": (Legs, LegsConfig)}
    factory.create_dataset = lambda name, **given: factory.DATASETS[name][0](LegsConfig(**given))
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: VERSION if name == "reasoning-gym" else real(name))


def rows_of(task: str = "leg_counting", split: str = "train", **source) -> list[dict]:
    return [row for _, row in read(Source(path=f"reasoning-gym:{task}", **source), split, "run.toml:data.train").rows]


def refused(*arguments, **source) -> InputError:
    with pytest.raises(InputError) as excinfo:
        rows_of(*arguments, **source)
    assert "\n" not in str(excinfo.value)
    return excinfo.value


# --- rows ---


def test_a_row_holds_the_prompt_and_what_scoring_needs(gym):
    rows = read(Source(path="reasoning-gym:leg_counting", args={"size": 2, "most": 5}), "train", "data.train")
    assert rows.name == "leg_counting"
    assert [place for place, _ in rows.rows] == ["leg_counting:1", "leg_counting:2"]
    row = rows.rows[0][1]
    assert (row["prompt"], row["answer"], row["task"]) == ("1 spiders?", "8", "leg_counting")
    assert json.loads(row["task_args"]) == {"size": 2, "seed": 1, "most": 5}
    assert unpacked(json.loads(row["metadata"])) == {"animals": (1, "spider")}


def test_training_and_evaluation_share_no_row_by_default(gym):
    train, held_out = rows_of(), rows_of(split="test")
    assert (len(train), len(held_out)) == (1000, 1000)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert rows_of(split="test", args={"seed": 1}) == train
    assert rows_of() == train


def test_columns_filters_and_limits_work_as_on_files(gym):
    filters = [{"column": "answer", "one_of": ["16", "24", "32"]}]
    found = rows_of(columns={"question": "prompt"}, filters=filters, max_rows=2)
    assert [row["question"] for row in found] == ["2 spiders?", "3 spiders?"]
    assert refused(columns={"question": "prompd"}).place == "leg_counting:prompd"


def test_args_in_a_configuration():
    data = Data(train={"path": "reasoning-gym:leg_counting", "args": {"size": 500, "seed": 1}}, eval="x.jsonl")
    assert (data.train[0].args, data.eval[0].args) == ({"size": 500, "seed": 1}, {})


@pytest.mark.parametrize("task", REFUSED)
@pytest.mark.parametrize("package", ["there", "missing"])
def test_a_task_whose_scorer_evaluates_text_or_pays_any_is_e309_package_or_not(monkeypatch, request, task, package):
    if package == "there":
        request.getfixturevalue("gym")
    error = refused(task)
    assert (error.code, error.place) == ("E309", "run.toml:data.train.path")
    assert error.found == f"{task} ({REFUSED[task]})"


@pytest.mark.parametrize(
    ("task", "args", "code", "place", "fix"),
    [
        ("leg_countin", {}, "E201", "path", 'path = "reasoning-gym:leg_counting"'),
        ("countdwn", {}, "E201", "path", 'path = "reasoning-gym:leg_counting"'),  # Never a denied one.
        ("leg_counting", {"mots": 3}, "E101", "args.mots", "did you mean most?"),
        ("leg_counting", {"qqqq": 3}, "E101", "args.qqqq", "remove it"),
        ("leg_counting", {"size": 0}, "E102", "args.size", "size = 1000"),
        ("leg_counting", {"size": True}, "E102", "args.size", "size = 1000"),
        ("leg_counting", {"seed": "a"}, "E102", "args.seed", "seed = 1"),
        ("leg_counting", {"seed": -1}, "E102", "args.seed", "seed = 1"),
        ("leg_counting", {"most": 0}, "E102", "args", "correct args"),
        ("leg_counting", {"most": "a\nb"}, "E102", "args", "correct args"),
        ("leg_counting", {"most": 99}, "E102", "args", "correct args"),
    ],
)
def test_what_is_refused_in_one_line(gym, task, args, code, place, fix):
    error = refused(task, args=args)
    if task == "countdwn":
        fix = "one of leg_counting" if error.fix.startswith("one of") else fix
    assert (error.code, error.place, error.fix) == (code, f"run.toml:data.train.{place}", fix)


@pytest.mark.parametrize(("version", "what"), [(None, "package missing"), ("0.1.26", "version out of range")])
def test_without_the_package_or_with_another_version_it_is_e702(monkeypatch, version, what):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", found)
    errors = [refused()]
    with pytest.raises(InputError) as excinfo:
        load_reward(SPEC, "key")
    for error in [*errors, excinfo.value]:
        assert (error.code, error.what) == ("E702", what)
        assert error.fix == "pip install reasoning-gym==0.1.25"


def test_args_belong_to_generated_tasks_alone(tmp_path):
    write_rows(tmp_path / "r.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="E108"):
        read(Source(path=str(tmp_path / "r.jsonl"), args={"size": 3}), "train", "data.train")


KEYS = st.text(max_size=3) | st.integers() | st.tuples(st.integers())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner) | st.sets(st.integers()),
    max_leaves=12,
)


@given(VALUES)
def test_metadata_survives_json(value):
    back = unpacked(json.loads(json.dumps(packed(value))))
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, set | list | dict | tuple)


# --- the answer, and its score ---


@pytest.mark.parametrize(
    ("text", "answer", "tag", "line"),
    [
        ("<answer>4</answer>", "4", "4", "<answer>4</answer>"),
        ("so\n<answer>\n4 \n5\n</answer>\nbye", "4 \n5", "4 \n5", "bye"),
        ("<answer>1</answer> no, <answer>2</answer>", "2", "2", "<answer>1</answer> no, <answer>2</answer>"),
        ("<answer>1</answer><answer>2", "1", "1", "<answer>1</answer><answer>2"),
        ("It is\n 4 \n\n", "4", None, "4"),
        ("<answer>4", "<answer>4", None, "<answer>4"),
        ("</answer>4", "</answer>4", None, "</answer>4"),
        ("<answer></answer>", "", "", "<answer></answer>"),
        ("", "", None, ""),
    ],
)
def test_where_the_answer_is(text, answer, tag, line):
    assert [extracted(text, how) for how in ("answer", "tag", "line", "text")] == [answer, tag, line, text.strip()]


@pytest.mark.parametrize("how", ["answer", "tag", "line", "text"])
@given(st.text() | st.lists(st.sampled_from(["<answer>", "</answer>", "x", "\n"])).map("".join))
def test_an_answer_is_part_of_the_text(how, text):
    assert (extracted(text, how) or "") in text


def scorer(answers: dict) -> SimpleNamespace:
    def score_answer(said, entry):
        if isinstance(answers[said], Exception):
            raise answers[said]
        return answers[said]

    return SimpleNamespace(score_answer=score_answer)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.25, 0.25), (True, 1.0), (ValueError(), 0), (RecursionError(), 0), (float("nan"), 0), (1j, 0)],
)
def test_a_text_that_the_scorer_cannot_read_is_0(value, expected):
    assert score("said", scorer({"said": value, "gold": 1}), "gold", {}) == expected


def test_a_scorer_that_fails_on_the_right_answer_too_is_broken():
    with pytest.raises(KeyError):
        score("said", scorer({"said": ValueError(), "gold": KeyError("board")}), "gold", {})
    with pytest.raises(MemoryError):
        score("said", scorer({"said": MemoryError(), "gold": 1}), "gold", {})


@pytest.mark.parametrize("isolation", [None, "actor", "subprocess", "sandbox"])
def test_it_runs_in_the_sandbox_whatever_is_configured(isolation):
    assert isolation_of(SPEC.model_copy(update={"isolation": isolation})) == "sandbox"


@pytest.mark.parametrize("isolation", [None, "actor", "subprocess"])
def test_without_bubblewrap_it_is_refused_and_never_run_weaker(gym, monkeypatch, isolation):
    monkeypatch.setattr("rollout.sandbox.sandbox_problem", lambda: "no bubblewrap")
    spec = SPEC.model_copy(update={"isolation": isolation})
    with pytest.raises(InputError, match="E308"):
        RewardWorker(Reward(functions=[spec]))


def test_called_outside_of_a_sandbox_it_scores_nothing(gym):
    columns = {"answer": ["8"], "task": ["leg_counting"], "metadata": ["{}"]}
    payload = {"prompts": [""], "completions": ["8"], "completion_ids": [[]], "columns": columns, "state": {}}
    with pytest.raises(CallFailed, match="E308"):
        invoke_now(load_reward(SPEC, "key"), payload)


def test_its_arguments_and_columns_are_checked_at_the_door(gym):
    with pytest.raises(InputError, match=r"E301.*Found lines, expected one of answer, tag, line, text"):
        load_reward(SPEC.model_copy(update={"args": {"extract": "lines"}}), "key")
    with pytest.raises(InputError, match="E301"):
        load_reward(SPEC.model_copy(update={"args": {"extrakt": "line"}}), "key")
    assert missing_column(ReasoningGym(), ["answer", "metadata"]) == "task"
    assert missing_column(ReasoningGym(), ["answer", "metadata", "task"]) is None


def test_the_tasks_of_a_call():
    columns = {"task": ["a", "a", "b", "a"], "task_args": ["{}", "{}", "{}", '{"n": 1}']}
    assert tasks_of(columns) == [["a", "{}"], ["b", "{}"], ["a", '{"n": 1}']]
    assert tasks_of({"task": ["a"]}) == [["a", "{}"]]
    assert tasks_of({}) == []


# --- before a run ---


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    paths = {
        "model.path": str(write_model(tmp_path / "model", "gsm8k", max_position_embeddings=1024)),
        "rollout.max_prompt_tokens": 900,
    }
    functions = [{"function": "reasoning_gym"}]
    return lambda **changes: make_config(**paths | {"reward.functions": functions} | changes)


@has_wall
def test_rows_of_a_file_that_name_a_denied_task_are_e309(gym, config, tmp_path):
    row = {"prompt": "1 2", "answer": "1", "task": "spiral_matrix", "task_args": "{}", "metadata": "{}"}
    rows = write_rows(tmp_path / "r.jsonl", [row, row | {"prompt": "2 1"}])
    with pytest.raises(InputErrors, match=r"E309.*run.toml:data\. Found spiral_matrix"):
        prepare(config(**{"data.train": str(rows)}), "run.toml", tmp_path, probing=False)


@needs_gym
@has_wall
@pytest.mark.process
def test_a_mixture_of_tasks_and_files_is_prepared_and_probed(config, tmp_path):
    rows = rows_of(args={"size": 3, "seed": 9000})
    write_rows(tmp_path / "more.jsonl", rows)
    train = [
        {"path": "reasoning-gym:leg_counting", "args": {"size": 20}, "weight": 1.0},
        {"path": "reasoning-gym:chain_sum", "args": {"size": 10, "min_digits": 3}, "weight": 2.0},
        {"path": str(tmp_path / "more.jsonl"), "weight": 1.0},
    ]
    held_out = {"path": "reasoning-gym:leg_counting", "args": {"size": 5}}
    prepared = prepare(config(**{"data.train": train, "data.eval": held_out}), "run.toml", tmp_path)
    assert [p.source for p in prepared.train.prompts] == ["leg_counting"] * 20 + ["chain_sum"] * 10 + ["more"] * 3
    assert prepared.train.mixture == [(20, 1.0), (10, 2.0), (3, 1.0)]
    assert len(prepared.held_out) == 5


# --- scores ---


@needs_gym
@has_wall
@pytest.mark.process
def test_completions_are_scored_each_in_its_own_task_and_each_call_in_a_fresh_process():
    worker = RewardWorker(Reward(functions=[SPEC]))
    try:
        for name in ("leg_counting", "figlet_font", "arc_agi"):  # Its own module, another's name, tuples in metadata.
            right, other = rows_of(name, args={"size": 2})
            texts = [f"<answer>{right['answer']}</answer>", right["answer"].split("\n")[-1], "zzz"]
            group = (0, make_prompt(0, **right), tuple(make_completion(text) for text in texts))
            second = (1, make_prompt(1, **other), (make_completion(f"<answer>{other['answer']}</answer>"),) * 2)
            first, last = worker.score([group, second], {})
            values = first.parts["reasoning_gym"].tolist()
            assert values[0] == 1
            assert values[1] == 1 or name == "arc_agi"  # A grid has several lines.
            assert values[2] < 0.1
            assert last.parts["reasoning_gym"].tolist() == [1, 1]
            scorer = worker._scorers[0]
            assert scorer._child is None  # It has met text.
            assert scorer._tasks[-1][0] == name
    finally:
        worker.close()
