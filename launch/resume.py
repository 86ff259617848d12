"""Where a run begins: anew, or from a checkpoint of the run that its folder holds; and one writer a folder.

Everything that can be refused is refused by ``find`` before any resource is taken. What lies after the checkpoint is cut
from metrics, samples and ledger, kept aside, and named.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from launch.replaced import LEAVING, MOVING, REPLACED, UNFINISHED, bring_back, length_of
from launch.stored_groups import read_groups
from rollout.prompts import PromptStream
from shared.checkpoints import all_of, newest, of_step
from shared.config import Config
from shared.errors import InputError, raise_all
from shared.metrics import read_metrics
from shared.types import RolloutGroup

STATE, QUEUED = "state/run.json", "state/queued.parquet"
SETTLED = ("run.seed", "data.shuffle", "rollout.group_size")
"""Settings that must stay as they were: the order of the data and the shape of a group hang on them."""
MAKES_GROUPS = [
    ("reward", "functions"),
    *(
        ("rollout", name)
        for name in ("max_staleness", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop")
    ),
    *(("learner", name) for name in ("prompts_per_step", "steps_per_batch", "epochs_per_batch")),
    *(("algorithm", name) for name in ("truncation_penalty", "zero_variance", "max_resampled_groups")),
]
"""Settings with which groups that wait for the learner must have been made; with others they are made again."""
NOTHING = {"bytes": 0, "sha256": hashlib.sha256().hexdigest(), "counts": {}, "reasons": {}, "open": []}
"""Mark of an empty sample ledger."""


@dataclass(frozen=True)
class Point:
    """A verified checkpoint to go on from."""

    place: Path
    manifest: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def at(cls, place: Path, manifest: dict[str, Any]) -> Point:
        """A verified folder with its manifest."""
        return cls(place, manifest, json.loads((place / STATE).read_text(encoding="utf-8")))

    @property
    def version(self) -> int:
        """Policy version of its weights."""
        return int(self.state["version"])

    def queued(self, config: Config, stream: PromptStream) -> list[RolloutGroup] | None:
        """The scored groups that waited for the learner; None if they are not what ``config`` would make."""
        now, then = config.model_dump(), self.manifest["config"]
        if any(now[section][name] != then[section][name] for section, name in MAKES_GROUPS):
            return None
        return read_groups(self.place / QUEUED, stream.at) if (self.place / QUEUED).exists() else []


def find(config: Config, folder: Path, stream: PromptStream, origin: str) -> Point | None:
    """The checkpoint that a run in ``folder`` goes on from; None: it begins anew. ``origin``: the configuration's file.

    Raises ``InputError`` E602 to E605 if the folder holds a run that must not, or cannot, be continued like this.
    """
    choice, parent = config.run.resume, folder / "checkpoints"
    check_lock(folder)
    lived = (folder / "metrics.jsonl").exists() or bool(all_of(parent))
    if choice == "overwrite" or (choice in ("auto", "never") and not lived):
        return None
    if choice == "never":
        rows = len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        there = [f"{rows} recorded rows"] * bool(rows) + [place.name for place in all_of(parent)[:1]]
        found, fix = " and ".join(there) or "an empty metrics.jsonl", "run.resume = auto or overwrite, or another name"
        raise InputError("E602", "run exists", f"run.output_dir = {folder}", found, "an empty directory", fix)
    found_place = newest(parent) if choice == "auto" else of_step(parent, int(choice))
    if found_place is None:
        print(f"warning[W603] no checkpoint in {folder} yet: the run begins anew at step 0", flush=True)
        return None
    point = Point.at(*found_place)
    raise_all(_mismatches(config, point, stream, origin))
    return point


def undo_unfinished(folder: Path) -> None:
    """Bring back the run in ``folder`` whose replacement was killed before its first checkpoint. Raises ``InputError`` E602."""
    if not any((folder / name).exists() for name in (REPLACED, MOVING, LEAVING)):
        return
    with take_lock(folder):
        if bring_back(folder):
            print(
                f"the {length_of(folder)} is back in {folder}: what was to replace it was killed before its first checkpoint, "
                f"and is in {folder / UNFINISHED}",
                flush=True,
            )


def dated(config: Config, folder: Path) -> Config:
    """``config`` with ``data.date``: as set, else the day of the first start of the run in ``folder``, else today.

    Chat templates may ask for the date: the prompts of a run must not depend on the day on which it is resumed.
    """
    first = None
    if config.run.resume != "overwrite":
        with contextlib.suppress(OSError, ValueError):  # No such run, or no file to read: its first start is now.
            first = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")).get("data", {}).get("date")
    day = config.data.date or first or today().isoformat()
    return config.model_copy(update={"data": config.data.model_copy(update={"date": str(day)})})


def today() -> date:
    """The day by the clock of this machine."""
    return date.today()


def _mismatches(config: Config, point: Point, stream: PromptStream, origin: str) -> list[InputError]:
    now, then = config.model_dump(), point.manifest["config"]
    differences: list[tuple[str, str, str]] = []
    for key in SETTLED:
        section, name = key.split(".")
        differences.append((key, str(then[section][name]), str(now[section][name])))
    if (before := point.state["data"]) != (digest := stream.digest):
        differences.append(("data.train", _marked(_sources(then), before), _marked(_sources(now), digest)))
    if (before := point.manifest["model"]) != (digest := model_digest(config)):
        differences.append(("model.path", _marked(then["model"]["path"], before), _marked(config.model.path, digest)))
    fix = "restore it, or start a new run (run.output_dir, or run.resume = overwrite)"
    what, there = "config does not match checkpoint", f"as in {point.place}"
    return [
        InputError("E605", what, f"{origin}:{key}", is_now, f"{was} {there}", fix)
        for key, was, is_now in differences
        if was != is_now
    ]


def _sources(table: dict[str, Any]) -> str:
    sources = table["data"]["train"]
    return sources if isinstance(sources, str) else " + ".join(Path(source["path"]).name for source in sources)


def _marked(name: str, digest: str) -> str:
    """A file of one name may hold two things."""
    return f"{name} (digest {digest[:8]})"


def model_digest(config: Config) -> str:
    """What tells one starting model from another: its configuration and the sizes of its weight files."""
    folder = Path(config.model.path)
    facts = [(path.name, path.stat().st_size) for path in sorted(folder.glob("*.safetensors"))]
    text = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").exists() else ""
    return hashlib.sha256(f"{text}{facts}".encode()).hexdigest()


def rewind_rows(path: Path, version: int) -> int:
    """Move the rows of a file of JSON lines after step ``version`` to ``*.cut.jsonl``; how many."""
    if not path.exists():
        return 0
    kept: list[str] = []
    cut: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        (kept if line.endswith("\n") and json.loads(line)["step"] <= version else cut).append(line)
    if cut:
        with path.with_suffix(".cut.jsonl").open("a", encoding="utf-8") as aside:
            aside.writelines(cut)
    draft = path.with_suffix(".new")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)
    return len(cut)


# --- one writer a folder ---


def check_lock(folder: Path) -> None:
    """Raises ``InputError`` E602 if a live run writes into ``folder``; takes nothing."""
    try:
        if (folder / "lock").exists():
            take_lock(folder).close()
    except OSError as error:
        place, expected = f"run.output_dir = {folder}", "a folder that can be written"
        raise InputError("E601", "cannot write the run folder", place, str(error), expected, "another place") from None


def take_lock(folder: Path) -> Any:
    """The open lock file of ``folder``; held until it is closed, or its process dies. Raises ``InputError`` E602."""
    file = (folder / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        fix = "wait for it, end it, or choose another run.output_dir"
        raise InputError("E602", "run is live", f"run.output_dir = {folder}", owner, "no other writer", fix) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
