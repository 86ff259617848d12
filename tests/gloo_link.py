"""A device link without GPUs: the product's engines over AsyncLLM and its NCCL sender, with gloo in the place of NCCL.

``GlooEngine`` and ``GlooLearner`` take the places of ``Engine`` and ``Learner`` in their processes. All that is not NCCL's own is the
product's or vLLM's: packing, rounds, ranks, fingerprints. As NCCL, the communicator knows no timeout: a broadcast in which
somebody is missing never ends.
"""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from learner.learner import Learner
from rollout.engine import Engine


class Communicator:
    """PyNccl's interface over gloo; it meets in the same store."""

    def __init__(self, group: Any, device: Any) -> None:
        store = dist.PrefixStore("gloo", group.store)
        self.gloo = dist.ProcessGroupGloo(store, group.rank, group.world_size, timedelta(hours=1))

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        try:
            self.gloo.broadcast([tensor], options).wait()
        except RuntimeError as error:
            print(f"broadcast: {error}", flush=True)
            time.sleep(1e9)  # A kernel of NCCL would spin.

    def destroy(self) -> None:
        self.gloo = None


def install() -> None:
    """Let vLLM's NCCL engine run without NCCL and streams in this process."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    pynccl.PyNcclCommunicator = Communicator
    stream = SimpleNamespace(synchronize=lambda: None)
    packed_tensor._get_streams = lambda _, number: (stream,) * number
    packed_tensor.torch = SimpleNamespace(**vars(torch) | {"cuda": SimpleNamespace(stream=lambda _: torch.no_grad())})
    torch.accelerator.current_device_index = lambda: 0


def start_async(config: Any, index: int, load_format: str) -> Any:
    """vLLM behind AsyncLLM, as on a GPU, with processes of its own."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from rollout.vllm_setup import engine_arguments
    from shared.weights import NCCL_BACKEND

    arguments = engine_arguments(config, index, load_format)
    arguments["weight_transfer_config"] = WeightTransferConfig(backend=NCCL_BACKEND)
    arguments["worker_extension_cls"] = "tests.gloo_link.Worker"
    if config.rollout.workers_per_engine > 1:
        arguments["distributed_executor_backend"] = "mp"
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)


def __getattr__(name: str) -> Any:
    """``Worker``, for vLLM's worker processes alone: it loads what only they need."""
    if name != "Worker":
        raise AttributeError(name)
    from rollout.weight_receiver import MillraceWorker

    install()
    return MillraceWorker


class GlooEngine(Engine):
    """An engine of which vLLM runs in processes of its own and takes weights from a link."""

    def __init__(self, *arguments: Any) -> None:
        from rollout import engine

        engine.start_vllm = start_async
        super().__init__(*arguments)

    def arm(self, value: str) -> None:
        """Arm fault points in this process."""
        from shared import faults

        faults.point = faults.Armed(faults.parse(value)).point


class GlooLearner(Learner):
    """A rank that sends over a link."""

    def open_sender(self, run_id: str) -> None:
        from learner.device_senders import NcclSender

        install()
        self._sender = NcclSender(self.engine, self.rank == 0)
