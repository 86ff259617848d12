"""Keeps the old run of a folder until the new one has a checkpoint, with ``run.resume = "overwrite"``.

Nothing of the old run is removed before the new one has written a checkpoint. Until then the old files lie in ``replaced/``.
A new run that ends before that moves to ``unfinished/``, and the old files come back, at the latest at the next start.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from shared.checkpoints import all_of
from shared.errors import InputError
from shared.metrics import read_metrics

OURS = (
    *("checkpoints", "samples", "ledger", "failed", "tensorboard", "wandb", "logs"),
    *(
        "config.toml",
        "metrics.jsonl",
        "metrics.cut.jsonl",
        "reward.png",
        "report.html",
        "stacks.txt",
        "wandb.id",
        "scale.asked.json",
        "scale.answered.json",
    ),
)
"""What a run writes into its folder, beside the lock."""
REPLACED, UNFINISHED = "replaced", "unfinished"
MOVING, LEAVING = "replaced.moving", "replaced.leaving"
"""Folders of old files that are not all in one place, and of old files that are being removed."""


def length_of(folder: Path) -> str:
    """``run of 100 steps``, from its metrics or else its checkpoints; empty if ``folder`` has neither."""
    steps = [int(place.name.rpartition("-")[2]) for place in all_of(folder / "checkpoints")[:1]]
    metrics = folder / "metrics.jsonl"
    if not steps and not (metrics.exists() and metrics.stat().st_size):
        return ""
    if metrics.exists():
        # A damaged file is replaced like any other.
        with contextlib.suppress(ValueError, KeyError, TypeError, InputError):
            steps += [int(row["step"]) for row in read_metrics(folder)[-1:]]
    longest = max(steps, default=0)
    return f"run of {longest} step{'' if longest == 1 else 's'}"


def set_aside(folder: Path) -> bool:
    """Move the files of the run in ``folder`` to ``replaced/``; False if it holds none. ``bring_back`` comes first."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    if not _move(folder, folder / MOVING):
        return False
    (folder / MOVING).rename(folder / REPLACED)
    return True


def remove(folder: Path) -> None:
    """Remove the old run for good; the new one has a checkpoint."""
    if (folder / REPLACED).is_dir():
        (folder / REPLACED).rename(folder / LEAVING)
        for path in (folder / LEAVING).iterdir():  # Of a link, what it names stays.
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / LEAVING, ignore_errors=True)


def bring_back(folder: Path) -> bool:
    """Put the files of an old run back where they were, and those of the new one into ``unfinished/``; False without any.

    The caller holds the folder's lock. If the process is killed inside, the next call finishes the work.
    """
    if not any((folder / name).is_dir() for name in (REPLACED, MOVING, LEAVING)):
        return False
    shutil.rmtree(folder / LEAVING, ignore_errors=True)
    back = (folder / REPLACED).is_dir()
    if back:
        _move(folder, folder / UNFINISHED)
        (folder / REPLACED).rename(folder / MOVING)
    if (folder / MOVING).is_dir():
        _move(folder / MOVING, folder)
        (folder / MOVING).rmdir()
    return back


def _move(source: Path, target: Path) -> bool:
    """Move what runs write, and nothing else: a wrong output_dir costs nobody's files. False if there is nothing."""
    there = [source / name for name in OURS if (source / name).exists() or (source / name).is_symlink()]
    if there:
        target.mkdir(exist_ok=True)
    for path in there:
        path.rename(target / path.name)
    return bool(there)
