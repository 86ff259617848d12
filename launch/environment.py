"""Is this environment able to run a job, and safe? Checked first at every start."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from importlib.machinery import PathFinder

from shared.errors import InputError, raise_all

PACKAGES = ("torch", "ray", "vllm", "deepspeed", "transformers")
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")


def check_environment() -> None:
    """Raises ``InputErrors``: E702 package missing, E701 CUDA builds beside a CPU torch, E704 unsafe setting."""
    problems = []
    missing = [name for name in PACKAGES if PathFinder.find_spec(name) is None]
    if missing:
        found, fix = f"no {', '.join(missing)} in {sys.prefix}", "run in the environment that make install made"
        problems.append(InputError("E702", "packages missing", "environment", found, ", ".join(PACKAGES), fix))
    if "torch" not in missing and importlib.metadata.version("torch").endswith("+cpu"):
        wrong = [name for name in CUDA_BUILDS if PathFinder.find_spec(name) is not None]
        wrong = [name for name in wrong if not importlib.metadata.version(name).endswith("+cpu")]
        if wrong:
            fix = f"pip uninstall {' '.join(CUDA_BUILDS)}"
            problems.append(
                InputError(
                    "E701", "mixed torch builds", "environment", f"{', '.join(wrong)} (CUDA)", "+cpu or none", fix
                )
            )
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") != "0":
        place = "environment:VLLM_ALLOW_INSECURE_SERIALIZATION"
        problems.append(InputError("E704", "unsafe setting", place, "set", "unset", "unset it"))
    raise_all(problems)
