"""Everything that a report shows of one run, read from its folder as plain JSON values.

``millrace report`` calls it for every run. Nothing in the folder is changed, and a run that goes on may write meanwhile.
Invariant: the result's size is bounded, whatever the length of the run; what was left out is told in ``notes``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from launch.accounts import verdict
from launch.report.findings import findings
from launch.report.rows import Row, numbers, read_rows, rounded, series, split_rows, times
from launch.report.samples import BUDGET, Piece, load_pieces, read_samples
from launch.report.times import Trace, read_trace, seconds, timeline
from launch.scale import is_live
from rollout.reward_loading import reward_name
from shared.config import Config
from shared.config_loader import known_keys, load_config
from shared.config_reward import RewardFunction
from shared.errors import MillraceError

Times = dict[str, dict[str, float]]
FINAL_STEPS = 10
"""Steps whose mean stands for the end of a run."""


def run_data(folder: Path, runs: int = 1, load: Callable[[str], Piece | None] = load_pieces) -> dict[str, Any]:
    """The run in ``folder``, one of ``runs`` on the page. Raises ``InputError`` E603 or E606."""
    rows = read_rows(folder)
    steps, evaluations = split_rows(rows)
    notes: list[str] = []
    settings, config = _settings(folder / "config.toml")
    if config is None:
        notes.append("Findings: config.toml does not fit this version of Millrace, so there are none.")
    trace = read_trace(folder / "ledger" / "trace.json")
    summary = _summary(folder, trace)
    trained = times(steps)
    whole = {process: row["states"] for process, row in summary.get("processes", {}).items()}
    tokenizer = str(settings.get("model.tokenizer") or settings.get("model.path") or "")
    return {
        "name": folder.resolve().name,
        "state": _state(folder, steps, settings, bool(summary)),
        "facts": _facts(folder, steps, settings),
        "tiles": _tiles(steps, evaluations),
        "verdict": _verdict(steps, summary, trained, config),
        "findings": [dataclasses.asdict(finding) for finding in findings(rows, config)] if config else None,
        "training": series(steps, notes, runs),
        "evaluations": series(evaluations, [], runs),
        "final": _final(steps, evaluations),
        "time": {"training": seconds(trained, notes), "whole": seconds(whole, []), "timeline": _timeline(trace, notes)},
        "samples": read_samples(folder, partial(load, tokenizer), BUDGET // runs, notes),
        "settings": settings,
        "changed": _changed(settings),
        "notes": notes,
    }


def _verdict(steps: list[Row], summary: dict[str, Any], trained: Times, config: Config | None) -> str:
    """That of the run itself if it ran in one piece, else of all its recorded steps."""
    if summary.get("training_seconds", 0) >= 0.9 * sum(numbers(steps, "time/step")) and summary.get("verdict"):
        return str(summary["verdict"])
    return verdict(trained, config) if config and trained else ""


def _timeline(trace: Trace | None, notes: list[str]) -> dict[str, Any] | None:
    return timeline(trace, notes) if trace else None


def _settings(path: Path) -> tuple[dict[str, Any], Config | None]:
    """The settings by dotted key as they are written, and the configuration if it is still valid."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, None
    try:
        return _flat(table), load_config([str(path)])
    except MillraceError:
        return _flat(table), None


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                flat |= _flat(item, f"{prefix}{name}.{number}.")
        elif isinstance(value, float) and not math.isfinite(value):
            flat[f"{prefix}{name}"] = str(value)
        elif value not in ({}, []):
            flat[f"{prefix}{name}"] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat


def _changed(settings: dict[str, Any]) -> list[str]:
    """Keys whose value is not the default."""
    defaults: dict[str, Any] = {}
    for key, found in known_keys().items():
        default: Any = None if found.is_required() else found.get_default(call_default_factory=True)
        defaults |= _flat({key: default.model_dump() if isinstance(default, BaseModel) else default})
    for key in settings:
        field = RewardFunction.model_fields.get(key.rpartition(".")[2])
        if key.startswith("reward.functions.") and field is not None:
            defaults[key] = field.get_default(call_default_factory=True)
    return [key for key, value in settings.items() if defaults.get(key) != value]


def _summary(folder: Path, trace: Trace | None) -> dict[str, Any]:
    """``ledger/time.json``, unless it is that of an earlier life of the run; each begins with a new ``config.toml``."""
    path = folder / "ledger" / "time.json"
    try:
        begun = max((folder / "config.toml").stat().st_mtime, trace.origin if trace else 0.0)
        if path.stat().st_mtime < begun:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(folder: Path, steps: list[Row], settings: dict[str, Any], summed: bool) -> dict[str, str]:
    done, wanted = steps[-1]["step"] if steps else 0, settings.get("run.steps", 0)
    said = f"{done:,} of {wanted:,} steps"
    if is_live(folder):
        return {"word": "going on", "text": f"{said} so far; make the report again for the rest"}
    if done >= wanted > 0:
        return {"word": "finished", "text": said}
    if summed:
        return {"word": "finished", "text": f"{said}, ended by early stopping"}
    return {"word": "ended early", "text": f"{said}; the same command goes on from the newest checkpoint"}


def _paths(settings: dict[str, Any], key: str) -> str:
    """Of the sources of rows."""
    return ", ".join(str(v) for k, v in settings.items() if k.startswith(f"{key}.") and k.endswith(".path"))


