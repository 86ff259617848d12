"""``millrace configs [NAME]``: the configurations and recipes that ship; with a name, its text, to read or to copy."""

from __future__ import annotations

import re
from pathlib import Path

from launch.options import Options, guarded
from shared.config_loader import RECIPES, recipes, shipped
from shared.errors import InputError, nearest


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _configs, parser())


def parser() -> Options:
    """The verb's options."""
    examples = """
        millrace configs                     # what there is
        millrace configs gsm8k > my.toml     # a copy to change
        """
    options = Options("configs", __doc__, examples)
    options.add_argument("name", nargs="?", help="print this one")
    return options


def _configs(arguments: list[str]) -> None:
    name = parser().parse_args(arguments).name
    there = {**shipped(), **{recipe: RECIPES / f"{recipe}.toml" for recipe in recipes()}}
    if name is None:
        print("configurations: millrace train NAME, or a copy of one\n" + _list(list(shipped().values())))
        print("\nrecipes: algorithm.recipe = NAME, or --algorithm.recipe NAME\n" + _list([there[n] for n in recipes()]))
        return
    if name not in there:
        guess, expected = nearest(name, there), f"one of {', '.join(there)}"
        fix = f"millrace configs {guess}" if guess else "millrace configs"
        raise InputError("E105", "no such configuration", "command line", name, expected, fix)
    print(copy_of(there[name]), end="")


def copy_of(path: Path) -> str:
    """Return the shipped configuration ``path`` without ``resume = "overwrite"``: a second start of a copy resumes the run."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith('resume = "overwrite"'))


def _list(paths: list[Path]) -> str:
    return "\n".join(f"  {path.stem:<15}{_first_sentence(path)}" for path in paths)


def _first_sentence(path: Path) -> str:
    """Of the comment at the top."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"(?<=[a-z0-9)]{3})\. ", " ".join(comment))[0].rstrip(".")
