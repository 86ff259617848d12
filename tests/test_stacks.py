"""The stacks of a run that stands still: of this process and of the actors that it started, stopped ones too."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from launch.stacks import dump_stacks

ACTOR = """# ray::Engine
import time
def waits_for_godot():
    print("ready", flush=True)
    time.sleep(60)
waits_for_godot()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_every_process_is_named_with_what_it_does(tmp_path, stopped):
    with subprocess.Popen([sys.executable, "-c", ACTOR], stdout=subprocess.PIPE, text=True) as actor:
        try:
            actor.stdout.readline()
            if stopped:
                actor.send_signal(signal.SIGSTOP)
                time.sleep(0.1)
            text = dump_stacks(tmp_path).read_text()
        finally:
            actor.kill()
    assert f"=== {actor.pid} {sys.executable} -c" in text
    assert "waits_for_godot" in text.partition(f"=== {actor.pid}")[2].partition("Thread")[2]
    assert "dump_stacks" in text
    assert ("(stopped)" in text) == stopped


def test_without_the_tool_the_run_still_ends_with_its_own_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: str(tmp_path / "none"))
    assert "no stack: " in dump_stacks(tmp_path).read_text()