def _facts(folder: Path, steps: list[Row], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page says about the run beside its figures: label and text."""

    def given(key: str) -> str:
        return str(settings.get(key, "?"))

    written = (folder / "metrics.jsonl").stat().st_mtime
    facts = [
        ("Model", f"{given('model.path')} · {given('model.dtype')}"),
        ("Training rows", _paths(settings, "data.train") or "?"),
        ("Held-out rows", _paths(settings, "data.eval") or "none"),
        ("Rewards", ", ".join(_rewards(settings)[:6])),
        ("Algorithm", _algorithm(settings)),
        ("A step", f"{given('learner.prompts_per_step')} prompts × {given('rollout.group_size')} completions"),
        ("Staleness", f"at most {given('rollout.max_staleness')} steps"),
        ("Processes", _processes(settings)),
        ("Weights", _weights(steps)),
        ("Goodput", _goodput(steps)),
        ("Libraries", _libraries(folder)),
        ("Last record", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(written))),
        ("Folder", str(folder.resolve())),
    ]
    return [(label, text) for label, text in facts if text]


def _rewards(settings: dict[str, Any]) -> list[str]:
    """The reward functions, as their metrics are named."""
    tables: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        number, _, field = key.removeprefix("reward.functions.").partition(".")
        if key.startswith("reward.functions.") and field in ("name", "function", "model", "url"):
            tables.setdefault(number, {})[field] = json.loads(value) if str(value)[:2] == '["' else str(value)
    return [reward_name(RewardFunction.model_construct(**table)) for table in tables.values()]


def _processes(settings: dict[str, Any]) -> str:
    width = settings.get("rollout.tensor_parallel_size", 1) * settings.get("rollout.pipeline_parallel_size", 1)
    counts = {
        "engine": settings.get("rollout.num_engines", 1),
        "learner rank": settings.get("learner.num_ranks", 1),
        "reward worker": settings.get("reward.workers", 1),
    }
    said = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items())
    return said if width == 1 else f"{said}; an engine takes {width} devices"


def _algorithm(settings: dict[str, Any]) -> str:
    names = ("advantage.name", "policy_loss.name", "aggregation.name")
    chosen = [str(settings.get(f"algorithm.{name}", "?")) for name in names]
    coef = float(settings.get("algorithm.kl.coef", 0))
    recipe = settings.get("algorithm.recipe")
    return " · ".join([*([f"recipe {recipe}"] if recipe else []), *chosen, f"KL {coef:g}"])


def _weights(steps: list[Row]) -> str:
    size = (numbers(steps, "sync/bytes") or [0])[-1]
    return f"{size / 1e6:,.1f} MB a publication" if size else ""


def _goodput(steps: list[Row]) -> str:
    rates, spent = numbers(steps, "goodput"), numbers(steps, "time/step")
    if not rates or len(rates) != len(spent) or not sum(spent):
        return ""
    mean = sum(rate * seconds for rate, seconds in zip(rates, spent, strict=True)) / sum(spent)
    return f"{mean:,.0f} useful tokens a second and device"


def _libraries(folder: Path) -> str:
    """As the newest checkpoint recorded them; the hardware itself is recorded nowhere."""
    for path in sorted(folder.glob("checkpoints/step-*/MANIFEST.json"), reverse=True):
        try:
            versions = json.loads(path.read_text(encoding="utf-8"))["versions"]
            return ", ".join(f"{name} {version}" for name, version in versions.items())
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return ""


def _tiles(steps: list[Row], evaluations: list[Row]) -> list[dict[str, str]]:
    """The figures at the top: label, value, a note, and the series to draw beside them."""
    spent, done = sum(numbers(steps, "time/step")), steps[-1]["step"] if steps else 0
    tiles = [
        _change("Reward", steps, "reward"),
        _change("Held-out reward", evaluations, "eval/reward", "last evaluation", count=1),
        _tile("Training time", _clock(spent), f"{spent / max(done, 1):.3g} s a step", "time/step"),
    ]
    for label, name in (
        ("Tokens a second", "throughput/rollout_tokens_per_second"),
        ("Completion length", "completions/mean_length"),
        ("KL", "kl"),
        ("Entropy", "entropy"),
    ):
        tiles.append(_change(label, steps, name))
    return [tile for tile in tiles if tile]


def _change(label: str, rows: list[Row], name: str, what: str = "", count: int = FINAL_STEPS) -> dict[str, str]:
    values = numbers(rows, name)
    if not values:
        return {}
    count = min(count, len(values))
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    what = what or (f"mean of the last {count} steps" if count > 1 else "last step")
    return _tile(label, _figure(last), f"{what}; first {_figure(first)}", name)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _tile(label: str, value: str, note: str, name: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "series": name}


def _clock(spent: float) -> str:
    minutes, rest = divmod(round(spent), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _final(steps: list[Row], evaluations: list[Row]) -> dict[str, Any]:
    """Figures at the end of the run: the mean of the last steps, and the last evaluation."""
    names = dict.fromkeys(name for row in steps[-FINAL_STEPS:] for name in row if name != "step")
    late = {name: numbers(steps[-FINAL_STEPS:], name) for name in names}
    figures = {name: rounded(sum(values) / len(values)) for name, values in late.items() if values}
    scores = {name for row in evaluations for name in row if name != "step"}
    figures |= {name: rounded(numbers(evaluations, name)[-1]) for name in sorted(scores) if numbers(evaluations, name)}
    best = max(numbers(evaluations, "eval/reward"), default=None)
    spent = sum(numbers(steps, "time/step"))
    figures |= {"seconds": rounded(spent), "best": rounded(best), "averaged": len(steps[-FINAL_STEPS:])}
    return figures | {"steps": steps[-1]["step"] if steps else 0}
