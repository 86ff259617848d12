"""One call of a reward function: the keywords it gets, as TRL gives them, and the checks on what it returns."""

from __future__ import annotations

import asyncio
import functools
import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch

from rollout.reward_calls import CallFailed, check_values, invoke, invoke_now
from tests.pace import scaled


def payload(*texts, prompts=None, columns=None, state=None, **more) -> dict:
    """A call on ``texts``; columns hold one value per completion."""
    texts = list(texts or ("a", "bb"))
    return {
        "prompts": prompts or ["q"] * len(texts),
        "completions": texts,
        "completion_ids": [list(range(len(text))) for text in texts],
        "columns": columns or {},
        "state": state or {"global_step": 7, "log_history": [{"reward": 0.5}]},
    } | more


def chat(*texts: str) -> list:
    return [[{"role": "assistant", "content": text}] for text in texts]


def values(function, *texts, **call) -> list:
    return invoke_now(function, payload(*texts, **call))["values"]


# --- what a function receives ---


def test_every_keyword_is_a_list_of_n():
    seen = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0] * len(kwargs["completions"])

    assert values(everything, columns={"answer": ["a", "a"], "level": [3, 4]}) == [0, 0]
    assert (seen["prompts"], seen["completions"]) == (["q", "q"], ["a", "bb"])
    assert seen["completion_ids"] == [[0], [0, 1]]
    assert (seen["answer"], seen["level"]) == (["a", "a"], [3, 4])
    assert (seen["trainer_state"].global_step, seen["trainer_state"].log_history[0]["reward"]) == (7, 0.5)
    assert set(seen) >= {"log_extra", "log_metric"}


def test_a_function_without_kwargs_receives_what_it_names():
    def named(completions, level):
        return [len(c) * n for c, n in zip(completions, level, strict=True)]

    assert values(named, columns={"level": [3, 4], "answer": ["x", "y"]}) == [3, 8]
    assert values(lambda completion_ids: [len(ids) for ids in completion_ids]) == [1, 2]


def test_the_trainers_state_is_a_snapshot():
    given = {"global_step": 7, "log_history": []}

    def writes(completions, trainer_state):
        trainer_state.global_step = 99
        trainer_state.log_history.append("x")
        return [0.0] * len(completions)

    values(writes, state=given)
    assert given == {"global_step": 7, "log_history": []}


# Functions as TRL's documentation shows them, in words of our own.


def longer_is_better(completions, **kwargs):
    return [float(len(text)) for text in completions]


def by_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def tagged(completions, **kwargs):
    shape = re.compile(r"^<think>.*?</think><answer>.*?</answer>$", re.DOTALL)
    return [1.0 if shape.match(completion[0]["content"]) else 0.0 for completion in completions]


def accuracy(completions, ground_truth, **kwargs):
    boxed = [re.search(r"\\boxed\{(.*?)\}", completion[0]["content"]) for completion in completions]
    said = [found.group(1) if found else "" for found in boxed]
    return [1.0 if a == truth else 0.0 for a, truth in zip(said, ground_truth, strict=True)]


async def remote(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]


def coding_only(prompts, completions, task, **kwargs):
    return [float("def " in c) if t == "coding" else None for c, t in zip(completions, task, strict=True)]


def math_only(completions, task, **kwargs):
    return [1.0 if t == "math" else None for t in task]


@pytest.mark.parametrize(
    ("function", "texts", "columns", "expected"),
    [
        (longer_is_better, ["a", "bbb"], {}, [1, 3]),
        (by_tokens, ["", "bbb"], {}, [0, 3]),
        (tagged, chat("<think>a</think><answer>b</answer>", "b"), {}, [1, 0]),
        (accuracy, chat("so \\boxed{1}", "so \\boxed{2}", "3"), {"ground_truth": ["1", "1", "3"]}, [1, 0, 0]),
        (remote, ["a", "bb"], {}, [2, 3]),
        (coding_only, ["def f", "x", "y"], {"task": ["coding", "coding", "math"]}, [1, 0, None]),
        (math_only, ["def f", "y"], {"task": ["coding", "math"]}, [None, 1]),
    ],
)
def test_trls_functions_run_unchanged(function, texts, columns, expected):
    assert values(function, *texts, columns=columns) == expected


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, completions, **kwargs):
        return [self.factor * len(c) for c in completions]


