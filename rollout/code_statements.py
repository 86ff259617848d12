"""Tests of programs that are pieces of Python: what one would run, and whether it could fail at all.

Nothing is run here. ``code_forms`` finds the pieces in a row; ``sandboxed_program`` runs them.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from dataclasses import dataclass

from shared.errors import one_line

_PREPARING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


class UnknownTests(ValueError):
    """Tests in no form that is understood."""

    def __init__(self, found: str, fix: str = "correct or remove the row") -> None:
        super().__init__(found, fix)
        self.found, self.fix = found, fix


@dataclass(frozen=True)
class Statement:
    """A test that is a piece of Python: it passes if it runs to its end."""

    source: str
    """Python text that compiles."""
    calls: tuple[tuple[str, int], ...] = ()
    """Functions that ``source`` defines without calling them, and how many arguments each takes: none or the candidate."""
    suites: tuple[str, ...] = ()
    """Classes of ``unittest`` that ``source`` defines."""
    entry_point: str = ""
    """Name or expression of the candidate; empty: the program's last function."""


def parse_statement(source: str, entry_point: str = "", whole: bool = False) -> Statement | None:
    """Read ``source`` as a test; None if it only imports, defines and assigns. ``entry_point``: of the candidate.

    ``whole``: it is all there is, so that a bare name is no test. Raises ``UnknownTests`` if it does not compile, or could
    not fail.
    """
    tree = parse(source)
    calls, suites = _uncalled(tree), _suites(tree)
    if not (_acts(tree) or calls or suites):
        if all(isinstance(node, _PREPARING) or _is_text(node) for node in tree.body):
            return None
        if whole or not any(isinstance(node, ast.Expr) for node in tree.body):
            raise UnknownTests(f'text that tests nothing: "{one_line(source, 60)}"')
    compared = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare) for node in tree.body]
    if any(compared):  # A comparison that stands alone is meant to hold.
        tree.body = [
            ast.Assert(node.value, None) if bare else node  # type: ignore[attr-defined]
            for node, bare in zip(tree.body, compared, strict=True)
        ]
        source = ast.unparse(ast.fix_missing_locations(tree))
    return Statement(textwrap.dedent(source), calls, suites, entry_point)


def parse(source: str) -> ast.Module:
    """Parse ``source``. Raises ``UnknownTests`` if it does not compile."""
    source = textwrap.dedent(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            compile(tree, "<test>", "exec")
            return tree
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        found = f'{said}{where} of "{one_line(source, 60)}"'
        raise UnknownTests(found, "write tests that compile") from None


def _body(tree: ast.Module) -> list[ast.stmt]:
    """What runs when the test is not the main program."""
    guards = [node for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.dump(node.test)]
    return [node for node in tree.body if node not in guards]


def _acts(tree: ast.Module) -> bool:
    """True if something in ``tree`` can fail: a call, a comparison, an assert, a raise."""
    running = [node for node in _body(tree) if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    deeds = (ast.Assert, ast.Call, ast.Raise, ast.Compare)
    return any(isinstance(node, deeds) for part in running for node in ast.walk(part))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _uncalled(tree: ast.Module) -> tuple[tuple[str, int], ...]:
    """Functions named check or test, of no argument or one, that nothing in ``tree`` calls.

    Raises ``UnknownTests`` for a test function that needs more than a candidate.
    """
    body, found = _body(tree), {}
    calls = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    for node in body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith(("check", "test")) or node.name in called:
            continue
        given = node.args.posonlyargs + node.args.args
        count = len(given) - len(node.args.defaults)
        most = 0 if node.name.startswith("test_") else 1
        if node.name.startswith("test") and (node.decorator_list or count > most):
            raise UnknownTests(f"{node.name} with arguments of pytest", "write test functions without arguments")
        if count <= 1:
            found[node.name] = count
    return tuple(found.items())


def _suites(tree: ast.Module) -> tuple[str, ...]:
    """Classes of unittest."""
    classes = [node for node in _body(tree) if isinstance(node, ast.ClassDef)]
    return tuple(node.name for node in classes if any("TestCase" in ast.unparse(base) for base in node.bases))
