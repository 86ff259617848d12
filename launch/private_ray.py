"""The Ray that a run starts for itself where it joins no cluster: on loopback, with a token, in a folder closed to others.

``cluster.connect`` starts it. Its folder is removed when it has ended well; after a failure its logs are kept.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from shared.errors import InputError, MillraceError, one_line

SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux, in bytes."""
RAY_BYTES = len("/ray-12345678/r/session_2026-01-31_12-00-00_123456_/sockets/plasma_store")
"""Bytes that Ray adds to its temporary folder for its longest socket, beside the driver's process number."""
FOLDERS: list[Path] = []
"""Folders of the private Ray of this process, with its sockets, logs and objects."""


def keep_private() -> None:
    """What Ray reads when it is imported and started, for a Ray of this run alone.

    The address 127.0.0.1 as an argument would be replaced by the machine's own; Ray's one way to loopback is its
    switch against clusters, made for other systems. The token is of this process: Ray's own would be written to the
    home folder for all to read.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def start_private(**options: Any) -> None:
    """Start Ray on this machine with ``options``. Raises ``MillraceError``, which names Ray's logs."""
    import ray

    FOLDERS.append(_own_folder())
    options |= {"include_dashboard": False, "_temp_dir": str(FOLDERS[-1] / "r")}
    try:
        ray.init(address="local", **options)
    except Exception as error:  # A busy machine, most often: Ray gives its processes 30 s.
        logs = FOLDERS.pop() / "r/session_latest/logs"
        raise MillraceError(f"a private Ray did not start: {one_line(error)} (logs: {logs})") from None


def remove_folders(failed: bool) -> None:
    """Remove the folder of the private Ray, which has ended; after a run that ``failed`` keep it, and say where its logs are."""
    while FOLDERS:
        folder = FOLDERS.pop()
        if failed:
            print(f"Ray's own logs: {folder / 'r/session_latest/logs'}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def temporary_folder() -> tuple[str, str]:
    """The variable that names Ray's folder for temporary files, and that folder."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    return name, os.environ.get(name, "/tmp")


def _own_folder() -> Path:
    """A new folder in that for temporary files, for a private Ray: closed to other users, whatever Ray opens inside."""
    parent = Path(temporary_folder()[1]).absolute()
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="ray-", dir=parent))


def check_temporary_folder() -> None:
    """Raises ``InputError`` E503 if a private Ray cannot keep its sockets in the folder for temporary files.

    With ``RAY_ADDRESS`` the cluster has a folder of its own, and nothing is checked.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    name, folder = temporary_folder()
    longest = SOCKET_BYTES - RAY_BYTES - len(str(os.getpid()))
    expected, fix = f"at most {longest}: Ray keeps its sockets there", f"{name}=/tmp"
    if (size := len(os.fsencode(folder))) > longest:
        what, found = "temporary folder too long", f"{size} bytes ({folder})"
        raise InputError("E503", what, f"environment:{name}", found, expected, fix)
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        found, expected = f"{there}: {error.strerror}", "a writable folder: Ray keeps its files there"
    raise InputError("E503", "no temporary folder", f"environment:{name}", found, expected, fix)