class Waiting(Scaled):
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return super().__call__(completions)


@pytest.mark.parametrize(
    "function", [Scaled(2), Waiting(2), functools.partial(Scaled(2)), functools.partial(lambda completions, factor: [factor * len(c) for c in completions], factor=2)]
)  # fmt: skip
def test_instances_and_partials_plain_or_async(function):
    assert values(function) == [2, 4]


async def test_async_functions_run_together():
    both = asyncio.Barrier(2)

    async def waits(completions):
        await asyncio.wait_for(both.wait(), scaled(10))
        return [1.0] * len(completions)

    answers = await asyncio.gather(invoke(waits, payload()), invoke(waits, payload()))
    assert [answer["values"] for answer in answers] == [[1, 1], [1, 1]]


def test_what_a_function_logs_is_kept():
    def logging(completions, log_extra, log_metric):
        log_extra("length", (len(c) for c in completions))
        log_metric("seen", 2)
        log_metric("seen", 4)
        return [1.0] * len(completions)

    answer = invoke_now(logging, payload())
    assert (answer["extra"], answer["metrics"]) == ({"length": [1, 2]}, {"seen": 3.0})


def test_a_logged_column_of_another_length_is_refused():
    def logging(completions, log_extra):
        log_extra("length", [1])
        return [1.0] * len(completions)

    failure = fails(logging)
    assert (failure.code, failure.found) == ("E302", "length: 1 values")


@pytest.mark.parametrize("where", ["prompts", "completions", "completion_ids", "gold"])
def test_a_changed_argument_is_reported_when_watched(where):
    def rude(prompts, completions, completion_ids, gold):
        lists = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids[1], "gold": gold[0]}
        lists[where].append(0)
        return [0.0, 0.0]

    call = payload(columns={"gold": [[], []]}, watch=True)
    assert invoke_now(rude, call)["metrics"] == {"changed_input": 1.0}
    call = payload(columns={"gold": [[], []]}, watch=True)
    assert invoke_now(lambda completions: [0.0, 0.0], call)["metrics"] == {}


# --- checks on a returned value ---


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 2.5, True], [1, 2.5, 1]),
        ((0, 1, 2), [0, 1, 2]),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3]),
        (np.array([True, False, True]), [1, 0, 1]),
        (torch.tensor([1, 2, 3]), [1, 2, 3]),
        (torch.tensor([0.5, 1, 2], dtype=torch.bfloat16, requires_grad=True), [0.5, 1, 2]),
        ([np.float64(1), torch.tensor(2.0), np.int32(3)], [1, 2, 3]),
        ([np.array(1.0), np.bool_(True), torch.tensor(True)], [1, 1, 1]),
        ([3e38, -3e38, 0], [3e38, -3e38, 0]),
        ([None, 1, None], [None, 1, None]),
        (np.array([None, 1.0, 2], dtype=object), [None, 1, 2]),
    ],
)
def test_numbers_of_every_kind_are_accepted(returned, expected):
    checked = check_values(returned, ["a", "b", "c"])
    assert checked == expected
    assert {type(value) for value in checked} <= {float, type(None)}


