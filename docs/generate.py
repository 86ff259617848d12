"""The reference pages that come from importing Millrace: settings, choices by name, commands, the Python API."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

WIDTH = "96"


def prose(text: str | None) -> str:
    """A docstring as Markdown."""
    text = inspect.cleandoc(text or "").replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<*\[\]])", r"\\\1", p) for p in parts)


def cell(text: str) -> str:
    """``text`` inside a table."""
    return " ".join(text.split()).replace("|", "\\|")


# --- settings ---


def settings() -> str:
    """Every setting by section, each under a heading of its own, so that search and links find it."""
    from shared.config import Config

    keys = all_settings()
    lines, section = [], ""
    for key, field in keys.items():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += [f"## {section}", "", prose(Config.model_fields[section].annotation.__doc__), ""]
        facts = f"default **{_default(field)}** · {kind_of(field.annotation, field.metadata)}"
        lines += [f"### `{key}` {{ #{anchor(key)} }}", "", facts, "", _linked(prose(field.description), keys, key), ""]
    return "\n".join(lines)


def all_settings() -> dict[str, Any]:
    """Every dotted key with its field; those of the tables inside lists too, as ``reward.functions[].weight``."""
    from shared.config_data import Filter, Source
    from shared.config_loader import known_keys
    from shared.config_reward import RewardFunction

    inner = {"data.train": Source, "reward.functions": RewardFunction}
    keys: dict[str, Any] = {}
    for key, field in known_keys().items():
        keys[key] = field
        for name, below in (inner[key].model_fields if key in inner else {}).items():
            keys[f"{key}[].{name}"] = below
            if name == "filters":
                keys |= {f"{key}[].{name}[].{part}": f for part, f in Filter.model_fields.items()}
    return keys


def anchor(key: str) -> str:
    """The setting's place on the page."""
    return key.replace("[]", "")


def _linked(text: str, keys: Mapping[str, Any], own: str) -> str:
    """``text`` with every other setting that it names as a link."""
    pattern = re.compile(
        rf"(?<![\w.\[`])({'|'.join(re.escape(k) for k in sorted(keys, key=len, reverse=True))})(?![\w\[])"
    )
    return pattern.sub(lambda m: m[1] if m[1] == own else f"[`{m[1]}`](#{anchor(m[1])})", text)


def _default(field: Any) -> str:
    if field.is_required():
        return "none: it has to be set"
    value = field.get_default(call_default_factory=True)
    return "not set" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        return _toml(value.name) if hasattr(value, "name") else _toml(value.model_dump())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)


