"""Weights between GPUs, without one: what is sent is what is loaded, by its fingerprints, and nothing is hashed on the host."""

from __future__ import annotations

import socket
import threading
import uuid

import blake3
import pytest
import torch

from shared import chunks
from shared.chunks import TurnMissed, Turns, buffer_size, cut
from shared.errors import WeightProofFailed
from shared.fingerprints import HEX, differing
from shared.weights import SHM_DIR, Link, describe, segment_name, unpack_handle

pytestmark = pytest.mark.stack


def policy_of(*layers):
    return type("Engine", (), {"module": torch.nn.ModuleDict({"model": torch.nn.Sequential(*layers)})})()


class Model(torch.nn.Module):
    """What an engine loads into."""

    def __init__(self):
        super().__init__()
        self.loaded = []

    def load_weights(self, weights):
        self.loaded += [(name, tensor.clone()) for name, tensor in weights]


@pytest.fixture
def no_host_hash(monkeypatch):
    """Between a pause and its end the host hashes nothing."""

    def forbidden(*_, **__):
        raise AssertionError("hashed on the host")

    monkeypatch.setattr(blake3, "blake3", forbidden)


# --- chunks ---


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ([], 4, []),
        ([1, 2, 3, 4], 4, [[1, 2], [3], [4]]),
        ([4, 4], 8, [[4, 4]]),
        ([9, 1, 1], 9, [[9], [1, 1]]),
        ([0, 5, 0], 5, [[0, 5, 0]]),
    ],
)
def test_tensors_are_cut_into_chunks_that_fit(sizes, size, expected):
    metas = describe([(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)], alignment=1)
    assert [[tensor.nbytes for tensor in chunk] for chunk in cut(metas, size)] == expected


def test_the_buffer_is_bounded_whatever_the_model_but_holds_its_largest_tensor(monkeypatch):
    def size(*sizes):
        return buffer_size(describe([(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)]))

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    assert (size(), size(10, 20), size(*[90] * 50), size(10, 250)) == (0, 30, 100, 250)


@pytest.fixture
def turns():
    """``(owner, other)``: both ends of one buffer."""
    owner = Turns(segment_name(f"test{uuid.uuid4().hex[:10]}", "turns-0"), owner=True)
    yield owner, Turns(owner.name)
    owner.close()
    assert not (SHM_DIR / owner.name).exists()


def test_a_chunk_is_written_when_the_last_was_taken_and_taken_when_it_was_written(turns):
    owner, other = turns
    buffer, read = [0], []

    def take():
        for _ in range(50):
            with other.take(5.0):
                read.append(buffer[0])

    reader = threading.Thread(target=take)
    reader.start()
    for number in range(50):
        with owner.write(5.0):
            buffer[0] = number
    owner.emptied(5.0)
    reader.join()
    assert read == list(range(50))


def test_who_waits_too_long_for_the_other_side_says_so_and_a_turn_that_failed_is_none(turns):
    owner, other = turns
    with pytest.raises(TurnMissed, match=r"the learner rank on this GPU sent no weights for 0\.01 s"), other.take(0.01):
        pass
    with pytest.raises(ZeroDivisionError), owner.write(1.0):
        raise ZeroDivisionError
    with owner.write(1.0):
        pass
    with pytest.raises(TurnMissed, match=r"the engine on this GPU took no weights for 0\.01 s"):
        owner.emptied(0.01)
    with pytest.raises(TurnMissed), owner.write(0.01):
        pass
    with other.take(1.0):
        pass
    owner.emptied(0.0)


# --- NCCL ---


