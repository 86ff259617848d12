"""What all verbs of the command line share: their options, and how they end.

Wrong options are ``InputError`` E106 with the nearest known one; an option is never taken for another that begins the
same. A verb returns 0, 2 for wrong input, 128 + N after signal N, 1 for anything else, and shows a traceback only with ``--debug``.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.interrupts import Ended, raised
from shared.errors import InputError, MillraceError, nearest, one_line


class _Layout(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Text as it was written, and the default after each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or action.required:
            return action.help
        return super()._get_help_string(action)


class Options(argparse.ArgumentParser):
    """argparse in Millrace's words."""

    def __init__(self, verb: str, description: str | None, examples: str = "") -> None:
        """``examples``: command lines, one a line, each with its meaning behind a #."""
        shown = f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}" if examples else None
        super().__init__(
            f"millrace {verb}",
            description=(description or "").replace("``", ""),
            epilog=shown,
            formatter_class=_Layout,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. Raises ``InputError`` E106."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise self._unknown(unknown[0])
        return options

    def error(self, message: str) -> NoReturn:
        """What argparse calls for anything else that is wrong."""
        raise InputError("E106", "bad option", "command line", message, "see --help", f"{self.prog} --help")

    def _unknown(self, argument: str) -> InputError:
        name = argument.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        guess = nearest(name, known) if name.startswith("-") else None
        fix, expected = guess or f"{self.prog} --help", f"one of {', '.join(known)}" if known else "no more arguments"
        return InputError("E106", "bad option", f"command line:{name}", argument, expected, fix)


class ConfigOptions(Options):
    """Options of a verb that takes configuration files and any setting of them."""

    def __init__(self, verb: str, description: str | None, examples: str = "") -> None:
        super().__init__(verb, description, examples)
        self.usage = f"millrace {verb} CONFIG [CONFIG ...] [--section.field VALUE ...] [options]"
        text = "TOML files, later ones over earlier ones; or the name of a shipped one (millrace configs)"
        self.add_argument("config", nargs="*", metavar="CONFIG", help=text)

    def parse_config(self, arguments: Sequence[str]) -> tuple[Any, list[str], dict[str, str]]:
        """``(options, files, settings)``. Raises ``InputError`` E105 or E106."""
        known = {option for action in self._actions for option in action.option_strings}
        ours: list[str] = []
        settings: dict[str, str] = {}
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            key, equals, value = argument[2:].partition("=")
            if not argument.startswith("--") or f"--{key}" in known:
                ours.append(argument)
                continue
            if "." not in key:
                raise self._unknown(argument)
            if not equals:
                if not rest or (rest[0].startswith("--") and "." in rest[0]):
                    place, fix = f"command line:--{key}", f"--{key} VALUE"
                    raise InputError("E106", "bad override", place, "no value", "a value", fix)
                value = rest.pop(0)
            settings[key.replace("-", "_")] = value
        options = self.parse_args(ours)
        if not options.config:
            fix = "millrace train quickstart"
            raise InputError("E105", "no config", "command line", "no file", "a TOML file", fix)
        return options, options.config, settings

    def format_help(self) -> str:
        """The verb's own help; that of the first verb goes on with every setting."""
        more = settings_help() if self.prog == "millrace train" else "settings: millrace train --help"
        return f"{super().format_help()}\n{more}\n"


def check_number(option: str, value: float | None, least: float, most: float = math.inf, limit: str = "") -> None:
    """Raises ``InputError`` E102 unless ``option``, if given, lies within these; ``limit`` is the name of ``most``."""
    if value is None or (least <= value <= most and math.isfinite(value)):
        return
    expected, nearest_one = f"a number >= {least:.9g}", most if value > most else least
    if most < math.inf:
        expected = f"a number from {least:.9g} to {f'{limit} = ' if limit else ''}{most:.9g}"
    fix = f"{option} {nearest_one:.9g}"
    raise InputError("E102", "bad value", f"command line:{option}", f"{value:.9g}", expected, fix)


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...] = (), example: str = "timings.json") -> None:
    """Raises ``InputError`` E601 unless a file, with one of these ``suffixes`` if any, can be written to ``path``.

    ``example``: a name for it, where ``path`` is a folder.
    """
    if path is None:
        return
    found, expected, fix = "", "a file in a folder that is there", f"mkdir -p {path.parent}"
    if suffixes and path.suffix.lower() not in suffixes:
        found, expected = path.suffix or "no suffix", f"one of {', '.join(suffixes)}"
        fix = f"{option} {path.with_suffix(suffixes[0]) if path.name else f'plan{suffixes[0]}'}"
    elif not path.parent.is_dir():
        found = f"no folder {path.parent}"
    elif path.is_dir():
        found, fix = "a folder", f"{option} {path / example}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        found, fix = "no permission", "another place"
    if found:
        raise InputError("E601", "cannot write", f"command line:{option} {path}", found, expected, fix)


def settings_help(only: str = "") -> str:
    """Every setting whose name contains ``only``: its default and meaning."""
    from shared.config_loader import known_keys

    lines, section = [], ""
    for key, field in known_keys().items():
        if only not in key:
            continue
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines.append(f"\n[{section}]")
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        meaning = textwrap.fill(
            " ".join((field.description or "").split()), 112, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
        lines += [f"  --{key}  ({default})", meaning]
    return (
        "\n".join(["settings, in the file or on the command line:", *lines]) if lines else f"no setting contains {only}"
    )


def guarded(arguments: list[str] | None, verb: Callable[[list[str]], None], parser: Options) -> int:
    """Run ``verb``, or print the help of its ``parser``; at most one error, without a traceback. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        terms = [argument for argument in arguments if not argument.startswith("-") and "/" not in argument]
        searchable = isinstance(parser, ConfigOptions) and terms and not terms[0].endswith(".toml")
        print(settings_help(terms[0]) if searchable else parser.format_help())
        return 0
    debug = "--debug" in arguments
    # Threads that spin while they wait take the cores from the other processes; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with raised():
            verb(arguments)
        return 0
    except MillraceError as error:
        if debug:
            raise
        print(f"{error}\nexit code {error.exit_code}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as error:
        code = 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)
        print(f"interrupted\nexit code {code}", file=sys.stderr, flush=True)
        return code
    except Exception as error:  # A bug of ours or a fault of a machine: the one case that needs its traceback.
        if debug:
            raise
        traceback.print_exc()
        said = f"error[E000] unexpected {type(error).__name__}: {one_line(error)}\nexit code 1"
        print(said, file=sys.stderr, flush=True)
        return 1
