"""The run folder: resolved configuration, metrics, samples, the reward curve, and the live progress on the screen.

Everything a reader needs after the run lies here; the controller calls it once a step. Writing never changes the
run: it only records.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from launch.failures import sample_file
from shared.config import Config
from shared.errors import GroupFailed, InputError
from shared.ledger import TimeBook
from shared.metrics import MetricsWriter, read_metrics
from shared.types import Prompt, RolloutGroup

PRINT_EVERY_S = 2.0


def resolve_output(output_dir: str) -> Path:
    """The absolute run folder; inside a Ray job, whose working directory is thrown away, relative to ~/millrace."""
    path = Path(output_dir).expanduser()
    if not path.is_absolute() and "_ray_pkg_" in os.getcwd():
        return Path.home() / "millrace" / path
    return path.absolute()


def check_output(config: Config, path: Path) -> None:
    """Raises ``InputError`` E602 if ``path`` holds an earlier run that must not be overwritten."""
    if (path / "metrics.jsonl").exists() and not config.run.overwrite:
        found = f"{len(read_metrics(path))} recorded rows"
        fix = "another name, or run.overwrite = true"
        raise InputError("E602", "run exists", f"run.output_dir = {path}", found, "an empty directory", fix)


class RunFolder:
    """One run's folder, open for writing."""

    def __init__(self, config: Config, path: Path) -> None:
        """Create ``path``, emptied if that is allowed. Raises ``InputError`` E601 if it cannot be written."""
        self.path, self._config = path, config
        check_output(config, path)
        if (path / "metrics.jsonl").exists():
            shutil.rmtree(path)
        try:
            for folder in ("samples", "ledger"):
                (path / folder).mkdir(parents=True, exist_ok=True)
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
        self._metrics = MetricsWriter(path, config.run.tensorboard)
        self.book = TimeBook(path / "ledger" / "trace.json")
        self._started = self._printed = time.monotonic()
        self._first_step = 0.0
        self._best: Path | None = None
        self._failures = 0
        self._last_sampled = 0

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup]) -> None:
        """Record a finished step and print a line of progress every other second."""
        now = time.monotonic()
        self._first_step = self._first_step or now
        self._metrics.write(step, metrics)
        every, last = self._config.run.samples_every, self._config.run.steps
        if every and (step // every > self._last_sampled // every or step >= last):
            self._last_sampled = step
            write_samples(self.path / "samples" / f"step-{step:06d}.parquet", step, groups)
        if now - self._printed >= PRINT_EVERY_S or step == 1 or step >= last:
            self._printed = now
            left = (now - self._first_step) / max(step - 1, 1) * (last - step)
            rate = metrics["throughput/rollout_tokens_per_second"]
            kl = f"  kl {metrics['kl']:.4f}" if "kl" in metrics else ""
            print(
                f"step {step:>5}/{last}  reward {metrics['reward']:.3f}{kl}  |A| {metrics['advantages/abs_mean']:.2f}  {rate:,.0f} tokens/s  {_clock(left)} left",
                flush=True,
            )

    def best_checkpoint(self, step: int) -> str:
        """Where the policy of ``step`` goes, which is the best so far; the earlier best is removed."""
        if self._best is not None:
            shutil.rmtree(self._best.parent, ignore_errors=True)
        self._best = self.path / "checkpoints" / f"best-{step:06d}" / "hf"
        return str(self._best)

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

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation of policy version ``step``, as a row of its own."""
        shown = "  ".join(
            f"{name.removeprefix('eval/').removeprefix('rewards/').removesuffix('/mean')} {value:.3f}"
            for name, value in metrics.items()
        )
        print(f"evaluation at version {step}: {shown}", flush=True)
        self._metrics.write(step, metrics)

    def summary(self, summary: dict[str, Any]) -> None:
        """Keep the summary of the run's time and print its verdict."""
        (self.path / "ledger" / "time.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        print(summary["verdict"], flush=True)

    def finish(self) -> None:
        """Close the sinks and draw the curve."""
        self.book.close()
        self._metrics.close()
        draw_curves(read_metrics(self.path), self.path / "reward.png", self._config)
        print(f"run folder: {self.path} ({_clock(time.monotonic() - self._started)} in all)", flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def dump_config(config: Config) -> str:
    """The configuration as TOML, without the keys that are none."""
    import tomli_w

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return tomli_w.dumps(clean(config.model_dump()))


def write_samples(path: Path, step: int, groups: list[RolloutGroup]) -> None:
    """The completions of a step with their rewards, one row each."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for group in groups:
        for i, completion in enumerate(group.completions):
            row = {
                "step": step,
                "group_id": group.group_id,
                "prompt": str(group.prompt.text),
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.token_ids),
                "reward": float(group.rewards[i]),
                "advantage": None if group.advantages is None else float(group.advantages[i]),
            }
            parts = {f"rewards/{name}": float(values[i]) for name, values in group.reward_parts.items()}
            rows.append(row | parts | {column: str(values[i]) for column, values in group.extra.items()})
    columns = dict.fromkeys(column for row in rows for column in row)
    table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
    pyarrow.parquet.write_table(table, path)


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
