"""Functions of a notebook or script as a file: what ``train`` does with plain functions, so that other processes can call them.

A function that a file defines is named by that file. One of a notebook or of the script itself is written out with all that
it uses: other such functions, imported names, and values that can be written as literals. Nothing is pickled: the file can be
read, and a resumed run finds it again.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from shared.errors import InputError


def write_functions(functions: Sequence[Callable[..., Any]], path: Path) -> dict[Callable[..., Any], str]:
    """``{function: "file.py:name"}``; those that no importable file defines are written to ``path``.

    Raises ``InputError`` E301 for a function that uses what cannot be written down.
    """
    names: dict[Callable[..., Any], str] = {}
    writer = _Writer()
    for function in functions:
        home = _home(function)
        if home is None:
            writer.add(function)
        names[function] = f"{home or path}:{function.__name__}"
    if writer.parts:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(writer.text(), encoding="utf-8")
    return names


def _home(function: Callable[..., Any]) -> Path | None:
    """The file that defines ``function`` at its top level, and may be imported: not the script that runs now."""
    module = inspect.getmodule(function)
    file = getattr(module, "__file__", None)
    if module is None or file is None or module.__name__ == "__main__" or "<locals>" in function.__qualname__:
        return None
    return Path(file).resolve()


class _Writer:
    """Source text in an order in which it can run: what is used comes before who uses it."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        """Name -> the text that defines it."""
        self._under_way: set[str] = set()

    def text(self) -> str:
        """The whole file."""
        head = '"""Reward functions, written by launch.train from the functions that it was given."""\n\n'
        return head + "\n".join(self.parts.values())

    def add(self, function: Callable[..., Any]) -> None:
        """Write ``function`` and everything that it uses."""
        if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
            raise _refused(function, "a lambda or an object", "a function defined with def")
        name = function.__name__
        if name in self.parts or name in self._under_way:
            return
        self._under_way.add(name)
        try:
            source = textwrap.dedent(inspect.getsource(function))
        except (OSError, TypeError):
            raise _refused(function, "no source text", "a function defined in a cell or a file") from None
        for used, value in self._used(function, source).items():
            self._write(function, used, value)
        self.parts[name] = source

    def _used(self, function: FunctionType, source: str) -> dict[str, Any]:
        """Global and enclosing names that the text of ``function`` reads, with what they mean."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        known = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
        read = [node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        return {name: known[name] for name in dict.fromkeys(read) if name in known and name != function.__name__}

    def _write(self, function: FunctionType, name: str, value: Any) -> None:
        if name in self.parts or getattr(builtins, name, self) is value:
            return
        if isinstance(value, ModuleType):
            self.parts[name] = f"import {value.__name__} as {name}\n"
        elif isinstance(value, re.Pattern):
            self.parts[name] = f"import re\n\n{name} = re.compile({value.pattern!r}, {value.flags})\n"
        elif isinstance(value, FunctionType) and _home(value) is None:
            self.add(value)
        elif callable(value) and _importable(value):
            self.parts[name] = f"from {value.__module__} import {value.__name__} as {name}\n"
        elif _is_literal(value):
            self.parts[name] = f"{name} = {value!r}\n"
        else:
            raise _refused(function, f"{name}, a {type(value).__name__}", "functions, modules and literals")


def _importable(value: Any) -> bool:
    module = getattr(value, "__module__", "__main__")
    return module not in ("__main__", None) and "." not in getattr(value, "__qualname__", ".")


def _is_literal(value: Any) -> bool:
    """Whether its text is the value again."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _refused(function: Any, found: str, expected: str) -> InputError:
    name = getattr(function, "__name__", repr(function))
    fix = "put it into a file of its own and import it from there"
    return InputError("E301", "reward cannot be passed on", f"rewards:{name}", f"it uses {found}", expected, fix)
