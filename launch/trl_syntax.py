"""A Python script as a syntax tree: what its names and expressions stand for, as far as that is written down.

``launch/trl_script.py`` asks it. Nothing of the script is ever executed or imported: literals, names assigned to them,
and simple arithmetic are read, all else raises ``Unreadable``. A name that is assigned under a condition is unreadable.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.errors import InputError, one_line

BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.Match)
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
CASTS: dict[str, Callable[[Any], Any]] = {"str": str, "int": int, "float": float, "bool": bool}
WORKS = {
    "GRPOTrainer",
    "GRPOConfig",
    "load_dataset",
    "from_pretrained",
    "train",
    "parse_args",
    "parse_args_and_config",
    "main",
}


class Unreadable(Exception):
    """A value that only running the script could tell."""

    def __init__(self, node: ast.AST) -> None:
        super().__init__(one_line(ast.unparse(node), 60))
        self.line = getattr(node, "lineno", 0)


class Script:
    """The names, imports and calls of one script."""

    def __init__(self, path: Path, text: str) -> None:
        """Parse ``text``. Raises ``InputError`` E105."""
        self.path, self.text = path, text
        try:
            self.tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            place = f"{path.name}:{getattr(error, 'lineno', None) or 1}"
            raise InputError("E105", "cannot parse script", place, str(error), "valid Python", "correct it") from None
        self.assigned: dict[str, list[tuple[int, ast.expr | None]]] = {}
        self.imports: dict[str, str] = {}
        self.top = {
            n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        self.calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        for node in ast.walk(self.tree):
            self._import(node)
        self._collect(self.tree, False)
        self._options = {name: call for call in self.calls if self.last(call) == "add_argument" for name in dests(call)}
        self.assumed: list[str] = []
        """Options of the script's own command line whose defaults were taken."""

    def _import(self, node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            self.imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            self.imports |= {a.asname: a.name for a in node.names if a.asname}

    def _collect(self, node: ast.AST, conditional: bool) -> None:
        for child in ast.iter_child_nodes(node):
            pairs: list[tuple[ast.expr, ast.expr | None]] = []
            if isinstance(child, ast.Assign):
                pairs = [(target, child.value) for target in child.targets]
            elif isinstance(child, ast.AnnAssign | ast.AugAssign):
                pairs = [(child.target, child.value if isinstance(child, ast.AnnAssign) else None)]
            for target, value in pairs:
                if isinstance(target, ast.Name | ast.Attribute):
                    known = self.assigned.setdefault(ast.unparse(target), [])
                    known.append((getattr(child, "lineno", 0), None if conditional else value))
            self._collect(child, conditional or (isinstance(child, BRANCHES) and not is_guard(child)))

    def dotted(self, node: ast.AST) -> str:
        """The full name of what an expression names, aliases resolved; empty if it is no name."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            before = self.dotted(node.value)
            return f"{before}.{node.attr}" if before else ""
        return ""

    def expression(self, node: ast.expr) -> ast.expr:
        """What ``node`` stands for: itself, or what its name was last assigned before. Raises ``Unreadable``."""
        if not isinstance(node, ast.Name):
            return node
        known = self.assigned.get(node.id, [])
        values = [value for _, value in known if value is not None]
        before = [v for v in values if v.lineno <= node.lineno and node not in ast.walk(v)]
        if not before or len(values) < len(known):
            raise Unreadable(node)
        return self.expression(before[-1])

    def value(self, node: ast.expr) -> Any:
        """The value of an expression. Raises ``Unreadable``."""
        node = self.expression(node)
        name = self.dotted(node)
        if name.startswith("torch."):
            return name.removeprefix("torch.")
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return {self.value(k) if k else unreadable(node): self.value(v) for k, v in zip(node.keys, node.values)}
        if isinstance(node, ast.Call) and self.dotted(node.func) == "dict" and not node.args:
            return {k.arg or unreadable(node): self.value(k.value) for k in node.keywords}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self.value(node.operand)
        if isinstance(node, ast.Call) and name_of(node) in CASTS and len(node.args) == 1:
            return self._calculated(node, lambda kind, one: CASTS[kind](one), name_of(node), self.value(node.args[0]))
        if isinstance(node, ast.Attribute) and self._is_parsed(node.value):
            return self._default_of_option(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self._calculated(node, operator.sub, 0, self.value(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return self._calculated(node, ARITHMETIC[type(node.op)], self.value(node.left), self.value(node.right))
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self.value(p.value if isinstance(p, ast.FormattedValue) else p)) for p in node.values)
        raise Unreadable(node)

    @staticmethod
    def _calculated(node: ast.expr, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        try:
            return function(left, right)
        except (TypeError, ValueError, ZeroDivisionError):
            raise Unreadable(node) from None

    def _is_parsed(self, node: ast.expr) -> bool:
        """Whether this is what argparse made of the command line."""
        values = [value for _, value in self.assigned.get(ast.unparse(node), [])]
        return any(isinstance(value, ast.Call) and self.last(value) == "parse_args" for value in values)

    def _default_of_option(self, node: ast.Attribute) -> Any:
        call = self._options.get(node.attr)
        given = {k.arg: k.value for k in call.keywords} if call else {}
        flag = "action" in given and self.value(given["action"]) in ("store_true", "store_false")
        if call is None or ("default" not in given and not flag):
            raise Unreadable(node)
        value = self.value(given["default"]) if "default" in given else self.value(given["action"]) == "store_false"
        self.assumed.append(ast.unparse(node))
        return value

    def last(self, call: ast.Call) -> str:
        """The last part of the name of what is called, also of a method of something without a name."""
        return self.dotted(call.func).rpartition(".")[2] or str(getattr(call.func, "attr", ""))

    def subclasses(self, name: str) -> set[str]:
        """Classes of the script that inherit from the class ``name``."""
        classes = [node for node in self.top.values() if isinstance(node, ast.ClassDef)]
        return {c.name for c in classes if name in {self.dotted(base).rpartition(".")[2] for base in c.bases}}

    def modules(self) -> set[str]:
        """Every module that it imports, or imports from."""
        nodes = list(ast.walk(self.tree))
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}

    def work_at_import(self) -> Iterator[int]:
        """Lines that would start to work if the script were imported: calls outside of functions and of the guard."""
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        for statement in self.tree.body:
            if not isinstance(statement, definitions) and not is_guard(statement):
                calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
                yield from (call.lineno for call in calls if self.last(call) in WORKS)

    def extracted(self, names: list[str]) -> str:
        """The definitions of ``names`` and all of the script's own that they use, as a module of its own."""
        kinds = (
            ast.Import,
            ast.ImportFrom,
            ast.Assign,
            ast.AnnAssign,
            ast.FunctionDef,
            ast.AsyncFunctionDef,
            ast.ClassDef,
        )
        defines = {name: node for node in self.tree.body if isinstance(node, kinds) for name in defined(node)}
        needed: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in defines and name not in needed:
                needed.add(name)
                used = [n.id for n in ast.walk(defines[name]) if isinstance(n, ast.Name)]
                waiting += used
        nodes = [node for node in self.tree.body if needed & set(defined(node))]
        lines, parts = self.text.splitlines(), []
        for node in nodes:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            parts.append("\n".join(lines[first - 1 : node.end_lineno]))
        return "\n\n".join(parts) + "\n"


def defined(node: ast.AST) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []


def dests(call: ast.Call) -> list[str]:
    """The attribute that ``add_argument`` fills; none if it is not written down."""
    named = [k.value for k in call.keywords if k.arg == "dest"] or call.args
    names = [str(node.value) for node in named if isinstance(node, ast.Constant)]
    long = [name for name in names if name.startswith("--")] or names
    return [name.lstrip("-").replace("-", "_") for name in long[:1]]


def name_of(call: ast.Call) -> str:
    """What is called, as it is written."""
    return ast.unparse(call.func)


def unreadable(node: ast.AST) -> Any:
    """Raise ``Unreadable`` where an expression is wanted."""
    raise Unreadable(node)


def is_guard(node: ast.AST) -> bool:
    """Whether this is ``if __name__ == "__main__"``."""
    return isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ ==")
