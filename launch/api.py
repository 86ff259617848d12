"""Training from Python: ``train`` blocks until the run has ended, ``train_steps`` hands out every step as it is done.

A run is the same one that ``millrace train`` makes, in the same folder, and can be resumed, shown and reported by the verbs. It
has an event loop of its own in a thread of its own, so that both work inside a notebook, whose thread has a loop already.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.display import Row
from launch.function_files import write_functions, write_once
from launch.run import prepare_session
from launch.run_folder import resolve_output
from shared.checkpoints import newest
from shared.config import Config
from shared.config_loader import config_file, config_of, load_config
from shared.errors import InputError, one_line
from shared.metrics import read_metrics

Reward = Callable[..., Any] | str | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: Path
    """Everything it left: ``millrace show``, ``report`` and ``resume`` take it."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row a step, and one for each evaluation: ``metrics.jsonl``."""
        return read_metrics(self.folder)

    @property
    def model(self) -> Path | None:
        """The newest checkpoint, as a Hugging Face model directory; None without any."""
        found = newest(self.folder / "checkpoints")
        return found[0] / "hf" if found else None


def train(
    config: Config | Mapping[str, Any] | str | Path,
    rewards: Sequence[Reward] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Train to the end, telling the progress.

    ``config``: a ``Config``, a table like the TOML file's, the path of one, or the name of a shipped one. ``rewards`` replace its
    reward functions: plain functions, names, or tables as under ``reward.functions``. ``rows`` replace its training rows.
    ``settings``: any further ones, ``{"run.steps": 50}``.

    Raises what the run raises: ``shared.errors.InputError`` for wrong input, ``MillraceError`` for what ended it.
    """
    session = _Background(config, rewards, rows, settings or {}, None)
    session.wait()
    return Run(session.folder)


def train_steps(
    config: Config | Mapping[str, Any] | str | Path,
    rewards: Sequence[Reward] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Train, and yield each step's row of metrics, evaluations included (``step`` says when); arguments as for ``train``.

    Training continues while the caller handles a row. If the caller leaves the loop, the run saves a checkpoint and ends.
    """
    told = _Told()
    session = _Background(config, rewards, rows, settings or {}, told)
    try:
        while (row := told.rows.get()) is not None:
            yield row
        session.wait()
    finally:
        session.end()


class _Told:
    """A ``Screen`` that hands rows to whoever iterates; None at the end."""

    def __init__(self) -> None:
        self.rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def step(self, step: int, row: Row, left_s: float) -> None:  # noqa: ARG002
        """See ``Screen``."""
        self.rows.put({"step": step, **row})

    def evaluated(self, step: int, row: Row, story: str) -> None:  # noqa: ARG002
        """See ``Screen``."""
        self.rows.put({"step": step, **row})

    def close(self) -> None:
        """See ``Screen``."""


class _Background:
    """A run in a thread of its own."""

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path,
        rewards: Sequence[Reward],
        rows: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        told: _Told | None,
    ) -> None:
        """Check everything, here and now, and begin."""
        given = _config(config, settings)
        self.folder = resolve_output(given.run.output_dir)
        source = Path("config.toml") if isinstance(config, Config | Mapping) else config_file(str(config))
        self._session = prepare_session(_with(given, rewards, rows, self.folder), source, told)
        self._told = told
        self._failure: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="millrace", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it has ended; raises what it raised. An interrupt ends the run first."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.2)  # In pieces: a whole join would not let an interrupt through.
        finally:
            self.end()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """End it if it still goes on."""
        self._begun.wait()
        if self._task is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # It has just ended by itself.
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as failure:  # The caller's thread raises it.
            self._failure = failure
        finally:
            self._begun.set()
            if self._told is not None:
                self._told.rows.put(None)

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        self._begun.set()
        if self._session is not None:
            await self._session.run()


def _config(config: Config | Mapping[str, Any] | str | Path, settings: Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        config = config.model_dump()
    if isinstance(config, Mapping):
        return config_of(config, settings)
    return load_config([str(config)], settings)


def _with(config: Config, rewards: Sequence[Reward], rows: Sequence[Mapping[str, Any]], folder: Path) -> Config:
    """``config`` with rewards and rows of the caller's, as files that other processes, and a resumed run, can read.

    Raises ``InputError`` E204, E301 or E601.
    """
    table = config.model_dump()
    try:
        if rewards:
            names = write_functions([reward for reward in rewards if callable(reward)], folder)
            table["reward"]["functions"] = [_entry(reward, names) for reward in rewards]
        if rows:
            text = "".join(_line(row, number) for number, row in enumerate(rows, 1))
            table["data"]["train"] = [{"path": str(write_once(folder, "rows-{}.jsonl", text))}]
    except OSError as error:
        where, fix = f"run.output_dir = {folder}", "another place"
        raise InputError("E601", "cannot write", where, one_line(error), "a writable directory", fix) from None
    return config_of(table)


def _line(row: Mapping[str, Any], number: int) -> str:
    try:
        return json.dumps(dict(row)) + "\n"
    except (TypeError, ValueError) as error:
        expected, fix = "texts, numbers, lists and tables", "convert it"
        raise InputError("E204", "row is no JSON", f"rows:{number}", one_line(error), expected, fix) from None


def _entry(reward: Reward, names: Mapping[Callable[..., Any], str]) -> dict[str, Any]:
    if isinstance(reward, str):
        return {"function": reward}
    if isinstance(reward, Mapping):
        return dict(reward)
    return {"function": names[reward], "name": reward.__name__}
