"""What a person sees of a run while it goes on: a panel on a terminal, plain lines elsewhere.

``RunFolder`` calls it once a step. Every figure comes from the step's row in ``metrics.jsonl``; the panel only arranges
them, so that nothing on the screen is missing from the file.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shared.config import Config
from shared.errors import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

LINE_EVERY_S = 2.0
BARS = "▁▂▃▄▅▆▇█"
IDLE = ("wait_for_prompts", "wait_for_groups", "wait_for_delivery", "start", "pause")
Row = dict[str, float]


class Screen(Protocol):
    """Where a run tells what it does."""

    def step(self, step: int, row: Row, left_s: float) -> None:
        """A step is done; ``left_s`` seconds of the run remain, at this pace; NaN before there is one."""

    def evaluated(self, step: int, row: Row, story: str) -> None:
        """An evaluation is done; ``story`` is what early stopping makes of it."""

    def close(self) -> None:
        """Nothing more comes."""


def screen_for(config: Config) -> Screen:
    """The panel on a terminal that can show it, unless ``MILLRACE_PLAIN`` is set."""
    fancy = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("MILLRACE_PLAIN")
    return Panel(config) if fancy else Lines(config)


def clock(seconds: float) -> str:
    """``1:02`` or ``3:04:05``; ``?`` for NaN."""
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Lines:
    """A line every other second, and one for each evaluation."""

    def __init__(self, config: Config) -> None:
        self._last, self._printed, self._any = config.run.steps, time.monotonic(), False

    def step(self, step: int, row: Row, left_s: float) -> None:
        """See ``Screen``."""
        now = time.monotonic()
        if now - self._printed < LINE_EVERY_S and self._any and step < self._last:
            return
        self._printed, self._any = now, True
        rate = row["throughput/rollout_tokens_per_second"]
        kl = f"  kl {row['kl']:.4f}" if "kl" in row else ""
        advantage = f"  |A| {row['advantages/abs_mean']:.2f}"
        print(
            f"step {step:>5}/{self._last}  reward {row['reward']:.3f}{kl}{advantage}  {rate:,.0f} tokens/s  "
            f"{clock(left_s)} left",
            flush=True,
        )

    def evaluated(self, step: int, row: Row, story: str) -> None:
        """See ``Screen``."""
        shown = "  ".join(f"{visible(short_name(name))} {value:.3f}" for name, value in row.items() if _headline(name))
        print(f"evaluation at version {step}: {shown}{'  (' + story + ')' if story else ''}", flush=True)

    def close(self) -> None:
        """See ``Screen``."""


class Panel:
    """A panel that stays at the bottom of the terminal; what others print scrolls above it."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._config, self._console = config, console
        self._rewards: list[float] = []
        self._scores: list[float] = []
        self._row: Row = {}
        self._where: dict[str, str] = {}
        self._step, self._left_s, self._story = 0, math.nan, ""
        self._started = self._stepped = time.monotonic()
        self._live: Live | None = None

    def step(self, step: int, row: Row, left_s: float) -> None:
        """See ``Screen``."""
        self._row, self._step, self._left_s, self._stepped = row, step, left_s, time.monotonic()
        self._rewards += finite(row["reward"])
        self._where |= whereabouts(row)  # Who did not report keeps what was known.
        self._show()

    def evaluated(self, step: int, row: Row, story: str) -> None:
        """See ``Screen``."""
        self._scores += finite(row["eval/reward"])
        self._story = story

    def close(self) -> None:
        """See ``Screen``."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if self._live is None:
            from rich.live import Live

            # It draws itself twice a second, so that a run that stands still is seen to.
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=2)
            self._live.start()

    def render(self) -> RenderableType:
        """The panel as it is now."""
        from rich import box
        from rich.markup import escape
        from rich.panel import Panel as Frame
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row, last = self._row, self._config.run.steps
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        table.add_row("progress", ProgressBar(total=last, completed=self._step))
        if self._rewards:
            table.add_row("reward", f"[bold]{self._rewards[-1]:.3f}[/]  [cyan]{sparkline(self._rewards, 40)}[/]")
        if self._scores:
            told = f"  [dim]{self._story}[/]" if self._story else ""
            table.add_row(
                "held-out", f"[bold]{self._scores[-1]:.3f}[/]  [magenta]{sparkline(self._scores, 20)}[/]{told}"
            )
        for title, text in self._figures(row).items():
            if text:
                table.add_row(title, text)
        for kind, text in self._where.items():
            table.add_row(kind, text)
        now = time.monotonic()
        quiet = now - self._stepped
        age = f"  ·  [yellow]no step for {clock(quiet)}[/]" if quiet > max(10.0, 3 * row.get("time/step", 0.0)) else ""
        title = f"[bold]{escape(Path(self._config.run.output_dir).name)}[/]  step {self._step}/{last}"
        foot = f"{clock(now - self._started)} so far  ·  {clock(self._left_s)} left{age}"
        return Frame(table, title=title, subtitle=foot, title_align="left", subtitle_align="right", box=box.ROUNDED)

    def _figures(self, row: Row) -> dict[str, str]:
        def some(parts: list[tuple[str, str, str]]) -> str:
            return "   ".join(f"[dim]{label}[/] {row[name]:{form}}" for label, name, form in parts if name in row)

        learning = [("kl", "kl", ".4f"), ("entropy", "entropy", ".3f"), ("|A|", "advantages/abs_mean", ".2f")]
        learning += [("grad norm", "grad_norm", ".3g"), ("lr", "learning_rate", ".2e")]
        speed = [("rollout", "throughput/rollout_tokens_per_second", ",.0f")]
        speed += [("learner", "throughput/train_tokens_per_second", ",.0f")]
        answers = [("length", "completions/mean_length", ".0f"), ("cut off", "completions/clipped_ratio", ".0%")]
        answers += [("without signal", "frac_reward_zero_std", ".0%")]
        bound = self._config.rollout.max_staleness
        queue = f"[dim]staleness[/] {row.get('staleness/mean', 0.0):.2f} of at most {bound}   "
        queue += (
            f"[dim]buffer[/] {row.get('buffer/ready', 0.0):.0f} ready, {row.get('buffer/in_flight', 0.0):.0f} in flight"
        )
        engines = row.get("engines/healthy")
        queue += f"   [dim]engines[/] {engines:.0f} serve" if engines is not None else ""
        return {"learning": some(learning), "answers": some(answers), "tokens/s": some(speed), "queue": queue}


def whereabouts(row: Row) -> dict[str, str]:
    """By kind of process, the states it spent most of the step in; those that wait for somebody are marked."""
    seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    names: defaultdict[str, set[str]] = defaultdict(set)
    for key, value in row.items():
        if key.startswith("time/") and key.count("/") == 2:
            _, process, state = key.split("/")
            kind = process.split("-")[0]
            seconds[kind][state] += value
            names[kind].add(process)
    told = {}
    for kind, states in seconds.items():
        total = sum(states.values()) or 1.0
        most = sorted(states.items(), key=lambda item: -item[1])[:4]
        shares = [(state, value / total) for state, value in most if value / total >= 0.02]
        text = "  ".join(f"[{'yellow' if s in IDLE else 'green'}]{s.replace('_', ' ')} {v:.0%}[/]" for s, v in shares)
        count = len(names[kind])
        name = {"reward": "scorer"}.get(kind, kind)
        told[f"{count} {name}s" if count > 1 else name] = text
    return {name: told[name] for name in sorted(told, key=lambda name: name.lstrip("0123456789 ").rstrip("s"))}


def finite(value: float) -> list[float]:
    """``value``, if it can be drawn: a step whose rewards are all None has NaN."""
    return [value] if math.isfinite(value) else []


def sparkline(values: list[float], width: int) -> str:
    """Finite ``values`` as at most ``width`` bars, each the mean of its share of them."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def short_name(metric: str) -> str:
    """An evaluation's metric without what all of them have."""
    return metric.removeprefix("eval/").removeprefix("rewards/").removesuffix("/mean")


def _headline(name: str) -> bool:
    """Whether a line has room for it."""
    return not name.endswith(("_length", "clipped_ratio")) and "/sampled/" not in name
