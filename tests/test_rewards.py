"""Reward functions: built-in values worked by hand, loading, TRL compatibility, checks, combination, the pool."""

from __future__ import annotations

import asyncio
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.reward_pool import RewardPool, RewardWorker, Scores, check_rewards
from rollout.rewards import BUILTINS, extract_number, load_reward, missing_column, reward_name, text_of
from shared.config import RewardFunction
from shared.errors import GroupFailed, InputError
from shared.types import Completion, Prompt
from tests.fakes import REWARD_CODE, RayActorError, RayTaskError, fake_ray, make_completion, make_config

DATA = Path(__file__).resolve().parent.parent / "launch" / "data" / "gsm8k" / "sample.jsonl"
TARGET = ["x" * 14, "x" * 20, "x" * 27]


def spec(function: str, **fields) -> RewardFunction:
    return RewardFunction(function=function, **fields)


def builtin(name: str, completions: list, args: dict | None = None, **columns) -> list:
    ids = columns.pop("ids", [[0] * len(text_of(c)) for c in completions])
    function = load_reward(spec(name, args=args or {}), "key")
    return function(prompts=[""] * len(completions), completions=completions, completion_ids=ids, **columns)


# --- built-ins ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length_negative_abs", [-6, 0, -7]),
        ("length_reciprocal", [0.142857, 1, 0.125]),
        ("length_exponential", [0.548812, 1, 0.496585]),
    ],
)
def test_length_rewards_at_14_20_and_27_of_20(name, expected):
    assert builtin(name, TARGET, {"target": 20}) == pytest.approx(expected, abs=1e-6)
    conversation = [[{"role": "assistant", "content": text}] for text in TARGET]
    assert builtin(name, conversation, {"target": 20}) == pytest.approx(expected, abs=1e-6)
    tokens = {"target": 20, "unit": "tokens"}
    lengths = [[0] * 14, [0] * 20, [0] * 27]
    assert builtin(name, ["", "", ""], tokens, ids=lengths) == pytest.approx(expected, abs=1e-6)


def test_soft_overlong_at_150_180_200_and_201():
    lengths = [[0] * n for n in (150, 180, 200, 201)]
    values = builtin("soft_overlong", [""] * 4, {"limit": 200, "buffer": 50}, ids=lengths)
    assert values == pytest.approx([0, -0.6, -1, -1])
    doubled = builtin("soft_overlong", [""] * 4, {"limit": 200, "buffer": 50, "factor": 2.0}, ids=lengths)
    assert doubled == pytest.approx([0, -1.2, -2, -2])
    assert builtin("soft_overlong", [""] * 4, {"limit": 200, "buffer": 0}, ids=lengths) == [0, 0, 0, -1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("  <think>a\nb</think> \n <answer>c\nd</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
        ("<think>a</think>x<answer>b</answer>", 0),
        ("<think><think>a</think></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("", 0),
    ],
)
def test_think_answer_format(text, value):
    assert builtin("think_answer_format", [text]) == [value]


@pytest.mark.parametrize(
    ("args", "text", "gold", "value"),
    [
        ({}, " 42\n", "42", 1),
        ({}, "42", 42, 1),
        ({}, "yes", "Yes", 0),
        ({"ignore_case": True}, "yes", "Yes", 1),
        ({"strip": False}, " 42", "42", 0),
        ({}, "420", "42", 0),
    ],
)
def test_exact_match(args, text, gold, value):
    assert builtin("exact_match", [text], args, answer=[gold]) == [value]


def test_the_gold_column_can_be_chosen():
    assert builtin("exact_match", ["a", "b"], {"column": "gold"}, gold=["a", "a"]) == [1, 0]
    assert builtin("final_number", ["it is 3"], {"column": "gold"}, gold=["#### 3"]) == [1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42", 42),
        ("10\n#### 1,234", 1234),
        ("#### 5 apples of 7", 5),
        ("#### 1\n#### 2", 2),
        ("costs $1,000.50.", 1000.5),
        ("minus -3", -3),
        ("a half is .5", 0.5),
        ("#### none", None),
        ("no digits", None),
        ("", None),
    ],
)
def test_the_number_that_is_extracted(text, number):
    assert extract_number(text) == number


def test_final_number_does_not_apply_without_a_gold_number_and_is_0_without_an_answer():
    assert builtin("final_number", ["3", "none", "3.0"], answer=["x", "#### 3", "#### 3"]) == [None, 0, 1]


def test_regex_searches_anywhere():
    assert builtin("regex", ["ab1", "abc"], {"pattern": r"\d"}) == [1, 0]


