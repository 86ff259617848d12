"""``millrace show RUN``: browse what a run sampled: prompts, completions, rewards, versions and log-probs of tokens.

Reads ``samples/`` of a run folder, also while the run goes on. On a terminal it turns pages, one group each; elsewhere it
prints them one after the other. Control characters in the text of a model are shown, and never reach the terminal.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.options import Options, check_number, guarded
from launch.stored_groups import Row, read_samples, sample_files
from shared.config_loader import load_config
from shared.errors import InputError, one_line, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

ORDERS: dict[str, Callable[[Group], float]] = {
    "time": lambda group: group.order,
    "reward": lambda group: -group.mean,
    "spread": lambda group: -group.spread,
    "length": lambda group: -max(row["tokens"] for row in group.rows),
}
HELP = "enter: next   p: previous   NUMBER: that group   /TEXT: the next one with TEXT   q: quit"
SCALE = ("#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac")
"""Low to high, for people of every kind of colour vision."""


@dataclass
class Group:
    """The completions of one prompt in one step."""

    order: float
    rows: list[Row]

    @property
    def mean(self) -> float:
        """Of the rewards that there are; -inf without any."""
        values = self._rewards()
        return sum(values) / len(values) if values else -math.inf

    @property
    def spread(self) -> float:
        """Largest reward less the smallest."""
        values = self._rewards()
        return max(values) - min(values) if values else 0.0

    def has(self, text: str) -> bool:
        """Whether prompt or completions contain ``text``, in any case."""
        return any(text.lower() in f"{row['prompt']}\n{row['completion']}".lower() for row in self.rows)

    def _rewards(self) -> list[float]:
        return [row["reward"] for row in self.rows if row["reward"] is not None and not math.isnan(row["reward"])]


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _show, parser())


def parser() -> Options:
    """The verb's options."""
    examples = """
        millrace show runs/my                              # the newest step, group by group
        millrace show runs/my --step 40 --sort reward      # the best of step 40 first
        millrace show runs/my --search "carry" --tokens logprobs
        """
    options = Options("show", __doc__, examples)
    options.add_argument("run", type=Path, help="a run folder")
    options.add_argument("--step", type=int, help="of this step; all: 0 (default: the newest that was kept)")
    options.add_argument("--group", type=int, help="this group alone")
    options.add_argument("--search", default="", metavar="TEXT", help="groups that contain TEXT")
    options.add_argument("--sort", choices=list(ORDERS), default="time", help="what comes first")
    colours = ["none", "logprobs", "versions", "advantage"]
    options.add_argument("--tokens", choices=colours, default="none", help="colour every token by this")
    options.add_argument("--limit", type=int, default=0, help="most groups; 0: all")
    options.add_argument("--list", action="store_true", help="one line a group")
    return options


def _show(arguments: list[str]) -> None:
    from rich.console import Console

    options = parser().parse_args(arguments)
    check_number("--limit", options.limit, 0)
    groups = list(_groups(options.run, options.step))
    groups = [g for g in groups if options.group in (None, g.rows[0]["group_id"]) and g.has(options.search)]
    groups.sort(key=ORDERS[options.sort])
    if not groups:
        place, fix = f"command line:{options.run}", "another --step, --group or --search"
        raise InputError("E603", "nothing to show", place, "no such group", "at least one", fix)
    groups = groups[: options.limit or None]
    console = Console(highlight=False)
    if options.list:
        _list(console, groups)
        return
    pieces = _pieces(options.run) if options.tokens != "none" else None
    if sys.stdin.isatty() and sys.stdout.isatty():
        _browse(console, groups, options.tokens, pieces)
        return
    for number, group in enumerate(groups, 1):
        console.print(page(group, f"{number} of {len(groups)}", options.tokens, pieces))


def _groups(run: Path, step: int | None) -> Iterator[Group]:
    """Raises ``InputError`` E603 where nothing was kept, or nothing can be read."""
    files = sample_files(run)
    if not files or (step and step not in files):
        there = ", ".join(map(str, sorted(files)[-8:])) or "no samples"
        expected = "a kept step" if files else "a run folder with samples (run.samples_every)"
        place, found = f"command line:{run}", f"steps {there}" if files else there
        raise InputError("E603", "nothing to show", place, found, expected, "check path and --step")
    chosen = [step] if step else sorted(files, reverse=step is None)
    whole = ((number, groups) for number in chosen if (groups := _read(files[number])))
    read = list(islice(whole, None if step == 0 else 1))
    if not read:
        place, found = f"command line:{run}", f"{len(chosen)} damaged files"
        raise InputError("E603", "nothing to show", place, found, "a parquet file that is whole", "another --step")
    for number, groups in read:
        for rows in groups:
            yield Group(number * 1e9 + rows[0]["group_id"], rows)


def _read(path: Path) -> list[list[Row]]:
    """The groups of a file; none of a damaged one, or one that is being written."""
    try:
        groups, damaged = read_samples(path)
    except OSError as error:
        print(f"warning[W603] {path} left out: {one_line(error)}", file=sys.stderr)
        return []
    if damaged:
        print(f"warning[W603] {damaged} damaged groups of {path} left out", file=sys.stderr)
    return groups


