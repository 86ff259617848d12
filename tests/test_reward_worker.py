"""A worker: groups in, scores out, each function in its isolation, and every failure with its place."""

from __future__ import annotations

import contextlib
import sys
from datetime import timedelta
from decimal import Decimal

import numpy as np
import pytest

from launch.preflight import check_rewards
from rollout import reward_worker, sandbox
from rollout.logged import Logged
from rollout.reward_worker import RewardWorker
from rollout.scores import Scores, penalise_truncated
from shared.config_reward import Reward, RewardFunction
from shared.errors import InputError, InputErrors, RewardFailed
from shared.types import Completion, Prompt
from tests.fakes import REWARD_CODE, make_completion, make_config

pytestmark = pytest.mark.process
has_wall = pytest.mark.skipif(bool(sandbox.sandbox_problem()), reason=f"no sandbox here: {sandbox.sandbox_problem()}")
CODE = (
    REWARD_CODE
    + """
import builtins, os, time
async def sleeps(completions):
    await asyncio.sleep(0.2)
    return [1.0] * len(completions)
async def from_until(completions):
    begun = time.monotonic() % 1000  # Small enough for the digits of a float32.
    await asyncio.sleep(0.3)
    return [begun, time.monotonic() % 1000]
also_from_until = functools.partial(from_until)
def by_text(completions, **kwargs):
    for text in completions:
        if text == "hang": time.sleep(99)
        if text == "hang in c": 9 ** 9 ** 9
        if text == "crash": os.kill(os.getpid(), 11)
        if text == "leave": os._exit(3)
        if text == "flood": print("x" * (1 << 20))
        if text == "memory": bytearray(1 << 30)
        if text == "raise": raise ValueError("bad fraction")
    return [float("nan") if text == "nan" else float(len(text)) for text in completions]
def poisons(completions):
    before, builtins.poison = getattr(builtins, "poison", 0.0), 1.0
    return [before] * len(completions)
def runs(completions):
    for text in completions: exec(text, {})
    return [0.0] * len(completions)
def logs_own_names(completions, log_extra, log_metric):
    log_metric("step", 7)
    log_extra("a\\x1bb", completions)
    return [1.0] * len(completions)
def odd_extra(completions, log_extra):
    log_extra("what", [object()] * len(completions))
    return [0.0] * len(completions)
def odd_columns(completions, gold, log_extra):
    log_extra("gold", [str(g) for g in gold])
    return [0.0] * len(completions)
def state(completions, trainer_state):
    return [float(trainer_state.global_step)] * len(completions)
"""
)


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("code") / "worker_rewards.py"
    path.write_text(CODE)
    yield str(path)
    sys.modules.pop("millrace_reward_worker_rewards", None)


@pytest.fixture
def make(code):
    """``make(*names, **fields)``: a worker with these functions of the file, in the actor unless told otherwise."""
    workers = []

    def worker(*names: str | RewardFunction, timeout_s: float = 5.0, **fields) -> RewardWorker:
        fields = {"isolation": "actor"} | fields
        functions = [
            RewardFunction(function=f"{code}:{name}", **fields) if isinstance(name, str) else name for name in names
        ]
        workers.append(RewardWorker(Reward(functions=functions, timeout_s=timeout_s)))
        return workers[-1]

    yield worker
    for one in workers:
        one.close()


def completions(*texts: str) -> tuple[Completion, ...]:
    return tuple(make_completion(text, len(text)) for text in texts)


def prompt(text="q", **columns) -> Prompt:
    return Prompt(0, np.zeros(1, np.int32), text, columns)


def score(worker: RewardWorker, *texts: str, on=None, state=None) -> Scores:
    (scores,) = worker.score([(12, on or prompt(answer="a"), completions(*(texts or ("a", "bb"))))], state or {})
    return scores


def fails(worker: RewardWorker, *texts: str) -> RewardFailed:
    with pytest.raises(RewardFailed) as excinfo:
        score(worker, *texts)
    return excinfo.value


# --- groups in, scores out ---


@pytest.mark.parametrize("isolation", ["actor", "subprocess", pytest.param("sandbox", marks=has_wall)])
def test_values_extras_metrics_and_times_are_the_same_at_every_level(make, isolation):
    scores = score(make("logging", "sometimes", "columns", isolation=isolation))
    assert scores.parts["logging"].dtype == np.float32
    assert scores.parts["columns"].tolist() == [1, 0]
    assert np.isnan(scores.parts["sometimes"]).tolist() == [True, False]
    assert (scores.extra, scores.metrics) == ({"length": [1, 2]}, {"seen": 3.0})
    assert set(scores.seconds) == {"logging", "sometimes", "columns"}
    assert all(0 < seconds < 5 for seconds in scores.seconds.values())
    assert scores.warnings == []


