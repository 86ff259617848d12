"""Reads from our source every call of a library's function or method, and says which of them the library does not take.

A new call is covered by itself. What a name like ``self._llm`` stands for is in ``RECEIVERS``, one line a library object;
imported names need no line.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("vllm", "deepspeed", "torch.distributed", "torch.multiprocessing", "torch.cuda", "ray")
ENGINES = ("vllm.v1.engine.async_llm:AsyncLLM", "rollout.in_process:InProcessLLM")
RECEIVERS: dict[str, dict[str, tuple[str, ...]]] = {
    "rollout/engine.py": {
        "self._llm": ENGINES,
        "self._llm.engine_core": ("vllm.v1.engine.core_client:AsyncMPClient", "rollout.in_process:InProcessLLM"),
        "result": ("vllm.outputs:RequestOutput",),
        "output": ("vllm.outputs:CompletionOutput",),
    },
    "rollout/vllm_requests.py": {"output": ("vllm.outputs:CompletionOutput",)},
    "rollout/in_process.py": {
        "self._llm": ("vllm.v1.engine.llm_engine:LLMEngine",),
        "self._llm.engine_core": ("vllm.v1.engine.core_client:InprocClient",),
        "self._core": ("vllm.v1.engine.core:EngineCore",),
        "output": ("vllm.outputs:RequestOutput",),
    },
    "rollout/weight_receiver.py": {
        "engine": ("rollout.weight_receiver:ShmWeightTransferEngine",),
    },
    "learner/device_senders.py": {
        "self._transfer": ("vllm.distributed.weight_transfer.nccl_engine:NCCLTrainerWeightTransferEngine",),
    },
    "learner/learner.py": {"self.engine": ("deepspeed:DeepSpeedEngine",)},
    "learner/learner_state.py": {"learner.engine": ("deepspeed:DeepSpeedEngine",)},
    "learner/reference.py": {"self._engine": ("deepspeed:DeepSpeedEngine",)},
}


def sources() -> dict[str, str]:
    """Return our files that name a library, by path from the root."""
    paths = (path for package in ("rollout", "learner", "launch", "shared") for path in (ROOT / package).rglob("*.py"))
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}
    return {path: text for path, text in texts.items() if path in RECEIVERS or any(map(text.__contains__, LIBRARIES))}


def problems(path: str, text: str) -> list[str]:
    """Return what does not exist, or does not bind, of the uses of libraries in ``text``, a line each."""
    tree, found = ast.parse(text), []
    names, broken = _imported(tree)
    found += broken
    receivers = RECEIVERS.get(path, {})
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        for owner, thing in _meant(node, names, receivers):
            wrong = _missing(owner, node) if thing is None else _unbound(thing, called.get(id(node)), owner)
            found += [f"{path}:{node.lineno} {ast.unparse(node)}: {wrong}"] if wrong else []
    return found


def _imported(tree: ast.AST) -> tuple[dict[str, Any], list[str]]:
    """Names that stand for something of a library, wherever they are imported; and imports of what is not there."""
    names: dict[str, Any] = {}
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _of_a_library(str(node.module)):
            for alias in node.names:
                try:
                    names[alias.asname or alias.name] = resolve(f"{node.module}:{alias.name}")
                except (ImportError, AttributeError) as error:
                    missing.append(f"from {node.module} import {alias.name}: {error}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("vllm", "deepspeed", "torch", "ray"):
                    names[alias.name.split(".")[0]] = importlib.import_module(alias.name.split(".")[0])
    return names, missing


def _of_a_library(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in LIBRARIES)


@functools.cache
def resolve(name: str) -> Any:
    """Return what ``module:attribute`` names; the attribute may be a module."""
    module, attribute = name.split(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        return importlib.import_module(f"{module}.{attribute}")


def _meant(node: ast.Name | ast.Attribute, names: dict[str, Any], receivers: Any) -> Iterator[tuple[str, Any]]:
    """``(owner, object)`` for everything that ``node`` may be; the object is None if the owner has none of that name."""
    if isinstance(node, ast.Name):
        if node.id in names and callable(names[node.id]):
            yield node.id, names[node.id]
        return
    text = ast.unparse(node)
    if text in receivers:
        return
    for kind in receivers.get(ast.unparse(node.value), ()):
        yield kind, _attribute(resolve(kind), node.attr)
    first, *rest = text.split(".")
    if first not in names or not all(part.isidentifier() for part in rest) or not inspect.ismodule(names[first]):
        return
    thing = names[first]
    if thing.__name__ == "torch" and not _of_a_library(f"torch.{rest[0]}"):
        return
    for part in rest:
        if not inspect.ismodule(thing):
            return
        thing = getattr(thing, part, None)
    yield first, thing


def _attribute(kind: type, name: str) -> Any:
    """A method or another attribute of ``kind``; True for one that instances alone have."""
    static = inspect.getattr_static(kind, name, None)
    if static is not None:
        return static if isinstance(static, staticmethod | property) else getattr(kind, name)
    if any(name in getattr(base, "__annotations__", {}) for base in kind.__mro__):
        return True
    own = (inspect.getsource(base) for base in kind.__mro__ if base.__module__ not in ("builtins", "abc", "typing"))
    return True if any(f"self.{name}" in text for text in own) else None


def _missing(owner: str, node: ast.Name | ast.Attribute) -> str:
    return f"{owner} has no {node.attr if isinstance(node, ast.Attribute) else node.id}"


def _unbound(thing: Any, call: ast.Call | None, owner: str) -> str:
    """Why the arguments of ``call`` do not fit ``thing``; empty if they do."""
    if call is None or thing is True or isinstance(thing, property):
        return ""
    method = ":" in owner and not inspect.ismethod(thing) and not isinstance(thing, staticmethod)
    try:
        signature = inspect.signature(thing.__func__ if isinstance(thing, staticmethod) else thing)
    except (TypeError, ValueError):  # Written in C.
        return ""
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    starred |= any(keyword.arg is None for keyword in call.keywords)
    given = [None] * (method + sum(not isinstance(argument, ast.Starred) for argument in call.args))
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    try:
        (signature.bind_partial if starred else signature.bind)(*given, **keywords)
    except TypeError as error:
        return f"{owner}: {error} in {signature}"
    return ""
