"""Isolated children: what ends them, what they leave, and that the sandbox holds what a bare subprocess lets through."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout import sandbox
from rollout.reward_calls import CallFailed
from rollout.sandbox import ROOT, Child, Limits, require_sandbox
from shared.errors import InputError
from tests.pace import scaled

pytestmark = pytest.mark.process
has_wall = pytest.mark.skipif(bool(sandbox.sandbox_problem()), reason=f"no sandbox here: {sandbox.sandbox_problem()}")
levels = pytest.mark.parametrize(
    "sandboxed", [False, pytest.param(True, marks=has_wall)], ids=["subprocess", "sandbox"]
)
TIGHT, WIDE = Limits(2, 512), Limits(30, 8192, 1024, 1024)
# Runs every completion as a program; what it leaves in ``r``, or the exception, is logged.
CODE = """
def attack(completions, log_extra, **kwargs):
    found = []
    for program in completions:
        names = {}
        try:
            exec(program, names)
            found.append(str(names.get("r")))
        except Exception as error:
            found.append(type(error).__name__)
    log_extra("r", found)
    return [float(len(program)) for program in completions]
"""


@pytest.fixture(scope="module")
def function(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("code") / "attack.py"
    path.write_text(CODE)
    return f"{path}:attack"


@pytest.fixture
def start(function):
    """``start(sandboxed, limits)`` makes a child that is ended with the test."""
    children = []

    def make(sandboxed: bool, limits: Limits | None = None, name: str = function) -> Child:
        spec = {"function": name, "model": None, "url": None, "name": None, "args": {}, "factory": False}
        limits = limits or (TIGHT if sandboxed else WIDE)
        children.append(Child(spec | {"isolation": None}, "key", limits, sandboxed))
        return children[-1]

    yield make
    for child in children:
        child.kill()


def payload(*programs: str) -> dict:
    n = len(programs)
    return {"prompts": [""] * n, "completions": [*programs], "completion_ids": [[]] * n, "columns": {}, "state": {}}


def run(child: Child, program: str, timeout_s: float = 10.0) -> str:
    return child.call(payload(program), timeout_s)["extra"]["r"][0]


def fails(child: Child, program: str, timeout_s: float = 10.0) -> CallFailed:
    with pytest.raises(CallFailed) as excinfo:
        child.call(payload(program), timeout_s)
    return excinfo.value


def gone(pid: int, within_s: float = 5.0) -> bool:
    """True once the process is dead (or a zombie that nobody collects)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def family(pid: int) -> list[int]:
    """``pid`` and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


# --- a child that misbehaves ---


@levels
def test_a_child_answers_many_calls_and_is_gone_after_the_kill(start, sandboxed):
    child = start(sandboxed)
    assert child.call(payload("a = 1", "r = 1"), 5)["values"] == [5, 5]
    assert [run(child, f"r = {i}") for i in range(3)] == ["0", "1", "2"]
    pids = family(child._process.pid)
    child.kill()
    assert not child.alive
    assert all(gone(pid) for pid in pids)
    child.kill()  # A second time does no harm.


@levels
@pytest.mark.parametrize("program", ["import time; time.sleep(99)", "9 ** 9 ** 9", "while True: pass"])
def test_a_hang_is_ended_at_the_deadline_even_in_c(start, sandboxed, program):
    child = start(sandboxed)
    pids, started = family(child._process.pid), time.monotonic()
    failure = fails(child, program, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started < scaled(10)
    assert (failure.code, failure.found, failure.expected) == ("E305", "> 0.3 s", "<= timeout_s = 0.3")
    assert not child.alive
    assert all(gone(pid) for pid in pids)


@levels
@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("import os; os.kill(os.getpid(), 11)", "worker ended by signal 11"),
        ("import ctypes; ctypes.string_at(0)", "worker ended by signal 11"),
        ("import os; os.abort()", "worker ended by signal 6"),
        ("import os; os._exit(0)", "worker ended with exit code 0"),
        ("import os; os._exit(7)", "worker ended with exit code 7"),
        ("raise SystemExit(5)", "worker ended with exit code 5"),
    ],
)
def test_a_crash_is_e304_and_says_how(start, sandboxed, program, found):
    child = start(sandboxed)
    failure = fails(child, program)
    assert (failure.code, failure.found) == ("E304", found)
    assert not child.alive


def test_cpu_time_is_limited_per_call_and_not_in_all(start):
    child = start(False, Limits(1, 512))
    busy = "import time\nend = time.process_time() + 0.55\nwhile time.process_time() < end: pass\nr = 'done'"
    assert [run(child, busy) for _ in range(4)] == ["done"] * 4
    failure = fails(child, "while True: pass")
    assert (failure.code, failure.expected) == ("E306", "<= cpu_s = 1")


@levels
def test_a_memory_bomb_is_e306(start, function, sandboxed):
    Path(function.rpartition(":")[0]).with_name("bomb.py").write_text(
        "def bomb(completions): return [len('x' * (1 << 30))] * len(completions)"
    )
    child = start(sandboxed, Limits(9, 512), function.replace("attack.py:attack", "bomb.py:bomb"))
    assert fails(child, "").code == "E306"


@levels
def test_endless_output_is_cut_at_64_kb_and_blocks_nobody(start, sandboxed):
    child, neighbour = start(sandboxed), start(sandboxed)
    assert run(child, "for _ in range(50): print('x' * (1 << 20))\nr = 'done'") == "done"
    assert child.cut
    assert len(child.output) == 64 << 10
    assert run(child, "r = 'again'") == "again"
    assert not child.cut
    assert fails(child, "while True: print('x' * 9999)", timeout_s=0.4).code == "E305"
    assert run(neighbour, "r = 1") == "1"


def test_forked_children_die_with_the_group_at_the_deadline(start, tmp_path):
    note = tmp_path / "pids"
    program = f"""
