"""Checkpoints on disk: whole and verified, or not there.

A checkpoint is written into a temporary folder, every file synced and hashed into ``MANIFEST.json``, then the folder is
renamed. Invariant: a folder ``step-N`` whose manifest verifies is complete, whatever killed the run at whatever moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from shared import faults
from shared.errors import InputError

MANIFEST = "MANIFEST.json"
PREFIX = "step-"


class Damaged(Exception):
    """A file of a checkpoint is not what its manifest says."""

    def __init__(self, file: Path, found: str, expected: str) -> None:
        super().__init__(file, found, expected)
        self.file, self.found, self.expected = file, found, expected


def begin(parent: Path, step: int) -> Path:
    """An empty folder for the files of the checkpoint of ``step``; what a killed writer left behind is removed."""
    sweep(parent)
    draft = parent / f"tmp.{PREFIX}{step:06d}.{uuid.uuid4().hex[:8]}"
    draft.mkdir(parents=True)
    return draft


def sweep(parent: Path) -> None:
    """Remove unfinished checkpoints."""
    for leftover in parent.glob("tmp.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def commit(draft: Path, step: int, facts: dict[str, Any]) -> Path:
    """Make ``draft`` the checkpoint of ``step``; ``facts`` go into the manifest. Raises ``OSError`` if the disk is full."""
    faults.point("checkpoint.after_write")
    files = {}
    for path in sorted(p for p in draft.rglob("*") if p.is_file()):
        _sync(path)
        files[path.relative_to(draft).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = draft / MANIFEST
    manifest.write_text(json.dumps({"step": step, **facts, "files": files}), encoding="utf-8")
    faults.point("checkpoint.after_manifest")
    for path in (manifest, *(p for p in draft.rglob("*") if p.is_dir()), draft):
        _sync(path)
    place = draft.parent / f"{PREFIX}{step:06d}"
    faults.point("checkpoint.before_rename")
    shutil.rmtree(place, ignore_errors=True)  # Of the same step, in a life of this run that was cut off.
    draft.rename(place)
    faults.point("checkpoint.after_rename")
    _sync(place.parent)
    return place


def verify(place: Path) -> dict[str, Any]:
    """The manifest of ``place``, once every file is what it says. Raises ``Damaged``."""
    try:
        manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(place / MANIFEST, f"{type(error).__name__}", "a manifest") from None
    for name, facts in files:
        path = place / name
        if not path.is_file():
            raise Damaged(path, "no file", f"{facts['bytes']} bytes")
        if path.stat().st_size != facts["bytes"]:
            raise Damaged(path, f"{path.stat().st_size} bytes", f"{facts['bytes']} bytes")
        if (found := _sha256(path)) != facts["sha256"]:
            raise Damaged(path, f"sha256 {found[:12]}…", f"{facts['sha256'][:12]}…")
    return manifest


def all_of(parent: Path) -> list[Path]:
    """Folders of checkpoints, the newest step first."""
    found = [path for path in parent.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def newest(parent: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies and its manifest; damaged ones are named and skipped. None: there is none at all.

    Raises ``InputError`` E604 if there are some, all damaged.
    """
    damages = []
    for place in all_of(parent):
        try:
            return place, verify(place)
        except Damaged as damage:
            damages.append(damage)
            print(f"warning[W604] checkpoint damaged, skipped — {_told(damage)}", flush=True)
    if damages:
        raise InputError(
            "E604",
            "no checkpoint is whole",
            str(damages[0].file),
            damages[0].found,
            damages[0].expected,
            "restore one from a copy, or begin anew with run.resume = overwrite",
        )
    return None


def of_step(parent: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of exactly ``step``. Raises ``InputError`` E603 if there is none, E604 if it is damaged."""
    place = parent / f"{PREFIX}{step:06d}"
    there = [int(path.name.removeprefix(PREFIX)) for path in all_of(parent)]
    if not place.is_dir():
        fix = f"run.resume = {there[0]}" if there else "drop run.resume, or check run.output_dir"
        found = f"checkpoints of steps {', '.join(map(str, there))}" if there else "no checkpoint"
        raise InputError("E603", "nothing to resume", str(parent), found, f"{PREFIX}{step:06d}", fix)
    try:
        return place, verify(place)
    except Damaged as damage:
        others = (other for other in there if other != step and _whole(parent / f"{PREFIX}{other:06d}"))
        fix = f"run.resume = {other}" if (other := next(others, None)) is not None else "restore it from a copy"
        raise InputError("E604", "checkpoint damaged", str(damage.file), damage.found, damage.expected, fix) from None


def _whole(place: Path) -> bool:
    try:
        return bool(verify(place))
    except Damaged:
        return False


def set_aside(parent: Path, version: int) -> list[str]:
    """Rename checkpoints of steps after ``version``: the run takes another way from there. Their new names."""
    moved = []
    for place in all_of(parent):
        if int(place.name.removeprefix(PREFIX)) > version:
            aside = place.with_name(f"cut.{place.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(place.rename(aside).name)
    return moved


def prune(parent: Path, keep: int, spare: Path | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints; ``spare`` stays too."""
    for place in all_of(parent)[keep:]:
        if place != spare:
            shutil.rmtree(place, ignore_errors=True)


def _told(damage: Damaged) -> str:
    return f"{damage.file}. Found {damage.found}, expected {damage.expected}."


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
