"""``millrace completion SHELL``: a script that lets a shell complete verbs, options, settings and their choices."""

from __future__ import annotations

import argparse
import importlib
import typing

from launch.cli import VERBS
from launch.options import ConfigOptions, Options, guarded

SHELLS = ("bash", "zsh", "tcsh")


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _completion, parser())


def parser() -> Options:
    """The verb's options."""
    examples = """
        eval "$(millrace completion bash)"                           # in this shell
        millrace completion bash >> ~/.local/share/bash-completion/completions/millrace
        """
    options = Options("completion", __doc__, examples)
    options.add_argument("shell", choices=SHELLS, help="which shell")
    return options


def _completion(arguments: list[str]) -> None:
    import shtab

    print(shtab.complete(everything(), parser().parse_args(arguments).shell))


def everything() -> argparse.ArgumentParser:
    """One parser of all verbs with all their options and settings."""
    import shtab

    top = argparse.ArgumentParser("millrace", allow_abbrev=False)
    verbs = top.add_subparsers()
    for verb, (entry, meaning) in VERBS.items():
        module, _, function = entry.partition(":")
        of = "resume_parser" if function == "resume" else "parser"
        known = getattr(importlib.import_module(module), of)()
        into = verbs.add_parser(verb, help=meaning, parents=[known], add_help=False, conflict_handler="resolve")
        if isinstance(known, ConfigOptions):
            _add_settings(into)
        for action in into._actions:
            if not action.option_strings and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return top


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from shared.config_loader import known_keys

    for key, field in known_keys().items():
        kind = field.annotation
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        choices = ("true", "false") if kind is bool else choices
        text = (field.description or "").split("\n")[0].partition(":")[0].replace("%", "%%")
        parser.add_argument(f"--{key}", choices=choices, help=text)
