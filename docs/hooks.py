"""What ``mkdocs build`` adds to the pages: the reference, generated from the code, and the drawings, put into the page.

A page says ``<!-- generated: NAME -->`` where ``GENERATED[NAME]()`` belongs. Drawings are inlined so that they follow the
light and the dark scheme; elsewhere the same files are plain pictures.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
for folder in (DOCS, DOCS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import generate  # noqa: E402
import generate_code  # noqa: E402

GENERATED: dict[str, Callable[[], str]] = {
    "settings": generate.settings,
    "choices": generate.choices,
    "commands": generate.commands,
    "python": generate.python_api,
    "errors": generate_code.errors,
    "warnings": generate_code.warnings,
    "metrics": generate_code.metrics,
    "states": generate_code.states,
    "environment": generate_code.environment,
}
MARK = re.compile(r"<!-- generated: (\w+) -->")
DRAWING = re.compile(r"!\[([^\]]*)\]\(((?:\.\./)*images/([\w-]+)\.svg)\)")


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is written elsewhere and has not come yet."""
    config.nav = [entry for entry in config.nav if _there(entry)]
    return config


def _there(entry: Any) -> bool:
    target = next(iter(entry.values())) if isinstance(entry, dict) else entry
    return not isinstance(target, str) or (DOCS / target).is_file()


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """The page with its generated parts and its drawings."""
    markdown = MARK.sub(lambda found: GENERATED[found[1]](), markdown)
    return DRAWING.sub(drawing, markdown)


def drawing(found: re.Match[str]) -> str:
    """A picture of ``docs/images``: one drawn by hand inline, a capture as a picture of its own."""
    said, place, name = found.groups()
    text = (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8")
    if "drawn by hand" not in text:
        return f"![{said}]({place}){{ .capture }}"
    svg = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{said}"', 1)
    return f'<figure class="drawing" markdown="0">{" ".join(svg.split())}</figure>'
