"""Pictures of the terminal for the pages: ``python docs/captures.py RUN`` writes ``docs/images/terminal-*.svg``.

``RUN`` is the folder of a quickstart. The panel is the one that a run shows, fed with the rows that the run recorded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.display import Panel  # noqa: E402
from launch.early_stopping import keep_best  # noqa: E402
from launch.show import _groups, _pieces, page  # noqa: E402
from shared.config_loader import load_config  # noqa: E402
from shared.metrics import read_metrics  # noqa: E402

WIDTH = 92


def main(run: Path) -> None:
    """All pictures of ``run``."""
    for name, console in {
        "panel": _panel(run),
        "show": _show(run),
        "help": _said("--help"),
        "dry-run": _said("train", "quickstart", "--dry-run", last=17),
        "wrong": _said("train", "quickstart", "--learner.lrr", "1e-5", "--rollout.group_sise", "4"),
    }.items():
        svg = console.export_svg(title="millrace")
        # The font comes from the network otherwise.
        svg = re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.S).replace("Fira Code", "DejaVu Sans Mono")
        svg = "\n".join(line.rstrip() for line in svg.splitlines())
        (ROOT / "docs" / "images" / f"terminal-{name}.svg").write_text(svg + "\n", encoding="utf-8")


def _recorder() -> Console:
    return Console(record=True, width=WIDTH, file=open(os.devnull, "w", encoding="utf-8"), force_terminal=True)


def _panel(run: Path) -> Console:
    """The panel after two thirds of the run."""
    console, stopping = _recorder(), keep_best()
    config = load_config([str(run / "config.toml")])
    panel = Panel(config, console)
    panel._show = lambda: None  # type: ignore[method-assign]
    rows = read_metrics(run)
    for row in rows:
        if row["step"] <= config.run.steps * 2 // 3:
            if "eval/reward" in row:
                stopping.observe(row, row["step"])
                panel.evaluated(row["step"], row, stopping.story())
            else:
                panel.step(row["step"], row, row["time/step"] * (config.run.steps - row["step"]))
    panel._started -= sum(row.get("time/step", 0.0) for row in rows) * 2 / 3
    console.print(panel.render())
    return console


def _show(run: Path) -> Console:
    """The group with the largest spread of an early step, its tokens coloured by their log-probs."""
    console = _recorder()
    groups = sorted(_groups(run, 10), key=lambda group: -group.spread)
    console.print(page(groups[0], f"1 of {len(groups)}", "logprobs", _pieces(run)))
    return console


def _said(*arguments: str, last: int = 0) -> Console:
    """What a command prints, under its prompt."""
    code = "import sys; from launch.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    lines = (done.stdout + done.stderr).rstrip().replace(str(Path.cwd()), "~").splitlines()
    console = _recorder()
    console.print(Text(f"$ millrace {' '.join(arguments)}", style="bold cyan"))
    if last:
        console.print(Text("…", style="dim"))
    console.print(Text("\n".join(lines[-last:])))
    return console


if __name__ == "__main__":
    main(Path(sys.argv[1]))
