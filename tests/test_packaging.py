"""What a company looks at first: the licence, the name of the distribution, and which packages we tell people to install."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from launch import cli, sinks
from launch.sinks import EXTRAS
from rollout.generated_tasks import VERSION
from tests.pace import scaled

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# `millrace` on PyPI is somebody else's package: neither it nor an extra of it is ours to install.
SOMEBODY_ELSES = re.compile(
    r"""(pip3?|uv|pipx|uvx)\s+(add|install|run)?[^\n|&;]*?["'\s]millrace(\[|==|>=|["'\s]*$)""", re.M
)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_the_licence_is_there_in_full_and_named_in_the_package():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "(LICENSE)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_distribution_has_a_name_of_our_own_and_the_command_keeps_its():
    assert PROJECT["name"] == "millrace-rl"
    assert list(PROJECT["scripts"]) == ["millrace"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('pip install "millrace[wandb]"', True),
        ("pip install -U millrace[wandb]", True),
        ("`uv add millrace`"[:-1], True),
        ("pip install millrace==0.1", True),
        ("pip install -e '.[gpu]'", False),
        ("pip install millrace-rl", False),
        ("pip install --no-deps --editable .", False),
    ],
)
def test_how_somebody_elses_package_is_recognised(text, wrong):
    assert bool(SOMEBODY_ELSES.search(text)) == wrong


def test_nobody_is_told_to_install_somebody_elses_package():
    own = Path(__file__).resolve()
    texts = {path: path.read_bytes().decode("utf-8", "replace") for path in tracked() if path != own}
    assert [str(path.relative_to(ROOT)) for path, text in texts.items() if SOMEBODY_ELSES.search(text)] == []
    assert [str(path.relative_to(ROOT)) for path, text in texts.items() if '"millrace[' in text] == []


def test_the_packages_that_errors_name_are_those_of_the_extras():
    extras = PROJECT["optional-dependencies"]
    assert extras["reasoning-gym"] == [f"reasoning-gym=={VERSION}"]
    for sink, package in EXTRAS.items():
        assert [re.split("[<>=]", requirement)[0] for requirement in extras[sink]] == [package]
    assert "pip install {package}" in Path(sinks.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("installed", ["millrace-rl", "millrace", ""])
def test_the_version_is_told_under_the_new_name_and_the_old_and_without_any(monkeypatch, installed):
    def version(name: str) -> str:
        if name != installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli._version() == ("0.1.0" if installed else "of a source tree that is not installed")


def test_an_installation_says_each_of_its_steps_before_it_takes_it(tmp_path):
    place = tmp_path / "env"
    stub = f'#!/bin/sh\necho "took: $0 $*" | cut -c 1-400\ncase "$*" in *venv*) mkdir -p {place}/bin; cp $0 {place}/bin/python; cp $0 {place}/bin/uv;; esac\n'
    python = tmp_path / "python3"
    python.write_text(stub)
    python.chmod(0o755)
    command = ["make", f"VENV={place}", f"PYTHON={python}", f"{place}/installed"]
    # `make test` runs this test: a make below it would tell its folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": scaled(20)}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr
    log = [line for line in done.stdout.splitlines() if " -c " not in line]
    assert [line.startswith("took: ") for line in log] == [False, True] * 5, done.stdout
    assert [line[:4] for line in log[::2]] == [f"{step}/5 " for step in range(1, 6)]
