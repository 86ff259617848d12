"""``millrace import-trl FILE``: the Millrace configuration that means the same as a TRL script or its arguments.

FILE is a script with GRPOConfig and GRPOTrainer calls, a YAML file for ``trl grpo``, or a JSON of arguments. Nothing of it is
run. The TOML comes first, then, as comments, what has no equal, what means something else, and which defaults are TRL's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.options import Options
from launch.run import guarded
from launch.trl_found import BUILTINS, Found, Source
from launch.trl_reader import read
from launch.trl_rules import translate
from launch.trl_settings import VERSION
from launch.trl_syntax import Script
from launch.trl_translation import Translation, written
from shared.config_loader import known_keys, load_config
from shared.errors import InputError, raise_all

MARK = "# From "
"""How a file that this verb wrote begins; no other is written over."""
SECTIONS = ("run", "model", "data", "rollout", "reward", "algorithm", "learner", "eval")
MANDATORY = {
    "model.path": ("model", "the policy to start from", "--model NAME"),
    "data.train": ("train_dataset", "rows to train on", "--train ROWS.jsonl"),
    "reward.functions": ("reward_funcs", "at least one reward function", "--reward NAME"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(sys.argv[1:] if arguments is None else arguments, _import, help_text=_parser().format_help())


def _parser() -> Options:
    parser = Options("import-trl", __doc__)
    parser.add_argument("file", type=Path, help="a .py, .yaml or .json file")
    parser.add_argument("--output", type=Path, help="write the configuration to this file")
    parser.add_argument("--processes", type=int, help="training processes, accelerate's num_processes")
    parser.add_argument("--rows", type=int, help="rows to train on, to make steps of epochs")
    parser.add_argument("--model", help="the model, where the file does not name it")
    parser.add_argument("--train", help="rows to train on, where the file does not name them")
    parser.add_argument("--eval", help="held-out rows, likewise")
    parser.add_argument("--reward", action="append", help="a reward function, instead of the file's; may be repeated")
    return parser


def _import(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    found = read(options.file)
    _complete(found, options)
    folder = options.output.parent if options.output else Path()
    own = _place_rewards(found, folder, options.output)
    t = Translation(found, _processes(found, options), _rows(found, options))
    idle = translate(t)
    _check_mandatory(t)
    report = _report(t, idle)
    text = _toml(t, options.file.name) + "\n" + "".join(f"# {line}".rstrip() + "\n" for line in report)
    _check(text, options.output or Path(f"{options.file.stem}.toml"))
    if options.output is None:
        print(text, end="", flush=True)
        return
    new = {options.output: text} | ({_own_file(options.output): own} if own else {})
    for path in new:
        if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            place, expected = "command line:--output", "a new file, or one that import-trl wrote"
            raise InputError("E106", "bad option", place, f"{path} is there already", expected, "choose another name")
    for path, content in new.items():
        path.write_text(content, encoding="utf-8")
    print("\n".join([f"written: {options.output}", *report]), flush=True)


def _complete(found: Found, options: Any) -> None:
    """What the command line gives takes the place of what the file says. Raises what is still refused."""
    instead = {"--model": options.model, "--train": options.train, "--eval": options.eval, "--reward": options.reward}
    raise_all([problem for problem in found.refused if not instead.get(problem.fix.split()[0])])
    found.model = options.model or found.model
    if options.train:
        found.train = Source(options.train)
    if options.eval:
        found.eval = Source(options.eval)
        if found.settings.get("eval_strategy", "no") == "no":
            found.settings["eval_strategy"] = "steps"
    if options.reward:
        found.rewards = [{"function": BUILTINS.get(name, (name, {}))[0]} for name in options.reward]


def _processes(found: Found, options: Any) -> int:
    given = found.settings.get("num_processes") if options.processes is None else options.processes
    if given is None:
        found.skip(0, "the number of processes is not in the file: 1 is taken; --processes N gives another")
    if given is not None and given < 1:
        raise InputError("E106", "bad option", "command line:--processes", str(given), ">= 1", "--processes 1")
    return 1 if given is None else int(given)


def _rows(found: Found, options: Any) -> int | None:
    """The number of rows to train on: given, or counted where the file is there."""
    if options.rows is not None or found.train is None:
        return None if options.rows is None else int(options.rows)
    here = [path for path in (Path(found.train.file), found.path.parent / found.train.file) if path.is_file()]
    if found.train.command or not here:
        return found.train.rows
    from rollout.prompts import load_rows

    return len(load_rows(str(here[0]), "data.train"))


def _own_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}_rewards.py")


def _place_rewards(found: Found, folder: Path, output: Path | None) -> str:
    """Make paths of the script's own functions relative to the configuration; returns them as a module, if they need one.

    A script that starts to train when it is imported cannot be where rewards are imported from.
    """
    mark = f"{found.path}:"
    own = [table for table in found.rewards if str(table.get("function", "")).startswith(mark)]
    names = [table["function"].removeprefix(mark) for table in own]
    moved = bool(own) and found.starts > 0 and output is not None
    source = _own_file(output) if moved and output is not None else found.path
    relative = os.path.relpath(source, folder) if not found.path.is_absolute() or moved else str(found.path)
    for table, name in zip(own, names):
        table["function"] = f"{relative}:{name}"
    if moved:
        found.skip(
            found.starts, f"importing the script would start it, so its reward functions are written to {source.name}"
        )
        script = Script(found.path, found.path.read_text(encoding="utf-8"))
        return f"{MARK}{found.path.name} by `millrace import-trl`: its reward functions.\n\n{script.extracted(names)}"
    if own and found.starts:
        text = f"importing the script for its reward functions would start it: move {', '.join(names)} to a file of their own"
        found.skip(found.starts, f"{text}, which --output does")
    return ""


def _check_mandatory(t: Translation) -> None:
    problems = []
    for key, (name, expected, fix) in MANDATORY.items():
        if not t.keys.get(key):
            place = f"{t.found.path.name}:{name}"
            problems.append(InputError("E102", "nothing to translate", place, "nothing", expected, fix))
    raise_all(problems)


def _toml(t: Translation, name: str) -> str:
    """The configuration as text, each key with what it comes from."""
    lines = [f"{MARK}{name} by `millrace import-trl`; settings that it does not give have the defaults of {VERSION}."]
    order = list(known_keys())
    place = {key: next(i for i, known in enumerate(order) if f"{known}.".startswith(f"{key}.")) for key in t.keys}
    for section in SECTIONS:
        keys = [key for key in sorted(t.keys, key=place.__getitem__) if key.startswith(f"{section}.")]
        keys = [key for key in keys if key != "reward.functions"]
        if keys:
            lines += ["", f"[{section}]"]
        for key in keys:
            lines.append(f"{key.removeprefix(f'{section}.')} = {written(t.keys[key])}  # {t.origins[key]}")
        for table in t.keys["reward.functions"] if section == "reward" else []:
            lines += ["", "[[reward.functions]]", *(f"{key} = {written(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _report(t: Translation, idle: list[str]) -> list[str]:
    """What is to be said, in parts that are left out where they are empty."""
    parts = [
        ("No equal", t.without),
        ("Means something else", t.different),
        (f"Defaults of {VERSION}, written out; older releases had others", t.defaults),
        ("Not read", t.found.unread),
        ("To do first", _commands(t)),
        ("No meaning here", [", ".join(idle)] if idle else []),
    ]
    lines: list[str] = []
    for title, said in parts:
        if said:
            lines += ["", f"{title}:", *(f"- {line}" for line in dict.fromkeys(said))]
    return lines


def _commands(t: Translation) -> list[str]:
    """How rows that are no local file become one."""
    used = [t.found.train, t.found.eval if "data.eval" in t.keys else None]
    lines = []
    for source in used:
        if source and source.command.startswith("load_dataset"):
            lines.append(f"save the rows to {source.file}: from datasets import load_dataset; {source.command}")
        elif source and source.command:
            lines.append(f"save the rows as the script makes them: {source.command}")
    return lines


def _check(text: str, name: Path) -> None:
    """Refuse what a run would refuse, with the same errors."""
    from learner.choices import Choices

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name.name
        path.write_text(text, encoding="utf-8")
        Choices(load_config([str(path)]), name.name)


if __name__ == "__main__":
    sys.exit(main())
