"""Command-line options of the verbs, with errors in the one form of all wrong input."""

from __future__ import annotations

import argparse

from shared.errors import InputError


class Options(argparse.ArgumentParser):
    """argparse, but wrong options raise ``InputError`` E106 instead of ending the process."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            f"millrace {verb}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.add_argument("--debug", action="store_true", help="show tracebacks")

    def error(self, message: str) -> None:  # type: ignore[override]
        """What argparse calls for anything wrong."""
        raise InputError("E106", "bad option", "command line", message, "see --help", f"{self.prog} --help")
