"""Reads a TRL training script as a syntax tree; nothing of it is ever executed or imported.

``launch/import_trl.py`` calls ``read_script``. What cannot be read is said with its line; for a model, rows or a reward
that cannot be read stands ``FILL_IN``.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

from launch.trl.found import BUILTINS, FILL_IN, Found, Table, builtin_reward, sources
from launch.trl.settings import coerced
from launch.trl.syntax import Script, Unreadable, unreadable
from shared.errors import InputError, one_line

ORDER = ("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class")
"""GRPOTrainer's arguments by position."""
HARMLESS = {"remove_columns", "select_columns", "with_format", "cast_column"}
"""What is done to rows without effect here."""
ASYNC_ADVANTAGE = 'write algorithm.advantage = { name = "grpo", ddof = 0, eps = 1e-8 }'
"""What AsyncGRPOTrainer's advantages are here."""
SHUFFLED = "shuffled"
"""Marks a source on its way: its first rows are no longer the first of the file."""


def read_script(path: Path, text: str) -> Found:
    """Everything that ``rules`` needs of a script. Raises ``InputError`` E105 or E102."""
    script, found = Script(path, text), Found(path)
    trainers = [call for call in script.calls if script.last(call).endswith("GRPOTrainer")]
    configs = [call for call in script.calls if script.last(call) == "GRPOConfig"]
    if not trainers and not configs:
        expected, fix = "a call of GRPOConfig or GRPOTrainer", "give the training script"
        raise InputError("E105", "no GRPO script", path.name, "neither", expected, fix)
    given: dict[str, ast.expr] = {}
    for call in trainers[:1]:
        given = dict(zip(ORDER, call.args)) | {k.arg: k.value for k in call.keywords if k.arg}
        if script.last(call) != "GRPOTrainer":
            found.skip(call.lineno, f"{script.last(call)} is not GRPOTrainer: what it overrides has no equal")
        if script.last(call) == "AsyncGRPOTrainer":
            found.first.append(f"{ASYNC_ADVANTAGE}: AsyncGRPOTrainer divides by the population's deviation")
    for call in [*trainers[1:], *configs[1:]]:
        found.skip(call.lineno, f"a second {script.last(call)}: it is not read")
    _settings(script, found, given, configs[:1])
    _trainer(script, found, given)
    names = [table["function"][1:] for table in found.rewards if str(table.get("function")).startswith(":")]
    found.own = script.extracted(names) if names else ""
    if script.assumed:
        listed = ", ".join(dict.fromkeys(script.assumed))
        found.skip(0, f"the command line of the script: the defaults of its own options stand for {listed}")
    return found


def _settings(script: Script, found: Found, given: dict[str, ast.expr], configs: list[ast.Call]) -> None:
    for call in configs:
        positional = [ast.keyword("output_dir", call.args[0])] if call.args else []
        for keyword in [*positional, *call.keywords]:
            _setting(script, found, keyword.arg, keyword.value)
    variables = {name for name, entries in script.assigned.items() if any(value in configs for _, value in entries)}
    variables |= {ast.unparse(given["args"])} if "args" in given else set()
    for target, entries in script.assigned.items():
        owner, _, name = target.rpartition(".")
        for line, value in entries if owner in variables else []:
            if value is None:
                found.skip(line, f"{target} is set under a condition")
            else:
                _setting(script, found, name, value)
    if "args" in given and not configs:
        text = "args come from the command line or a file: TRL's defaults stand here; import that file instead"
        if isinstance(given["args"], ast.Call) and script.last(given["args"]).endswith("Config"):
            text = f"{script.last(given['args'])} is not GRPOConfig and is not read: TRL's defaults stand here"
        found.skip(given["args"].lineno, text)


def _setting(script: Script, found: Found, name: str | None, node: ast.expr) -> None:
    try:
        value = script.value(node)
    except Unreadable as error:
        found.skip(node.lineno, f"{name or '**'} = {error} is not read; TRL's default stands here")
        return
    given = value if name is None and isinstance(value, dict) else {name: value}
    for key, one in given.items():
        found.settings[str(key)] = coerced(str(key), one, f"{found.path.name}:{node.lineno}:{key}")


def _trainer(script: Script, found: Found, given: dict[str, ast.expr]) -> None:
    for name, node in given.items():
        if name == "model":
            found.model = _pretrained(script, found, node)
        elif name == "reward_funcs":
            _rewards(script, found, node)
        elif name in ("train_dataset", "eval_dataset"):
            _rows(script, found, node, name.partition("_")[0])
        elif name != "args" and not (isinstance(node, ast.Constant) and node.value is None):
            found.trainer[name] = node.lineno


