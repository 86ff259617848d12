"""Reads a TRL training script as a syntax tree; nothing of it is ever executed or imported.

``launch/trl_reader.py`` calls ``read_script``. What cannot be read is said
with its line; a model, rows or a reward that cannot be read are refused unless they are given another way.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.trl_found import BUILTINS, Found, Source, builtin_reward, source_of
from launch.trl_settings import coerced
from launch.trl_syntax import Script, Unreadable, unreadable
from shared.errors import InputError, one_line

PASSING = {"map", "filter", "shuffle", "select", "rename_column", "rename_columns", "remove_columns", "cast_column"}
PASSING |= {"select_columns", "train_test_split", "with_format", "sort", "take", "skip", "cast", "unique", "flatten"}
READERS = {"from_json": "json", "from_csv": "csv", "from_parquet": "parquet"}


def read_script(path: Path, text: str) -> Found:
    """Everything that ``launch/trl_rules.py`` needs of a script. Raises ``InputError`` E105 or E102."""
    script, found = Script(path, text), Found(path)
    subclasses = script.subclasses("GRPOTrainer")
    trainers = [c for c in script.calls if script.last(c) in {"GRPOTrainer", *subclasses}]
    configs = [c for c in script.calls if script.last(c) == "GRPOConfig"]
    if not trainers and not configs:
        expected, fix = "a call of GRPOConfig or GRPOTrainer", "give the training script"
        raise InputError("E105", "no GRPO script", path.name, "neither", expected, fix)
    configs.sort(key=lambda call: call not in _args_of(script, trainers[:1]))  # Others may only try something out.
    for call in [*trainers[1:], *configs[1:]]:
        found.skip(call.lineno, f"a second {script.last(call)}: it is not read")
    for name in subclasses:
        found.skip(script.top[name].lineno, f"{name} changes GRPOTrainer: what it overrides has no equal")
    _settings(script, found, trainers[:1], configs[:1])
    for call in trainers[:1]:
        _trainer(script, found, call)
    found.starts = next(script.work_at_import(), 0)
    if script.assumed:
        names = ", ".join(dict.fromkeys(script.assumed))
        found.skip(0, f"the command line of the script: the defaults of its own options stand for {names}")
    return found


def _args_of(script: Script, trainers: list[ast.Call]) -> list[ast.expr]:
    """The expression that is GRPOTrainer's ``args``."""
    try:
        return [script.expression(k.value) for call in trainers for k in call.keywords if k.arg == "args"]
    except Unreadable:
        return []


def _settings(script: Script, found: Found, trainers: list[ast.Call], configs: list[ast.Call]) -> None:
    for call in configs:
        positional = [ast.keyword("output_dir", call.args[0])] if call.args else []
        for keyword in [*positional, *call.keywords]:
            _setting(script, found, keyword)
    variables = {n for n, all_ in script.assigned.items() if any(value in configs for _, value in all_)}
    variables |= {ast.unparse(k.value) for call in trainers for k in call.keywords if k.arg == "args"}
    trained = {n for n, all_ in script.assigned.items() if any(value in trainers for _, value in all_)}
    for target, all_ in script.assigned.items():
        owner, dot, name = target.rpartition(".")
        for line, value in all_ if dot and owner in variables | trained else []:
            if owner in trained:
                found.skip(line, f"{target} is set on the trainer itself: not read")
            elif value is None:
                found.skip(line, f"{target} is set under a condition")
            else:
                _setting(script, found, ast.keyword(name, value, lineno=line))
    if trainers and not configs and any(k.arg == "args" for k in trainers[0].keywords):
        text = "args come from the command line or a file: TRL's defaults stand here; import that file instead"
        found.skip(trainers[0].lineno, text)


def _setting(script: Script, found: Found, keyword: ast.keyword) -> None:
    line = keyword.value.lineno
    try:
        value = script.value(keyword.value)
    except Unreadable as error:
        found.skip(error.line or line, f"{keyword.arg or '**'} = {error} is not read; TRL's default stands here")
        return
    given = value if keyword.arg is None and isinstance(value, dict) else {keyword.arg: value}
    for name, one in given.items():
        found.settings[str(name)] = coerced(str(name), one, f"{found.path.name}:{line}:{name}")


def _trainer(script: Script, found: Found, call: ast.Call) -> None:
    order = ("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class")
    given = dict(zip(order, call.args)) | {k.arg: k.value for k in call.keywords if k.arg}
    for keyword in call.keywords:
        if keyword.arg is None:
            found.skip(call.lineno, f"**{one_line(ast.unparse(keyword.value), 40)} of GRPOTrainer is not read")
    for name, node in given.items():
        if name == "model":
            found.model = _pretrained(script, found, node, "model", "--model NAME")
        elif name == "processing_class":
            found.tokenizer = _pretrained(script, found, node, "processing_class", "")
        elif name == "reward_funcs":
            _rewards(script, found, node)
        elif name in ("train_dataset", "eval_dataset"):
            _rows_of(script, found, node, name.partition("_")[0])
        elif name != "args" and not (isinstance(node, ast.Constant) and node.value is None):
            found.trainer[name] = node.lineno


def _pretrained(script: Script, found: Found, node: ast.expr, what: str, fix: str) -> str | None:
    """The name of a model or tokenizer: a string, or what ``from_pretrained`` is given."""
    try:
        made = script.expression(node)
        if isinstance(made, ast.Call) and script.last(made) == "from_pretrained" and made.args:
            kind = script.dotted(made.func).split(".")[-2]
            if "ImageText" in kind or "Vision" in kind or "VL" in kind:
                found.skip(made.lineno, f"{kind}: images have no equal, text alone is trained")
            for keyword in made.keywords if what == "model" else []:
                _model_option(script, found, keyword)
            return str(script.value(made.args[0]))
        name = script.value(made)
        if isinstance(name, str):
            return name
        raise Unreadable(node)
    except Unreadable as error:
        if fix:
            found.refuse(f"{what} not readable", error.line, str(error), "the name of a model", fix)
        else:
            found.skip(error.line, f"{what} = {error} is not read; the model's own stands here")
        return None


