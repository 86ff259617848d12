"""The security defaults on the real stack: who listens where, who is answered, and where a planted secret turns up."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from launch.cluster import worker_environment
from rollout.reward_models import is_loopback
from tests.pace import scaled

pytestmark = pytest.mark.stack
ROOT = Path(__file__).resolve().parent.parent
PLANTED = "planted-s3cret-value"
AGENT = "ray::DashboardAgent"


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def processes_of(session: str) -> set[psutil.Process]:
    """Those whose Ray lives in ``session``, and their children: some of Ray's overwrite their environment."""
    found = set()
    for process in psutil.process_iter():
        if environment_of(process).get("RAY_TMPDIR") == session:
            with contextlib.suppress(psutil.Error):
                found |= {process, *process.children(recursive=True)}
    return found


def listeners(session: str) -> set[tuple[str, str, int]]:
    """``(process, address, port)`` of every listening socket of those processes; an actor without its method."""
    found = set()
    for process in processes_of(session):
        with contextlib.suppress(psutil.Error, OSError):
            sockets = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            name = process.name().strip().partition(".")[0]
            found |= {(name, c.laddr.ip, c.laddr.port) for c in sockets}
    return found


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


def own_environment(session: str, **more: str) -> dict[str, str]:
    """As a user's shell has it: without what tests in this process have set for Ray."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_TMPDIR": session} | more


# --- a Ray by itself ---

CONNECT = """
import sys
from launch import cluster
from tests.fakes import make_config
if "open" in sys.argv:
    cluster._keep_private = lambda: None
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
            port for name, _, port in listeners(session) if name.startswith(AGENT)
        }:
            time.sleep(0.2)
        return listeners(session)

    yield begin
    for process in started:
        process.communicate(timeout=scaled(60))


def jobs_status(found: set[tuple[str, str, int]], authorization: str = "") -> set[int]:
    """What the job servers among the listeners answer to a request for the list of jobs."""
    statuses = set()
    for name, address, port in found:
        if not name.startswith(AGENT):
            continue
        connection = http.client.HTTPConnection(
            address.removeprefix("::ffff:").replace("::", "127.0.0.1"), port, timeout=5
        )
        try:
            connection.request("GET", "/api/job_agent/jobs/x/logs", headers={"Authorization": authorization})
            answer = connection.getresponse()
            if not answer.read().startswith(b"# HELP"):  # The port of its metrics gives them for any path.
                statuses.add(answer.status)
        except (OSError, http.client.HTTPException):
            continue  # One of its ports speaks gRPC.
        finally:
            connection.close()
    return statuses


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

REWARD = """
import os
def accuracy(completions, answer, **kwargs):
    assert os.environ["JUDGE_API_KEY"]  # A function of the user may need it ...
    return [float(a == b) for a, b in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A short quickstart with planted secrets: its output, folder, Ray's folder, listeners, tokens, command lines."""
    session, folder = tempfile.mkdtemp(prefix="ms-"), tmp_path_factory.mktemp("run")
    (folder / "reward.py").write_text(REWARD)
    spec = f'[[reward.functions]]\nfunction = "{folder}/reward.py:accuracy"\n'
    (folder / "own.toml").write_text(spec)
    changes = [
        "--run.output_dir",
        str(folder / "run"),
        "--run.steps",
        "3",
        "--eval.max_rows",
        "8",
        "--run.samples_every",
        "1",
    ]
    command = [sys.executable, "launch/run.py", "launch/configs/quickstart.toml", str(folder / "own.toml"), *changes]
    planted = {"HF_TOKEN": PLANTED, "JUDGE_API_KEY": PLANTED, "DB_PASSWORD": PLANTED, "MILLRACE_WORKER_LOGS": "1"}
    environment = own_environment(session, **planted)
    output = folder / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        found, tokens, commands = set(), set(), set()
        deadline = time.monotonic() + scaled(200)
        while process.poll() is None and time.monotonic() < deadline:
            found |= listeners(session)
            for one in processes_of(session):
                tokens |= {environment_of(one).get("RAY_AUTH_TOKEN", "")} - {""}
                with contextlib.suppress(psutil.Error):
                    commands |= set(one.cmdline())
            time.sleep(1.0)
        process.kill()
        process.wait()
    yield process.returncode, output.read_text(), folder, Path(session), found, tokens, " ".join(commands)
    shutil.rmtree(session, ignore_errors=True)


@pytest.mark.timeout(300)
def test_no_process_of_a_local_run_listens_to_others(watched):
    code, output, *_, found, _, _ = watched
    assert code == 0, output[-3000:]
    names = {name for name, *_ in found}
    assert {"gcs_server", "raylet", "ray::Engine", "ray::Learner", "ray::RewardWorker"} <= names
    assert open_to_others(found) == set()


def test_a_secret_of_the_environment_is_in_no_file_and_no_output(watched):
    _, output, folder, session, *_ = watched
    assert PLANTED not in output
    assert files_with(folder, PLANTED) == []
    assert files_with(session, PLANTED) == []  # Ray's own logs.
    (folder / "canary").write_text(f"... {PLANTED} ...")
    assert files_with(folder, PLANTED) == [str(folder / "canary")]


def test_nor_is_the_token_of_its_ray(watched):
    _, output, folder, session, _, tokens, commands = watched
    (token,) = tokens
    assert len(token) == 64
    assert token not in output
    assert token not in commands
    assert files_with(folder, token) == files_with(session, token) == []


# --- vLLM ---


@pytest.mark.parametrize("off", [False, True])
def test_vllm_takes_no_functions_over_its_wire_in_an_actors_environment(off):
    environment = os.environ | worker_environment() | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if off else {})
    code = "from vllm.v1.serial_utils import MsgpackEncoder; MsgpackEncoder().encode([lambda: 1]); print('sent')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=scaled(120), check=False)
    assert ("sent" in done.stdout) is off, done.stderr[-500:]
    assert ("is not serializable" in done.stderr) is not off
