"""``millrace score``: stored rows through the pool's own worker code, its output and its complaints."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from launch import score
from rollout.reward_worker import RewardWorker
from shared.errors import InputError
from tests.conftest import ROOT
from tests.fakes import FakeActor, fake_ray, write_rows
from tests.pace import scaled

CODE = """
def lengths(completions, **kwargs): return [float(len(c)) for c in completions]
def contents(completions, prompts): return [len(c[0]["content"]) + 100.0 * len(p) for c, p in zip(completions, prompts)]
def scaled(completions, factor, **kwargs): return [factor * len(c) for c in completions]
def tokens(completion_ids): return [float(len(ids)) for ids in completion_ids]
def some(completions, kind): return [1.0 if k == "math" else None for k in kind]
def picky(completions, **kwargs):
    if any(c == "bad" for c in completions): raise ValueError("no good")
    return [1.0] * len(completions)
"""


class LocalActor(FakeActor):
    """A worker in this process."""

    def __init__(self, *arguments) -> None:
        self.worker = RewardWorker(*arguments)

    async def ready(self):
        return True

    async def score(self, groups, state):
        return await asyncio.to_thread(self.worker.score, groups, state)


@pytest.fixture
def verb(tmp_path, monkeypatch, capsys):
    """``verb(rows, *arguments) -> (exit code, output, errors)`` in this process, beside ``r.py``."""
    fake_ray(monkeypatch)
    monkeypatch.setattr("launch.ray_actors.RaySlot.spawn", lambda slot, kind, *arguments, **_: LocalActor(*arguments))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(CODE)

    def call(rows, *arguments: str) -> tuple[int, list[str], str]:
        if isinstance(rows, list):
            write_rows(tmp_path / "rows.jsonl", rows)
        elif rows is not None:
            (tmp_path / "rows.jsonl").write_text(rows)
        code = score.main(["--data", "rows.jsonl", "--isolation", "actor", *arguments])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    return call


def rewards(lines: list[str]) -> list:
    """What the last line says."""
    return json.loads(lines[-1])["rewards"]


PLAIN = [{"prompt": "q", "completion": "a", "answer": "a"}, {"prompt": "q", "completion": "bbb", "answer": "a"}]
TALK = [{"role": "user", "content": "q"}]
SAID = [{"role": "assistant", "content": "four"}]


@pytest.mark.parametrize(
    ("reward", "rows", "arguments", "expected"),
    [
        ("exact_match", PLAIN, [], [1, 0]),
        ("r.py:lengths", PLAIN, [], [1, 3]),
        ("r.py:scaled", PLAIN, ["--args", "{factor = 2.5}"], [2.5, 7.5]),
        ("length_negative_abs", PLAIN, ["--args", "{target = 2}"], [-1, -1]),
        ("r.py:contents", [{"prompt": TALK, "completion": SAID}], [], [104]),
        ("exact_match", [{"prompt": TALK, "completion": SAID, "answer": "four"}], [], [1]),
        ("r.py:tokens", [{"prompt": "", "completion": "x", "completion_ids": [5, 6, 7]}], [], [3]),
        ("r.py:some", [{"completion": "a", "kind": "math"}, {"completion": "b", "kind": "code"}], [], [1, None]),
        ("r.py:lengths", [{"prompt": "", "completion": ""}], [], [0]),
        ("r.py:lengths", [], [], []),
    ],
)
def test_rows_are_scored_in_order(verb, reward, rows, arguments, expected):
    code, lines, errors = verb(rows, "--reward", reward, "--json", *arguments)
    assert (code, errors) == (0, "")
    assert rewards(lines) == pytest.approx(expected)


def test_several_rewards_are_summed_and_more_rows_than_a_call_holds_keep_their_order(verb):
    rows = [{"prompt": "", "completion": "x" * (i % 7), "answer": ""} for i in range(100)]
    _, lines, _ = verb(rows, "--reward", "r.py:lengths", "--reward", "exact_match", "--json", "--workers", "2")
    assert rewards(lines) == [i % 7 + (i % 7 == 0) for i in range(100)]


def test_without_json_a_line_a_row_is_printed(verb):
    code, lines, _ = verb(
        [{"completion": "a", "kind": "math"}, {"completion": "b", "kind": "x"}], "--reward", "r.py:some"
    )
    assert (code, lines) == (0, ["0\t1", "1\tNone"])


@pytest.mark.parametrize(
    ("rows", "number", "said"),
    [
        ('{"completion": "a"}\n{"completion": \n', "E204", "rows.jsonl:2"),
        ('{"completion": "a"}\n\n[1]\n', "E202", "rows.jsonl:3"),
        ('{"prompt": "a", "text": "b"}\n', "E202", "prompt, text"),
        ('"a"\n', "E202", "str"),
        (None, "E201", "rows.jsonl"),
    ],
)
def test_bad_rows_are_wrong_input(verb, rows, number, said):
    code, lines, errors = verb(rows, "--reward", "exact_match")
    assert (code, lines) == (2, [])
    assert errors.startswith(f"error[{number}]")
    assert said in errors
    assert "Traceback" not in errors


def test_rows_that_are_no_utf8_are_wrong_input(verb, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"completion": "\xe9"}\n')
    code, _, errors = verb(None, "--reward", "exact_match")
    assert (code, errors[:11]) == (2, "error[E205]")


def test_line_separators_inside_strings_do_not_cut_a_row(verb):
    rows = '{"completion": "a\u2028b"}\n{"completion": "c\x85"}\n'
    assert rewards(verb(rows, "--reward", "r.py:lengths", "--json")[1]) == [3, 2]


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["--reward", "exact_mach"], "E301"),
        (["--reward", "exact_match"], "E301"),  # No column "answer".
        (["--reward", "r.py:nothing"], "E301"),
        (["--reward", "r.py:scaled", "--args", "{faktor = 1}"], "E301"),
        (["--reward", "r.py:scaled", "--args", "{factor"], "E106"),
        (["--reward", "r.py:lengths", "--nonsense"], "E106"),
        ([], "E106"),
    ],
)
def test_wrong_options_exit_2(verb, arguments, number):
    code, lines, errors = verb([{"completion": "a"}], *arguments)
    assert (code, lines) == (2, [])
    assert f"error[{number}]" in errors
    assert "Traceback" not in errors


def test_rows_that_fail_are_null_and_named_and_exit_2(verb):
    rows = [{"completion": text} for text in ("good", "bad", "fine")]
    code, lines, errors = verb(rows, "--reward", "r.py:picky", "--json")
    assert code == 2
    assert json.loads(lines[-1]) == {"rewards": [1, None, 1], "failed": [1]}
    assert "row 1: error[E304] reward raised — r.py:picky, group 1. Found ValueError: no good" in errors
    assert "1 of 3 rows failed" in errors


def test_read_rows_names_the_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"E201.*nothing\.jsonl"):
        score.read_rows(tmp_path / "nothing.jsonl")


@pytest.mark.stack
def test_with_ray_the_last_line_holds_the_rewards_and_a_hanging_row_is_null(tmp_path):
    hangs = "import time\ndef hangs(completions):\n    if 'hang' in completions: time.sleep(60)\n    return [None if c == 'none' else float(len(c)) for c in completions]\n"
    (tmp_path / "r.py").write_text(hangs)
    rows = write_rows(tmp_path / "rows.jsonl", [{"completion": text} for text in ("a", "hang", "none", "ccc")])
    command = [sys.executable, "-m", "launch.score", "--reward", f"{tmp_path / 'r.py'}:hangs", "--data", str(rows)]
    done = subprocess.run(
        [*command, "--json", "--timeout-s", "0.5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=scaled(120),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"rewards": [1, None, None, 3], "failed": [1]}
    assert "E305" in done.stderr
    assert "(raylet)" not in done.stdout + done.stderr


@pytest.mark.process
def test_rows_whose_tests_are_not_understood_are_named_and_get_no_reward(verb, monkeypatch):
    monkeypatch.setattr("rollout.code_tests._share", lambda *_: 1.0)
    rows = [{"prompt": "", "completion": "x", "tests": tests} for tests in ("assert x", "assert (", "[]")]
    code, lines, errors = verb(rows, "--reward", "code_tests", "--json")
    assert (code, json.loads(lines[-1])) == (0, {"rewards": [1.0, None, None], "failed": []})
    assert "warning[W310] tests not understood — rows.jsonl:2:tests (and 1 more). Found '(' was never closed" in errors
