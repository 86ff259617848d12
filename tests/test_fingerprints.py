"""Fingerprints prove weights on their way between GPUs: equal for equal bytes on any device, different after any fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared import fingerprints
from shared.fingerprints import HEX, Fingerprints, differing, fingerprint, summary

pytestmark = pytest.mark.process  # It loads torch.

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 66, 129, 700, 4099]


def by_hand(data: bytes, block: int) -> list[int]:
    """The fingerprint in Python's own integers, from the description at the top of the module."""
    mask = 2**64 - 1

    def key(lane, position, level):
        mixed = (lane * block + position + 1 + level * 2 * block) * 0x9E3779B97F4A7C15 & mask
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
        return (mixed ^ (mixed >> 31)) | 1

    def fold(words, level):
        blocks = [words[at : at + block] for at in range(0, max(len(words), 1), block)]
        return [[sum(w * key(lane, i, level) for i, w in enumerate(b)) & mask for lane in (0, 1)] for b in blocks]

    def words_of(raw):
        return np.frombuffer(raw, "<i4").tolist()

    whole = len(data) - len(data) % 4
    sums, level = fold(words_of(data[:whole]), 0), 0
    if len(data) % 4:
        sums += fold(words_of(data[whole:] + bytes(-len(data) % 4)), 3)
    while len(sums) > 1:
        level += 1
        sums = fold(words_of(np.array(sums, "<u8").tobytes()), min(level, 2))
    return [(total + len(data)) & mask for total in sums[0]]


@pytest.fixture(params=[8, 64, fingerprints.BLOCK])
def block(request, monkeypatch):
    """The size of a block; small ones fold a small tensor several times."""
    monkeypatch.setattr(fingerprints, "BLOCK", request.param)
    fingerprints._keys_of.cache_clear()
    yield request.param
    fingerprints._keys_of.cache_clear()


@pytest.mark.parametrize("size", SIZES)
def test_a_fingerprint_is_what_python_s_integers_give(block, size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    found = fingerprint(torch.from_numpy(data)).numpy().astype(np.uint64)
    assert found.tolist() == by_hand(data.tobytes(), block)


def test_a_fingerprint_depends_on_the_bytes_and_not_on_their_type_place_or_grouping(monkeypatch):
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4 * 1000, dtype=np.uint8))
    expected = fingerprint(data)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64):
        assert torch.equal(fingerprint(data.view(dtype)), expected)
    assert torch.equal(fingerprint(data.view(torch.float32).view(100, 10)), expected)
    for offset in range(1, 9):  # In a packed buffer a tensor begins anywhere.
        packed = torch.zeros(offset + len(data), dtype=torch.uint8)
        packed[offset:] = data
        assert torch.equal(fingerprint(packed[offset:]), expected)
    monkeypatch.setattr(fingerprints, "BLOCK", 8)
    fingerprints._keys_of.cache_clear()
    words = data.view(torch.int32)
    alone = fingerprints._fold(words, 0)
    grouped = [
        fingerprints._sums(words.view(-1, 8)[at : at + 3], fingerprints._keys_of(0, "cpu")) for at in range(0, 125, 3)
    ]
    assert torch.equal(alone, torch.cat(grouped))  # As many blocks at once as a GPU takes.
    fingerprints._keys_of.cache_clear()


@given(size=st.sampled_from([4, 6, 14, 200, 4099, 300_000]), seed=st.integers(0, 2**32 - 1))
def test_every_flipped_bit_changes_a_fingerprint(size, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, size, dtype=np.uint8)
    before = fingerprint(torch.from_numpy(data))
    for _ in range(8):
        at, bit = rng.integers(size), 1 << rng.integers(8)
        data[at] ^= bit
        assert not torch.equal(fingerprint(torch.from_numpy(data)), before)
        data[at] ^= bit
    assert torch.equal(fingerprint(torch.from_numpy(data)), before)


@given(dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 2**32 - 1), sign=st.booleans())
def test_swapped_elements_change_a_fingerprint(dtype, seed, sign):
    """Also those that differ in their sign alone: the top bit of a word."""
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy(rng.standard_normal(5000).astype(np.float32)).to(dtype)
    first, second = (int(i) for i in rng.choice(5000, 2, replace=False))
    if sign:
        tensor[second] = -tensor[first]
    swapped = tensor.clone()
    swapped[first], swapped[second] = tensor[second], tensor[first]
    assert torch.equal(tensor, swapped) or not torch.equal(fingerprint(tensor), fingerprint(swapped))


@given(seed=st.integers(0, 2**32 - 1))
def test_zeros_at_the_end_shifted_rows_and_repeated_blocks_change_a_fingerprint(seed):
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy(rng.standard_normal((3, fingerprints.BLOCK)).astype(np.float32))
    others = [
        torch.cat([tensor.view(-1), torch.zeros(1)]),
        tensor.roll(1, 0),
        tensor.roll(1, 1),
        tensor[[0, 0, 2]],
        -tensor,
        torch.zeros_like(tensor),
    ]
    found = {tuple(fingerprint(one).tolist()) for one in (tensor, *others)}
    assert len(found) == 1 + len(others)


def test_swapped_tensors_are_named():
    tensors = {"q": torch.ones(3), "k": torch.zeros(3), "v": torch.full((3,), 2.0)}

    def text(*order):
        prints = Fingerprints()
        for name in order:
            prints.add(tensors[name])
        return prints.text()

    sent = text("q", "k", "v")
    assert len(sent) == 3 * HEX
    assert differing(sent, text("q", "k", "v"), list(tensors)) == []
    assert differing(sent, text("k", "q", "v"), list(tensors)) == ["q", "k"]
    assert differing(sent, "d1", list(tensors)) == []
    assert summary(sent) != summary(text("k", "q", "v"))
    assert len(summary(sent)) == 64
    assert summary("d1") == "d1"
    assert Fingerprints().text() == ""
