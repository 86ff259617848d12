"""A Python script as a syntax tree: what its names and expressions stand for, as far as that is written down.

``script`` asks it. Nothing of the script is ever executed or imported: literals, names assigned to them, simple arithmetic
and defaults of argparse are read, all else raises ``Unreadable``. A name that is assigned under a condition is unreadable.
"""

from __future__ import annotations

import ast
import contextlib
import operator
import symtable
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.errors import InputError, one_line

BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.Match)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MOVES = {"to", "cuda", "cpu", "eval", "train", "requires_grad_", "half", "float", "bfloat16"}
"""Methods of a model that return it."""
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
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
            symtable.symtable(text, path.name, "exec")  # Refuses what the parser alone lets pass.
        except (SyntaxError, ValueError, RecursionError) as error:
            place = f"{path.name}:{getattr(error, 'lineno', None) or 1}"
            raise InputError("E105", "cannot parse script", place, str(error), "valid Python", "correct it") from None
        nodes = list(ast.walk(self.tree))
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self.top = {node.name: node for node in self.tree.body if isinstance(node, DEFINITIONS)}
        self.imports: dict[str, str] = {}
        """Names that imports bind, and what they stand for."""
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                self.imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                self.imports |= {a.asname or a.name.split(".")[0]: a.name for a in node.names if a.asname}
                self.imports |= {a.name.split(".")[0]: a.name.split(".")[0] for a in node.names if not a.asname}
        self.assigned: dict[str, list[tuple[int, ast.expr | None]]] = {}
        """Line and value of every assignment; no value under a condition."""
        self._collect(self.tree, False)
        self.assumed: list[str] = []
        """Options of the script's own command line whose defaults were taken."""

    def _collect(self, node: ast.AST, conditional: bool) -> None:
        for child in ast.iter_child_nodes(node):
            targets: list[ast.expr] = []
            if isinstance(child, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                known = not conditional and not isinstance(child, ast.AugAssign)
                for name, value in [pair for target in targets for pair in _unpacked(target, child.value)]:
                    self.assigned.setdefault(ast.unparse(name), []).append((child.lineno, value if known else None))
            self._collect(child, conditional or (isinstance(child, BRANCHES) and not is_guard(child)))

    def dotted(self, node: ast.AST) -> str:
        """The full name of what an expression names, aliases resolved; empty if it is no name."""
        if isinstance(node, ast.Name):
            return self.imports.get(node.id, node.id)
        before = self.dotted(node.value) if isinstance(node, ast.Attribute) else ""
        return f"{before}.{node.attr}" if isinstance(node, ast.Attribute) and before else ""

    def last(self, node: ast.AST) -> str:
        """The last part of the name of what is called, also of a method of something without a name; else empty."""
        if not isinstance(node, ast.Call):
            return ""
        return self.dotted(node.func).rpartition(".")[2] or str(getattr(node.func, "attr", ""))

    def expression(self, node: ast.expr) -> ast.expr:
        """What ``node`` stands for: itself, or what its name was last assigned before. Raises ``Unreadable``."""
        if not isinstance(node, ast.Name):
            return node
        known = self.assigned.get(node.id, [])
        here = (node.lineno, node.col_offset)
        before = [v for _, v in known if v is not None and (v.end_lineno or 0, v.end_col_offset or 0) <= here]
        if not before or any(value is None for _, value in known):
            raise Unreadable(node)
        return self.expression(before[-1])

    @contextlib.contextmanager
    def called(self, call: ast.Call) -> Iterator[ast.expr]:
        """Yield what a function of the script returns; its parameters stand for what ``call`` gives. Raises ``Unreadable``."""
        function = self.functions.get(self.dotted(call.func))
        ends = [node for node in ast.walk(function) if isinstance(node, ast.Return)] if function else []
        if function is None or len(ends) != 1 or ends[0].value is None or any(k.arg is None for k in call.keywords):
            raise Unreadable(call)
        names, defaults = [a.arg for a in function.args.args], function.args.defaults
        given = dict(zip(names[len(names) - len(defaults) :], defaults)) | dict(zip(names, call.args))
        given |= {k.arg: k.value for k in call.keywords if k.arg}
        assigned, functions, line = self.assigned, self.functions, function.body[0].lineno
        self.assigned = dict(assigned)
        for name, node in given.items():
            value = ast.Constant(self.value(node), lineno=line, col_offset=0, end_lineno=line, end_col_offset=0)
            self.assigned[name] = [(line, value)]
        self.functions = {name: one for name, one in functions.items() if one is not function}  # It cannot call itself.
        try:
            yield ends[0].value
        finally:
            self.assigned, self.functions = assigned, functions

    def unmoved(self, node: ast.expr) -> tuple[ast.expr, str]:
        """Return the model that ``node`` moves to a device, and the call, if any, that changes its type. Raises ``Unreadable``."""
        made, rounded = self.expression(node), ""
        while isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute) and made.func.attr in MOVES:
            types = [ast.unparse(one) for one in made.args if self.dotted(one).startswith("torch.")]
            if types or made.func.attr in ("half", "float", "bfloat16"):
                rounded = f".{made.func.attr}({', '.join(types)})"
            made = self.expression(made.func.value)
        return made, rounded

    def value(self, node: ast.expr) -> Any:
        """The value of an expression. Raises ``Unreadable``."""
        try:
            return self._value(self.expression(node))
        except (TypeError, ArithmeticError, RecursionError):
            raise Unreadable(node) from None

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [self.value(item) for item in node.elts]
            case ast.Dict():
                return {self.value(k) if k else unreadable(node): self.value(v) for k, v in zip(node.keys, node.values)}
            case ast.Call(func=ast.Name("dict"), args=[]):
                return self.named(node)
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand)
            case ast.UnaryOp(op=ast.Not()):
                return not self.value(node.operand)
            case ast.BinOp():
                return self._calculated(node)
            case ast.JoinedStr():
                return "".join(
                    str(self.value(p.value if isinstance(p, ast.FormattedValue) else p)) for p in node.values
                )
            case ast.Attribute():
                name = self.dotted(node)
                return name.removeprefix("torch.") if name.startswith("torch.") else self._default_of_option(node)
        raise Unreadable(node)

    def _calculated(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        kinds, joined = {type(left), type(right)}, isinstance(node.op, ast.Add)
        if type(node.op) not in ARITHMETIC or not (kinds <= {int, float} or (kinds == {str} and joined)):
            raise Unreadable(node)
        return ARITHMETIC[type(node.op)](left, right)

    def _default_of_option(self, node: ast.Attribute) -> Any:
        """What argparse takes for ``args.name`` where the command line has no such option."""
        if self.last(self.expression(node.value)) != "parse_args":
            raise Unreadable(node)
        for call in self.calls if self.dotted(node) else []:
            flags = [str(getattr(a, "value", "")).lstrip("-").replace("-", "_") for a in call.args]
            if self.last(call) == "add_argument" and node.attr in flags:
                given = {k.arg: k.value for k in call.keywords}
                switch = "action" in given and self.value(given["action"]) == "store_true"
                value = False if switch else self.value(given.get("default") or unreadable(node))
                self.assumed.append(ast.unparse(node))
                return value
        raise Unreadable(node)

    def named(self, call: ast.Call) -> dict[str, Any]:
        """The keyword arguments of a call. Raises ``Unreadable``."""
        return {k.arg or unreadable(call): self.value(k.value) for k in call.keywords}

    def extracted(self, names: list[str]) -> str:
        """The definitions of ``names`` and all of the script's own that they use, as a module of its own."""
        statements = [(node, set(defined(node))) for node in self.tree.body]
        needed: set[str] = set()
        waiting = set(names)
        while waiting:
            needed |= waiting
            waiting = {name for node, bound in statements if bound & waiting for name in used(node) - bound} - needed
        lines, parts = self.text.split("\n"), []
        for node in [n for n, bound in statements if bound & needed or getattr(n, "module", "") == "__future__"]:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            parts.append("\n".join(lines[first - 1 : node.end_lineno]))
        return "\n\n".join(parts) + "\n"


def _unpacked(target: ast.expr, value: ast.expr | None) -> list[tuple[ast.expr, ast.expr | None]]:
    """Return the names that an assignment binds, each with its value: an item, where it takes a sequence apart."""
    if not isinstance(target, ast.Tuple | ast.List) or value is None:
        return [(target, value)]
    if any(isinstance(one, ast.Starred) for one in target.elts):
        return [(one.value if isinstance(one, ast.Starred) else one, None) for one in target.elts]
    if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
        return list(zip(target.elts, value.elts))
    items = [ast.Subscript(value, ast.Constant(i)) for i in range(len(target.elts))]
    return [(one, ast.copy_location(item, value)) for one, item in zip(target.elts, items)]


def defined(node: ast.AST) -> list[str]:
    """The names that a statement binds, its blocks included; none of what only a script that is run does."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    if isinstance(node, SCOPES) or is_guard(node):
        return []
    return [name for child in ast.iter_child_nodes(node) for name in defined(child)]


def used(node: ast.AST) -> set[str]:
    """The names of the module in a statement; what is local to a function is none of them."""
    tables = [symtable.symtable(ast.unparse(node), "statement", "exec")]
    names = set(tables[0].get_identifiers())
    while tables:
        table = tables.pop()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return names


def is_guard(node: ast.AST) -> bool:
    """Whether it is ``if __name__ == "__main__":``."""
    return isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ ==")


def unreadable(node: ast.AST) -> Any:
    """Raise ``Unreadable`` where an expression is wanted."""
    raise Unreadable(node)
