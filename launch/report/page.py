"""``millrace report RUN [RUN2 ...]``: one HTML page that explains finished or running runs, or compares them.

The page shows curves, completions, where the time went, and findings in words with the setting to change. It is one file
that needs no network, so it can be mailed or put on a server. Text of models is shown as text and never as HTML.
"""
# Its content security policy forbids the network too. What a run has written reaches the page as data, never as markup.

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.options import Options, check_output, guarded
from shared.errors import InputError

PARTS = Path(__file__).resolve().parent / "assets"
SCRIPTS = (
    *("page.js", "chart.js", "curves.js", "overview.js", "time.js", "timeline.js"),
    *("tokens.js", "completions.js", "compare.js", "main.js"),
)
"""In this order they make one script."""
MOST_RUNS = 8
"""Runs that a page tells apart by colour."""


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _report, parser())


def parser() -> Options:
    """The verb's options."""
    examples = """
        millrace report runs/my                      # runs/my/report.html
        millrace report runs/a runs/b --output ab.html
        """
    options = Options("report", __doc__, examples)
    text = "run folders; the first is the one that others are compared with"
    options.add_argument("runs", type=Path, nargs="+", help=text)
    options.add_argument("--output", type=Path, help="the page (default: report.html in the first run folder)")
    return options


def _report(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    check_output("--output", options.output, example="report.html")
    output = options.output or options.runs[0] / "report.html"
    page = build(options.runs)
    draft = output.with_name(f".{output.name}.draft")
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, output)
    except OSError as error:
        draft.unlink(missing_ok=True)
        place, fix = f"command line:--output {output}", "another place"
        raise InputError("E601", "cannot write the report", place, str(error), "a writable file", fix) from None
    print(f"report: {output} ({output.stat().st_size / 1e6:.2f} MB)", flush=True)


def build(folders: Sequence[Path]) -> str:
    """The page of the runs in ``folders``. Raises ``InputError`` E603 or E606 for what is no run, E106 for too many."""
    from launch.report.data import run_data

    if len(folders) > MOST_RUNS:
        place, fix = "command line", "report them in parts"
        raise InputError("E106", "bad option", place, f"{len(folders)} runs", f"at most {MOST_RUNS}", fix)
    runs = [run_data(folder, len(folders)) for folder in folders]
    for run, name in zip(runs, _names(folders), strict=True):
        run["name"] = name
    return render({"made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "runs": runs})


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many of the folders above as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def render(data: dict[str, Any]) -> str:
    """The page that shows ``data``, plain JSON values."""
    style = (PARTS / "page.css").read_text(encoding="utf-8")
    code = "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{code}\n}})();'
    page = (PARTS / "page.html").read_text(encoding="utf-8")
    inserted = {
        "POLICY": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        "STYLE": style,
        "DATA": embedded(data),
        "SCRIPT": script,
    }
    before, *rest = page.split("{{")  # One pass: what is inserted is never searched for further places.
    pieces = [piece.split("}}", 1) for piece in rest]
    return before + "".join(inserted[name] + text for name, text in pieces)


def embedded(data: Any) -> str:
    """``data`` as JSON that no markup can be part of."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return escaped.encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


if __name__ == "__main__":
    sys.exit(main())