def _pretrained(script: Script, found: Found, node: ast.expr) -> str:
    """The name of a model: a string, or what ``from_pretrained`` is given."""
    try:
        made, rounded = script.unmoved(node)
        if rounded:
            found.skip(node.lineno, f"{rounded}: write it as model.dtype")
        if not isinstance(made, ast.Call):
            return str(script.value(made))
        if script.last(made) != "from_pretrained" or not made.args:
            raise Unreadable(node)
        if made.keywords:
            options = ast.Dict([ast.Constant(k.arg) for k in made.keywords], [k.value for k in made.keywords])
            _setting(script, found, "model_init_kwargs", ast.copy_location(options, made))
        return str(script.value(made.args[0]))
    except Unreadable as error:
        found.miss(error.line, "the name of the model", str(error))
        return FILL_IN


# --- rows ---


def _rows(script: Script, found: Found, node: ast.expr, part: str) -> None:
    if isinstance(node, ast.IfExp):  # dataset["test"] if training_args.eval_strategy != "no" else None
        node = node.body
    undone: list[str] = []
    try:
        tables = _sources(script, found, node, "", undone)
    except Unreadable as error:
        if part == "train":
            found.miss(error.line, "a file of rows", str(error))
            found.train = [{"path": FILL_IN}]
        else:
            found.skip(error.line, f"eval_dataset = {error} is not read; data.eval is left out")
        return
    if undone:
        file, source = f"data/{part}.jsonl", one_line(ast.unparse(node), 60)
        found.first.append(f"save the rows as the script makes them: {source}.to_json('{file}')")
        tables = [{"path": file}]
    for table in tables:
        table.pop(SHUFFLED, None)
    setattr(found, part, tables)


def _sources(script: Script, found: Found, node: ast.expr, split: str | int, undone: list[str]) -> list[Table]:
    """Follow an expression back to ``load_dataset``; what is done to the rows on the way and not here is added to ``undone``.

    ``split`` is the name of the part that is taken, or its number in a list of splits.
    """
    made = script.expression(node)
    if isinstance(made, ast.Constant) and made.value is None:
        return []
    if isinstance(made, ast.Subscript):
        part = script.value(made.slice)
        return _sources(script, found, made.value, part if isinstance(part, int) else str(part), undone)
    last = script.last(made)
    if not isinstance(made, ast.Call):
        raise Unreadable(node)
    if last == "load_dataset":
        values = dict(zip(("path", "name", "data_dir", "data_files", "split"), made.args))
        values |= {k.arg: k.value for k in made.keywords if k.arg}
        wanted = ("path", "name", "data_dir", "data_files", "split", "revision")
        known = {name: script.value(value) for name, value in values.items() if name in wanted}
        if isinstance(split, int):  # One of a list of splits.
            parts = known.get("split")
            known["split"] = parts[split] if isinstance(parts, list) and split < len(parts) else unreadable(made)
        return sources(found, made.lineno, {"split": split or "train"} | known) or unreadable(made)
    if last == "concatenate_datasets" and made.args:
        listed = script.expression(made.args[0])
        parts = listed.elts if isinstance(listed, ast.List | ast.Tuple) else unreadable(made)
        return [table for one in parts for table in _sources(script, found, one, split, undone)]
    if isinstance(made.func, ast.Name):
        with script.called(made) as returned:
            return _sources(script, found, returned, split, undone)
    if not isinstance(made.func, ast.Attribute):
        raise Unreadable(made)
    tables = _sources(script, found, made.func.value, "" if last == "train_test_split" else split, undone)
    if last not in HARMLESS and not undone:
        try:
            for table in tables:
                _step(script, found, made, table, alone=len(tables) == 1)
        except (Unreadable, ValueError):
            undone.append(last)
    if last in undone:
        found.skip(made.end_lineno or made.lineno, f".{last}(...) is not run")
    return tables