def test_a_broadcast_has_the_same_fingerprints_on_both_ends(monkeypatch, no_host_hash):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from learner.device_senders import _PrintedSource
    from rollout.weight_receiver import ProvedNcclEngine

    source = _PrintedSource(policy_of(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).bfloat16()), True)
    sent = [(name, tensor.clone()) for name, tensor in source]
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, t.dtype, tuple(t.shape)) for n, t in sent]
    receiver = ProvedNcclEngine.__new__(ProvedNcclEngine)
    receiver.model = Model()

    def broadcast(self, _):
        self.model.load_weights(iter(sent[:1]))
        self.model.load_weights(iter(sent[1:]))

    monkeypatch.setattr(NCCLWeightTransferEngine, "receive_weights", broadcast)
    receiver.receive_weights(None)
    names = [name for name, _ in sent]
    assert [name for name, _ in receiver.model.loaded] == names
    assert receiver.received == source.prints.text()
    assert len(receiver.received) == len(names) * HEX
    sent[1][1][0] += 1
    receiver.receive_weights(None)
    assert differing(source.prints.text(), receiver.received, names) == [names[1]]


def test_a_rank_that_sends_nothing_looks_at_nothing(no_host_hash):
    from learner.device_senders import _checked, _PrintedSource

    source = _PrintedSource(policy_of(torch.nn.Linear(3, 2)), False)
    assert len(list(source)) == 2
    assert source.prints.text() == ""
    assert _checked(policy_of(torch.nn.Linear(3, 2)), "") == ""


def test_what_was_sent_is_compared_with_the_cpu_s_view_of_it():
    from learner.device_senders import _checked, _PrintedSource

    engine = policy_of(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).bfloat16())
    source = _PrintedSource(engine, True)
    raw = b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for _, t in source)
    assert _checked(engine, source.prints.text()) == blake3.blake3(raw).hexdigest()
    sent = source.prints.text()
    wrong = sent[: 2 * HEX] + sent[:HEX] + sent[3 * HEX :]
    with pytest.raises(WeightProofFailed, match=r"GPU and CPU find different fingerprints: 1\.weight"):
        _checked(engine, wrong)


def test_another_link_destroys_the_communicator_of_the_last_on_both_ends(monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    from learner import device_senders
    from learner.device_senders import NcclSender
    from rollout.weight_receiver import ProvedNcclEngine

    made, destroyed = [], []

    class Communicator:
        def __init__(self, *_):
            made.append(self)

        def destroy(self):
            destroyed.append(self)

    monkeypatch.setattr(device_senders, "_communicator", Communicator)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", Communicator)
    sender = NcclSender(policy_of(torch.nn.Linear(3, 2)), True)
    receiver = ProvedNcclEngine.__new__(ProvedNcclEngine)
    receiver.model_update_group = receiver.parallel_config = None
    info = nccl_engine.NCCLWeightTransferInitInfo(master_address="h", master_port=1, rank_offset=1, world_size=2)
    for _ in range(2):
        sender.connect(Link("h", 1, 1))
        receiver.init_transfer_engine(info)
    assert destroyed == made[:2]
    sender.close()
    receiver.shutdown()
    assert set(destroyed) == set(made)


def test_the_port_of_a_link_is_held_from_the_time_when_it_is_named(monkeypatch):
    """Another process must not be able to take it before the sender opens its end."""
    from learner import device_senders
    from learner.device_senders import NcclSender

    sender = NcclSender(policy_of(torch.nn.Linear(3, 2)), True)
    ports = [sender.listen("127.0.0.1") for _ in range(2)]
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", ports[1]))
    got = []
    monkeypatch.setattr(device_senders, "_communicator", lambda link, listener: got.append((link, listener)))
    sender.connect(Link("127.0.0.1", ports[1], 1))
    with got[0][1] as listener:
        assert listener.getsockname() == ("127.0.0.1", ports[1])


# --- IPC ---


@pytest.fixture
def shared_gpu(monkeypatch):
    """Handles without a GPU: what is exported is what others map; the list of exports, and the number of mappings."""
    from torch.multiprocessing import reductions

    exported, mapped = [], []

    def reduce_tensor(buffer):
        exported.append(buffer)
        storage = (
            torch.storage.TypedStorage,
            buffer.dtype,
            3,
            b"handle",
            buffer.nbytes,
            0,
            False,
            b"count",
            7,
            b"event",
            True,
        )
        return None, (torch.Tensor, buffer.size(), buffer.stride(), 0, *storage)

    def rebuild(cls, size, stride, offset, storage_cls, dtype, device, handle, *rest):
        buffer = exported[-1]
        assert (cls, tuple(size), dtype, handle, rest) == (
            torch.Tensor, (buffer.nbytes,), torch.uint8, b"handle", (buffer.nbytes, 0, False, b"count", 7, b"event", True),
        )  # fmt: skip
        assert issubclass(storage_cls, torch.UntypedStorage)
        assert device == 0
        mapped.append(buffer)
        return buffer

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"uuid": "GPU-1"})())
    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    return exported, mapped


