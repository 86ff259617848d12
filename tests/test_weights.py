"""One publication on the wire: layout, bytes, digests, shared memory."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blake3 import blake3

from learner.weight_sender import ShmSender
from shared.errors import InputError
from shared.weights import (
    SHM_DIR,
    Canary,
    Publication,
    Segment,
    describe,
    digest,
    orphans,
    remove_segments,
    segment_name,
    shared_memory_free,
    views,
)

TENSORS = [
    ("embed", torch.float32, (5, 3)),
    ("scale", torch.bfloat16, ()),
    ("norm", torch.bfloat16, (7,)),
    ("empty", torch.float32, (0, 4)),
    ("wide", torch.float32, (16, 2)),
]


@pytest.fixture
def run_id():
    """A run of its own, whose shared memory is gone afterwards."""
    name = f"test{uuid.uuid4().hex[:10]}"
    yield name
    for path in SHM_DIR.glob(f"*{name}*"):
        path.unlink()


def test_tensors_lie_back_to_back_aligned_to_64_bytes():
    metas = describe(TENSORS)
    assert [(m.name, m.dtype, m.shape, m.nbytes) for m in metas] == [
        ("embed", "float32", (5, 3), 60),
        ("scale", "bfloat16", (), 2),
        ("norm", "bfloat16", (7,), 14),
        ("empty", "float32", (0, 4), 0),
        ("wide", "float32", (16, 2), 128),
    ]
    assert [m.offset for m in metas] == [0, 64, 128, 192, 192]
    assert describe([]) == ()


def test_large_tensors_do_not_overflow():
    (meta,) = describe([("w", torch.float32, (1 << 20, 1 << 14))])
    assert meta.nbytes == 1 << 36


def test_views_are_the_bytes_of_each_tensor_without_a_copy():
    metas = describe(TENSORS)
    buffer = np.arange(metas[-1].offset + metas[-1].nbytes).astype(np.uint8)
    parts = list(views(buffer, metas))
    assert [len(part) for part in parts] == [60, 2, 14, 0, 128]
    assert parts[2].tolist() == list(range(128, 142))
    parts[1][:] = 255
    assert buffer[64:66].tolist() == [255, 255]


def test_the_digest_is_blake3_of_all_bytes_in_order():
    a, b = np.arange(100, dtype=np.uint8), np.arange(50, dtype=np.uint8)
    assert digest([a, b]) == blake3(a.tobytes() + b.tobytes()).hexdigest()
    assert digest([a, b]) != digest([b, a])
    changed = a.copy()
    changed[99] ^= 1
    assert digest([changed, b]) != digest([a, b])


def test_a_segment_carries_bytes_and_proves_them(run_id):
    metas = describe(TENSORS)
    size = metas[-1].offset + metas[-1].nbytes
    written = Segment(segment_name(run_id, "a"), size)
    tensor = torch.arange(15, dtype=torch.float32).reshape(5, 3)
    written.bytes[:60] = tensor.view(torch.uint8).flatten().numpy()
    read = Segment(segment_name(run_id, "a"))
    assert len(read.bytes) >= size
    assert digest(views(read.bytes, metas)) == digest(views(written.bytes, metas))
    first = next(views(read.bytes, metas))
    assert torch.equal(torch.frombuffer(first, dtype=torch.float32).reshape(5, 3), tensor)
    written.bytes[0] ^= 1
    assert read.bytes[0] == written.bytes[0]
    written.unlink()
    written.unlink()
    assert not (SHM_DIR / written.name).exists()
    assert digest(views(read.bytes, metas)) == digest(views(written.bytes, metas))  # A mapping outlives its name.


def test_a_reader_cannot_change_what_others_read(run_id):
    owner = Segment(segment_name(run_id, "a"), 64)
    reader, other = Segment(owner.name), Segment(owner.name)
    reader.bytes[:] = 7
    assert owner.bytes[:64].tolist() == other.bytes[:64].tolist() == [0] * 64


def test_a_segment_is_private_to_the_user_never_reused_and_never_imaginary(run_id):
    owner = Segment(segment_name(run_id, "a"), 8)
    assert stat.S_IMODE(os.stat(SHM_DIR / owner.name).st_mode) == 0o600
    with pytest.raises(FileExistsError):
        Segment(owner.name, 8)
    with pytest.raises(FileNotFoundError):
        Segment(segment_name(run_id, "b"))


def test_an_empty_segment_can_be_mapped(run_id):
    assert len(Segment(segment_name(run_id, "a"), 0).bytes) >= 0


def test_a_run_removes_what_it_left_and_nothing_else(run_id):
    mine = [Segment(segment_name(run_id, label), 8).name for label in ("a", "b-0")]
    longer = Segment(segment_name(f"{run_id}x", "a"), 8)
    assert sorted(remove_segments(run_id)) == sorted(mine)
    assert remove_segments(run_id) == []
    assert (SHM_DIR / longer.name).exists()


def test_the_manifest_of_a_publication():
    canary = Canary(np.arange(3, dtype=np.int32), np.zeros(2, np.float32))
    publication = Publication(4, "millrace_shm", "millrace-x-0", describe(TENSORS), "abc", canary)
    assert publication.nbytes == 60 + 2 + 14 + 0 + 128
    info = publication.update_info()
    assert info["segment"] == "millrace-x-0"
    assert info["names"] == ["embed", "scale", "norm", "empty", "wide"]
    assert info["dtype_names"] == ["float32", "bfloat16", "bfloat16", "float32", "float32"]
    assert info["shapes"] == [[5, 3], [], [7], [0, 4], [16, 2]]
    assert info["offsets"] == [0, 64, 128, 192, 192]
    assert info["sizes"] == [60, 2, 14, 0, 128]
    msgpack = pytest.importorskip("msgpack")
    assert msgpack.unpackb(msgpack.packb(info)) == info


def test_segments_of_a_killed_owner_are_orphans_and_those_of_a_living_one_are_not(run_id):
    code = "import os, signal, sys; from shared.weights import Segment; s = Segment(sys.argv[1], 8); os.kill(os.getpid(), signal.SIGKILL)"
    killed, living = segment_name(run_id, "killed"), Segment(segment_name(run_id, "living"), 8)
    subprocess.run([sys.executable, "-c", code, killed], check=False)
    assert SHM_DIR / killed in orphans(older_than_s=0)
    assert SHM_DIR / killed not in orphans(older_than_s=60)
    assert SHM_DIR / living.name not in orphans(older_than_s=0)


@pytest.fixture
def room_for_one(monkeypatch):
    """Shared memory that has room for one segment, as a container's 64 MB have for a small model."""
    allocate, taken = os.posix_fallocate, []

    def limited(descriptor, start, size):
        taken.append(size)
        if len(taken) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)


