"""``millrace import-trl FILE``: the Millrace configuration that means the same as a TRL script or its arguments.

FILE is a script with GRPOConfig and GRPOTrainer calls, a YAML file for ``trl grpo``, or a JSON of arguments. Nothing of it is
run. The TOML comes first, then, as comments, what has no equal, what means something else, and which defaults are TRL's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.options import Options, guarded
from launch.trl.found import FILL_IN, Found, read_arguments
from launch.trl.rules import translate
from launch.trl.script import read_script
from launch.trl.settings import VERSION
from launch.trl.translation import Translation, written
from shared.config_loader import known_keys, load_config
from shared.errors import InputError, nearest, visible

MARK = "# From "
"""How a file that this verb wrote begins; no other is written over."""


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _import, parser())


def parser() -> Options:
    """The verb's options."""
    examples = """
        millrace import-trl train.py --processes 8 --rows 7473          # print it
        millrace import-trl train.py --processes 8 --output my.toml     # write it
        """
    options = Options("import-trl", __doc__, examples)
    options.add_argument("file", type=Path, help="a .py, .yaml or .json file")
    options.add_argument("--output", type=Path, help="write the configuration to this file")
    options.add_argument("--processes", type=int, help="training processes, accelerate's num_processes")
    options.add_argument("--rows", type=int, help="rows to train on, to make steps of epochs")
    return options


def _import(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    found = read(options.file)
    for part, name in (("model", "model"), ("train", "train_dataset"), ("rewards", "reward_funcs")):
        if not getattr(found, part):
            setattr(found, part, {"model": FILL_IN, "train": [{"path": FILL_IN}]}.get(part, [{"function": FILL_IN}]))
            found.first.append(f"{name} is not in the file: write it for {FILL_IN}")
    own = _name_own_rewards(found, options.output)
    known = [source.get("max_rows") for source in found.train]
    rows = options.rows or (None if None in known else sum(known))
    t = Translation(found, _processes(found, options), rows)
    t.keys = {f"data.{name}": value for name, value in found.data.items()} | {"data.train": found.train}
    t.origins = dict.fromkeys(t.keys, "train_dataset") | {"model.path": "model"}
    translate(t)
    report = _report(t)
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
    print(visible("\n".join([f"written: {options.output}", *report])), flush=True)


def read(path: Path) -> Found:
    """Whatever ``path`` says. Raises ``InputError`` E105 for an unreadable file, E102 for a value of a wrong kind."""
    if not path.is_file():
        similar = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        fix = f"did you mean {path.parent / similar}?" if similar else "check the path"
        raise InputError("E105", "cannot read script", str(path), "no such file", "a .py, .json, .yaml file", fix)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#x} at offset {error.start}"
        raise InputError("E105", "cannot parse script", path.name, found, "UTF-8", "save it as UTF-8") from None
    return read_script(path, text) if path.suffix == ".py" else read_arguments(path, text)


def _name_own_rewards(found: Found, output: Path | None) -> str:
    """Say in which file the script's own functions are; returns the content of that file, if it has to be written.

    A script that starts to train when it is imported cannot be where rewards are imported from.
    """
    own = [table for table in found.rewards if str(table.get("function", "")).startswith(":")]
    file = str(found.path) if output is None else _own_file(output).name
    for table in own:
        table["function"] = file + table["function"]
    if own and output is None:
        text = "the script is imported for its reward functions, and must not start to train then"
        found.first.append(f"{text}: --output writes them to a file of their own")
    return f"{MARK}{found.path.name} by `millrace import-trl`: its reward functions.\n\n{found.own}" if own else ""


def _own_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}_rewards.py")


def _processes(found: Found, options: Any) -> int:
    given = found.settings.get("num_processes") if options.processes is None else options.processes
    if given is None:
        found.skip(0, "the number of processes is not in the file: 1 is taken; --processes N gives another")
    elif given < 1:
        raise InputError("E106", "bad option", "command line:--processes", str(given), ">= 1", "--processes 1")
    return 1 if given is None else int(given)


def _toml(t: Translation, name: str) -> str:
    """The configuration as text, each key with what it comes from."""
    lines = [f"{MARK}{name} by `millrace import-trl`; settings that it does not give have the defaults of {VERSION}."]
    order = list(known_keys())
    place = {key: next(i for i, known in enumerate(order) if f"{known}.".startswith(f"{key}.")) for key in t.keys}
    section = ""
    for key in sorted(t.keys, key=place.__getitem__):
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += ["", f"[{section}]"] if key != "reward.functions" else []
        value = t.keys[key]
        if key == "reward.functions":
            for table in value:
                lines += ["", "[[reward.functions]]", *(f"{name} = {written(one)}" for name, one in table.items())]
        else:
            value = _shortest(value) if key in ("data.train", "data.eval") else value
            lines.append(f"{key.partition('.')[2]} = {written(value)}  # {t.origins[key]}")
    return "\n".join(lines) + "\n"


def _shortest(sources: list[dict[str, Any]]) -> Any:
    """Sources as one writes them by hand: a path alone, or one table, or a list."""
    short = [source["path"] if set(source) == {"path"} else source for source in sources]
    return short[0] if len(short) == 1 else short


def _report(t: Translation) -> list[str]:
    """What is to be said, in parts that are left out where they are empty."""
    parts = [
        ("No equal", t.without),
        ("Means something else", t.different),
        ("Not read", t.found.unread),
        ("To do first", t.found.first),
        ("No meaning here", [", ".join(t.idle)] if t.idle else []),
    ]
    lines: list[str] = []
    for title, said in parts:
        if said:
            lines += ["", f"{title}:", *(f"- {line}" for line in dict.fromkeys(said))]
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
