"""What a generated task pays: the right answer, however it is marked up; and nothing for a text that only contains it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rollout.datasets import read
from rollout.generated_guards import OWN, SHAPES, bare, is_answer, means_gold
from rollout.generated_scoring import score
from rollout.generated_tasks import REFUSED
from rollout.reward_worker import RewardWorker
from shared.config_data import Source
from shared.config_reward import Reward, RewardFunction
from tests.fakes import make_completion, make_prompt
from tests.test_generated_tasks import has_wall, needs_gym

GREEDY = SimpleNamespace(score_answer=lambda said, entry: float(str(entry["answer"]) in said) or 0.05)
"""A scorer of the kind that is found in the package."""
MOVES = "Move disk 1 from Peg 1 to Peg 3"


def paid(task: str, said: str, gold: str | None) -> float:
    return score(said, GREEDY, gold, {}, task)


@pytest.mark.parametrize("form", ["{}", " {}\n", "**{}**", "`{}`", "${}$", "{}.", "\\boxed{{{}}}", "$\\boxed{{{}}}$."])
@pytest.mark.parametrize(
    "gold", ["24", "-24", "1 1 0\n0 1 0", "He is a hero, and she is a sage.", "[[0, 1]]", "a b", "0.25", '{"N": 3}']
)
def test_the_right_answer_has_its_score_however_it_is_marked_up(form, gold):
    assert means_gold(form.format(gold), gold)
    assert paid("any", form.format(gold), gold) == 1


@pytest.mark.parametrize(
    "form", ["The answer is not {}", "not {}", "-{}", "x{}", "{}x", "{} or 7", "{}\n{}", "1{}", "{} {}", "", "zzz"]
)
@pytest.mark.parametrize("gold", ["24", "1 1 0\n0 1 0", "abc", "True"])
def test_a_text_that_only_contains_it_has_none(form, gold):
    assert paid("any", form.format(gold, gold), gold) == 0


@pytest.mark.parametrize(
    ("said", "gold", "same"),
    [
        ("24.0", "24", True),
        ("1,024", "1024", True),
        ("\u221224", "-24", True),
        ("\u221224", "24", False),
        ("24%", "24", False),
        ("024", "24", True),
        ("24", "024", False),
        ("true", "True", True),
        ("no", "No", True),
        ("ABC", "abc", False),
        ("24", None, False),
    ],
)
def test_the_same_answer_written_otherwise(said, gold, same):
    assert means_gold(said, gold) == same


@pytest.mark.parametrize(
    ("task", "said", "fits"),
    [
        ("kakurasu", "1 1 0\n0 1 0", True),
        ("kakurasu", "not 1 1 0\n0 1 0", False),
        ("survo", "8 8 29\n-3 9 23", True),
        ("survo", "8 8 or\n3 9 23", False),
        ("sokoban", "ULLR", True),
        ("sokoban", "The answer is not ULLR", False),
        ("quantum_lock", "A \u2192 B \u2192 C", True),
        ("quantum_lock", "not A \u2192 B", False),
        ("knights_knaves", "Ann is a hero, and Bo is an altruist.", True),
        ("knights_knaves", "Ann is a hero and Bo is a villain", True),
        ("knights_knaves", "It is not so that Ann is a hero, and Bo is a villain", False),
        ("tower_of_hanoi", MOVES + "\n" + MOVES, True),
        ("tower_of_hanoi", "not " + MOVES, False),
        ("complex_arithmetic", "-3.0 + 2.5i", True),
        ("complex_arithmetic", "nan", False),
        ("complex_arithmetic", "inf", False),
        ("fraction_simplification", "$\\frac{46}{81}$", True),
        ("fraction_simplification", "46/81", True),
        ("fraction_simplification", "46/81 or 1/2", False),
        ("rush_hour", "F+1 K-2", True),
        ("rush_hour", "not F+1 K-2", False),
        ("time_intervals", "99 days", True),
        ("time_intervals", "99 days, 12:30", True),
        ("time_intervals", "12:27:12.868", True),
        ("time_intervals", "99 or 67 days", False),
        ("spell_backward", "olleh", True),
        ("spell_backward", "olleh hello", False),
    ],
)
def test_the_shape_of_an_answer(task, said, fits):
    assert is_answer(task, said, "zzzz") == fits


@pytest.mark.parametrize(
    ("task", "said", "gold", "value"),
    [
        ("game_of_life_halting", "True", "True", 1),
        ("game_of_life_halting", " false.", "False", 1),
        ("game_of_life_halting", "False", "True", 0),
        ("game_of_life_halting", "not True", "True", 0),
        ("game_of_life_halting", "x", "True", 0),
        ("gsm_symbolic", "405", "405", 1),
        ("gsm_symbolic", "The answer is $405.", "405", 1),
        ("gsm_symbolic", "The answer is not 405", "405", 0),
        ("gsm_symbolic", "-405", "405", 0),
        ("gsm_symbolic", "405 or 406", "405", 0),
        ("gsm_symbolic", "405 406", "405", 0),
        ("coin_flip", "0.171875", "0.171875", 1),
        ("coin_flip", "11/64", "0.171875", 1),
        ("coin_flip", "0.1719", "0.171875", 1),
        ("coin_flip", "17.1875%", "0.171875", 1),
        ("coin_flip", "0", "0.171875", 0),
        ("coin_flip", "0.1", "0.171875", 0),
        ("coin_flip", "0", "0.00003", 0),
    ],
)
def test_what_is_compared_in_place_of_a_scorer(task, said, gold, value):
    assert paid(task, said, gold) == value


def test_an_answer_without_a_gold_one_is_left_to_the_scorer():
    assert score("{}", SimpleNamespace(score_answer=lambda said, entry: 0.5), None, {}, "graph_color") == 0.5
    assert score("{}", SimpleNamespace(score_answer=lambda said, entry: 0.05), None, {}, "graph_color") == 0


def test_marks_around_an_answer_are_taken_off():
    assert bare(" **$\\boxed{ 1\n 2 }$**. ") == "1 2"
    assert bare(".5") == ".5"


@needs_gym
def test_every_task_with_a_rule_exists():
    from reasoning_gym.factory import DATASETS

    assert {*SHAPES, *OWN, *REFUSED} <= set(DATASETS)
    assert not {*SHAPES, *OWN} & set(REFUSED)


PARTS = 6
"""Of the tasks: a part takes some ten seconds on two idle cores."""


def probes(rows: list[dict], row: dict) -> dict[str, tuple[float, float]]:
    """Texts, and the least and the most that each may be paid."""
    gold = row["answer"]
    found = {"": (0, 0), "zzz": (0, 0.25), row["prompt"]: (0, 0.25)}
    if gold is None:
        return found
    found |= dict.fromkeys((gold, f" {gold}\n", f"**{gold}**", f"$\\boxed{{{gold}}}$."), (1, 1))
    found |= dict.fromkeys((f"The answer is not {gold}", f"not {gold}", f"{gold} or {gold}1"), (0, 0))
    others = [other["answer"] for other in rows if not means_gold(other["answer"], gold)]
    return dict.fromkeys(others, (0, 0.999)) | found


@needs_gym
@has_wall
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_task_pays_its_answer_and_no_text_around_it(part):
    from reasoning_gym.factory import DATASETS

    worker = RewardWorker(Reward(functions=[RewardFunction(function="reasoning_gym", args={"extract": "text"})]))
    wrong = []
    try:
        for task in sorted(set(DATASETS) - set(REFUSED))[part::PARTS]:
            rows = [row for _, row in read(Source(path=f"reasoning-gym:{task}", args={"size": 4}), "train", "key").rows]
            tables = [probes(rows, row) for row in rows[:2]]
            groups = [
                (i, make_prompt(i, **row), tuple(make_completion(text) for text in table))
                for i, (row, table) in enumerate(zip(rows[:2], tables, strict=True))
            ]
            for table, scores in zip(tables, worker.score(groups, {}), strict=True):
                for (text, (least, most)), value in zip(table.items(), scores.parts["reasoning_gym"], strict=True):
                    if not least <= value <= most:
                        wrong.append((task, text[:60], float(value)))
    finally:
        worker.close()
    assert wrong == []