def ipc_receiver(monkeypatch):
    from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter

    from rollout import weight_receiver
    from rollout.weight_receiver import ProvedIpcEngine

    monkeypatch.setattr(weight_receiver, "finalize_layerwise_reload", lambda *_: None)
    receiver = ProvedIpcEngine.__new__(ProvedIpcEngine)
    receiver.model, receiver.model_config, receiver.packed = Model(), None, True
    receiver.device, receiver._packed_importer = torch.device("cuda", 0), PackedBufferImporter()
    return receiver


@pytest.mark.parametrize("bound", [1, 40, 1 << 30])
def test_weights_go_through_one_buffer_in_chunks(monkeypatch, shared_gpu, bound):
    """Plain handles go through msgpack, vLLM's own consumer unpacks the buffer; both sides take turns in two threads."""
    import msgspec

    from learner.device_senders import IpcSender
    from rollout.weight_receiver import IpcUpdateInfo

    monkeypatch.setattr(chunks, "CHUNK_BYTES", bound)
    exported, mapped = shared_gpu
    engine = policy_of(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    sender = IpcSender(engine, torch.device("cpu"), f"test{uuid.uuid4().hex[:10]}", 0)
    whole = sum(p.nbytes for p in engine.module.parameters())
    assert len(sender._buffer) == {1: 40, 40: 40, 1 << 30: whole}[bound]
    receiver = ipc_receiver(monkeypatch)
    for version in range(3):
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.add_(1.0)
        publication = sender.export(version, None)
        assert (publication.collective, publication.digest) == (True, "")
        sent = []
        sending = threading.Thread(target=lambda: sent.append(sender.send()))  # noqa: B023
        sending.start()
        info = msgspec.msgpack.decode(msgspec.msgpack.encode(publication.update_info()))
        receiver.receive_weights(IpcUpdateInfo(**info))
        sending.join()
        receiver.finish_weight_update()
        assert [receiver.received] == sent
        named = list(engine.module["model"].named_parameters())
        for (name, tensor), (ours, parameter) in zip(receiver.model.loaded, named, strict=True):
            assert name == ours
            assert torch.equal(tensor, parameter)
        receiver.model.loaded.clear()
    assert sender.check()
    assert len(exported) == len(mapped) == 1, "an export and a mapping stay as long as the buffer"
    assert unpack_handle(publication.handles["GPU-1"][1:])[:2] == (torch.Tensor, (len(sender._buffer),))
    sender.close()


def test_an_engine_without_a_rank_on_its_gpu_says_so(monkeypatch, shared_gpu):
    from rollout.weight_receiver import IpcUpdateInfo

    receiver = ipc_receiver(monkeypatch)
    with pytest.raises(ValueError, match=r"no learner rank on GPU GPU-1, ranks are on \['GPU-2'\]"):
        receiver.receive_weights(
            IpcUpdateInfo(names=[], dtype_names=[], shapes=[], ipc_handles={"GPU-2": []}, tensor_sizes=[])
        )
