"""Reads a configuration: TOML files from left to right, then ``--section.field value`` overrides, validated once.

A file and the command line get the same checks and the same one-line errors; all problems of one pass are reported
together, each with the key as the user wrote it and the nearest known one.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from shared.config import Config
from shared.config_algorithm import Section
from shared.config_checks import disagreements
from shared.config_names import advice
from shared.config_reward import RewardFunction
from shared.errors import InputError, nearest, raise_all

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "configs" / "recipes"


def load_config(files: list[str], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read TOML ``files`` left to right, apply ``overrides`` (dotted key to text, or to a value) and validate.

    Raises ``InputError`` E105 for an unreadable file and ``InputErrors`` with every E101-E104, E106 and E108 found.
    """
    table: dict[str, Any] = {}
    for name in files:
        _merge(table, _read_toml(config_file(name)))
    return config_of(table, overrides, config_file(files[-1]).name if files else "command line")


def config_of(given: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, origin: str = "config") -> Config:
    """``given``, as a TOML file would have it, with ``overrides``; ``origin`` is what messages call it. Raises as above."""
    table, overrides = copy.deepcopy(dict(given)), overrides or {}
    place = f"{origin}:algorithm.recipe"
    if overrides.get("algorithm.recipe", "none") != "none":  # On the command line it replaces what the files say.
        table["algorithm"] = {"recipe": overrides["algorithm.recipe"]}
        place = "command line:--algorithm.recipe"
    table = _over_recipe(table, place) if overrides.get("algorithm.recipe") != "none" else table
    for key, value in overrides.items():
        _assign(table, key, value)
    for key, field in known_keys().items():
        *path, last = key.split(".")
        holder = _entry(table, path)
        if isinstance(holder, dict) and holder.get(last) == "none" and type(None) in get_args(field.annotation):
            holder[last] = None
    try:
        config = Config.model_validate(table)
    except ValidationError as error:
        places = {key: f"command line:--{key}" for key in overrides}
        raise_all([_explain(detail, origin, places) for detail in error.errors()] + _further(table, error, origin))
        raise
    raise_all(disagreements(config, origin))
    return config


def recipes() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _over_recipe(table: dict[str, Any], place: str) -> dict[str, Any]:
    """``table`` over the recipe that it names, if any. Raises ``InputError`` E107."""
    algorithm = table.get("algorithm")
    name = algorithm.get("recipe") if isinstance(algorithm, dict) else None
    if not isinstance(name, str):
        return table
    if name not in recipes():
        guess = nearest(name, recipes())
        expected, fix = f"one of {', '.join(recipes())}", f'"{guess}"' if guess else "choose one of these"
        raise InputError("E107", "unknown recipe", place, name, expected, fix)
    below = _read_toml(RECIPES / f"{name}.toml")
    _merge(below, table)
    return below


def config_file(name: str) -> Path:
    """The file that ``name`` means: itself, or else the shipped configuration of that name."""
    path = Path(name)
    return path if path.is_file() or path.suffix or path.name != name else shipped().get(name, path)


def shipped() -> dict[str, Path]:
    """The configurations that ship, by name; recipes are parts of one and not among them."""
    return {path.stem: path for path in sorted(RECIPES.parent.glob("*.toml"))}


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = {p.name: p for p in path.parent.glob("*.toml")} if path.parent.is_dir() else {}
        similar = nearest(path.name, [*there, *shipped()])
        fix = f"did you mean {there.get(similar, similar)}?" if similar else "check the path"
        raise InputError("E105", "cannot read config", str(path), "no such file", "a TOML file", fix)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        place, found = _toml_place(path, str(error))
        raise InputError("E105", "cannot parse config", place, found, "valid TOML", "correct that line") from None
    except OSError as error:
        raise InputError("E105", "cannot read config", str(path), str(error), "a file to read", "check it") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at offset {error.start}"
        raise InputError("E105", "cannot parse config", str(path), found, "UTF-8", "save it as UTF-8") from None


def _toml_place(path: Path, message: str) -> tuple[str, str]:
    """Where tomllib stopped, as file:line:column, and that line with what it says of it."""
    reason, _, where = message.removesuffix(")").partition(" (at ")
    lines = path.read_text(encoding="utf-8").splitlines() or [""]
    numbers = [int(word) for word in re.findall(r"\d+", where)]
    line, column = numbers if len(numbers) == 2 else (len(lines), len(lines[-1]) + 1)
    return f"{path}:{line}:{column}", f'"{lines[line - 1].strip()}" ({reason})'


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        old = into.get(key)
        # A new ``name`` chooses another function: its predecessor's arguments would not fit, so it replaces the table.
        if isinstance(value, dict) and isinstance(old, dict) and "name" not in value:
            _merge(old, value)
        else:
            into[key] = value


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(
                "E106", "bad override", f"command line:--{key}", f"{part} is not a table", "a known key", "see --help"
            )
    table[last] = _parsed(key, value) if isinstance(value, str) else value