def _step(script: Script, found: Found, call: ast.Call, table: Table, alone: bool) -> None:
    """Do to a source, one of several unless ``alone``, what a method of datasets does to its rows. Raises ``Unreadable``."""
    last, values = script.last(call), call.args
    columns: dict[str, str] = table.get("columns", {})
    if last == "shuffle":
        table[SHUFFLED] = True
        found.skip(call.end_lineno or call.lineno, ".shuffle(...): data.shuffle shuffles, in another order")
    elif last == "take" or (last == "select" and values and script.last(values[0]) == "range"):
        if SHUFFLED in table or not alone:  # max_rows are the first rows of one source.
            raise Unreadable(call)
        limit = values if last == "take" else getattr(values[0], "args", [])
        (table["max_rows"],) = [script.value(one) for one in limit]  # One number, or ValueError.
    elif last in ("rename_column", "rename_columns"):
        given = [script.value(one) for one in values] + list(script.named(call).values())
        for old, new in (given[0] if isinstance(given[0], dict) else {given[0]: given[1]}).items():
            columns[new] = columns.pop(old, old)
    elif last == "map" and len(values) == 1 and not {k.arg for k in call.keywords} - {"remove_columns", "num_proc"}:
        moved = _moved(script, found, values[0])
        columns |= {new: columns.get(old, old) for new, old in moved.items() if new != old}
    else:
        raise Unreadable(call)
    if columns:
        table["columns"] = columns


class _Column(str):
    """A value that is a column of the row."""


class _Columns(ast.NodeTransformer):
    """Puts the column's name for every ``row["column"]``."""

    def __init__(self, row: str) -> None:
        self.row = row

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        column = isinstance(node.slice, ast.Constant) and ast.unparse(node.value) == self.row
        return ast.copy_location(ast.Constant(_Column(getattr(node.slice, "value", ""))), node) if column else node


def _moved(script: Script, found: Found, node: ast.expr) -> dict[str, str]:
    """New name of a column -> its old one, of a function of a row that only moves columns. Raises ``Unreadable``."""
    function: Any = script.functions.get(node.id) if isinstance(node, ast.Name) else node
    body = getattr(function, "body", None)
    *before, last = body if isinstance(body, list) else [body]
    made = last.value if isinstance(last, ast.Return) else last
    if any(not isinstance(one, ast.Expr) for one in before) or not isinstance(made, ast.Dict):
        raise Unreadable(node)
    data: Table = {}
    moved = script.value(_Columns(function.args.args[0].arg).visit(copy.deepcopy(made)))
    match moved.get("prompt"):
        case [{"role": "user", "content": _Column() as column}]:
            moved["prompt"], data = column, {"chat": True}
        case [{"role": "system", "content": str(system)}, {"role": "user", "content": _Column() as column}]:
            moved["prompt"], data = column, {"chat": True, "system_prompt": system}
    if not all(isinstance(column, _Column) for column in moved.values()):
        raise Unreadable(node)
    found.data |= data
    return moved


# --- rewards ---


def _rewards(script: Script, found: Found, node: ast.expr) -> None:
    try:
        listed = script.expression(node)
    except Unreadable:
        listed = node
    for item in listed.elts if isinstance(listed, ast.List | ast.Tuple) else [node]:
        try:
            found.rewards.append(_reward(script, item))
        except Unreadable as error:
            found.rewards.append({"function": FILL_IN})
            found.miss(error.line, "package.module:function", str(error))


def _reward(script: Script, node: ast.expr) -> Table:
    """The table of ``reward.functions`` for one entry of reward_funcs. Raises ``Unreadable``."""
    known = isinstance(node, ast.Name) and (node.id in script.top or node.id in script.imports)
    made = node if known else script.expression(node)
    if isinstance(made, ast.Name | ast.Attribute):
        return _named(script, made)
    if not isinstance(made, ast.Call):
        name = script.value(made)
        return {"model": name} if isinstance(name, str) else unreadable(node)
    if script.last(made) == "from_pretrained" and made.args:
        return {"model": str(script.value(made.args[0]))}
    values, named = [script.value(value) for value in made.args], script.named(made)
    if script.last(made) in BUILTINS and script.dotted(made.func).startswith("trl."):
        return builtin_reward(script.last(made), values, named)
    table, definition = _named(script, made.func), script.functions.get(script.dotted(made.func))
    named |= dict(zip([a.arg for a in definition.args.args] if definition else [], values))
    if len(named) < len(values):  # Of another module: what they are called is not written here.
        raise Unreadable(made)
    return table | {"factory": True} | ({"args": named} if named else {})


def _named(script: Script, node: ast.expr) -> Table:
    name = script.dotted(node)
    module, _, last = name.rpartition(".")
    if module.split(".")[0] == "trl" and last in BUILTINS:
        return builtin_reward(last, [], {})
    if name in script.top:
        return {"function": f":{name}"}
    imported = ast.unparse(node).split(".")[0] in script.imports
    return {"function": f"{module}:{last}"} if module and imported else unreadable(node)
