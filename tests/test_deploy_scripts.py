"""slurm.sh and bare-metal.md of launch/deploy as they run: Slurm, ssh and Ray are stand-ins that note their calls."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pace import scaled
from tests.test_deploy import DEPLOY, TEXTS, shell_blocks

pytestmark = pytest.mark.process


SHELL = {"slurm.sh": TEXTS["slurm.sh"], "bare-metal.md": "\n".join(shell_blocks(TEXTS["bare-metal.md"]).values())}
# What it could say of the document: the environment is not there, and ssh gets values of this shell, as it should.
LINTERS = {"bash": ["-n"], "shellcheck": ["--shell=bash", "--exclude=SC1091,SC2029", "-"], "hadolint": ["-"]}


@pytest.mark.parametrize(
    ("tool", "name"), [("hadolint", "Dockerfile"), *((tool, name) for tool in ("bash", "shellcheck") for name in SHELL)]
)
def test_a_linter_finds_nothing(tool, name):
    program = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip(f"no {tool} on this machine; the package {tool}-py has one")
    text, command = SHELL.get(name, TEXTS[name]), [program, *LINTERS[tool]]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=scaled(60), check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


COMMANDS = {
    "scontrol": """
[[ "$1 $2" == "show hostnames" ]] && tr , '\\n' <<<"$3"
""",
    # One process a node, told of a SIGTERM, as Slurm's does.
    "srun": """
IFS=, read -ra nodes <<<"$SLURM_JOB_NODELIST"
while [[ $1 == --* ]]; do
  case $1 in
    --nodes=*) count=${1#*=} ;;
    --nodelist=*) nodes=("${1#*=}") ;;
    --exclude=*) for i in "${!nodes[@]}"; do [[ ${nodes[i]} != "${1#*=}" ]] || unset "nodes[i]"; done ;;
  esac
  shift