def _pieces(run: Path) -> Callable[[list[int]], list[str]] | None:
    """Token ids -> their texts, by the run's tokenizer; None if it is not on this machine."""
    from transformers import AutoTokenizer

    model = load_config([str(run / "config.toml")]).model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer or model.path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        print(f"warning[W603] tokens without colours: no tokenizer ({one_line(error)})", file=sys.stderr)
        return None
    return lambda ids: [tokenizer.decode([i]) for i in ids]


def _list(console: Console, groups: list[Group]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("group", "step", "reward", "spread", "tokens", "prompt", box=None, header_style="dim")
    for group in groups:
        first = group.rows[0]
        tokens = sum(row["tokens"] for row in group.rows)
        prompt = Text(visible(" ".join(first["prompt"].split())), overflow="ellipsis", no_wrap=True)
        cells = f"{first['group_id']}", f"{first['step']}", f"{group.mean:.3f}", f"{group.spread:.3f}", f"{tokens}"
        table.add_row(*cells, prompt)
    console.print(table)


def _browse(console: Console, groups: list[Group], colour: str, pieces: Any) -> None:
    from rich.text import Text

    at, said = 0, ""
    while True:
        console.clear()
        console.print(page(groups[at], f"{at + 1} of {len(groups)}", colour, pieces))
        console.print(Text.assemble((HELP, "dim"), f"  {said}" if said else ""))
        try:
            answer = input("> ").strip()
        except EOFError:
            return
        at, said = _turn(groups, at, answer)
        if at < 0:
            return


def _turn(groups: list[Group], at: int, answer: str) -> tuple[int, str]:
    """Where an answer leads, and what to say; -1: away."""
    last, said = len(groups) - 1, ""
    if answer == "q":
        at = -1
    elif answer in ("", "n", "p"):
        at = max(at - 1, 0) if answer == "p" else min(at + 1, last)
    elif answer.startswith("/"):
        hits = [i for i in (*range(at + 1, last + 1), *range(at + 1)) if groups[i].has(answer[1:])]
        at, said = (hits[0], "") if hits else (at, f"no {answer[1:]!r} here")
    else:
        found = [i for i, group in enumerate(groups) if str(group.rows[0]["group_id"]) == answer]
        at, said = (found[0], "") if found else (at, f"no group {answer} here")
    return at, said


def page(
    group: Group, number: str, colour: str = "none", pieces: Callable[[list[int]], list[str]] | None = None
) -> Panel:
    """A group as a panel: its prompt, and each completion under a line of its figures."""
    from rich.console import Group as Together
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    first = group.rows[0]
    parts: list[Any] = [Text(visible(first["prompt"]), style="bold")]
    for row in sorted(group.rows, key=lambda row: -(row["reward"] if row["reward"] is not None else -math.inf)):
        parts += [
            Rule(Text(visible(_figures(row)), style="dim"), align="left", style="dim"),
            _completion(row, colour, pieces),
        ]
    title = f"group {first['group_id']}  step {first['step']}  reward {group.mean:.3f}"
    return Panel(
        Together(*parts), title=Text(visible(title)), subtitle=Text(number), title_align="left", subtitle_align="right"
    )


def _figures(row: Row) -> str:
    parts = [f"{key.removeprefix('rewards/')} {value:.3g}" for key, value in row.items() if _is_part(key, value)]
    told = [f"reward {row['reward']:.3f}" if row["reward"] is not None else "no reward"]
    told += [f"({', '.join(parts)})"] if len(parts) > 1 else []
    told += [f"advantage {row['advantage']:+.2f}"] if row["advantage"] is not None else ["not trained"]
    told += [f"{row['tokens']} tokens", row["finish_reason"]]
    versions = sorted({row["versions"][i] for i in range(0, len(row["versions"]), 3)})
    told += [f"version{'s' if len(versions) > 1 else ''} {', '.join(map(str, versions))}"] if versions else []
    return "  ".join(told)


def _is_part(key: str, value: Any) -> bool:
    return key.startswith("rewards/") and value is not None and not math.isnan(value)


def _completion(row: Row, colour: str, pieces: Callable[[list[int]], list[str]] | None) -> Text:
    from rich.text import Text

    if colour == "none" or pieces is None:
        return Text(visible(row["completion"]))
    text = Text()
    for piece, shade in zip(pieces(row["token_ids"]), _shades(row, colour), strict=True):
        text.append(visible(piece), style=f"black on {SCALE[shade]}" if 2 <= shade <= 5 else f"white on {SCALE[shade]}")
    return text


def _shades(row: Row, colour: str) -> list[int]:
    """An index into ``SCALE`` for each token: likely, new and favoured ones are blue."""
    top = len(SCALE) - 1
    if colour == "logprobs":  # exp: 0 for the impossible, 1 for the certain.
        return [round(top * math.exp(min(value, 0.0))) for value in row["rollout_logprobs"]]
    if colour == "advantage":
        squashed = math.tanh(row["advantage"] or 0.0)
        return [round(top * (squashed + 1) / 2)] * row["tokens"]
    spans = [row["versions"][i : i + 3] for i in range(0, len(row["versions"]), 3)]
    oldest, newest = min((s[0] for s in spans), default=0), max((s[0] for s in spans), default=0)
    shades = [top] * row["tokens"]
    for version, start, end in spans:
        shade = round(top * (version - oldest) / (newest - oldest)) if newest > oldest else top
        shades[start:end] = [shade] * (end - start)
    return shades