import os, subprocess, time
started = [subprocess.Popen(["sleep", "300"]).pid for _ in range(3)]
if os.fork() == 0:
    time.sleep(300)
open({str(note)!r}, "w").write(" ".join(map(str, started)))
time.sleep(300)
"""
    child = start(False)
    assert fails(child, program, timeout_s=1.0).code == "E305"
    pids = [int(pid) for pid in note.read_text().split()]
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids)


@levels
def test_a_killed_parent_leaves_no_child(function, sandboxed):
    program = f"""
import threading, time
from rollout.sandbox import Child, Limits
spec = {{"function": {function!r}, "model": None, "url": None, "name": None, "args": {{}}, "factory": False}}
child = Child(spec | {{"isolation": None}}, "key", Limits(30, 512), {sandboxed})
call = {payload("import time; time.sleep(300)")!r}
threading.Thread(target=lambda: child.call(call, 300), daemon=True).start()
time.sleep(0.1)
print(child._process.pid, flush=True)
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = family(int(parent.stdout.readline()))
    assert len(pids) >= (2 if sandboxed else 1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(gone(pid) for pid in pids)


@levels
def test_no_descriptor_is_left_behind(start, sandboxed):
    start(sandboxed).kill()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        start(sandboxed).kill()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_function_that_cannot_be_loaded_is_e301_as_in_the_parent(start, function):
    with pytest.raises(InputError, match='no attribute "nothing"') as excinfo:
        start(False, name=function.replace(":attack", ":nothing"))
    assert (excinfo.value.code, excinfo.value.place) == ("E301", "key.function")


# --- what the wall holds, and a bare subprocess does not ---


@pytest.fixture(scope="module")
def pair(function, tmp_path_factory):
    """``pair(program) -> (bare, walled)``: what a program gets at in a subprocess and in the sandbox."""
    os.environ["MILLRACE_PLANTED"] = "s3cret-value"
    made: dict[bool, Child] = {}
    spec = {"function": function, "model": None, "url": None, "name": None, "args": {}, "factory": False}

    def both(program: str) -> tuple[str, str]:
        for walled, limits in ((False, WIDE), (True, TIGHT)):
            if walled not in made or not made[walled].alive:
                made[walled] = Child(spec | {"isolation": None}, "key", limits, walled)
        return run(made[False], program), run(made[True], program)

    yield both
    for child in made.values():
        child.kill()
    del os.environ["MILLRACE_PLANTED"]


REACH = "import os, socket\ndef reach(address, kind):\n    s = socket.socket(kind)\n    s.settimeout(2)\n    s.connect(address)\n    return 'reached'\n"
HOST = f"import os, sys\nroot = {str(ROOT)!r}\n"
ATTACKS = {
    "a file of the system": ("r = 'root:' in open('/etc/passwd').read()", "True"),
    "the home folder": ("import os; r = sorted(os.listdir({home!r})) == {entries!r}", "True"),
    "other folders of the repository": (HOST + "r = os.path.exists(root + '/tests/fakes.py') or os.path.exists(root + '/launch')", "True"),
    "files of this test": ("r = open({secret!r}).read()", "planted"),
    "environment": ("import os; r = os.environ.get('MILLRACE_PLANTED')", "s3cret-value"),
    "environment of every process": (
        "import glob\nr = False\nfor name in glob.glob('/proc/[0-9]*/environ'):\n    try: r |= b's3cret-value' in open(name, 'rb').read()\n    except OSError: pass",
        "True",
    ),
    "other processes": ("import os; os.kill({pid}, 0); r = os.path.exists('/proc/{pid}/cmdline')", "True"),
    "a server on this machine": (REACH + "r = reach(('127.0.0.1', {port}), socket.AF_INET)", "reached"),
    "an abstract socket": (REACH + "r = reach({abstract!r}, socket.AF_UNIX)", "reached"),
    "the network's interfaces": ("import socket; r = [n for _, n in socket.if_nameindex() if n != 'lo'] != []", "True"),
    "fork": ("import os\npid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0)\nr = 'forked'", "forked"),
    "a subprocess": ("import subprocess; r = subprocess.run(['/usr/bin/env', 'echo', 'hi'], capture_output=True).stdout", "b'hi\\n'"),
    "a shell": ("import os; r = os.system('exit 7') >> 8", "7"),
    "multiprocessing": ("import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start(); p.join(); r = p.exitcode", "0"),
    "600 MB": ("r = len(bytearray(600 << 20)) >> 20", "600"),
    "a file of 2 MB": ("import os\nn = open('/tmp/millrace-2mb', 'wb').write(bytes(2 << 20)); os.remove('/tmp/millrace-2mb'); r = n >> 20", "2"),
    "20 MB of small files": (
        "import shutil, tempfile\nd = tempfile.mkdtemp(dir='/tmp')\ntry:\n    for i in range(25):\n        with open(f'{{d}}/{{i}}', 'wb') as f: f.write(bytes(800000))\n    r = i\nfinally:\n    shutil.rmtree(d)",
        "24",
    ),
    "100 open files": ("fs = [open('/dev/null') for _ in range(100)]; r = len(fs)", "100"),
    "the sources": (HOST + "r = [p for p in (root + '/rollout', root + '/rollout/rewards.py', root + '/shared', '/usr/lib', sys.prefix) if os.access(p, os.W_OK)] != []", "True"),
    "its own function": ("import os; r = os.access({function!r}, os.W_OK)", "True"),
}  # fmt: skip
AS_ROOT = {
    "the user's number": ("import os; r = (os.getuid(), os.geteuid(), os.getgid())", "(0, 0, 0)"),
    "capabilities": ("r = any(int(line.split()[1], 16) for line in open('/proc/self/status') if line.startswith('Cap') and 'Amb' not in line and 'Inh' not in line)", "True"),
    "new namespaces": ("import ctypes; r = ctypes.CDLL(None).unshare(0x04000000)", "0"),
    "changing the user": ("import os; os.setuid(0); r = 'root'", "root"),
}  # fmt: skip
OUTSIDE_TMP = {
    "the root folder": ("import os; r = os.access('/', os.W_OK)", "True"),
    "folders above visible ones": ("import os; r = os.access({above!r}, os.W_OK)", "True"),
    "shared memory": ("import os; r = os.access('/dev/shm', os.W_OK)", "True"),
    "kernel settings": ("import os; r = os.access('/proc/sys/kernel/core_pattern', os.W_OK)", "True"),
}
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="a user has none of this outside either")