done
((${#nodes[@]} == count)) || exit 9
trap 'kill -TERM "${tasks[@]}"' TERM
for node in "${nodes[@]}"; do NODE=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do
  until wait "$task"; code=$?; ! kill -0 "$task" 2>/dev/null; do :; done
done
exit "$code"
""",
    "ray": """
echo "ray $NODE $* mode=$RAY_AUTH_MODE token=$RAY_AUTH_TOKEN" >>"$LOG"
[[ $* == *--block* ]] || exit 0
[[ $NODE != "$BROKEN" ]] || exit "$CODE"
echo $$ >>"$LOG.pids"
[[ $NODE == "$LATE" ]] || touch "$UP/$NODE"
trap 'echo "ended $NODE" >>"$LOG"; exit 1' TERM
while :; do sleep 0.02; done
""",
    "python": f"""
[[ $1 != -c ]] || PYTHONPATH=${{0%/*}} exec {sys.executable} "$@"
echo "driver $* at $RAY_ADDRESS token $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c <"$RAY_AUTH_TOKEN_PATH")" >>"$LOG"
echo $$ >>"$LOG.pids"
trap 'sleep 0.1; echo "driver told" >>"$LOG"; exit 143' TERM
[[ $CODE != none ]] || {{ touch "$UP.driver"; while :; do sleep 0.02; done; }}
exit "$CODE"
""",
    "ssh": """
host=$1 && shift && mkdir -p "$HOSTS/$host/millrace/.venv/bin" && cd "$HOSTS/$host"
echo : >millrace/.venv/bin/activate
echo "ssh $host" >>"$LOG"
HOME=$PWD NODE=$host exec env -u RAY_AUTH_MODE sh -c "$*"
""",
}
RAY = """
import os
class util:
    get_node_ip_address = staticmethod(lambda: "10.9.8.7")
def init(**options):
    assert os.environ["RAY_ADDRESS"].startswith("10.9.8.7:")
def nodes():
    return [{"Alive": True} for _ in os.listdir(os.environ["UP"])]
"""


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    """A folder with the stand-ins, an environment to activate, and a home."""
    for folder in ("bin", "up", "home", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text("#!/usr/bin/env bash\n" + text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "ray.py").write_text(RAY)
    (tmp_path / ".venv" / "bin" / "activate").write_text("ACTIVE=yes\n")
    yield tmp_path
    while BEGUN:  # What a test that failed has left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(BEGUN.pop().pid, signal.SIGKILL)


BEGUN: list[subprocess.Popen[str]] = []


def begin(place: Path, script: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {
        **{"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HOME": str(place / "home"), "CODE": "0"},
        **{"LOG": str(place / "log"), "UP": str(place / "up"), "HOSTS": str(place / "hosts")},
        **more,
    }
    command = ["bash", "-c", script, "slurm.sh", *arguments]
    BEGUN.append(
        subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    )
    return BEGUN[-1]


def batch(place: Path, *arguments: str, nodes: str = "n1,n2", script: str = "", **more: str) -> subprocess.Popen[str]:
    """slurm.sh, begun as Slurm does on the first of ``nodes``."""
    slurm = {
        **{"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_ID": "4711", "SLURM_CPUS_ON_NODE": "8"},
        **{"SLURM_JOB_NODELIST": nodes, "SLURM_JOB_NUM_NODES": str(nodes.count(",") + 1)},
    }
    return begin(place, script or TEXTS["slurm.sh"], *arguments, **slurm, **more)


def log(place: Path) -> list[str]:
    return (place / "log").read_text().splitlines() if (place / "log").exists() else []


def ended(place: Path, process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said; nothing that was started is left, nor the token."""
    said = process.communicate(timeout=scaled(60))[1]
    for pid in (place / "log.pids").read_text().split() if (place / "log.pids").exists() else ():
        assert not Path(f"/proc/{pid}").exists()
    assert list((place / "home" / ".ray").iterdir()) == []
    return process.returncode, said


def test_one_node_is_the_head_and_the_others_join_it(place):
    run = batch(place, "my.toml", "--run.steps", "2", nodes="n1,n2,n3")
    assert ended(place, run) == (0, "")
    starts = sorted(line for line in log(place) if line.startswith("ray"))
    end = "--disable-usage-stats --block mode=token token="
    assert starts == [
        f"ray n1 start --head --port=24711 --include-dashboard=false {end}",
        *(f"ray {node} start --address=10.9.8.7:24711 {end}" for node in ("n2", "n3")),
    ]
    (driver,) = [line for line in log(place) if line.startswith("driver")]
    assert driver == "driver launch/run.py my.toml --run.steps 2 at 10.9.8.7:24711 token 600 65"
    assert sorted(log(place)[-3:]) == ["ended n1", "ended n2", "ended n3"]


@pytest.mark.slow
def test_one_node_alone_is_enough(place):
    run = batch(place, nodes="n1")
    assert ended(place, run) == (0, "")
    assert [line.split()[:2] for line in log(place)] == [["ray", "n1"], ["driver", "launch/run.py"], ["ended", "n1"]]
    assert "driver launch/run.py launch/configs/gsm8k.toml at" in log(place)[1]


@pytest.mark.slow
def test_a_token_that_others_could_read_is_not_used(place):
    token = place / "home" / ".ray" / "token-4711"
    token.parent.mkdir()
    token.write_text("old")
    token.chmod(0o644)
    assert ended(place, batch(place, nodes="n1")) == (0, "")
    assert "token 600 65" in log(place)[1]


@pytest.mark.slow
def test_the_exit_code_is_the_driver_s(place):
    assert ended(place, batch(place, CODE="2")) == (2, "")


def terminate(run: subprocess.Popen[str], there: Path) -> None:
    deadline = time.monotonic() + scaled(30)
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_sigterm_before_there_is_a_driver_ends_the_job(place):
    run = batch(place, LATE="n2")
    terminate(run, place / "up" / "n1")
    assert ended(place, run) == (143, "")
    assert [line for line in log(place) if line.startswith("driver")] == []


def test_sigterm_ends_the_driver_first(place):
    run = batch(place, CODE="none")
    terminate(run, place / "up.driver")
    assert ended(place, run) == (143, "")
    assert log(place)[-3] == "driver told"
    assert sorted(log(place)[-2:]) == ["ended n1", "ended n2"]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["0", "1"])
def test_a_node_that_cannot_start_ray_ends_the_job_at_once(place, code):
    started = time.monotonic()
    code, said = ended(place, batch(place, BROKEN="n2", CODE=code))
    assert (code, said.startswith("error: ")) == (1, True)
    assert time.monotonic() - started < scaled(60), "not at the deadline, after 300 s"
    assert not [line for line in log(place) if line.startswith("driver")]


@pytest.mark.slow
def test_a_node_that_never_joins_ends_the_job_at_the_deadline(place):
    script = re.sub(r"^READY_S=\d+$", "READY_S=1", TEXTS["slurm.sh"], flags=re.M)
    code, said = ended(place, batch(place, LATE="n2", script=script))
    assert (code, said.count("error: a node could not join Ray")) == (1, 1)
    assert not [line for line in log(place) if line.startswith("driver")]


@pytest.mark.slow
def test_slurm_reads_all_of_its_options():
    lines = (DEPLOY / "slurm.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(options) == 10
    assert max(options) < first, "sbatch reads no further than the first command"


def test_the_recipe_without_slurm_brings_token_and_ray_to_every_machine(place):
    blocks = shell_blocks(TEXTS["bare-metal.md"])
    script = "\n".join(blocks[name] for name in ("Start", "Train"))
    run = begin(place, "set -eu\n" + script)
    assert (run.wait(timeout=scaled(60)), run.stderr.read()) == (0, "")
    tokens = [place / "home", place / "hosts" / "10.0.0.2", place / "hosts" / "10.0.0.3"]
    files = [folder / ".ray" / "auth_token" for folder in tokens]
    assert {(file.read_text(), file.stat().st_mode & 0o777) for file in files} == {(files[0].read_text(), 0o600)}
    assert re.fullmatch(r"[0-9a-f]{64}\n", files[0].read_text())
    calls = [line.replace("ray  ", "ray here ") for line in log(place) if line.startswith("ray")]
    assert [call.split()[1:3] for call in calls] == [
        *(["here", "start"], ["10.0.0.2", "start"], ["10.0.0.3", "start"], ["here", "status"], ["here", "job"]),
    ]
    assert "--address=10.0.0.1:6379 --node-ip-address=10.0.0.3" in calls[2]
    assert all("mode=token" in call for call in calls)


@pytest.mark.slow
def test_the_recipe_without_slurm_leaves_no_ray_and_no_token(place):
    blocks = shell_blocks(TEXTS["bare-metal.md"])
    run = begin(place, "set -eu\n" + "\n".join(blocks[name] for name in ("Start", "Stop")))
    assert (run.wait(timeout=scaled(60)), run.stderr.read()) == (0, "")
    stopped = [line.split()[:3] for line in log(place) if " stop " in line and " job " not in line]
    assert stopped == [["ray", "10.0.0.2", "stop"], ["ray", "10.0.0.3", "stop"], ["ray", "stop", "mode=token"]]
    assert list(place.rglob("auth_token")) == []
