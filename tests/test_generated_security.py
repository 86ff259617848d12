"""What a hostile answer can do to a generated task: evaluated by none that is allowed, and contained if it were."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from rollout import sandbox
from rollout.datasets import read
from rollout.generated_tasks import DENIED, REFUSED
from rollout.reward_worker import RewardWorker
from shared.config_data import Source
from shared.config_reward import Reward, RewardFunction
from shared.errors import RewardFailed
from tests.fakes import make_completion, make_prompt
from tests.pace import scaled
from tests.test_generated_tasks import has_wall, needs_gym

pytestmark = [pytest.mark.process, needs_gym]
ROOT = Path(sandbox.ROOT)
FAILURES = {"E302", "E303", "E304", "E305", "E306"}
PARTS = 8
WATCH = """
import json, sys
from reasoning_gym.factory import DATASETS, create_dataset
MARK = "canary_7919"
found, current = set(), ""

def watch(event, arguments):
    if event in ("compile", "exec", "import", "open", "os.system", "subprocess.Popen") and MARK in str(arguments[:2]):
        found.add(current)

sys.addaudithook(watch)
answers = [MARK, f"[{MARK}]", f"{MARK} + 1", f"[['{MARK}']]", f'"{MARK}"', f"{{{MARK}: 1}}", f"f({MARK})", f"{MARK}=1"]
for current in sorted(set(DATASETS) - {"composite"}):
    dataset = create_dataset(current, size=2, seed=7)
    for entry in (dataset[0], dataset[1]):
        for answer in answers:
            try:
                dataset.score_answer(answer, entry)
            except Exception:
                pass
print("\\n" + json.dumps([sorted(found), sorted(DATASETS)]))
"""


def bare(program: str) -> str:
    """What ``program`` prints, outside of any sandbox."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], capture_output=True, text=True, timeout=scaled(200), check=True
    )
    return done.stdout


def test_the_denied_tasks_evaluate_answers_and_no_other_does():
    found, tasks = json.loads(bare(WATCH).splitlines()[-1])
    assert found == sorted(set(DENIED) - {"composite"})
    assert set(DENIED) <= set(tasks)
    assert len(tasks) == 106


# Modules that evaluate, and what: nothing of these is the text of a model.
HARMLESS = {
    "algorithmic/number_sorting.py": "the row's own answer",
    "arithmetic/basic_arithmetic.py": "an expression that it made",
    "arithmetic/bitwise_arithmetic.py": "the row's own problem",
    "arithmetic/gsm_symbolic/generators_00_49.py": "a fraction out of its list",
    "arithmetic/gsm_symbolic/generators_50_99.py": "a fraction that it made",
    "code/codeio.py": "programs of the package, to make rows",
    "code/bf.py": "compiles its own programs, to make rows",
    "code/contrib/bfit/BF-it.py": "the same",
    "code/contrib/bfit/Compiler/Compiler.py": "the same",
    "logic/propositional_logic.py": "parse_expr is a parser of its own",
}


def test_every_module_of_the_package_that_evaluates_anything_has_been_read():
    spec = importlib.util.find_spec("reasoning_gym")
    root = Path(spec.origin).parent
    words = ("eval(", "exec(", "parse_expr(", "sympify(", "literal_eval(", "pickle", " compile(", ".compile(")
    found = set()
    for file in root.rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        called = [line for line in lines if any(word in line for word in words) and "re.compile" not in line]
        if called:
            found.add(str(file.relative_to(root)))
    denied = {name for name in found if Path(name).stem in DENIED}
    assert {Path(name).stem for name in denied} == set(DENIED) - {"composite"}
    assert found - denied == set(HARMLESS)


def attacks(canary: str) -> list[str]:
    """Answers that would make the file ``canary`` if anything evaluated them."""
    system, write = f"__import__('os').system('touch {canary}')", f"open({canary!r}, 'w').write('x')"
    return [
        system,
        f"[{system}]",
        f"({write}, 1)",
        f'{{"a": {write}}}',
        f"exec({write!r})",
        f"[[{system} for _ in (1,)]]",
        f"(lambda: {write})()",
        f"1 + {system}",
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"cos\nsystem\n(S'touch {canary}'\ntR.",
        f"$(touch {canary}); `touch {canary}`",
    ]


def odd(chance: random.Random) -> list[str]:
    """Unicode, control characters and numbers that are none."""
    points = [chance.choice((chance.randrange(32, 0xD800), chance.randrange(0xE000, 0x110000))) for _ in range(200)]
    noise = "".join(map(chr, points))
    return [
        noise,
        "\x00\x1b[2J\r\n\t",
        "٣٤٥ ²½ Ⅷ",
        "İıßΣς",
        "\u202e\u200b\ufeff1",
        "nan",
        "inf",
        "1e999",
        "-0",
        "1_0",
        "1/0",
        "{}",
        "[]",
    ]


def heavy(chance: random.Random) -> list[str]:
    """Long and deeply nested."""
    depth = chance.randrange(10_000, 50_000)
    return [
        "9" * depth,
        "[" * depth + "]" * depth,
        "(" * depth,
        '{"a":' * depth,
        "~(" * depth + "A" + ")" * depth,
        "1 " * depth,
        "A=1," * depth,
        "R99999999999 " * 9,
        "1e99999999",
        "\n" * depth,
        " " * depth + "x",
    ]


@has_wall
@pytest.mark.slow
@pytest.mark.parametrize("part", [pytest.param(i, marks=pytest.mark.xdist_group(f"hostile-{i}")) for i in range(PARTS)])
def test_hostile_answers_to_every_allowed_task_give_numbers_or_a_typed_failure(tmp_path, part):
    from reasoning_gym.factory import DATASETS

    canary = tmp_path / "canary"
    worker = RewardWorker(Reward(functions=[RewardFunction(function="reasoning_gym")]))

    def values(row: dict, texts: list[str]) -> list[float]:
        completions = tuple(make_completion(f"<answer>{text}</answer>") for text in texts)
        return worker.score([(0, make_prompt(0, **row), completions)], {})[0].parts["reasoning_gym"].tolist()

    def values_or_failure(row: dict, texts: list[str]) -> list[float] | str:
        try:
            return values(row, texts)
        except RewardFailed as failure:
            return failure.code

    try:
        for task in sorted(set(DATASETS) - set(REFUSED))[part::PARTS]:
            chance = random.Random(f"{task} 1")
            rows = read(Source(path=f"reasoning-gym:{task}", args={"size": 2}), "train", "key").rows
            row = chance.choice(rows)[1]
            texts = [*attacks(str(canary)), *odd(chance)]
            if row["answer"] is not None:
                assert values(row, [row["answer"], *texts])[0] == 1, task
            assert all(0 <= value <= 1 for value in values(row, texts)), task
            outcome = values_or_failure(row, heavy(chance))
            assert (isinstance(outcome, str) and outcome in FAILURES) or all(0 <= value <= 1 for value in outcome), task
            assert not canary.exists()
    finally:
        worker.close()
    assert os.listdir(tmp_path) == []


def test_the_same_answers_make_the_file_where_a_task_is_denied_and_no_wall_stands(tmp_path):
    canary = tmp_path / "canary"
    program = f"""
from reasoning_gym.factory import create_dataset
dataset = create_dataset("spiral_matrix", size=1, seed=1)
for answer in {attacks(str(canary))!r}:
    dataset.score_answer(answer, dataset[0])
"""
    bare(program)
    assert canary.exists()
