"""Rows of generated tasks: ``{ path = "reasoning-gym:leg_counting", args = { size = 500, seed = 1 } }``.

``datasets.read`` asks for them; ``rollout/generated_scoring.py`` scores completions of them. A row holds the prompt, the
answer, and what scoring needs: the task's name, its arguments and the row's metadata, both as JSON. Invariant: a task
whose scorer evaluates the text of a model gives no rows, whoever asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from shared.errors import InputError, nearest, one_line

if TYPE_CHECKING:  # Sandboxed children import this module; they have to start in milliseconds.
    from shared.config_data import Source

SCHEME = "reasoning-gym:"
VERSION = "0.1.25"
"""The one whose scorers were read: ``DENIED`` holds for no other."""
SIZE, SEED, HELD_OUT_SEED = 1000, 1, 1 << 31
"""Rows are numbered from the seed on, so those of two splits are far apart unless their seeds are set close together."""
_EVAL = "its scorer calls eval() on model text"
_SYMPY = "its scorer gives model text to sympy's parse_expr, which is eval()"
DENIED = {
    "binary_matrix": _EVAL,
    "n_queens": _EVAL,
    "spiral_matrix": _EVAL,
    "string_insertion": _EVAL,
    "countdown": _SYMPY,
    "intermediate_integration": _SYMPY,
    "polynomial_multiplication": _SYMPY,
    "puzzle24": _SYMPY,
    "simple_integration": _SYMPY,
    "composite": "it hands model text to the scorers of other tasks, those above among them",
}
"""Tasks whose scorer evaluates model text, and how."""
UNSOUND = {
    "propositional_logic": "where its premises contradict each other, a quarter of its rows, any formula has full credit",
}
"""Tasks that pay wrong answers in a way that no rule on the answer can mend, and how."""
REFUSED = DENIED | UNSOUND
"""Every task that gives no rows."""


def task_rows(source: Source, split: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """``(place, row)`` of every row of the task that ``source`` names, the same ones for the same arguments.

    Raises ``InputError`` E102 for arguments that the task does not take, E201, E309 or E702.
    """
    task = source.path.removeprefix(SCHEME)
    refuse_denied(task, f"{key}.path")
    require_package(f"{key}.path")
    from dataclasses import fields

    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        guess = nearest(task, allowed := sorted(set(DATASETS) - set(REFUSED)))
        fix = f'path = "{SCHEME}{guess}"' if guess else f"one of {', '.join(allowed)}"
        found, expected = f'"{source.path}"', f"one of the {len(allowed)} tasks of reasoning-gym"
        raise InputError("E201", "unknown task", f"{key}.path", found, expected, fix)
    seed = SEED if split == "train" else HELD_OUT_SEED
    given = {"size": SIZE, "seed": seed} | source.args
    _check_names(given, [field.name for field in fields(DATASETS[task][1])], f"{key}.args")
    try:
        dataset, about = create_dataset(task, **given), json.dumps(given)
        entries = [dataset[i] for i in range(given["size"])]
    except Exception as error:  # Tasks check their arguments by assertions, or fail while they generate.
        found, expected = one_line(f"{type(error).__name__}: {error}"), f"arguments that {task} takes"
        raise InputError("E102", "bad value", f"{key}.args", found, expected, "correct args") from None
    return [(f"{task}:{i}", _row(task, about, entry)) for i, entry in enumerate(entries, 1)]


def refuse_denied(task: str, key: str) -> None:
    """Raises ``InputError`` E309 for a task whose scorer evaluates model text, or pays wrong answers."""
    if task in DENIED:
        found = f"{task} ({DENIED[task]})"
        raise InputError("E309", "unsafe task", key, found, "a task off the denylist", "choose another")
    if task in UNSOUND:
        found, expected = f"{task} ({UNSOUND[task]})", "a task that pays right answers only"
        raise InputError("E309", "unsound task", key, found, expected, "choose another")


def refuse_denied_rows(columns: Iterable[dict[str, Any]], key: str) -> None:
    """The same for rows that name a task, from wherever they come; ``columns``: of each row."""
    for task in dict.fromkeys(str(row.get("task")) for row in columns):
        refuse_denied(task, key)


def require_package(key: str) -> None:
    """Raises ``InputError`` E702 where reasoning-gym is missing or is not the version whose scorers were read."""
    import importlib.metadata

    fix = f"pip install reasoning-gym=={VERSION}"
    try:
        found = importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("E702", "package missing", key, "no reasoning-gym", f"reasoning-gym {VERSION}", fix) from None
    if found != VERSION:
        expected = f"{VERSION} (the denylist was made for it)"
        raise InputError("E702", "version out of range", key, f"reasoning-gym {found}", expected, fix)


def _check_names(given: dict[str, Any], known: list[str], key: str) -> None:
    for name, value in given.items():
        if name not in known:
            guess = nearest(name, known)
            fix = f"did you mean {guess}?" if guess else "remove it"
            raise InputError("E101", "unknown key", f"{key}.{name}", name, f"one of {', '.join(known)}", fix)
        least = {"size": 1, "seed": 0}.get(name)
        if least is not None and (type(value) is not int or value < least):
            expected, fix = f"an integer >= {least}", f"{name} = {SIZE if name == 'size' else SEED}"
            raise InputError("E102", "bad value", f"{key}.{name}", repr(value), expected, fix)


def _row(task: str, about: str, entry: dict[str, Any]) -> dict[str, Any]:
    metadata = json.dumps(packed(entry["metadata"]), ensure_ascii=False)
    answer = entry["answer"] if entry["answer"] is None else str(entry["answer"])
    return {"prompt": entry["question"], "answer": answer, "task": task, "task_args": about, "metadata": metadata}


def packed(value: Any) -> Any:
    """``value`` in JSON's types: tuples, sets and keys that are no text are marked, for scorers tell them apart."""
    if hasattr(value, "tolist"):
        return packed(value.tolist())
    if isinstance(value, tuple | set | frozenset):
        kind = "tuple" if isinstance(value, tuple) else "set"
        return {f"<{kind}>": [packed(one) for one in value]}
    if isinstance(value, list):
        return [packed(one) for one in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: packed(one) for name, one in value.items()}
    if isinstance(value, dict):
        return {"<dict>": [[packed(name), packed(one)] for name, one in value.items()]}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def unpacked(value: Any) -> Any:
    """What ``packed`` was given, but for types of others than Python's."""
    if isinstance(value, list):
        return [unpacked(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, inside),) = value.items()
        if mark == "<dict>":
            return {unpacked(name): unpacked(one) for name, one in inside}
        if mark in ("<tuple>", "<set>"):
            return (tuple if mark == "<tuple>" else set)(map(unpacked, inside))
    return {name: unpacked(one) for name, one in value.items()}
