"""Functions of a notebook or script as a file: what ``train`` does with plain functions, so that other processes can call them.

A function that a file defines is named by that file. One of a notebook or of the script itself is written out with all that
it uses: other such functions, imported names, and values that can be written as literals. Nothing is pickled: the file can be
read, and a resumed run finds it again.
"""

from __future__ import annotations

import ast
import builtins
import dis
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from shared.errors import InputError


def write_functions(functions: Sequence[Callable[..., Any]], folder: Path) -> dict[Callable[..., Any], str]:
    """``{function: "file.py:name"}``; those that no importable file defines are written to a file in ``folder``.

    It is named after its content: another run that lives there keeps its own. Raises ``InputError`` E301 for a function
    that uses what cannot be written down.
    """
    writer = _Writer()
    homes = {function: _home(function) for function in functions}
    for function, home in homes.items():
        if home is None:
            writer.add(function)
    written = write_once(folder, "rewards-{}.py", writer.text()) if writer.parts else None
    return {function: f"{home or written}:{function.__name__}" for function, home in homes.items()}


def write_once(folder: Path, name: str, text: str) -> Path:
    """A file in ``folder`` with ``text``, which is never written over: ``{}`` of its ``name`` is a digest of it."""
    path = folder / name.format(hashlib.sha256(text.encode()).hexdigest()[:8])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _home(function: Callable[..., Any]) -> Path | None:
    """The file that defines ``function`` at its top level, and may be imported: not the script that runs now.

    Raises ``InputError`` E301 for what is neither function nor class.
    """
    if not isinstance(function, FunctionType | type):
        raise _refused(function, "no source text of its own", "a function defined with def")
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
        self._values: dict[str, Any] = {}
        """Name -> what it means, of all that is written or about to be."""

    def text(self) -> str:
        """The whole file."""
        head = '"""Reward functions, written by launch.train from the functions that it was given."""\n\n'
        return head + "\n".join(self.parts.values())

    def add(self, function: Callable[..., Any]) -> None:
        """Write ``function`` and everything that it uses."""
        if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
            raise _refused(function, "a lambda or an object", "a function defined with def")
        name = function.__name__
        under_way = name in self._values
        if self._is_known(function, name, function) or under_way:
            return
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
        read = [*_read_outside(source), *function.__code__.co_freevars, *_globals_of(function.__code__)]
        names = [name for name in dict.fromkeys(read) if name in known and not name.startswith("__")]
        return {name: known[name] for name in names if known[name] is not function}

    def _is_known(self, function: FunctionType, name: str, value: Any) -> bool:
        """Whether ``name`` is there already. Raises ``InputError`` E301 if it means something else there."""
        known = self._values.setdefault(name, value)
        if known is not value and (isinstance(value, FunctionType) or type(known) is not type(value) or known != value):
            raise _refused(function, f"{name}, which means something else to another function", "one meaning a name")
        return name in self.parts

    def _write(self, function: FunctionType, name: str, value: Any) -> None:
        if getattr(builtins, name, self) is value:
            return
        if isinstance(value, FunctionType) and _home(value) is None:
            self.add(value)
        if (isinstance(value, FunctionType) and name == value.__name__) or self._is_known(function, name, value):
            return
        if isinstance(value, ModuleType):
            self.parts[name] = f"import {value.__name__} as {name}\n"
        elif isinstance(value, re.Pattern):
            self.parts[name] = f"import re\n\n{name} = re.compile({value.pattern!r}, {value.flags})\n"
        elif isinstance(value, FunctionType) and _home(value) is None:
            self.parts[name] = f"{name} = {value.__name__}\n"
        elif callable(value) and _importable(value):
            self.parts[name] = f"from {value.__module__} import {value.__name__} as {name}\n"
        elif _is_literal(value):
            self.parts[name] = f"{name} = {value!r}\n"
        else:
            raise _refused(function, f"{name}, a {type(value).__name__}", "functions, modules and literals")


def _read_outside(source: str) -> list[str]:
    """Names that a definition reads before it is called: in decorators, defaults and annotations."""
    (definition,) = ast.parse(source).body
    outside = [part for name, part in ast.iter_fields(definition) if name in ("decorator_list", "args", "returns")]
    nodes = [node for part in outside for node in (part if isinstance(part, list) else [part]) if node is not None]
    return [found.id for node in nodes for found in ast.walk(node) if isinstance(found, ast.Name)]


def _globals_of(code: CodeType) -> list[str]:
    """Names of the module that ``code``, and what it defines, reads."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return own + [name for one in inner for name in _globals_of(one)]


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
