"""The security defaults on the real stack: who listens where, who is answered, and where a planted secret turns up."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch.cluster import worker_environment
from rollout.reward_models import is_loopback
from tests.pace import scaled
from tests.whole_run import PLANTED, listeners_of, own_environment, processes_of

pytestmark = pytest.mark.stack
ROOT = Path(__file__).resolve().parent.parent
AGENT = "ray::DashboardAgent"


def open_to_others(found: set[tuple[str, str, int]]) -> set[str]:
    """Names of the processes that listen on more than this machine."""
    return {name for name, address, _ in found if not is_loopback(address.removeprefix("::ffff:"))}


def files_with(folder: Path, secret: str) -> list[str]:
    """Files below ``folder`` that hold ``secret``, as text or inside a compressed table."""
    import pyarrow.parquet

    held = []
    for path in folder.rglob("*"):
        if not path.is_file():  # Sockets too.
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += str(pyarrow.parquet.read_table(path).to_pylist()).encode()
        held += [str(path)] if secret.encode() in data else []
    return held


@pytest.fixture
def session():
    """A short folder for one Ray: its socket paths have a limit."""
    folder = tempfile.mkdtemp(prefix="ms-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# --- a Ray by itself ---

CONNECT = """
import functools, sys
from launch import cluster
from learner.distributed import free_port
from tests.fakes import make_config
keep = cluster.keep_private
def keep_private():
    if "open" not in sys.argv:
        keep()
    import ray._private.parameter as parameters  # Another Ray of this machine may have the usual port of the job server.
    parameters.RayParams = functools.partial(parameters.RayParams, dashboard_agent_listen_port=free_port())
cluster.keep_private = keep_private
cluster.connect(make_config())
import ray
address = ray.util.get_node_ip_address()
print(address, flush=True)
sys.stdin.read()
cluster.disconnect()
"""


@pytest.fixture
def start(session):
    """``start(*arguments, **environment)``: a process with a private Ray; its listeners, once the last is up."""
    started = []

    def begin(*arguments: str, **more: str) -> set[tuple[str, str, int]]:
        command = [sys.executable, "-c", CONNECT, *arguments]
        environment = own_environment(session, PYTHONPATH=str(ROOT), **more)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip()
        deadline = time.monotonic() + scaled(20)
        while time.monotonic() < deadline and not {
            port for name, _, port in listeners_of(processes_of(session)) if name.startswith(AGENT)
        }:
            time.sleep(0.2)
        return listeners_of(processes_of(session))

    yield begin
    for process in started:
        process.communicate(timeout=scaled(60))


def jobs_status(found: set[tuple[str, str, int]], authorization: str = "") -> set[int]:
    """What the job servers among the listeners answer to a request for the list of jobs, once one of them answers."""
    deadline = time.monotonic() + scaled(30)
    statuses: set[int] = set()
    while not statuses and time.monotonic() < deadline:
        agents = [(address, port) for name, address, port in found if name.startswith(AGENT)]
        answers = (job_server_status(address, port, authorization) for address, port in agents)
        statuses = {status for status in answers if status is not None}
    return statuses


def job_server_status(address: str, port: int, authorization: str) -> int | None:
    """None where something else than a job server answers, or nothing."""
    address = address.removeprefix("::ffff:").replace("::", "127.0.0.1")
    connection = http.client.HTTPConnection(address, port, timeout=scaled(5))
    try:
        connection.request("GET", "/api/job_agent/jobs/x/logs", headers={"Authorization": authorization})
        answer = connection.getresponse()
        # The port of its metrics gives them for any path.
        return None if answer.read().startswith(b"# HELP") else answer.status
    except (OSError, http.client.HTTPException):
        return None  # One of its ports speaks gRPC.
    finally:
        connection.close()


def test_a_private_ray_listens_on_loopback_and_answers_nobody_without_its_token(start):
    found = start()
    assert len(found) >= 6
    assert open_to_others(found) == set()
    assert (jobs_status(found), jobs_status(found, "Bearer wrong")) == ({401}, {403})


def test_left_to_itself_it_listens_to_all(start):
    assert {"gcs_server", "raylet"} <= open_to_others(start("open", RAY_AUTH_MODE="disabled"))


def test_without_authentication_its_job_server_answers(start):
    found = start(RAY_AUTH_MODE="disabled")
    assert open_to_others(found) == set()  # One default does not hang on the other.
    assert jobs_status(found)
    assert not jobs_status(found) & {401, 403}


# --- a whole run ---


@pytest.mark.timeout(300)
def test_no_process_of_a_local_run_listens_to_others(quickstart):
    assert quickstart.code == 0, quickstart.output[-3000:]
    names = {name for name, *_ in quickstart.listeners}
    assert {"gcs_server", "raylet", "ray::Engine", "ray::Learner", "ray::RewardWorker"} <= names
    assert open_to_others(quickstart.listeners) == set()


def test_a_secret_of_the_environment_is_in_no_file_and_no_output(quickstart):
    place = quickstart.folder.parent
    assert PLANTED not in quickstart.output
    assert files_with(place, PLANTED) == []
    assert list(quickstart.kept.rglob("raylet.out"))  # Ray's own logs.
    assert files_with(quickstart.kept, PLANTED) == []
    (place / "canary").write_text(f"... {PLANTED} ...")
    assert files_with(place, PLANTED) == [str(place / "canary")]
    (place / "canary").unlink()


def test_nor_is_the_token_of_its_ray(quickstart):
    (token,) = quickstart.tokens
    assert len(token) == 64
    assert token not in quickstart.output
    assert token not in quickstart.commands
    assert files_with(quickstart.folder.parent, token) == files_with(quickstart.kept, token) == []


# --- vLLM ---


WIRE = """
import os
from vllm.v1.serial_utils import MsgpackEncoder
for wanted in ("as it is", "1"):
    if wanted == "1":
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = wanted
    try:
        MsgpackEncoder().encode([lambda: 1])
        print("sent")
    except TypeError as error:
        print("refused" if "is not serializable" in str(error) else error)
"""


def test_vllm_takes_no_functions_over_its_wire_in_an_actors_environment():
    environment = os.environ | worker_environment()
    done = subprocess.run(
        [sys.executable, "-c", WIRE], env=environment, capture_output=True, text=True, timeout=scaled(120), check=False
    )
    assert done.stdout.split() == ["refused", "sent"], done.stderr[-500:]