@pytest.fixture(scope="module")
def targets(tmp_path_factory, function):
    """What the attacks are after: a file, this process, two listening sockets."""
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.write_text("planted")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0millrace-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        yield {
            "secret": str(secret),
            "pid": os.getpid(),
            "port": server.getsockname()[1],
            "abstract": name,
            "function": function.rpartition(":")[0],
            "above": str(Path(sys.base_prefix).parent),  # The clone itself may lie in /tmp, which is writable.
            "home": str(Path.home()),
            "entries": sorted(os.listdir(Path.home())),
        }


ALWAYS_TRIED = {
    *("the home folder", "environment of every process", "a server on this machine", "fork", "a shell", "600 MB"),
    *("a file of 2 MB", "its own function", "capabilities", "shared memory"),
}
"""Attacks that ``make test`` tries; ``make test-slow`` tries the others."""


def attacks():
    """One parameter set an attack."""
    for name, attack in (ATTACKS | AS_ROOT | OUTSIDE_TMP).items():
        marks = [] if name in ATTACKS else [root_only]
        yield pytest.param(*attack, id=name, marks=marks if name in ALWAYS_TRIED else [*marks, pytest.mark.slow])


def test_the_attacks_that_are_always_tried_exist():
    assert {*ATTACKS, *AS_ROOT, *OUTSIDE_TMP} > ALWAYS_TRIED