# --- what functions log ---


def logged(*calls: dict[str, float]) -> tuple[list[dict[str, float]], list[str]]:
    """What is recorded of the calls of a function r, and all that is told."""
    kept, names = zip(*map(Logged("r").metrics, calls), strict=True)
    return list(kept), [line for told in names for line in told]


def test_a_metric_of_the_runs_own_name_gets_another_and_that_is_said_once():
    kept, told = logged({"step": 7.0, "reward": 999.0, "kl": 1.0}, {"rewards/r/mean": 2.0, "mine": 3.0})
    assert kept == [
        {"logged/step": 7.0, "logged/reward": 999.0, "logged/kl": 1.0},
        {"logged/rewards/r/mean": 2.0, "mine": 3.0},
    ]
    assert told == [
        "warning[W311] r: the logged metric logged/step is recorded so: the run writes metrics of its own name itself"
    ]


def test_names_are_readable_and_bounded_and_values_are_numbers():
    kept, told = logged({"a\x1b[2J\nb": 1.0, "x" * 100_000: 2.0, "nan": float("nan"), "much": float("inf")})
    assert kept == [{r"a\x1b[2J b": 1.0, "x" * 99 + "…": 2.0}]
    assert [line.split()[5] for line in told] == [r"a\x1b[2J", "nan"]


def test_a_function_may_log_a_hundred_names():
    kept, told = logged(*({f"n{i}": 1.0} for i in range(150)), {"n0": 2.0})
    assert [*kept[:100], kept[-1]] == [*({f"n{i}": 1.0} for i in range(100)), {"n0": 2.0}]
    assert kept[100:-1] == [{}] * 50
    assert len(told) == 1


def test_what_a_function_logs_is_cleaned_before_it_is_recorded(make):
    scores = score(make("logs_own_names", isolation="actor"))
    assert scores.metrics == {"logged/step": 7.0}
    assert [*scores.extra] == [r"a\x1bb"]
    assert scores.warnings[0].startswith("warning[W311] logs_own_names: the logged metric logged/step is")


@pytest.mark.parametrize("isolation", ["actor", "subprocess"])
def test_every_group_gets_its_own_values(make, isolation):
    groups = [(i, prompt(answer="a" * i), completions(*("a" * j for j in range(n)))) for i, n in ((1, 2), (2, 3))]
    first, second = make("columns", "logging", isolation=isolation).score(groups, {})
    assert (first.parts["columns"].tolist(), second.parts["columns"].tolist()) == ([0, 1], [0, 0, 1])
    assert (first.extra, second.extra) == ({"length": [0, 1]}, {"length": [0, 1, 2]})


def test_a_column_that_another_group_lacks_is_none_there(make):
    seen = make("everything")
    seen.score([(0, prompt(x=1), completions("a")), (1, prompt(y=2), completions("b"))], {})
    given = sys.modules["millrace_reward_worker_rewards"].SEEN
    assert (given["x"], given["y"]) == ([1, None], [None, 2])


def test_conversations_are_passed_as_message_lists(make):
    messages = [{"role": "user", "content": "q"}]
    worker = make("conversational", "everything")
    assert score(worker, on=prompt(messages)).parts["conversational"].tolist() == [1, 2]
    given = sys.modules["millrace_reward_worker_rewards"].SEEN
    assert given["prompts"] == [messages, messages]
    assert given["completions"][1] == [{"role": "assistant", "content": "bb"}]
    assert given["completion_ids"] == [[0], [0, 1]]


def test_stored_messages_are_passed_whole(make):
    said = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    completion = Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "b", "stop", messages=said)
    make("everything").score([(0, prompt([{"role": "user", "content": "q"}]), (completion,))], {})
    assert sys.modules["millrace_reward_worker_rewards"].SEEN["completions"] == [said]


@pytest.mark.parametrize("isolation", ["actor", "subprocess"])
def test_arguments_are_copies(make, isolation):
    original = prompt("q", gold=[])
    scores = score(make("rude", "wants_gold", isolation=isolation), on=original)
    assert original.columns == {"gold": []}
    assert scores.parts["wants_gold"].tolist() == [0, 0]


@pytest.mark.parametrize("isolation", ["actor", "subprocess"])
def test_the_trainers_state_arrives(make, isolation):
    assert score(make("state", isolation=isolation), state={"global_step": 7}).parts["state"].tolist() == [7, 7]


@pytest.mark.parametrize("isolation", ["actor", "subprocess"])
def test_async_functions_run_together(make, isolation):
    parts = score(make("from_until", "also_from_until", isolation=isolation)).parts
    (begun, ended), (also_begun, also_ended) = (parts[name].tolist() for name in ("from_until", "also_from_until"))
    assert max(begun, also_begun) < min(ended, also_ended)