@pytest.mark.parametrize(
    ("returned", "code", "sample", "found"),
    [
        ([1, 2], "E302", -1, "2 values"),
        ([1], "E302", -1, "1 values"),
        ([1, 2, 3, 4], "E302", -1, "4 values"),
        ([], "E302", -1, "0 values"),
        ({"a": 1}, "E302", -1, "dict"),
        ({1, 2, 3}, "E302", -1, "set"),
        (1.0, "E302", -1, "float"),
        (None, "E302", -1, "NoneType"),
        ("abc", "E302", -1, "str"),
        ((n for n in (1, 2, 3)), "E302", -1, "generator"),
        (np.ones((3, 1)), "E302", -1, "shape (3, 1)"),
        (torch.ones(1, 3), "E302", -1, "shape (1, 3)"),
        (torch.tensor(1.0), "E302", -1, "shape ()"),
        (np.ones(1), "E302", -1, "1 values"),
        ([1, "0.5", 1], "E303", 1, "str '0.5'"),
        (np.array(["1", "2", "3"]), "E303", 0, "str '1'"),
        ([1, 1, [1]], "E303", 2, "list [1]"),
        ([1, 1, {}], "E303", 2, "dict {}"),
        ([1, 1j, 1], "E303", 1, "complex 1j"),
        ([Decimal(1), 1, 1], "E303", 0, "Decimal"),
        ([1, 1, np.ones(2)], "E303", 2, "ndarray"),
        ([1, 1, torch.ones(1)], "E303", 2, "Tensor"),
        ([float("nan"), 1, 1], "E303", 0, "nan for 'a'"),
        ([1, float("-inf"), 1], "E303", 1, "-inf for 'b'"),
        ([1, 1, 1e40], "E303", 2, "1e+40 (overflows float32) for 'c'"),
        ([1, 1, 10**400], "E303", 2, "overflows float32) for 'c'"),
        (np.array([1, np.nan, 1]), "E303", 1, "nan for 'b'"),
        (torch.tensor([1, 1, math.inf]), "E303", 2, "inf for 'c'"),
    ],
)
def test_a_bad_value_names_its_sample(returned, code, sample, found):
    with pytest.raises(CallFailed) as excinfo:
        check_values(returned, ["a", "b", "c"])
    failure = excinfo.value
    assert (failure.code, failure.sample) == (code, sample)
    assert found in failure.found
    assert failure.expected.startswith("3 numbers" if code == "E302" else "a finite number")


def test_a_nan_is_none_only_where_that_is_configured():
    assert check_values([float("nan"), np.float32("nan"), 1], ["", "", ""], nan_is_none=True) == [None, None, 1]
    with pytest.raises(CallFailed, match="E303"):
        check_values([float("inf")], [""], nan_is_none=True)


def test_sixty_characters_of_the_completion_are_quoted_on_one_line():
    with pytest.raises(CallFailed) as excinfo:
        check_values([math.nan], ["line\none " + "x" * 100])
    assert excinfo.value.found == "nan for 'line one " + "x" * 50 + "…'"


# --- a function that raises ---


def fails(function, *texts, **call) -> CallFailed:
    with pytest.raises(CallFailed) as excinfo:
        invoke_now(function, payload(*texts, **call))
    return excinfo.value


def test_an_exception_is_e304_with_its_traceback_apart():
    def raises(completions, log_extra):
        log_extra("lost", [0, 0])
        raise ValueError("bad\nfraction " + "x" * 999)

    failure = fails(raises)
    assert (failure.code, failure.what) == ("E304", "reward raised")
    assert failure.found.startswith("ValueError: bad fraction xxx")
    assert len(failure.found) < 220
    assert "\n" not in failure.found
    assert "in raises" in failure.trace


@pytest.mark.parametrize(
    ("function", "code", "found"),
    [
        (lambda completions: completions[5], "E304", "IndexError"),
        (lambda completions, gold: gold, "E304", "TypeError"),
        (lambda completions, **columns: columns["solution"], "E304", "KeyError: 'solution'"),
        (lambda completions: [0] * 10**14, "E306", "memory"),
    ],
)
def test_whatever_a_function_raises_becomes_one_typed_error(function, code, found):
    failure = fails(function)
    assert failure.code == code
    assert found in failure.found


def test_an_async_function_that_raises_is_e304():
    async def raises(completions):
        raise RuntimeError("later")

    assert fails(raises).found == "RuntimeError: later"