def test_a_segment_without_room_names_its_file_and_leaves_none(run_id, room_for_one):
    Segment(segment_name(run_id, "a"), 8)
    with pytest.raises(OSError, match=rf"No space left on device: '/dev/shm/millrace-{run_id}-b'"):
        Segment(segment_name(run_id, "b"), 8)
    assert [path.name for path in SHM_DIR.glob(f"*{run_id}*")] == [segment_name(run_id, "a")]


def test_a_sender_without_room_for_two_copies_says_what_is_needed_and_takes_nothing(run_id, room_for_one, monkeypatch):
    monkeypatch.setattr("learner.weight_sender.shared_memory_free", lambda: 64 << 20)
    engine = SimpleNamespace(module=torch.nn.ModuleDict({"model": torch.nn.Linear(1000, 1000)}))
    with pytest.raises(InputError) as caught:
        ShmSender(engine, run_id, is_sender=True)
    assert re.fullmatch(
        r"error\[E505\] shared memory too small — /dev/shm\. Found 64 MiB free on \S+, expected >= 8 MiB for 2 copies of the "
        r"weights\. Fix: docker run --shm-size=2g, or in Kubernetes an emptyDir .*",
        str(caught.value),
    )
    assert list(SHM_DIR.glob(f"*{run_id}*")) == []


def test_an_error_that_is_not_of_room_stays_what_it_is(run_id):
    Segment(segment_name(run_id, "b"), 8)
    with pytest.raises(FileExistsError):
        ShmSender(SimpleNamespace(module=torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})), run_id, is_sender=True)


def test_what_a_killed_run_left_in_shared_memory_is_free_for_the_next(run_id):
    before = shared_memory_free()
    living = Segment(segment_name(run_id, "living"), 64 << 20)
    assert before - shared_memory_free() > 32 << 20
    living.unlink()
    del living  # Its mapping would keep the memory.
    with (SHM_DIR / segment_name(run_id, "killed")).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 << 20)
    os.utime(file.name, (0, 0))
    assert abs(before - shared_memory_free()) < 32 << 20
