"""The reference pages that are read off the source: error and warning codes, metrics, environment variables.

``meanings.toml`` says more about each. Invariant: a metric, state or variable that it does not explain, or anything that it
explains and the code no longer has, stops the build; a code that it does not explain is explained by its own message.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from generate import cell, prose

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("shared", "rollout", "learner", "launch")
MEANINGS: dict[str, dict[str, str]] = tomllib.loads((ROOT / "docs" / "meanings.toml").read_text(encoding="utf-8"))
CODE = re.compile(r"^[EW]\d{3}$")
FAMILIES = {
    "0": "Ours",
    "1": "Configuration",
    "2": "Data",
    "3": "Rewards",
    "4": "Model",
    "5": "Cluster and start",
    "6": "Output and resume",
    "7": "Environment and safety",
    "9": "While a run goes on",
}


class Told(NamedTuple):
    """One message of the code."""

    code: str
    what: str
    expected: str
    fix: str
    file: str


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module of the packages, parsed."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


# --- codes ---


@functools.cache
def messages() -> list[Told]:
    """Every error that the code can raise, with its words; what is filled in at run time is an ellipsis."""
    found: dict[Told, None] = {}
    for file, tree in sources().items():
        for scope in _scopes(tree):
            words = _assigned(scope)
            for call in _calls(scope):
                for told in _messages_of(call, words, file):
                    found[told] = None
    return sorted(found)


def _messages_of(call: ast.Call, words: dict[str, list[tuple[int, ast.expr]]], file: str) -> Iterator[Told]:
    name = ast.unparse(call.func)
    said = [_words(argument, words, call.lineno) for argument in call.args]
    if name == "disagree" and len(said) == 4:
        yield Told("E108", "options disagree", said[2], said[3], file)
        return
    at = next((i for i, text in enumerate(said) if re.match(r"E\d{3}(?: or E\d{3})*$", text)), None)
    if at is None or len(said) - at < 5:
        return
    rest = said[at + 1 :]
    # A failed call of a reward function has no place yet; everything else has (what, place, found, expected, fix).
    what, expected, fix = (rest[0], rest[2], rest[3]) if name == "CallFailed" else (rest[0], rest[3], (*rest, "")[4])
    for code in said[at].split(" or "):
        yield Told(code, what, expected, fix, file)


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    yield ast.Module([n for n in tree.body if not isinstance(n, ast.ClassDef | ast.FunctionDef)], [])


def _calls(scope: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(scope) if isinstance(node, ast.Call))


def _assigned(scope: ast.AST) -> dict[str, list[tuple[int, ast.expr]]]:
    """Names of a function with what they were set to, by line."""
    words: dict[str, list[tuple[int, ast.expr]]] = defaultdict(list)
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts))
                for one, value in pairs:
                    if isinstance(one, ast.Name):
                        words[one.id].append((node.lineno, value))
    return words


def _words(node: ast.expr, words: dict[str, list[tuple[int, ast.expr]]], line: int, depth: int = 0) -> str:
    """The text that an expression makes, as far as the source says it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
    if isinstance(node, ast.IfExp):
        both = [_words(branch, words, line, depth) for branch in (node.body, node.orelse)]
        return " or ".join(dict.fromkeys(both))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left, words, line, depth) + _words(node.right, words, line, depth)
    if isinstance(node, ast.Name) and depth < 3:
        before = [(at, value) for at, value in words.get(node.id, []) if at <= line]
        return _words(max(before, key=lambda b: b[0])[1], words, line, depth + 1) if before else "…"
    return "…"


def errors() -> str:
    """All error codes: what they say, and what to do."""
    lines, family = [], ""
    for code in sorted(all_codes("E")):
        if code[1] != family:
            family = code[1]
            lines += ["", f"### {FAMILIES[family]}: E{family}xx", ""]
        told = [t for t in messages() if t.code == code]
        lines += [f"#### {code} {{ #{code.lower()} }}", "", _explanation(code, told), ""]
        if told:
            lines += ["| message | expected | fix | in |", "|---|---|---|---|"]
            lines += [f"| {_shown(t.what)} | {_shown(t.expected)} | {_shown(t.fix)} | `{t.file}` |" for t in told]
            lines.append("")
    return "\n".join(lines)


def _explanation(code: str, told: list[Told]) -> str:
    own = "; ".join(dict.fromkeys(t.what for t in told))
    return MEANINGS["codes"].get(code) or f"{own[:1].upper()}{own[1:]}."


def _shown(text: str) -> str:
    return re.sub(r"([<*\[\]])", r"\\\1", cell(text))


def warnings() -> str:
    """All warning codes."""
    lines = ["| code | meaning |", "|---|---|"]
    lines += [f'| <a id="{c.lower()}"></a>**{c}** | {cell(_explanation(c, []))} |' for c in sorted(all_codes("W"))]
    return "\n".join(lines)


