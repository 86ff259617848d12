"""Checkpoints: whole and verified, or not there; whatever kills the writer, whatever damages the files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.keeper import Keeper
from shared import checkpoints
from shared.errors import InputError
from shared.ledger import TimeLedger

ROOT = Path(__file__).resolve().parent.parent

WRITER = """
import sys
from pathlib import Path
from shared import checkpoints
parent = Path(sys.argv[1])
for step in map(int, sys.argv[2:]):
    draft = checkpoints.begin(parent, step)
    for name in ("hf/model", "learner/part", "state/run"):
        (draft / name).parent.mkdir()
        (draft / name).write_bytes(f"{name} of step {step} ".encode() * 20000)
    checkpoints.commit(draft, step, {"config": {}})
    print(step, flush=True)
"""


def write(parent: Path, *steps: int, faults: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MILLRACE_FAULTS": faults}
    command = [sys.executable, "-c", WRITER, str(parent), *map(str, steps)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def is_whole(place: Path) -> bool:
    """Every file is that of the step that the folder names."""
    step = int(place.name.removeprefix("step-"))
    names = ("hf/model", "learner/part", "state/run")
    return all((place / n).read_bytes() == f"{n} of step {step} ".encode() * 20000 for n in names)


@pytest.fixture
def parent(tmp_path):
    """Checkpoints of steps 5 and 10."""
    assert write(tmp_path, 5, 10).returncode == 0
    return tmp_path


def damaged(parent: Path, file: str = "learner/part", step: int = 10) -> Path:
    path = parent / f"step-{step:06d}" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


# --- writing ---


def test_a_checkpoint_names_every_file_with_its_size_and_hash(parent):
    place, manifest = checkpoints.newest(parent)
    assert place.name == "step-000010"
    assert (manifest["step"], manifest["config"]) == (10, {})
    assert sorted(manifest["files"]) == ["hf/model", "learner/part", "state/run"]
    assert manifest["files"]["hf/model"]["bytes"] == len("hf/model of step 10 ") * 20000
    assert all(len(facts["sha256"]) == 64 for facts in manifest["files"].values())


@pytest.mark.process
@settings(derandomize=True)
@given(
    point=st.sampled_from(["after_write", "after_manifest", "before_rename", "after_rename"]),
    hit=st.integers(1, 3),
)
def test_a_writer_killed_at_any_point_leaves_the_old_or_the_new(tmp_path_factory, point, hit):
    parent = tmp_path_factory.mktemp("killed")
    process = write(parent, 5, 10, 15, faults=f"checkpoint.{point}:{hit}:kill")
    assert process.returncode == -signal.SIGKILL
    done = hit if point == "after_rename" else hit - 1
    found = checkpoints.newest(parent)
    assert (found and found[0].name) == (f"step-{5 * done:06d}" if done else None)
    assert all(is_whole(place) for place in checkpoints.all_of(parent))
    assert write(parent, 20).returncode == 0  # The next one sweeps what was left.
    assert checkpoints.newest(parent)[0].name == "step-000020"
    assert list(parent.glob("tmp.*")) == []


@pytest.mark.process
@settings(derandomize=True)
@given(milliseconds=st.integers(0, 60))
def test_a_writer_killed_at_any_moment_leaves_whole_ones_alone(tmp_path_factory, milliseconds):
    parent = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(parent), *(str(step) for step in range(1, 200))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        last = int(process.stdout.readline())
        time.sleep(milliseconds / 1000)
        process.kill()
        last = max([last, *map(int, process.stdout.read().split())])
    place, _ = checkpoints.newest(parent)
    assert int(place.name.removeprefix("step-")) >= last
    assert all(is_whole(place) for place in checkpoints.all_of(parent))


def test_a_step_that_is_written_again_replaces_the_one_of_a_cut_life(parent):
    damaged(parent)
    assert write(parent, 10).returncode == 0
    assert checkpoints.newest(parent)[0].name == "step-000010"


def test_a_full_disk_is_an_oserror_and_the_old_one_stays(tmp_path):
    """A limit on the size of files stands for the disk; the root of a test cannot always mount one."""
    parent = tmp_path / "c"
    assert write(parent, 5).returncode == 0
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))"
    command = [sys.executable, "-c", limit + WRITER, str(parent), "10"]
    process = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert "OSError" in process.stderr
    assert checkpoints.newest(parent)[0].name == "step-000005"


def test_a_full_file_system_is_an_oserror_and_the_old_one_stays(tmp_path):
    parent = tmp_path / "small"
    parent.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(parent)], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        assert write(parent, 5).returncode == 0
        process = write(parent, 10, 15, 20)
        assert "No space left on device" in process.stderr
        newest = checkpoints.newest(parent)[0]
        assert is_whole(newest)
        checkpoints.sweep(parent)
        assert sorted(path.name for path in parent.iterdir()) == [p.name for p in checkpoints.all_of(parent)[::-1]]
    finally:
        subprocess.run(["umount", str(parent)], check=True)


def test_the_newest_are_kept_and_a_spared_one(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.prune(tmp_path, 2, spare=tmp_path / "step-000002")
    assert [path.name for path in checkpoints.all_of(tmp_path)] == ["step-000005", "step-000004", "step-000002"]


# --- reading ---


def test_the_newest_step_is_found_by_its_number_and_not_by_its_name(tmp_path):
    for name in ("step-999999", "step-1000000", "step-000007", "cut.step-2000000", "step-best"):
        (tmp_path / name).mkdir()
    assert [place.name for place in checkpoints.all_of(tmp_path)] == ["step-1000000", "step-999999", "step-000007"]


@pytest.mark.parametrize("file", ["hf/model", "learner/part", "state/run"])
def test_a_flipped_bit_is_found_named_and_the_one_before_is_taken(parent, file, capsys):
    path = damaged(parent, file)
    assert checkpoints.newest(parent)[0].name == "step-000005"
    said = capsys.readouterr().out
    assert said.startswith(f"warning[W604] checkpoint damaged, skipped — {path}. Found sha256 ")


@pytest.mark.parametrize(
    "harm", ["truncated", "missing", "no manifest", "empty manifest", "torn manifest", "strange manifest"]
)
def test_every_other_damage_is_found_too(parent, harm, capsys):
    place = parent / "step-000010"
    if harm == "truncated":
        os.truncate(place / "learner/part", 100)
    elif harm == "missing":
        (place / "learner/part").unlink()
    elif harm == "no manifest":
        (place / "MANIFEST.json").unlink()
    else:
        text = (place / "MANIFEST.json").read_text()
        torn = {"empty manifest": "", "torn manifest": text[: len(text) // 2], "strange manifest": "[1]"}
        (place / "MANIFEST.json").write_text(torn[harm])
    assert checkpoints.newest(parent)[0].name == "step-000005"
    assert "W604" in capsys.readouterr().out


def test_when_all_are_damaged_nothing_begins_anew_silently(parent):
    for step in (5, 10):
        damaged(parent, step=step)
    with pytest.raises(InputError) as excinfo:
        checkpoints.newest(parent)
    assert excinfo.value.code == "E604"


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert checkpoints.newest(tmp_path / "nowhere") is None


def test_a_step_that_is_asked_for_is_that_step_or_an_error(parent):
    assert checkpoints.of_step(parent, 5)[1]["step"] == 5
    with pytest.raises(InputError) as excinfo:
        checkpoints.of_step(parent, 7)
    error = excinfo.value
    assert (error.code, error.found, error.expected) == ("E603", "checkpoints of steps 10, 5", "step-000007")
    path = damaged(parent)
    with pytest.raises(InputError) as excinfo:
        checkpoints.of_step(parent, 10)
    assert (excinfo.value.code, excinfo.value.place) == ("E604", str(path))
    assert excinfo.value.fix == "run.resume = 5"


def test_a_file_that_no_manifest_names_is_no_harm(parent):
    (parent / "step-000010" / "notes.txt").write_text("mine")
    (parent / "step-old").mkdir()
    assert json.loads((parent / "step-000010" / "MANIFEST.json").read_text())["step"] == 10
    assert checkpoints.newest(parent)[0].name == "step-000010"


def test_a_run_that_is_cancelled_in_the_moment_its_checkpoint_is_written_ends():
    async def run():
        written = asyncio.get_running_loop().create_future()
        recorder = SimpleNamespace(draft=lambda version: "draft", commit=lambda *_: written)
        learners = SimpleNamespace(save=lambda draft: asyncio.sleep(0))
        keeper = Keeper(learners, recorder, TimeLedger("run"))
        keeper._task = written
        waiting = asyncio.create_task(keeper.finish())
        await asyncio.sleep(0)
        written.set_result(True)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