def _model_option(script: Script, found: Found, keyword: ast.keyword) -> None:
    """What ``from_pretrained`` of the model was given, as if it had been in model_init_kwargs."""
    try:
        found.settings.setdefault("model_init_kwargs", {})[str(keyword.arg)] = script.value(keyword.value)
    except Unreadable as error:
        found.skip(error.line, f"{keyword.arg} = {error} of the model is not read")


def _rows_of(script: Script, found: Found, node: ast.expr, part: str) -> None:
    option = f"--{part} ROWS.jsonl"
    if isinstance(node, ast.IfExp):  # dataset["test"] if training_args.eval_strategy != "no" else None
        node = node.body
    try:
        source = _source(script, found, node, "")
    except Unreadable as error:
        if part == "train":
            found.refuse("train rows not readable", error.line, str(error), "load_dataset of a file or name", option)
        else:
            found.skip(error.line, f"eval_dataset = {error} is not read; {option} gives it")
        return
    if source and source.changed:
        file = f"data/{part}.jsonl"
        source = replace(source, file=file, command=f"{one_line(ast.unparse(node), 60)}.to_json({file!r})")
    if part == "train":
        found.train = source
    else:
        found.eval = source


def _source(script: Script, found: Found, node: ast.expr, split: str) -> Source | None:
    """Follow an expression back to ``load_dataset``; what is done to the rows on the way is said."""
    made = script.expression(node)
    if isinstance(made, ast.Constant) and made.value is None:
        return None
    if isinstance(made, ast.Subscript):
        return _source(script, found, made.value, str(script.value(made.slice)))
    if not isinstance(made, ast.Call):
        raise Unreadable(node)
    last = script.last(made)
    if last == "load_dataset":
        names = ("path", "name", "data_dir", "data_files", "split")
        given = dict(zip(names, made.args)) | {k.arg or "": k.value for k in made.keywords}
        known = {name: script.value(value) for name, value in given.items() if name in names}
        return source_of(
            str(known.get("path")), known.get("name"), known.get("split") or split or "train", known.get("data_files")
        )
    if last in READERS and made.args:
        return source_of(READERS[last], None, split or "train", script.value(made.args[0]))
    if isinstance(made.func, ast.Attribute) and last in PASSING:
        source = _source(script, found, made.func.value, "" if last == "train_test_split" else split)
        found.skip(made.end_lineno or made.lineno, f".{last}(...) is not run")
        return source and replace(source, rows=None, changed=True)
    raise Unreadable(made)


def _rewards(script: Script, found: Found, node: ast.expr) -> None:
    try:
        listed = script.expression(node)
    except Unreadable:
        listed = node
    for item in listed.elts if isinstance(listed, ast.List | ast.Tuple) else [node]:
        try:
            found.rewards.append(_reward(script, item))
        except Unreadable as error:
            expected = "a function of this script or of a module, a name of trl.rewards, or a model"
            found.refuse("reward not readable", error.line, str(error), expected, "--reward package.module:function")


def _reward(script: Script, node: ast.expr) -> dict[str, Any]:
    """The table of ``reward.functions`` for one entry of reward_funcs. Raises ``Unreadable``."""
    if isinstance(node, ast.Name) and (node.id in script.top or node.id in script.imports):
        return _named_reward(script, node)
    made = script.expression(node)
    if isinstance(made, ast.Attribute):
        return _named_reward(script, made)
    if isinstance(made, ast.Name):
        return _named_reward(script, made)
    if not isinstance(made, ast.Call):
        name = script.value(made)
        return {"model": name} if isinstance(name, str) else unreadable(node)
    if script.last(made) == "from_pretrained" and made.args:
        return {"model": str(script.value(made.args[0]))}
    if script.last(made) == "partial" and len(made.args) == 1:
        args = {k.arg or unreadable(made): script.value(k.value) for k in made.keywords}
        return _named_reward(script, made.args[0]) | {"args": args}
    return _made_reward(script, made)


def _named_reward(script: Script, node: ast.expr) -> dict[str, Any]:
    name = script.dotted(node)
    module, _, last = name.rpartition(".")
    if module.split(".")[0] == "trl" and last in BUILTINS:
        return builtin_reward(last, [], {})
    if name in script.top:
        return {"function": f"{script.path}:{name}"}
    root = ast.unparse(node).split(".")[0]
    imported = root in script.imports or module in script.modules()
    return {"function": f"{module}:{last}"} if module and imported else unreadable(node)


def _modules(script: Script) -> set[str]:
    nodes = list(ast.walk(script.tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}


def _made_reward(script: Script, call: ast.Call) -> dict[str, Any]:
    """A function that a call makes: of trl.rewards, or of a factory or class of the script's own."""
    name, values = script.dotted(call.func), [script.value(value) for value in call.args]
    named = {k.arg or unreadable(call): script.value(k.value) for k in call.keywords}
    last = name.rpartition(".")[2]
    if name.split(".")[0] == "trl" and last in BUILTINS:
        return builtin_reward(last, values, named)
    table, definition = _named_reward(script, call.func), script.top.get(name)
    if isinstance(definition, ast.FunctionDef):
        named = dict(zip([a.arg for a in definition.args.args], values)) | named
        return table | {"factory": True} | ({"args": named} if named else {})
    if values or not isinstance(definition, ast.ClassDef):
        raise Unreadable(call)
    return table | ({"args": named} if named else {})
