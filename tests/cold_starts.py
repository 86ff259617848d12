"""Print the seconds that imports and cold starts take, each in a process of its own; ``make test-times`` ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.conftest import ROOT

PREPARED = """
from pathlib import Path
from launch.preflight import prepare
from shared.config_loader import load_config
config = prepare(load_config(["launch/configs/quickstart.toml"]), "quickstart", Path("."), probing=False).config
"""
ENGINE = """
import asyncio
from rollout.engine import Engine
async def start():
    await Engine(config).close()
asyncio.run(start())
"""
RAY = "import ray\nray.init(address='local', num_cpus=1, include_dashboard=False)\nray.shutdown()\n"
LIBRARIES = ("numpy", "torch", "transformers", "vllm", "ray", "deepspeed", "launch.controller")
STARTS = {
    **{f"import {name}": ("", f"import {name}") for name in LIBRARIES},
    "Ray, started and stopped": ("", RAY),
    "the quickstart's engine, with the import of vLLM": (PREPARED, ENGINE),
    "the quickstart's learner, with the import of DeepSpeed": (
        PREPARED,
        "from learner.learner import Learner\nLearner(config)",
    ),
}
"""What is timed -> (code that runs before the clock starts, code that is timed)."""


def seconds(before: str, timed: str) -> float:
    """Wall time of ``timed`` in a fresh interpreter."""
    clock = "import time as _time\n_begun = _time.perf_counter()\n"
    code = f"{before}\n{clock}{timed}\nprint('took', _time.perf_counter() - _begun, flush=True)\nimport os\nos._exit(0)"
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        environment = os.environ | {"RAY_TMPDIR": folder}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    took = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("took ")]
    if not took:
        raise SystemExit(done.stderr[-3000:])
    return float(took[0])


if __name__ == "__main__":
    print("--- seconds of imports and cold starts, each in a fresh process")
    for name, (before, timed) in STARTS.items():
        print(f"{seconds(before, timed):8.2f}  {name}", flush=True)
