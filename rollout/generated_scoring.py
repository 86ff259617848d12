"""The reward ``reasoning_gym``: completions of generated tasks, scored by the tasks themselves, inside the sandbox.

``reward_child`` makes a ``ReasoningGym`` in a fresh sandbox, which imports the tasks that it is about to meet before it
sees any completion; ``rollout/reward_worker.py`` names them. Needs the standard library alone until a task is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rollout.generated_guards import CONSOLATION, OWN, SHAPES, is_answer, means_gold, trimmed
from rollout.generated_tasks import refuse_denied, require_package, unpacked
from shared.errors import InputError

KEY = "reward reasoning_gym"
EXTRACT = ("answer", "tag", "line", "text")
MOST_PREPARED = 8
"""Tasks that a child imports ahead; others at their first completion."""


class ReasoningGym:
    """Score of the answer by the task's own ``score_answer``, mostly in [0, 1]; 0 where the scorer cannot read it.

    An answer that only contains the right one is wrong.
    """

    def __init__(self, *, extract: str = "answer", tasks: list[list[str]] | None = None) -> None:
        """``extract``: the answer is what is in the last ``<answer>...</answer>``, else the last line (``answer``); only
        what is in the tags (``tag``); the last line (``line``); or the whole text (``text``).

        ``tasks``: names and arguments to import now. Raises ``InputError`` E301 or E702.
        """
        if extract not in EXTRACT:
            place, expected, fix = "reward.functions.args.extract", f"one of {', '.join(EXTRACT)}", 'extract = "answer"'
            raise InputError("E301", "reward arguments refused", place, str(extract), expected, fix)
        require_package(KEY)
        self._extract = extract
        for name, arguments in tasks or []:
            with contextlib.suppress(Exception):  # What is wrong with a task, its first completion says.
                scorer_of(name, arguments)

    def __call__(
        self, completions: list[Any], answer: list[Any], task: list[Any], metadata: list[Any], **columns: Any
    ) -> list[float | None]:
        """One score per completion; None where the row names no task. Raises ``InputError`` E308 outside of a sandbox."""
        from rollout.rewards import text_of

        if os.uname().nodename != "sandbox":
            raise InputError("E308", "no sandbox", KEY, "a process without one", "bubblewrap", "leave isolation unset")
        arguments = columns.get("task_args") or ["{}"] * len(completions)
        rows = zip(completions, task, arguments, answer, metadata, strict=True)
        return [None if row[0] is None else self._score(text_of(text), *row) for text, *row in rows]

    def _score(self, text: str, name: str, arguments: str, gold: str | None, metadata: str) -> float:
        said = extracted(text, self._extract)
        if said is None:
            return 0.0
        return score(said, scorer_of(name, arguments), gold, unpacked(json.loads(metadata)), name)


def extracted(text: str, how: str) -> str | None:
    """The answer in ``text``, trimmed; None if there is none. Linear in the length of any text."""
    if how == "text":
        return text.strip()
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0 and how != "line":
        return text[start + len("<answer>") : end].strip()
    return None if how == "tag" else text.strip().rpartition("\n")[2].strip()


def score(said: str, scorer: Any, gold: str | None, metadata: Any, task: str = "") -> float:
    """Score of the answer ``said``: what ``scorer`` gives, within the rules of ``generated_guards``.

    0 if the scorer fails on it, or returns no finite number, but not on ``gold``. Several scorers raise on text that is no
    number, say: that is a wrong answer. One that fails on the right answer too is broken, and raises.
    """
    if means_gold(said, gold):
        said = str(gold)
    elif task in SHAPES:
        said = trimmed(said)
    if task in OWN and gold is not None:
        return OWN[task][0](said, gold)
    if not is_answer(task, said, gold):
        return 0.0
    try:
        value = float(scorer.score_answer(said, {"answer": gold, "metadata": metadata, "question": ""}))
        if math.isfinite(value):
            return value if value > CONSOLATION else 0.0
    except MemoryError:
        raise
    except Exception:  # Whatever a scorer makes of model text; the next line tells whose fault it is.
        pass
    scorer.score_answer(gold, {"answer": gold, "metadata": metadata, "question": ""})
    return 0.0


@functools.cache
def scorer_of(name: str, arguments: str) -> Any:
    """The task's dataset, for its scorer. Raises ``InputError`` E309, E702, or what its arguments raise."""
    refuse_denied(name, KEY)
    require_package(KEY)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # Each thread's buffer counts against the memory limit.
    _import_alone(name)
    from reasoning_gym.factory import create_dataset

    return create_dataset(name, **json.loads(arguments))


def _import_alone(name: str) -> None:
    """Import the module of one task without its 105 siblings: 30 ms of CPU against 840 for the whole package.

    Its packages are stood in for by empty modules. Only in a child: nobody else there has use for the package.
    """
    if "reasoning_gym" not in sys.modules:
        spec = importlib.util.find_spec("reasoning_gym")
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for folder in [root, *(file.parent for file in root.glob("*/__init__.py"))]:
            package = ".".join(folder.relative_to(root.parent).parts)
            if folder.name not in ("coaching", "data"):
                sys.modules[package] = ModuleType(package)
                sys.modules[package].__path__ = [str(folder)]
    importlib.import_module("reasoning_gym.coaching")  # First, for it and the factory import each other.
    root = Path(sys.modules["reasoning_gym"].__path__[0])
    registers = (file for file in root.rglob("*.py") if f'"{name}"' in file.read_text(encoding="utf-8"))
    for file in [*root.rglob(f"{name}.py")] or registers:
        importlib.import_module(".".join(file.relative_to(root.parent).with_suffix("").parts))


def tasks_of(columns: dict[str, list[Any]]) -> list[list[str]]:
    """Names and arguments of the tasks in the rows of a call."""
    names = columns.get("task", [])
    arguments = columns.get("task_args") or ["{}"] * len(names)
    pairs = ((str(name), str(given)) for name, given in zip(names, arguments, strict=True) if name is not None)
    return [list(pair) for pair in dict.fromkeys(pairs)]