def test_the_last_assistant_message_is_the_completion():
    said = [("assistant", "a"), ("assistant", "b"), ("tool", "c")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert (text_of(messages), text_of([]), text_of("d")) == ("b", "", "d")


def test_gsm8k_answers_score_1_on_themselves_and_0_with_another_number():
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 100
    gold = [row["answer"] for row in rows]
    assert builtin("gsm8k_answer", gold, answer=gold) == [1] * 100
    numbers = [text.rsplit("####", 1)[1].strip() for text in gold]
    wrong = [str(int(number.replace(",", "")) + 1) for number in numbers]
    changed = [f"{text.rsplit('####', 1)[0]}#### {number}" for text, number in zip(gold, wrong, strict=True)]
    assert builtin("gsm8k_answer", changed, answer=gold) == [0] * 100
    # The number may also just come last, or inside the recipe's tags.
    assert builtin("gsm8k_answer", [f"So it is {n}." for n in numbers], answer=gold) == [1] * 100
    tagged = [f"<think>9</think><answer>{n}</answer>" for n in numbers]
    assert builtin("gsm8k_answer", tagged, answer=gold) == [1] * 100


# --- loading ---


@pytest.fixture
def code(tmp_path, monkeypatch) -> str:
    """A user's file of reward functions, also importable as module ``my_rewards``."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARD_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield str(path)
    for name in ("my_rewards", "millrace_reward_my_rewards"):
        sys.modules.pop(name, None)


def completions(*texts: str) -> tuple[Completion, ...]:
    return tuple(make_completion(text, len(text)) for text in texts)


def prompt(text="q", **columns) -> Prompt:
    return Prompt(0, np.zeros(1, np.int32), text, columns)


def score(*specs: RewardFunction, texts=("a", "bb"), on=None, state=None) -> Scores:
    return RewardWorker(list(specs)).score(on or prompt(answer="a"), completions(*texts), state or {})


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        ("{file}:plain", {}, [1, 2]),
        ("my_rewards:plain", {}, [1, 2]),
        ("{file}:scaled", {"factor": 2.0}, [2, 4]),
        ("{file}:Brevity", {"target": 2}, [-1, 0]),
        ("{file}:instance", {}, [0, -1]),
        ("{file}:bound", {}, [3, 6]),
        ("exact_match", {}, [1, 0]),
    ],
)
def test_functions_classes_instances_and_partials_load(code, function, args, expected):
    scores = score(spec(function.format(file=code), args=args, name="r"))
    assert scores.parts["r"].tolist() == expected
    assert scores.parts["r"].dtype == np.float32


@pytest.mark.parametrize(
    ("function", "args", "place", "said"),
    [
        ("exact_mach", {}, "key.function", "exact_match"),
        ("plain", {}, "key.function", "expected one of"),
        ("no_such_module:f", {}, "key.function", "no_such_module"),
        ("no_such_file.py:f", {}, "key.function", "no_such_file.py"),
        ("{file}:plane", {}, "key.function", ":plain"),
        ("{file}:LIMIT", {}, "key", "LIMIT"),
        ("{file}:Brevity", {}, "key.args", "target"),
        ("{file}:Brevity", {"goal": 1}, "key.args", "goal"),
        ("{file}:Brevity", {"target": -1}, "key.args", "target must be >= 0"),
        ("{file}:plain", {"goal": 1}, "key.args", "goal"),
    ],
)
def test_what_cannot_be_loaded_is_e301(code, function, args, place, said):
    with pytest.raises(InputError) as excinfo:
        load_reward(spec(function.format(file=code), args=args), "key")
    assert excinfo.value.code == "E301"
    assert place in excinfo.value.place
    assert said in str(excinfo.value)


def test_a_file_that_raises_on_import_is_e301(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    with pytest.raises(InputError, match=r"ModuleNotFoundError.*no_such_thing") as excinfo:
        load_reward(spec(f"{tmp_path / 'broken.py'}:f"), "key")
    assert excinfo.value.code == "E301"


def test_the_metric_name_is_given_or_the_functions_own():
    names = [spec("a.b:f"), spec("x/y.py:Style"), spec("regex"), spec("a.b:f", name="g")]
    assert [reward_name(s) for s in names] == ["f", "Style", "regex", "g"]


def test_a_parameter_without_a_column_is_found(code):
    def missing(name, columns, **args):
        return missing_column(load_reward(spec(f"{code}:{name}", args=args), "key"), columns)

    assert missing("columns", []) == "answer"
    assert missing("columns", ["answer"]) is None
    assert missing("plain", []) is None
    assert missing("scaled", []) == "factor"
    assert missing("scaled", [], factor=1.0) is None
    assert missing("Brevity", [], target=1) is None
    needed = {missing_column(function, ["answer"]) for function in BUILTINS.values()}
    assert needed == {None, "pattern", "target", "limit"}


# --- a TRL function runs unchanged ---


def test_a_function_receives_every_keyword_as_a_list_of_n(code):
    worker = RewardWorker([spec(f"{code}:everything")])
    worker.score(prompt("q", answer="a", level=3), completions("a", "bb"), {"global_step": 7})
    seen = sys.modules["millrace_reward_my_rewards"].SEEN
    assert seen["prompts"] == ["q", "q"]
    assert seen["completions"] == ["a", "bb"]
    assert seen["completion_ids"] == [[0], [0, 1]]
    assert (seen["answer"], seen["level"]) == (["a", "a"], [3, 3])
    assert seen["trainer_state"] == {"global_step": 7}
    assert callable(seen["log_extra"])
    assert callable(seen["log_metric"])


def test_conversations_are_passed_as_message_lists(code):
    messages = [{"role": "user", "content": "q"}]
    assert score(spec(f"{code}:conversational"), on=prompt(messages)).parts["conversational"].tolist() == [1, 2]
    score(spec(f"{code}:everything"), on=prompt(messages))
    given = sys.modules["millrace_reward_my_rewards"].SEEN
    assert given["prompts"] == [messages, messages]
    assert given["completions"][1] == [{"role": "assistant", "content": "bb"}]


def test_columns_are_repeated_for_each_completion(code):
    assert score(spec(f"{code}:columns")).parts["columns"].tolist() == [1, 0]


def test_async_functions_and_none(code):
    scores = score(spec(f"{code}:patient"), spec(f"{code}:sometimes"))
    assert scores.parts["patient"].tolist() == [2, 2]
    assert np.isnan(scores.parts["sometimes"]).tolist() == [True, False]


def test_what_a_function_logs_is_kept(code):
    scores = score(spec(f"{code}:logging"))
    assert scores.extra == {"length": [1, 2]}
    assert scores.metrics == {"seen": 3.0}
    assert set(scores.seconds) == {"logging"}


def test_arguments_are_copies(code):
    original = prompt("q", gold=[])
    scores = score(spec(f"{code}:rude"), spec(f"{code}:wants_gold"), on=original)
    assert original.columns == {"gold": []}
    assert scores.parts["wants_gold"].tolist() == [0, 0]


def test_a_raising_function_is_e304_and_what_it_logged_is_lost(code):
    with pytest.raises(InputError) as excinfo:
        score(spec(f"{code}:logs_then_raises", name="fractions"))
    assert (excinfo.value.code, excinfo.value.place) == ("E304", "fractions")
    assert excinfo.value.found == "ValueError: bad fraction"


async def test_the_evaluate_verb_scores_with_async_functions(code, monkeypatch):
    from launch import evaluate

    class Engine:
        def __init__(self, *_, **__): ...
        async def generate(self, *_):
            return completions("a")

        async def close(self): ...

    monkeypatch.setattr("rollout.engine.Engine", Engine)
    config = make_config(**{"reward.functions": [{"function": f"{code}:patient"}]})
    assert await evaluate.score(config, [prompt(), prompt()]) == {"patient": 2.0}


# --- checks on a returned value ---


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 2.5, True], [1, 2.5, 1]),
        ((0, 1, 2), [0, 1, 2]),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
        (torch.tensor([1, 2, 3]), [1, 2, 3]),
        ([np.float64(1), torch.tensor(2.0), np.int32(3)], [1, 2, 3]),
        ([3e38, -3e38, 0], [np.float32(3e38), np.float32(-3e38), 0]),
    ],
)
def test_numbers_of_every_kind_are_accepted(returned, expected):
    assert check_rewards(returned, completions("a", "b", "c"), "f").tolist() == expected


def test_none_becomes_nan():
    assert np.isnan(check_rewards([None, 1, None], completions("a", "b", "c"), "f")).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("returned", "code", "place", "found"),
    [
        ([1, 2], "E302", "f", "2 values"),
        ([1], "E302", "f", "1 values"),
        ([], "E302", "f", "0 values"),
        ({"a": 1}, "E302", "f", "dict"),
        (1.0, "E302", "f", "float"),
        (None, "E302", "f", "NoneType"),
        ("abc", "E302", "f", "str"),
        (np.ones((3, 1)), "E302", "f", "shape (3, 1)"),
        (torch.tensor(1.0), "E302", "f", "shape ()"),
        ([1, "0.5", 1], "E303", "f, sample 1", "str '0.5'"),
        ([1, 1, [1]], "E303", "f, sample 2", "list [1]"),
        ([1, 1, np.ones(2)], "E303", "f, sample 2", "ndarray"),
        ([float("nan"), 1, 1], "E303", "f, sample 0", "nan for 'a'"),
        ([1, float("-inf"), 1], "E303", "f, sample 1", "-inf for 'b'"),
        ([1, 1, 1e40], "E303", "f, sample 2", "1e+40 for 'c'"),
        ([1, 1, 10**400], "E303", "f, sample 2", "for 'c'"),
        (np.array([1, np.nan, 1]), "E303", "f, sample 1", "nan for 'b'"),
    ],
)
def test_a_bad_value_names_function_and_sample(returned, code, place, found):
    with pytest.raises(InputError) as excinfo:
        check_rewards(returned, completions("a", "b", "c"), "f")
    assert (excinfo.value.code, excinfo.value.place) == (code, place)
    assert found in excinfo.value.found


def test_a_worker_names_the_function_that_returned_too_few(code):
    with pytest.raises(InputError) as excinfo:
        score(spec(f"{code}:plain"), spec(f"{code}:short"))
    assert (excinfo.value.code, excinfo.value.place, excinfo.value.found) == ("E302", "short", "1 values")


# --- combination ---


def test_the_combined_reward_is_the_weighted_sum_of_what_applied():
    nan = np.nan
    parts = {"f": np.array([1, 2, nan, nan], np.float32), "g": np.array([10, nan, 30, nan], np.float32)}
    functions = [spec("m:f", weight=2.0), spec("m:g", weight=-0.5)]
    combined = Scores(parts).combined(functions)
    assert combined.dtype == np.float32
    assert combined[:3].tolist() == [-3, 4, -15]
    assert np.isnan(combined[3])


# --- the pool ---


class Actor:
    """An actor whose calls follow ``script``: an exception to raise, ``"hang"``, or a result."""

    def __init__(self, script: list):
        self.killed = False
        self.score = types.SimpleNamespace(remote=lambda *_: self._call(script))
        self.ready = types.SimpleNamespace(remote=lambda: asyncio.sleep(0, True))

    async def _call(self, script: list):
        step = script.pop(0) if script else "ok"
        if step == "hang":
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            raise step
        return step


def pool(monkeypatch, script: list, workers: int = 1, retries: int = 2):
    """A pool of scripted actors, and every actor it ever had."""
    actors = []
    fake_ray(monkeypatch, spawn=lambda *_: actors.append(Actor(script)) or actors[-1])
    config = make_config(**{"reward.workers": workers, "reward.retries": retries, "reward.timeout_s": 0.02})
    return RewardPool(config, {}), actors


BAD = RayTaskError(InputError("E304", "reward raised", "f", "ValueError", "a number", "correct it"))


@pytest.mark.parametrize(
    ("script", "counters", "killed"),
    [
        (["ok"], {}, 0),
        ([BAD, "ok"], {"retries": 1}, 0),
        (["hang", "ok"], {"retries": 1, "timeouts": 1, "worker_restarts": 1}, 1),
        ([RayActorError("gone"), BAD, "ok"], {"retries": 2, "worker_restarts": 1}, 1),
    ],
)
async def test_a_failed_call_is_repeated_on_a_live_worker(monkeypatch, script, counters, killed):
    rewards, actors = pool(monkeypatch, script)
    await rewards.start()
    assert await rewards.score(1, prompt(), completions("a")) == "ok"
    assert dict(+rewards.counters) == counters
    assert [actor.killed for actor in actors] == [True] * killed + [False]


@pytest.mark.parametrize(
    ("failure", "cause"), [("hang", "timeout"), (BAD, "E304"), (RayActorError("gone"), "worker_died")]
)
async def test_after_the_last_try_the_group_fails_with_its_cause(monkeypatch, failure, cause):
    rewards, actors = pool(monkeypatch, [failure] * 3, workers=2)
    with pytest.raises(GroupFailed) as excinfo:
        await rewards.score(7, prompt(), completions("a"))
    assert (excinfo.value.group_id, excinfo.value.cause) == (7, cause)
    assert [actor.killed for actor in actors].count(False) == 2  # Capacity is constant.
    assert await rewards.score(8, prompt(), completions("a")) == "ok"


async def test_a_bug_of_ours_is_no_group_failure(monkeypatch):
    rewards, _ = pool(monkeypatch, [RayTaskError(AttributeError("ours"))])
    with pytest.raises(RayTaskError):
        await rewards.score(1, prompt(), completions("a"))
