"""A run on several hosts, submitted as a job: one host is lost half way, one joins, and the run is scaled.

With root the hosts have networks, shared memory and processes of their own (``tests/hosts.py``).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch import cluster as launch_cluster
from shared.errors import InputError
from tests.conftest import ROOT
from tests.hosts import Cluster
from tests.pace import scaled

pytestmark = pytest.mark.stack
STEPS = 400


@pytest.fixture
def hosts():
    folder = Path(tempfile.mkdtemp(prefix="mh-"))  # Short, for Ray's sockets.
    cluster = Cluster(folder, [1, 1, 1])
    yield cluster
    cluster.close()


def until(job, pattern, timeout_s=120.0):
    """Wait until the job has said ``pattern``; the match."""
    deadline = time.monotonic() + scaled(timeout_s)
    while time.monotonic() < deadline:
        said = job.output()
        if found := re.search(pattern, said, re.MULTILINE):
            return found
        assert "exit code" not in said, said[-4000:]
        time.sleep(0.3)
    raise AssertionError(f"nothing said of {pattern!r}:\n{job.output()[-4000:]}")


def on_host(place, name):
    """Number of the host where ``name`` lives, by the line that says who is where."""
    host = next(part for part in place.split("; ") if name in part).partition(":")[0]
    return int(host.rpartition(".")[2]) - 10


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_job_on_three_hosts_survives_the_loss_of_one(hosts, tmp_path):
    if not hosts.sealed:
        pytest.skip("hosts of their own need root")
    folder = tmp_path / "run"
    changes = {
        "run.output_dir": folder,
        "run.steps": STEPS,
        "run.checkpoint_every": 20,
        "rollout.num_engines": 2,
        "eval.max_rows": 32,
    }
    job = hosts.submit(ROOT, "launch/configs/quickstart.toml", *(f"--{k}={v}" for k, v in changes.items()))
    place = until(job, r"workers up after .*? \((.*)\)").group(1)
    assert len(place.split("; ")) == 3  # Everyone on a host of its own: no memory is shared.
    until(job, r"^step +\d\d/")
    name = next(engine for engine in ("engine-1", "engine-0") if on_host(place, engine) > 0)  # The head is needed.
    hosts.hosts[on_host(place, name)].power_off()
    until(job, f"{name} lost, 1 of 2 engines serve")
    assert f"{name} serves again" not in job.output()
    hosts.add(1)
    until(job, f"{name} serves again")
    answer = subprocess.run(
        [sys.executable, "-m", "launch.scale", str(folder), "--engines", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=scaled(90),
        check=False,
    )
    assert answer.stdout.startswith("2 -> 1 engines; gone: engine-"), answer.stderr
    until(job, "^run folder: ", 300)
    assert job.wait(300) == "SUCCEEDED", job.output()[-4000:]

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "staleness/max" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert max(row["staleness/max"] for row in steps) <= 2
    assert max(row["sync/canary_gap"] for row in steps) < 1e-3
    assert {1.0, 2.0} <= {row["engines/healthy"] for row in steps}
    assert steps[-1]["engines/healthy"] == 1.0
    fates = [json.loads(line) for line in (folder / "ledger" / "samples.jsonl").read_text().splitlines()]
    assert len({fate["group"] for fate in fates}) == len(fates)
    trained = sum(fate["samples"] for fate in fates if fate["fate"] == "trained")
    said = re.search(r"([\d,]+) completions: ([\d,]+) trained", job.output())
    assert int(said.group(2).replace(",", "")) == trained


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_learner_s_ranks_meet_over_the_network(hosts, tmp_path):
    """Also where no host knows another's name."""
    if not hosts.sealed:
        pytest.skip("hosts of their own need root")
    changes = {
        "run.output_dir": tmp_path / "run",
        "run.steps": 6,
        "learner.num_ranks": 2,
        "learner.zero_stage": 3,
        "eval.max_rows": 8,
    }
    job = hosts.submit(ROOT, "launch/configs/quickstart.toml", *(f"--{k}={v}" for k, v in changes.items()))
    place = until(job, r"workers up after .*? \((.*)\)").group(1)
    assert on_host(place, "learner-0") != on_host(place, "learner-1")
    until(job, "^run folder: ")
    assert job.wait(60) == "SUCCEEDED"


def test_a_name_is_held_once_on_a_cluster(private_ray, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "here")
    held = launch_cluster.claim(tmp_path / "run")
    assert held is not None
    with pytest.raises(InputError, match=r"run is live — run.output_dir = .*/run. Found pid \d+ on .* in this cluster"):
        launch_cluster.claim(tmp_path / "run")
    assert launch_cluster.claim(tmp_path / "other") is not None
