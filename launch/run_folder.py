"""The run folder: resolved configuration, metrics, samples, the reward curve, and the live progress on the screen.

Everything a reader needs after the run lies here; the controller calls it once a step. Writing never changes the
run: it only records.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib.metadata
import json
import math
import operator
import os
import shutil
import time
from pathlib import Path
from typing import Any

from launch import replaced
from launch.display import Screen, clock, screen_for
from launch.failures import sample_file
from launch.resume import METRICS, NOTHING, QUEUED, SAMPLES, STATE, WEIGHTS, Point, model_digest, rewind_rows, take_lock
from launch.room import Room
from launch.sinks import Sinks
from launch.stored_groups import sample_files, write_groups
from shared import checkpoints
from shared.config import Config
from shared.config_loader import known_keys
from shared.errors import GroupFailed, InputError, one_line
from shared.fingerprints import summary
from shared.ledger import TimeBook
from shared.metrics import MetricsWriter, read_metrics
from shared.sample_ledger import SampleLedger
from shared.types import Prompt, RolloutGroup

TRACE_BYTES = 64 << 20


def resolve_output(output_dir: str) -> Path:
    """The absolute run folder; inside a Ray job, whose working directory is thrown away, relative to ~/millrace."""
    path = Path(output_dir).expanduser()
    if not path.is_absolute() and "_ray_pkg_" in os.getcwd():
        return Path.home() / "millrace" / path
    return path.absolute()


class RunFolder:
    """One run's folder, open for writing."""

    def __init__(self, config: Config, path: Path, screen: Screen | None = None) -> None:
        """Create ``path`` and lock it, with the files of another run aside if it is to be overwritten.

        Raises ``InputError`` E601 or E602.

        ``screen`` is told of the progress; default: the terminal.
        """
        self.path, self._config = path, config
        self.replaced = ""
        """The run that this one replaces, whose files are not removed yet, in words."""
        self.is_cut_short = False
        self.room: Room | None = None
        """Cores and GPUs that the run could still take, once that is known."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(path)
            (path / "scale.asked.json").unlink(missing_ok=True)
            replaced.bring_back(path)
            if config.run.resume == "overwrite":
                self.replaced = replaced.length_of(path)
                replaced.set_aside(path)
                if not self.replaced:  # Files of a start that came to nothing.
                    replaced.remove(path)
            for folder in ("samples", "ledger", "checkpoints"):
                (path / folder).mkdir(exist_ok=True)
            (path / "config.toml").write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise InputError(
                "E601",
                "cannot write the run folder",
                f"run.output_dir = {path}",
                str(error),
                "a writable directory",
                "another place",
            ) from None
        self._metrics, self._sinks = MetricsWriter(path), Sinks(config, path)
        self._screen = screen or screen_for(config)
        self.book = TimeBook(path / "ledger" / "trace.json", None if config.run.trace else TRACE_BYTES)
        self.samples = SampleLedger(path / SAMPLES)
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._failures = self._refusals = self._unsaved = 0
        self._last_sampled = 0

    def rewind(self, point: Point | None) -> None:
        """Make the folder that of ``point``: what was recorded after it is cut, kept aside and named."""
        version, self.is_cut_short = point.version if point else -1, False
        self._metrics.close()
        rows = rewind_rows(self.path / METRICS, version)
        rewind_rows(self.path / WEIGHTS, version)
        for step, sample in sample_files(self.path).items():
            if step > version:
                sample.unlink()
        aside = checkpoints.set_aside(self.path / "checkpoints", version)
        self._metrics = MetricsWriter(self.path)
        groups = self.samples.rewind(point.state["samples"] if point else NOTHING)
        self._last_sampled = max(version, 0)
        if point:
            print(f"going on from {point.place}", flush=True)
        if rows or groups:
            print(f"cut: {rows} recorded rows and the fates of {groups} groups after it, to be done again", flush=True)
        if aside:
            print(f"set aside: {', '.join(aside)} in {self.path / 'checkpoints'}", flush=True)

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup], digest: str = "") -> None:
        """Record a finished step and show it; ``digest`` is that of its weights."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        every, last = self._config.run.samples_every, self._config.run.steps
        if every and (step // every > self._last_sampled // every or step >= last):
            self._last_sampled = step
            write_groups(self.path / "samples" / f"step-{step:06d}.parquet", groups, step)
        with (self.path / WEIGHTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "digest": summary(digest)}) + "\n")
        self._metrics.write(step, metrics)  # Last: a step that has its row has everything.
        self._sinks.write(step, metrics)
        done, remain = step - self._first[0], max(last - step, 0)
        pace = (now - self._first[1]) / done if done > 0 else math.nan
        self._screen.step(step, metrics, pace * remain if remain else 0.0)

    def draft(self, step: int) -> Path:
        """An empty folder for the files of a checkpoint. Raises ``OSError`` if one as large as the last has no room."""
        parent = self.path / "checkpoints"
        draft = checkpoints.begin(parent, step)
        size = sum(f.stat().st_size for last in checkpoints.all_of(parent)[:1] for f in last.rglob("*"))
        if (free := shutil.disk_usage(parent).free) < size:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.3f} GB free, the last one took {size / 1e9:.3f} GB")
        return draft

    async def commit(self, draft: Path, state: dict[str, Any], queued: list[RolloutGroup]) -> bool:
        """Make ``draft`` a checkpoint, beside the run; False if the disk did not let it."""
        try:
            await asyncio.to_thread(self._commit, draft, state, queued)
        except OSError as error:
            self.unsaved(state["version"], error)
            return False
        self._unsaved = 0
        return True

    def unsaved(self, step: int, error: OSError) -> None:
        """A checkpoint could not be written: the one before is kept. Raises ``InputError`` E601 at the second in a row."""
        checkpoints.sweep(self.path / "checkpoints")
        self._unsaved += 1
        place, found = f"run.output_dir = {self.path}", f"step {step}: {one_line(error)}"
        if self._unsaved > 1:
            expected, fix = "room for a checkpoint, two failed in a row", "make room, or another run.output_dir"
            raise InputError("E601", "not enough disk", place, found, expected, fix) from None
        print(f"warning[W601] checkpoint not written — {place}. Found {found}. The one before is kept", flush=True)

    def _commit(self, draft: Path, state: dict[str, Any], queued: list[RolloutGroup]) -> None:
        (draft / STATE).parent.mkdir()
        (draft / STATE).write_text(json.dumps(state), encoding="utf-8")
        if queued:
            write_groups(draft / QUEUED, queued)
        facts = {"config": self._config.model_dump(), "model": model_digest(self._config), "versions": _versions()}
        place = checkpoints.commit(draft, state["version"], facts)
        best = place.parent / f"{checkpoints.PREFIX}{state['stopping'].get('best_version', -1):06d}"
        checkpoints.prune(place.parent, self._config.run.keep_checkpoints, spare=best)
        if not self.is_cut_short:
            self.replaced = ""
            replaced.remove(self.path)

    def cut_short(self) -> None:
        """The run ends before its time: what it saves from now on does not cost the run that it was to replace."""
        self.is_cut_short = True

    def refused(self, step: int, groups: list[RolloutGroup]) -> Path:
        """Keep the groups of a refused optimizer step after policy version ``step``; where."""
        self._refusals += 1
        path = self.path / "failed" / f"step-{step:06d}-{self._refusals}.parquet"
        write_groups(path, groups, step)
        return path

    def failed(self, failure: GroupFailed, prompt: Prompt) -> None:
        """Keep a dropped group for inspection, up to as many as may fail."""
        self._failures += 1
        if self._failures > self._config.reward.max_failed_groups + 1:
            return
        path = self.path / sample_file(failure)
        path.parent.mkdir(exist_ok=True)
        kept = {"group": failure.group_id, "cause": failure.cause, "error": failure.detail, "sample": failure.sample}
        kept |= {
            "prompt": prompt.text,
            "columns": prompt.columns,
            "completion": failure.text,
            "traceback": failure.trace,
        }
        path.write_text(json.dumps(kept, default=str, indent=1), encoding="utf-8")

    def evaluated(self, step: int, metrics: dict[str, float], story: str = "") -> None:
        """Record an evaluation of policy version ``step``, as a row of its own; ``story``: what early stopping makes of it."""
        self._screen.evaluated(step, metrics, story)
        self._metrics.write(step, metrics)
        self._sinks.write(step, metrics)

    def summary(self, summary: dict[str, Any]) -> None:
        """Keep the summary of the run's time, and print its verdict and the account of all samples."""
        (self.path / "ledger" / "time.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        print(f"{summary['verdict']}\n{self.samples.verdict()}", flush=True)

    def close(self) -> None:
        """Close the sinks, and bring back the run that this one has not replaced."""
        self._screen.close()
        self.book.close()
        self._metrics.close()
        self._sinks.close()
        self.samples.flush()
        if self.replaced:
            replaced.bring_back(self.path)
            print(
                f"the {self.replaced} is back in {self.path}: this one did not come to its first checkpoint", flush=True
            )
        self._lock.close()

    def finish(self) -> None:
        """Close everything and draw the curve."""
        self.close()
        draw_curves(read_metrics(self.written), self.written / "reward.png", self._config)
        took = clock(time.monotonic() - self._started)
        print(f"run folder: {self.written} ({took} in all)", flush=True)

    @property
    def written(self) -> Path:
        """Where the files of this run lie: beside those of a run that is back, or else in the run folder."""
        return self.path / replaced.UNFINISHED if self.replaced else self.path


def dump_config(config: Config) -> str:
    """The configuration as TOML. What is none is left out, or said where the default, or a recipe, may say otherwise."""
    import tomli_w

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list) else value

    table: dict[str, Any] = config.model_dump()
    for key, field in known_keys().items():
        *path, last = key.split(".")
        holder = functools.reduce(operator.getitem, path, table)
        by_recipe = config.algorithm.recipe is not None and path[0] == "algorithm"
        if holder[last] is None and (by_recipe or field.default is not None):
            holder[last] = "none"
    return tomli_w.dumps(clean(table))


def _versions() -> dict[str, str]:
    """Of the libraries that wrote a checkpoint."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "ray")}


def draw_curves(rows: list[dict[str, Any]], path: Path, config: Config) -> None:
    """Reward and evaluation score over the policy version, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    trained = [(row["step"], row["reward"]) for row in rows if row.get("reward") is not None]
    if trained:
        steps, rewards = zip(*trained, strict=True)
        window = max(1, len(rewards) // 50)
        smooth = [
            sum(rewards[max(0, i - window + 1) : i + 1]) / len(rewards[max(0, i - window + 1) : i + 1])
            for i in range(len(rewards))
        ]
        axis.plot(steps, rewards, color="#9db8d9", linewidth=0.8, label="reward of a step")
        axis.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label=f"mean of {window} steps")
    evaluated = [(row["step"], row["eval/reward"]) for row in rows if row.get("eval/reward") is not None]
    if evaluated:
        axis.plot(*zip(*evaluated, strict=True), "o-", color="#c2571a", label="held-out, greedy")
    axis.set(xlabel="policy version (optimizer steps)", ylabel="reward", title=Path(config.run.output_dir).name)
    axis.grid(alpha=0.3)
    if trained or evaluated:
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