def kind_of(annotation: Any, metadata: Any = ()) -> str:
    """A type in words."""
    from shared.config_algorithm import Choice

    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(inner[0], inner[1:])
    if origin is typing.Literal:
        return " or ".join(f"`{_toml(value)}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        names = [kind_of(one) for one in inner if one is not type(None)]
        return " or ".join(dict.fromkeys(names)) + (", or left out" if type(None) in inner else "")
    if origin is list:
        return f"list of {kind_of(inner[0])}" if inner else "list"
    if origin is dict:
        return "table"
    names = {int: "integer", float: "number", bool: "`true` or `false`", str: "text"}
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return "a name, or a table of name and arguments"
    return names.get(annotation, "table") + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    told = []
    for item in metadata:
        if type(item).__name__ == "FieldInfo":
            told.append(_bounds(item.metadata).removeprefix(", "))
        for name, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            if (value := getattr(item, name, None)) is not None:
                told.append(f"{word} {value:g}")
    told = [t for t in told if t]
    return f", {', '.join(told)}" if told else ""


# --- choices by name ---


def choices() -> str:
    """What the settings that are chosen by name can be, with the arguments of each and their defaults."""
    from launch.early_stopping import EARLY_STOPPING
    from launch.sinks import SINKS
    from learner import advantages, coefficients, kl, losses, policy_losses, rejection, schedules
    from rollout.rewards import BUILTINS

    tables: list[tuple[str, str, Mapping[str, Callable[..., Any]]]] = [
        ("Advantages", "algorithm.advantage", advantages.ADVANTAGES),
        ("Policy losses", "algorithm.policy_loss", policy_losses.POLICY_LOSSES),
        ("Aggregations", "algorithm.aggregation", losses.AGGREGATIONS),
        ("KL estimators", "algorithm.kl.estimator", kl.KL_ESTIMATORS),
        ("KL controls", "algorithm.kl.control", coefficients.KL_CONTROLS),
        ("Rejections", "algorithm.rejection", rejection.REJECTIONS),
        ("Entropy bonuses", "algorithm.entropy", coefficients.ENTROPY_BONUSES),
        ("Schedules", "learner.schedule", schedules.SCHEDULES),
        ("Early stopping", "eval.early_stopping", EARLY_STOPPING),
        ("Sinks", "run.sinks", SINKS),
        ("Built-in rewards", "reward.functions", BUILTINS),
    ]
    lines = []
    for title, key, table in tables:
        lines += [f"## {title}", "", f"For [`{key}`](settings.md#{key}).", ""]
        lines += ["| name | arguments | what it is |", "|---|---|---|"]
        lines += [f"| `{name}` | {cell(_arguments(entry))} | {cell(_first(entry))} |" for name, entry in table.items()]
        lines.append("")
    return "\n".join(lines)


def _arguments(entry: Callable[..., Any]) -> str:
    from shared.choices import SUPPLIED

    told = []
    for name, p in inspect.signature(entry).parameters.items():
        if p.kind is p.KEYWORD_ONLY and name not in SUPPLIED:
            told.append(f"`{name}`" if p.default is p.empty else f"`{name}` = `{_argument(p.default)}`")
        if p.kind is p.VAR_KEYWORD and name == "init":
            told.append("any more of the library's own")
    return ", ".join(told) or "none"


def _argument(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return "none" if value is None else _toml(value)


def _first(entry: Callable[..., Any]) -> str:
    return prose((inspect.getdoc(entry) or "").split("\n\n")[0])


# --- commands ---


def commands() -> str:
    """The ``--help`` of every verb."""
    from launch.cli import GROUPS

    lines = []
    for title, verbs in GROUPS.items():
        lines += [f"## {title.capitalize()}", ""]
        for verb, (entry, meaning) in verbs.items():
            lines += [f"### `millrace {verb}` {{ #{verb} }}", "", f"{meaning[0].upper()}{meaning[1:]}.", ""]
            for parser in parsers_of(verb, entry):
                lines += ["```text", help_of(parser), "```", ""]
    return "\n".join(lines)


def parsers_of(verb: str, entry: str) -> list[argparse.ArgumentParser]:
    """The options of a verb; of ``bench``, those of each workload."""
    module, _, function = entry.partition(":")
    found = importlib.import_module(module)
    if verb == "bench":
        return [found.parser(workload) for workload in found.WORKLOADS]
    return [getattr(found, "resume_parser" if function == "resume" else "parser")()]


def help_of(parser: argparse.ArgumentParser) -> str:
    """Its help without the settings, which have a page of their own."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        text = parser.format_help()
    finally:
        del os.environ["COLUMNS"]
        os.environ.update({} if before is None else {"COLUMNS": before})
    return text.partition("\nsettings, in the file or")[0].rstrip()


# --- Python ---

API = [
    ("launch", ("train", "train_steps", "Run")),
    ("shared.config_loader", ("load_config",)),
    ("learner.learner", ("Learner",)),
    ("learner.passes", ("Given",)),
    ("shared.types", ("Prompt", "Completion", "VersionSpan", "RolloutGroup", "StepReport")),
    ("rollout.rewards", ("text_of",)),
    ("launch.sinks", ("Sink",)),
    ("shared.errors", ("MillraceError", "InputError")),
]
METHODS = {"Learner": ("__init__", "train_step", "sequence_logprobs", "save")}


def python_api() -> str:
    """Signatures and docstrings of what is meant to be imported."""
    lines = []
    for module, names in API:
        lines += [f"## `{module}`", ""]
        for name in names:
            lines += _described(getattr(importlib.import_module(module), name), name)
    return "\n".join(lines)


def _described(thing: Any, name: str) -> list[str]:
    lines = [f"### `{name}` {{ #{name.lower()} }}", ""]
    if inspect.isclass(thing):
        lines += [prose(thing.__doc__), ""]
        for field, kind, text in _fields(thing):
            lines += [f"- `{field}`: `{kind}`{'. ' + prose(text) if text else ''}"]
        public = [
            m for m, f in vars(thing).items() if not m.startswith("_") and (callable(f) or isinstance(f, property))
        ]
        for method in METHODS.get(name, public):
            member = vars(thing)[method]
            if isinstance(member, property):
                lines += ["", f"- `{method}`: {prose(member.__doc__)}"]
            elif inspect.isfunction(member):
                lines += ["", *_signature(member, f"{name}.{method}" if method != "__init__" else name)]
                lines += ["", prose(member.__doc__)]
        return [*lines, ""]
    return [*lines, *_signature(thing, name), "", prose(thing.__doc__), ""]


def _signature(function: Callable[..., Any], name: str) -> list[str]:
    source = textwrap.dedent(inspect.getsource(function))
    node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    arguments = [a for a in ast.unparse(node.args).split(", ") if a != "self"]
    flat = f"{name}({', '.join(arguments)})"
    if len(flat) > 90:
        flat = f"{name}(\n" + "".join(f"    {a},\n" for a in _split_arguments(node.args)) + ")"
    return ["```python", flat + (f" -> {ast.unparse(node.returns)}" if node.returns else ""), "```"]


def _split_arguments(args: ast.arguments) -> list[str]:
    defaults: list[ast.expr | None] = [None] * (len(args.args) - len(args.defaults)) + list(args.defaults)
    told = []
    for a, default in zip(args.args, defaults, strict=True):
        kind = f": {ast.unparse(a.annotation)}" if a.annotation else ""
        told.append(f"{a.arg}{kind}" + (f" = {ast.unparse(default)}" if default else ""))
    return [t for t in told if t != "self"]


def _fields(thing: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and docstring of every annotated field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    assert isinstance(body, ast.ClassDef)
    following = [*body.body[1:], None]
    for node, after in zip(body.body, following, strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield node.target.id, ast.unparse(node.annotation), str(text)