def _parsed(key: str, text: str) -> Any:
    """``text``, as it stands on a command line, as a value of ``key``."""
    annotation = field_annotation(key)
    declared = "" if annotation is None else str(annotation)
    if "str" in declared and "list" not in declared and "dict" not in declared:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def field_annotation(key: str) -> Any | None:
    """The declared type of a dotted key, or None if there is no such field."""
    model: Any = Config
    for part in key.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return None
        model = fields[part].annotation
    return model


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key with its pydantic field, in declaration order."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


_EXPECTED = {
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than_equal": "a number <= {le:g}",
    "literal_error": "{expected}",
    "float_type": "a number",
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "too_short": "at least {min_length} entries",
    "string_too_short": "at least {min_length} character",
    "missing": "a value",
    "value_error": "{error}",
}


def _explain(detail: Any, origin: str, places: dict[str, str]) -> InputError:
    """One pydantic error as one of ours."""
    parts = _path(detail)
    key = ".".join(parts)
    written = next((k for k in places if k == key or k.startswith(key + ".")), None)
    overridden = places[written] if written else None
    place = overridden or f"{origin}:{key}"
    if detail["type"] == "extra_forbidden":
        parent, last = parts[:-1], parts[-1]
        siblings = [
            k[len(".".join([*parent, ""])) :].split(".")[0]
            for k in known_keys()
            if k.startswith(".".join([*parent, ""]) if parent else "")
        ]
        siblings = list(dict.fromkeys(siblings)) or list(RewardFunction.model_fields)
        guess = nearest(last, siblings)
        # Not of a table inside a list, nor of a whole section: there only the neighbours are near.
        single = written or not (isinstance(detail["input"], dict) or any(part.isdigit() for part in parts))
        fix = advice(written or key, known_keys(), "--{}" if overridden else "did you mean {}?") if single else ""
        if overridden:
            fix = fix or (f"--{'.'.join([*parent, guess])}" if guess else "see --help")
            return InputError("E106", "bad override", place, last, "a known key", fix)
        fix = fix or (f"did you mean {'.'.join([*parent, guess])}?" if guess else "remove it")
        return InputError("E101", "unknown key", place, last, f"one of {', '.join(siblings)}", fix)
    field = known_keys().get(key)
    template = _EXPECTED.get(detail["type"])
    expected = template.format(**detail.get("ctx", {})) if template else detail["msg"]
    if detail["type"] in ("float_type", "int_type"):
        expected += _bounds(field)
    found = "nothing" if detail["type"] == "missing" else _toml(detail["input"])
    default = getattr(field, "default", None)
    form = "--{} {}" if overridden else "{} = {}"
    example = form.format(key, _toml(default)) if isinstance(default, str | int | float) else f"set {key}"
    code = "E106" if overridden else "E102"
    return InputError(code, "bad override" if overridden else "bad value", place, found, expected, example)


def _path(detail: Any) -> list[str]:
    """The key that a pydantic error is about, without the member of a union that it was tried as."""
    return [str(p) for p in detail["loc"] if p not in ("int", "float", "str", "constrained-float", "constrained-int")]


def _further(table: dict[str, Any], error: ValidationError, origin: str) -> list[InputError]:
    """What else is wrong, whatever the values that ``error`` refuses should have been: they are at their defaults here."""
    doubtful = set()
    for detail in error.errors():
        *path, last = _path(detail)
        holder = _entry(table, path)
        if isinstance(holder, dict):
            holder.pop(last, None)
        siblings = [key.rpartition(".")[2] for key in known_keys() if key.rpartition(".")[0] == ".".join(path)]
        doubtful |= {last, nearest(last, siblings)}
    try:
        mended = Config.model_validate(table)
    except ValidationError:  # A value inside a list, or one without a default.
        return []
    return [
        problem for problem in disagreements(mended, origin) if doubtful.isdisjoint(re.findall(r"\w+", str(problem)))
    ]


def _entry(table: Any, path: list[str]) -> Any:
    for part in path:
        table = table.get(part) if isinstance(table, dict) else None
    return table


def _bounds(field: Any) -> str:
    """The limits of a number, as they follow "a number": ``" > 0"``."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        (sign, getattr(limit, name, None)) for limit in getattr(field, "metadata", []) for name, sign in signs.items()
    ]
    return " and".join(f" {sign} {bound:g}" for sign, bound in limits if bound is not None)


def _toml(value: Any) -> str:
    """``value`` as a file would have it."""
    return json.dumps(value, ensure_ascii=False, default=repr)
