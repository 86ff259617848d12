"""Fetch models and datasets of the Hugging Face hub, and say why one cannot be fetched and what mends it."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from shared.errors import InputError, one_line

NAMED = re.compile(r"([\w.-]+/[\w.-]+)(?:@([0-9a-f]{40}))?")
"""A model or dataset of the hub: ``org/name``, or at one commit ``org/name@COMMIT``."""
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""Patterns of the files of a model that are read."""
UNREACHED = {"LocalEntryNotFoundError", "ConnectionError", "TransportError", "TimeoutException"}
"""Names of the exceptions, or of their bases, of a hub that gives no answer."""


def is_named(path: str) -> bool:
    """Return whether ``path`` names something of the hub; a path in a folder that is there means a file."""
    return NAMED.fullmatch(path) is not None and not Path(path).exists() and not Path(path).parent.is_dir()


def fetched(path: str, kind: str, code: str, key: str, patterns: list[str], hub_first: bool = False) -> Path:
    """Return the folder of ``path`` on this machine: the copy that is there, else a downloaded one.

    ``kind`` is model or dataset. With ``hub_first`` the hub is asked before the copy, which may lack some ``patterns``.
    Raises ``InputError`` of ``code``, which names the setting ``key``.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # Its warnings repeat what the error says.
    matched = NAMED.fullmatch(path)
    assert matched is not None
    name, revision = matched.groups()
    problem: Exception | None = None
    for offline in (False, True) if hub_first else (True, False):
        try:
            if not offline and not _is_offline():
                print(f"downloading the {kind} {path} from {_endpoint()}", file=sys.stderr, flush=True)
            folder = snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=offline
            )
            return Path(folder)
        except Exception as error:  # Whatever a client of the network or a disk raises: the reason is told below.
            problem = problem if offline and problem else error
    assert problem is not None
    found, fix = _reason(problem, name, revision, kind)
    expected = "a folder, or a model of the hub" if kind == "model" else "a file, or a dataset of the hub"
    raise InputError(code, f"{kind} not found", key, f'"{path}" ({found})', expected, fix) from None


def _reason(problem: Exception, name: str, revision: str | None, kind: str) -> tuple[str, str]:
    """Return why ``problem`` was raised, and what mends it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    chain = list(_chain(problem))
    names = {base.__name__ for error in chain for base in type(error).__mro__}
    answers = (getattr(error, "response", None) for error in chain)
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    number = next((error.errno for error in chain if isinstance(error, OSError) and error.errno), 0)
    page, folder = f"{_endpoint()}/{'' if kind == 'model' else 'datasets/'}{name}", "give a folder on this machine"
    token = "hf auth login, or HF_TOKEN=..."
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(problem):
        return f"no space left in {HF_HUB_CACHE}", "free some, or HF_HOME=/a/larger/disk"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{HF_HUB_CACHE} cannot be written", "HF_HOME=/a/writable/folder"
    if _is_offline():
        return "no copy on this machine, and HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, or {folder}"
    if "GatedRepoError" in names:
        return "the hub gives it only to those who accepted its terms", f"accept them on {page}, then {token}"
    if "RevisionNotFoundError" in names or "RevisionResolutionError" in names:
        return f"the hub has no commit {(revision or 'main')[:12]} of it", f"take a commit from {page}/commits/main"
    if "RepositoryNotFoundError" in names or status == 404:
        return f"the hub knows no such {kind}", f"check the name on {page}; if it is private, {token}"
    if status in (401, 403):
        return f"the hub refuses this login (HTTP {status})", f"{token}, with access to {page}"
    if status:
        return f"no copy on this machine, and the hub answers HTTP {status}", f"try again later, or {folder}"
    if names & UNREACHED:
        fix = f"check the network, the proxy and HF_ENDPOINT, or {folder}"
        return f"no copy on this machine, and {_endpoint()} cannot be reached", fix
    return one_line(f"{type(problem).__name__}: {problem}", 120), f"try again, or {folder}"


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    """Yield ``problem`` and what caused it."""
    while problem is not None:
        yield problem
        problem = problem.__cause__


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return bool(is_offline_mode())


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