def all_codes(letter: str) -> set[str]:
    """Every code with this first letter that the code prints or raises."""
    found = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(rf"\[({letter}\d{{3}})\]", node.value))
                found |= {node.value} if CODE.match(node.value) and node.value[0] == letter else set()
    found |= set(re.findall(rf"\[({letter}\d{{3}})\]", (ROOT / "Makefile").read_text(encoding="utf-8")))
    _the_same("codes", found, found | {code for code in MEANINGS["codes"] if code[0] == letter})
    return found


def _the_same(what: str, found: set[str], explained: set[str]) -> None:
    if found != explained:
        unexplained, gone = sorted(found - explained), sorted(explained - found)
        raise ValueError(f"docs/meanings.toml [{what}]: not explained {unexplained}, not in the code {gone}")


# --- metrics ---

METRIC = re.compile(r"^[a-z_]+(?:/[a-z_@]+)+$")
WRITERS = ("shared/metrics.py", "learner/losses.py", "learner/off_policy.py", "learner/passes.py", "learner/learner.py")
WRITERS += (
    "rollout/engine_pool.py",
    "rollout/replica.py",
    "rollout/buffer.py",
    "launch/accounts.py",
    "launch/keeper.py",
)
WRITERS += ("launch/controller.py", "launch/held_out.py", "shared/sample_ledger.py", "rollout/reward_pool.py")


def metrics() -> str:
    """Every metric with its meaning, by what it is about."""
    unknown = sorted(name for name in metrics_in_code() if not explained(name))
    if unknown:
        raise ValueError(f"docs/meanings.toml [metrics]: not explained {unknown}")
    lines = []
    for title, table in MEANINGS["metrics"].items():
        assert isinstance(table, dict)
        lines += [f"## {title}", "", "| metric | meaning |", "|---|---|"]
        lines += [f"| `{name}` | {cell(meaning)} |" for name, meaning in table.items()]
        lines.append("")
    return "\n".join(lines)


@functools.cache
def metrics_in_code() -> set[str]:
    """Names of metrics that the modules which measure write down as they are."""
    found = set()
    for file in WRITERS:
        for node in ast.walk(sources()[file]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.match(node.value):
                found.add(node.value.removesuffix("_sum"))
    return {name for name in found if not name.endswith("/square")} - NO_METRICS


NO_METRICS = {f"{unit}/sampled" for unit in ("groups", "samples", "tokens")} | {
    "tokens/lost",
    "eval/pass@",
    "eval/sampled",
}
"""Counts of a ledger that no row has, and beginnings of names."""


def explained(metric: str) -> bool:
    """Whether a name, as a row has it, is one of those explained; a star stands for anything."""
    names = [name for table in MEANINGS["metrics"].values() for name in table]
    patterns = (re.escape(name).replace(r"\*", "[^/]+").replace("<k>", r"\d+") for name in names)
    return any(re.fullmatch(pattern, metric) for pattern in patterns)


def states() -> str:
    """States of the time ledger."""
    found = set()
    for tree in sources().values():
        for call in _calls(tree):
            if isinstance(call.func, ast.Attribute) and call.func.attr in ("enter", "during") and call.args:
                first = call.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(first.value)
    _the_same("states", found | {"start", "generate"}, set(MEANINGS["states"]))
    rows = [f"| `{name}` | {cell(meaning)} |" for name, meaning in MEANINGS["states"].items()]
    return "\n".join(["| state | meaning |", "|---|---|", *rows])


# --- environment ---


def environment() -> str:
    """Environment variables that Millrace reads or sets."""
    _the_same("environment", variables(), set(MEANINGS["environment"]))
    rows = [f"| `{name}` | {cell(prose(meaning))} |" for name, meaning in MEANINGS["environment"].items()]
    return "\n".join(["| variable | meaning |", "|---|---|", *rows])


def variables() -> set[str]:
    """Names of the environment that the packages look up or set for themselves."""
    found = set()
    for tree in sources().values():
        constants = {t.id: n.value for n in tree.body for t in _targets(n) if isinstance(n, ast.Assign)}
        for node in ast.walk(tree):
            found |= {name for key in _looked_up(node) if (name := _name(key, constants))}
    return found


def _targets(node: ast.stmt) -> list[ast.Name]:
    return [t for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []


def _looked_up(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
        return [node.slice]
    if isinstance(node, ast.Call) and re.match(r"os\.(environ\.\w+|getenv)$", ast.unparse(node.func)) and node.args:
        return [node.args[0]]
    if isinstance(node, ast.Compare) and any(ast.unparse(c) == "os.environ" for c in node.comparators):
        return [node.left]
    return []


def _name(key: ast.expr, constants: dict[str, Any]) -> str | None:
    key = constants.get(key.id, key) if isinstance(key, ast.Name) else key
    return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None
