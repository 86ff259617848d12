"""Rows that no completion can satisfy are counted before a run."""

from __future__ import annotations

from importlib.util import find_spec
from time import process_time

import numpy as np
import pytest

from launch import gold_rows
from launch.gold_rows import rows_without_score
from launch.preflight import prepare
from shared.types import Prompt
from tests.fakes import make_config, write_model, write_rows

needs_math_verify = pytest.mark.skipif(not find_spec("math_verify"), reason="the math extra is not installed")


def prompts(golds: list, column: str = "answer") -> list[Prompt]:
    return [Prompt(i, np.zeros(1, np.int32), "", {column: gold}) for i, gold in enumerate(golds)]


def warned(name: str, golds: list, column: str = "answer", args: dict | None = None) -> list[str]:
    config = make_config(**{"data.train": "rows.jsonl", "reward.functions": [{"function": name, "args": args or {}}]})
    return rows_without_score(config, "run.toml", prompts(golds, column))


@pytest.mark.parametrize(
    ("name", "golds", "bad", "first"),
    [
        ("gsm8k_answer", ["#### 5", "5", 5, "1{,}000", "3/4", "\u22125"], 0, 0),
        ("gsm8k_answer", ["5", "five", "3:4", None], 3, 2),
        ("final_number", ["x", "#### none"], 2, 1),
        ("exact_match", ["a", "", 3, 4.0, True], 0, 0),
        ("exact_match", ["a", None, ["a"], {"a": 1}, float("nan")], 4, 2),
        ("boxed_accuracy", ["a", None], 1, 2),
        ("math_accuracy", ["5", "\\$18.90", "52_8", "(B)", "\\text{Evelyn}", "6:30 p.m."], 0, 0),
        ("math_accuracy", ["5", "none of these", "Evelyn", ""], 3, 2),
        ("cosine_length", ["no", "5"], 1, 1),
        ("length", ["x"], 0, 0),
        ("think_format", [None], 0, 0),
    ],
)
def test_rows_that_a_builtin_can_never_pay_are_counted(name, golds, bad, first):
    column = "solution" if name == "math_accuracy" else "answer"
    args = {"limit": 9} if name == "cosine_length" else {}
    lines = warned(name, golds, column, args)
    assert len(lines) == bool(bad)
    for line in lines:
        assert line.startswith(f"warning[W309] rows that never score \u2014 run.toml:reward.functions[0], {name}. ")
        assert f"Found {bad} of {len(golds)} rows whose {column} it cannot read, the first rows.jsonl:{first}" in line


def test_the_column_that_the_reward_reads_is_looked_at():
    assert warned("final_number", ["x"], "gold", {"column": "gold"})[0].endswith(
        "Fix: correct gold, or leave these rows out"
    )
    assert warned("final_number", ["5"], "gold", {"column": "gold"}) == []


def test_of_many_rows_a_part_is_read(monkeypatch):
    monkeypatch.setattr(gold_rows, "MOST_READ", 100)
    (line,) = warned("final_number", ["5"] * 500 + ["five"] * 500)
    assert "Found 50 of 100 rows looked at (of 1000)" in line


def test_it_is_cheap_for_numbers():
    started = process_time()
    assert warned("gsm8k_answer", ["3 * 4 = 12, and so on.\n#### 12"] * 5000) == []
    assert process_time() - started < 2.0


@needs_math_verify
@pytest.mark.process
def test_formulas_are_tried_as_their_own_answers(monkeypatch):
    golds = ["a+b", "5", "\\frac{x}{2}", "(1, 2)", "about 5 or so 6", "Evelyn", "e^x"]
    (line,) = warned("math_accuracy", golds, "solution")
    assert "Found 2 of 7 rows" in line
    monkeypatch.setattr(gold_rows, "MOST_TRIED", 3)
    assert warned("math_accuracy", [f"{i}x" for i in range(9)], "solution") == []


@pytest.mark.process
def test_every_start_and_dry_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(7)])
    with rows.open("a") as more:
        more.write('{"prompt": "9+1=", "answer": "ten"}\n')
    paths = {"model.path": str(write_model(tmp_path / "model")), "data.train": str(rows)}
    config = make_config(**paths | {"reward.functions": [{"function": "final_number"}]})
    told = [line for line in prepare(config, "run.toml", tmp_path).warnings if "W309" in line]
    assert len(told) == 1
    assert "Found 1 of 8 rows whose answer it cannot read, the first rows.jsonl:8 ('ten')" in told[0]
