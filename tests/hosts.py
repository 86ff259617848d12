"""Hosts on this machine, as far apart as root can make them: each has its own network, shared memory, processes and name.

They share a file system, as hosts with a network disk do. Without root they are Ray nodes side by side on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tests.pace import scaled

RAY = str(Path(sys.executable).with_name("ray"))
TAG = f"{os.getpid() % 4096:x}"
BRIDGE, NETWORK = f"mrb{TAG}", f"10.77.{os.getpid() % 250 + 1}"  # Of this process: another may test beside it.
SHM = "1g"


def sealed() -> bool:
    """Whether hosts can have networks and memory of their own."""
    probe = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "ip", "link", "add", "x", "type", "bridge"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@dataclass
class Host:
    """One node of a cluster."""

    number: int
    process: subprocess.Popen

    def power_off(self) -> None:
        """Off the network first, so that nobody is told; then everything in it ends."""
        if sealed():
            _run("ip", "link", "set", f"mrv{TAG}n{self.number}", "down")
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)


@dataclass
class Job:
    """A submitted job: its status over HTTP, and what it said from the head's own file.

    When a host vanishes from the network, Ray's dashboard may not answer for minutes, whatever the job does.
    """

    url: str
    headers: dict[str, str]
    read: list[str]
    """A command that prints its log."""

    def ended(self) -> str:
        """How it ended: SUCCEEDED, FAILED, STOPPED; empty while it goes on, or while that cannot be known."""
        request = urllib.request.Request(self.url, headers=self.headers)
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=scaled(5)) as answer:
            status = json.load(answer)["status"]
            return status if status in ("SUCCEEDED", "FAILED", "STOPPED") else ""
        return ""

    def output(self) -> str:
        """Everything that it has said."""
        return subprocess.run(self.read, capture_output=True, text=True, check=False, timeout=scaled(30)).stdout

    def wait(self, timeout_s: float) -> str:
        """How it ended."""
        deadline = time.monotonic() + scaled(timeout_s)
        while not (status := self.ended()):
            assert time.monotonic() < deadline, f"still there:\n{self.output()[-4000:]}"
            time.sleep(0.5)
        return status


class Cluster:
    """A head and workers, started with ``ray start``; token authentication throughout."""

    def __init__(self, folder: Path, cpus: list[int], memory: int = 200_000_000) -> None:
        """Hosts with so many ``cpus``, the head first; sockets and logs go below ``folder``, whose name must be short;
        ``memory``: bytes of each object store."""
        self.folder, self.memory, self.hosts = folder, memory, list[Host]()
        self.sealed = sealed()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.environment = os.environ | token | {"PATH": path, "RAY_health_check_failure_threshold": "2"}
        for name in ("RAY_TMPDIR", "RAY_ADDRESS"):
            self.environment.pop(name, None)
        if self.sealed:
            self._sweep()
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
        self.head = f"{NETWORK}.10" if self.sealed else "127.0.0.1"
        self.port, self.dashboard = (6379, 8265) if self.sealed else (_free(), _free())
        for count in cpus:
            self.add(count)

    @property
    def address(self) -> str:
        return f"{self.head}:{self.port}"

    def add(self, cpus: int) -> Host:
        """One host more."""
        number = len(self.hosts)
        command = [RAY, "start", f"--num-cpus={cpus}", "--block", f"--object-store-memory={self.memory}"]
        command += [f"--node-ip-address={NETWORK}.{10 + number}" if self.sealed else "--node-ip-address=127.0.0.1"]
        if number == 0:
            command += ["--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
            command += [f"--dashboard-host={self.head}", f"--temp-dir={self.folder}/{number}"]
            command += [] if self.sealed else [f"--dashboard-agent-listen-port={_free()}"]
        else:
            command += [f"--address={self.address}"]
        if self.sealed:
            command = self._inside(number, command)
        log = (self.folder / f"host-{number}.log").open("w")
        process = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.hosts.append(Host(number, process))
        if number == 0:
            self._wait_for_head()
        return self.hosts[-1]

    def on(self, number: int, *command: str) -> list[str]:
        """``command`` as a command that runs on a host."""
        if not self.sealed:
            return list(command)
        import psutil

        (init,) = psutil.Process(self.hosts[number].process.pid).children()
        return ["nsenter", "--target", str(init.pid), "--net", "--mount", "--pid", "--uts", "--ipc", "--wd=.", *command]

    def submit(self, root: Path, *arguments: str) -> Job:
        """``ray job submit`` of a run.

        Not waiting: when a host is lost, the command's own log now and then stands still although the job goes on.
        """
        command = [RAY, "job", "submit", "--no-wait", "--working-dir", ".", "--", "python", "launch/run.py", *arguments]
        environment = self.environment | {"RAY_API_SERVER_ADDRESS": f"http://{self.head}:{self.dashboard}"}
        said = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=90
        )
        found = re.search(r"raysubmit_\w+", said.stdout)
        assert found, said.stdout + said.stderr
        url = f"http://{self.head}:{self.dashboard}/api/jobs/{found.group()}"
        log = f"{self.folder}/0/session_latest/logs/job-driver-{found.group()}.log"
        return Job(url, {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}, self.on(0, "cat", log))

    def close(self) -> None:
        for host in reversed(self.hosts):
            if host.process.poll() is None:
                os.killpg(host.process.pid, signal.SIGKILL)
                host.process.wait(20)
        if self.sealed:
            self._sweep()

    def _inside(self, number: int, command: list[str]) -> list[str]:
        """``command`` in a host of its own, joined to the bridge."""
        space, inner, outer = f"mr{TAG}n{number}", f"mri{TAG}n{number}", f"mrv{TAG}n{number}"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        _run("ip", "link", "set", inner, "netns", space)
        _run("ip", "link", "set", outer, "master", BRIDGE)
        _run("ip", "link", "set", outer, "up")
        for step in (f"addr add {NETWORK}.{10 + number}/24 dev {inner}", f"link set {inner} up", "link set lo up"):
            _run("ip", "-n", space, *step.split())
        (self.folder / "0").mkdir(exist_ok=True)
        own = f"mount -t tmpfs -o size={SHM} tmpfs /dev/shm && mount -t tmpfs tmpfs {self.folder}/0"
        setup = f'hostname host-{number} && {own} && exec "$@"'
        apart = ["unshare", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", space, *apart, "sh", "-c", setup, "sh", *command]

    def _wait_for_head(self) -> None:
        import socket

        deadline = time.monotonic() + scaled(60)
        for port in (self.port, self.dashboard):
            while time.monotonic() < deadline:
                try:
                    socket.create_connection((self.head, port), 1).close()
                    break
                except OSError:
                    time.sleep(0.2)

    def _sweep(self) -> None:
        """Networks and links of this process."""
        for number in range(len(self.hosts)):
            subprocess.run(["ip", "link", "del", f"mrv{TAG}n{number}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", f"mr{TAG}n{number}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _free() -> int:
    from learner.distributed import free_port

    return free_port()