@has_wall
@pytest.mark.parametrize(("program", "evidence"), list(attacks()))
def test_an_attack_that_works_in_a_subprocess_fails_in_the_sandbox(pair, targets, program, evidence):
    bare, walled = pair(program.format(**targets))
    assert bare == evidence
    assert walled != evidence


@has_wall
def test_the_sandbox_has_a_temporary_folder_of_its_own(start):
    name = f"/tmp/millrace-{os.getpid()}"
    program = f"import os; r = os.getcwd(), open({name!r}, 'w').write('x'), os.path.exists({name!r})"
    assert run(start(True), program) == "('/tmp', 1, True)"
    assert not os.path.exists(name)
    assert run(start(True), f"import os; r = os.path.exists({name!r})") == "False"


# --- no wall, no sandbox ---


@pytest.fixture
def fresh():
    """``sandbox_problem`` asked anew, now and after the test."""
    sandbox.sandbox_problem.cache_clear()
    yield
    sandbox.sandbox_problem.cache_clear()


def test_without_bubblewrap_a_sandbox_is_e308(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError) as excinfo:
        require_sandbox("run.toml:reward.functions[0].isolation")
    assert excinfo.value.code == "E308"
    assert excinfo.value.found == "no bubblewrap"


@pytest.mark.parametrize("script", ["echo no namespaces >&2; exit 1", 'while [ "$1" != -- ]; do shift; done; exit 0'])
def test_a_bubblewrap_that_does_not_work_is_e308(fresh, monkeypatch, tmp_path, script):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"E308.*bubblewrap fails"):
        require_sandbox("key")


def test_a_machine_without_a_system_call_filter_is_e308(fresh, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", "riscv64")))
    with pytest.raises(InputError, match=r"E308.*riscv64|E308.*no bubblewrap"):
        require_sandbox("key")


@levels
def test_a_reward_file_finds_its_neighbours(start, tmp_path, sandboxed):
    (tmp_path / "helper.py").write_text("import sibling\nVALUE = sibling.VALUE\n")
    (tmp_path / "sibling.py").write_text("VALUE = 3\n")
    (tmp_path / "r.py").write_text(
        "import helper\ndef f(completions, **c): return [helper.VALUE for _ in completions]\n"
    )
    child = start(sandboxed, name=f"{tmp_path}/r.py:f")
    payload = {"prompts": [""], "completions": ["a"], "completion_ids": [[]], "columns": {}, "state": {}}
    assert child.call(payload, 20)["values"] == [3]