@pytest.mark.parametrize(
    "value",
    [np.arange(3), np.float32(1.5), {1, 2}, (1, 2), b"\xff", "\ud800", float("inf"), Decimal("1.5"), timedelta(1)],
)
def test_columns_of_every_kind_reach_a_child(make, value):
    assert score(make("odd_columns", isolation="subprocess"), on=prompt(gold=value)).extra["gold"][0]


@pytest.mark.parametrize("value", [object(), {(1, 2): 3}])
def test_a_column_without_a_json_form_is_a_failure_of_its_group(make, value):
    worker = make("odd_columns", isolation="subprocess")
    with pytest.raises(RewardFailed) as excinfo:
        score(worker, on=prompt(gold=value))
    assert (excinfo.value.code, excinfo.value.what) == ("E304", "reward not called")
    assert score(worker, on=prompt(gold="1")).extra["gold"][0] == "1"


def test_the_combined_reward_is_the_weighted_sum_of_what_applied():
    nan = np.nan
    parts = {"f": np.array([1, 2, nan, nan], np.float32), "g": np.array([10, nan, 30, nan], np.float32)}
    functions = [RewardFunction(function="m:f", weight=2.0), RewardFunction(function="m:g", weight=-0.5)]
    combined = Scores(parts).combined(functions)
    assert combined.dtype == np.float32
    assert combined[:3].tolist() == [-3, 4, -15]
    assert np.isnan(combined[3])


def test_truncated_completions_are_penalised():
    ends = ("stop", "length", "length")
    cut = [Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), "", end) for end in ends]
    rewards = np.array([2, 4, np.nan], np.float32)
    assert penalise_truncated(rewards, cut, 0.5)[:2].tolist() == [2, 2]
    assert penalise_truncated(rewards, cut, -1.0)[:2].tolist() == [2, -1]
    assert all(np.isnan(penalise_truncated(rewards, cut, penalty)[2]) for penalty in (0.5, 0.0, -1.0))


# --- failures and their places ---


@pytest.mark.parametrize("isolation", ["actor", "subprocess"])
def test_a_bad_value_names_function_sample_and_group(make, isolation):
    failure = fails(make("plain", "by_text", isolation=isolation), "a", "nan", "ccc")
    assert (failure.code, failure.place) == ("E303", "worker_rewards.py:by_text, sample 1 of group 12")
    assert failure.found == "nan for 'nan'"
    assert (failure.sample, failure.text) == (1, "nan")
    assert str(failure).startswith(
        "error[E303] bad reward value — worker_rewards.py:by_text, sample 1 of group 12. Found nan for 'nan'"
    )


def test_in_a_call_of_several_groups_the_sample_counts_within_its_own(make):
    groups = [(4, prompt(), completions("a", "b")), (9, prompt(), completions("c", "d", "nan"))]
    with pytest.raises(RewardFailed) as excinfo:
        make("by_text").score(groups, {})
    assert excinfo.value.place == "worker_rewards.py:by_text, sample 2 of group 9"


@pytest.mark.parametrize("isolation", ["actor", "subprocess"])
def test_a_raising_function_is_e304_with_its_traceback_and_what_it_logged_is_lost(make, isolation):
    failure = fails(make("logging", "logs_then_raises", isolation=isolation))
    assert (failure.code, failure.place) == ("E304", "worker_rewards.py:logs_then_raises, group 12")
    assert failure.found == "ValueError: bad fraction"
    assert "in logs_then_raises" in failure.trace
    assert "Traceback" not in str(failure)


def test_too_few_values_are_not_broadcast(make):
    failure = fails(make("plain", "short"))
    assert (failure.code, failure.place, failure.found) == ("E302", "worker_rewards.py:short, group 12", "1 values")


def test_what_cannot_be_sent_back_is_e304(make):
    failure = fails(make("odd_extra", isolation="subprocess"))
    assert failure.code == "E304"
    assert "object" in failure.found


@pytest.mark.parametrize(
    ("text", "number", "found"),
    [
        ("hang", "E305", "> 0.25 s"),
        ("hang in c", "E305", "> 0.25 s"),
        ("crash", "E304", "worker ended by signal 11"),
        ("leave", "E304", "worker ended with exit code 3"),
        ("memory", "E306", "> 512 MB"),
    ],
)
@pytest.mark.parametrize("isolation", ["subprocess", pytest.param("sandbox", marks=has_wall)])
def test_after_a_failure_the_next_call_works(make, isolation, text, number, found):
    worker = make("by_text", isolation=isolation, timeout_s=0.25, memory_mb=512)
    for _ in range(2 if isolation == "subprocess" else 1):
        failure = fails(worker, "a", text)
        assert (failure.code, failure.found) == (number, found)
        assert score(worker, "a", "bb").parts["by_text"].tolist() == [1, 2]


