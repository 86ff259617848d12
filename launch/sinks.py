"""Where metrics go beside ``metrics.jsonl``: one class a sink, chosen by name in ``run.sinks``.

``RunFolder`` writes to all of them after every step. ``metrics.jsonl`` stays the truth: a sink that fails is switched off with
one line and costs the run nothing else.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from shared.choices import bind
from shared.config import Config
from shared.errors import InputError, one_line

Row = dict[str, float]


class Sink(Protocol):
    """Takes the rows of a run; made with its run folder and configuration, and the arguments from ``run.sinks``."""

    def write(self, step: int, row: Row) -> None:
        """Record ``row`` under policy version ``step``."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Events in the run folder: ``tensorboard --logdir runs``."""

    def __init__(self, folder: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, row: Row) -> None:
        """See ``Sink``."""
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """See ``Sink``."""
        self._board.close()


class WandB:
    """Weights & Biases: one run, named after the run folder, that goes on when the run does: the folder keeps its id.

    Rows go without W&B's own step, which must not fall: a run that goes on from a checkpoint repeats steps.
    """

    def __init__(self, folder: Path, config: Config, *, project: str = "millrace", **init: Any) -> None:
        import wandb

        kept = folder / "wandb.id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._run: Any = wandb.init(
            project=project,
            name=folder.name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(),
            **init,
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: Row) -> None:
        """See ``Sink``."""
        self._run.log({"step": step, **row})

    def close(self) -> None:
        """See ``Sink``."""
        self._run.finish()


class Trackio:
    """trackio, which has W&B's interface and keeps everything on this machine unless told otherwise."""

    def __init__(self, folder: Path, config: Config, *, project: str = "millrace", **init: Any) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project=project, name=folder.name, config=config.model_dump(), resume="allow", **init)

    def write(self, step: int, row: Row) -> None:
        """See ``Sink``."""
        self._trackio.log({"step": step, **row}, step=step)

    def close(self) -> None:
        """See ``Sink``."""
        self._trackio.finish()


class Prometheus:
    """Gauges that Ray's metrics agent exports: ``millrace_<metric>{run="..."}``; launch/grafana.json shows them.

    Seconds by state become ``millrace_time_seconds{process, state}``.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        from ray.util.metrics import Gauge

        self._make, self._run = Gauge, folder.name
        self._gauges: dict[str, Any] = {}
        self._time = Gauge("millrace_time_seconds", "seconds of the last step by state", ("run", "process", "state"))

    def write(self, step: int, row: Row) -> None:
        """See ``Sink``."""
        for name, value in {"step": float(step), **row}.items():
            parts = name.split("/")
            if parts[0] == "time" and len(parts) == 3:
                self._time.set(value, {"run": self._run, "process": parts[1], "state": parts[2]})
                continue
            if name not in self._gauges:
                self._gauges[name] = self._make(prometheus_name(name), name, ("run",))
            self._gauges[name].set(value, {"run": self._run})

    def close(self) -> None:
        """See ``Sink``."""


SINKS: dict[str, Callable[..., Any]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "prometheus": Prometheus,
}
EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Sink -> the package that it needs; each is an extra in pyproject.toml too."""


def prometheus_name(metric: str) -> str:
    """``metric`` as Prometheus allows it."""
    return "millrace_" + re.sub(r"[^a-zA-Z0-9]+", "_", metric.replace("@", "_at_")).strip("_").lower()


def check_sinks(config: Config, origin: str) -> None:
    """Raises ``InputError`` E107 for a sink that does not exist or does not take its arguments, E702 without its package."""
    import importlib.util

    for i, choice in enumerate(config.run.sinks):
        key = f"{origin}:run.sinks[{i}]"
        bind(choice, SINKS, "sink", key)
        package = EXTRAS.get(choice.name)
        if package and importlib.util.find_spec(package) is None:
            fix = f"pip install {package}"
            raise InputError("E702", "package missing", key, f"no {package}", package, fix)


class Sinks:
    """All sinks of a run as one; none of them can end it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._open: list[tuple[str, Sink]] = []
        for choice in config.run.sinks:
            make = bind(choice, SINKS, "sink", "run.sinks")
            sink = self._try(choice.name, partial(make, folder, config))
            if sink is not None:
                self._open.append((choice.name, sink))

    def write(self, step: int, row: Row) -> None:
        """To each."""
        self._open = [(name, sink) for name, sink in self._open if self._try(name, partial(_written, sink, step, row))]

    def close(self) -> None:
        """Each."""
        for name, sink in self._open:
            self._try(name, sink.close)
        self._open = []

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None if it fails, which is told."""
        try:
            return call()
        except Exception as error:  # Whatever the library raises, it is only about telling.
            print(f"warning[W905] sink {name} switched off — {type(error).__name__}: {one_line(error)}", flush=True)
            return None


def _written(sink: Sink, step: int, row: Row) -> bool:
    sink.write(step, row)
    return True