def test_an_async_function_in_the_actor_has_the_same_deadline(make):
    failure = fails(make("sleeps", timeout_s=0.1))
    assert (failure.code, failure.found, failure.expected) == ("E305", "> 0.1 s", "<= timeout_s = 0.1")


def test_a_function_has_its_own_deadline(code):
    spec = RewardFunction(function=f"{code}:sleeps", timeout_s=0.1, isolation="subprocess")
    worker = RewardWorker(Reward(functions=[spec], timeout_s=60.0))
    assert fails(worker).expected == "<= timeout_s = 0.1"
    worker.close()


def test_cut_output_is_a_warning_and_the_values_are_kept(make):
    scores = score(make("by_text", "plain", isolation="subprocess"), "flood", "a")
    assert scores.parts["by_text"].tolist() == [5, 1]
    assert scores.warnings == ["warning[W306] by_text: stdout cut at 64 KB"]


@has_wall
def test_one_sandboxed_call_cannot_poison_the_next(make):
    boxed, bare = make("poisons", isolation="sandbox"), make("poisons", isolation="subprocess")
    assert [score(bare).parts["poisons"][0] for _ in range(3)] == [0, 1, 1]
    assert [score(boxed).parts["poisons"][0] for _ in range(3)] == [0, 0, 0]


def forging(answer: bytes) -> str:
    """A program that answers in its harness's place."""
    frame = len(answer).to_bytes(4, "big") + answer
    return f"import os\nfor fd in range(3, 250):\n    try: os.write(fd, {frame!r})\n    except OSError: pass"


@pytest.mark.parametrize("forged", ["[1e40]", "[1, 2, 3]", '["7"]', "[NaN]", "7", None])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_forged_answer_is_a_failed_call_and_no_reward(make, forged, wrapped):
    answer = f'{{"values": {forged}, "extra": {{}}, "metrics": {{}}}}' if wrapped else str(forged)
    with pytest.raises(RewardFailed):
        score(make("runs", isolation="subprocess"), forging(answer.encode()))


def test_after_a_forged_answer_the_next_call_gets_its_own(make):
    worker = make("runs", isolation="subprocess")
    for forged in (b'{"values": [5], "extra": {}, "metrics": {}}', b'{"values": [6], "extra": {}, "metrics": {}}'):
        with contextlib.suppress(RewardFailed):
            score(worker, forging(forged))
    assert score(worker, "", "").parts["runs"].tolist() == [0, 0]


def test_its_children_are_gone_after_close(make):
    worker = make("plain", "by_text", isolation="subprocess", timeout_s=0.3)
    fails(worker, "hang")  # Starts a replacement, and a spare one.
    score(worker)
    children = [child for s in worker._scorers for child in (s._child, s._spare and s._spare.result()) if child]
    assert len(children) >= 2
    worker.close()
    assert not any(child.alive for child in children)


# --- starting ---


def test_a_function_that_cannot_be_imported_is_e301(make):
    for isolation in ("actor", "subprocess"):
        with pytest.raises(InputError, match=r"E301.*reward\.functions\[0\]\.function"):
            make("nothing", isolation=isolation)


@pytest.fixture
def no_bubblewrap(monkeypatch, tmp_path):
    """A machine without it, where starting any child is noted."""
    started = []
    sandbox.sandbox_problem.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(reward_worker, "Child", lambda *arguments: started.append(arguments))
    yield started
    sandbox.sandbox_problem.cache_clear()


@pytest.mark.parametrize(
    "fields", [{"function": "{file}:plain", "isolation": "sandbox"}, {"function": "code_tests"}, {"function": "exact_match", "isolation": "sandbox"}]
)  # fmt: skip
def test_without_bubblewrap_a_sandboxed_function_is_refused_and_never_run_weaker(no_bubblewrap, code, fields):
    spec = RewardFunction(**fields | {"function": fields["function"].format(file=code)})
    with pytest.raises(InputError, match=r"E308.*reward\.functions\[0\]\.isolation"):
        RewardWorker(Reward(functions=[spec]))
    with pytest.raises(InputErrors, match=r"E308.*run\.toml:reward\.functions\[0\]\.isolation"):
        check_rewards(make_config(**{"reward.functions": [spec.model_dump()]}), "run.toml", ["answer", "tests"])
    assert no_bubblewrap == []


def test_options_that_a_service_or_model_does_not_take_are_e301():
    spec = RewardFunction(url="https://host/score", args={"retry": 3})
    with pytest.raises(InputError, match=r"E301.*reward\.functions\[0\]\.args.*retry"):
        RewardWorker(Reward(functions=[spec]))
