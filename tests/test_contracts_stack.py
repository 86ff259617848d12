"""What our code calls of vLLM, DeepSpeed, torch and Ray exists there, and takes the arguments that it is given.

The classes that serve on GPUs are among them: vLLM's Python is the same in both wheels, which ``make check-gpu-wheel`` tests.
"""

from __future__ import annotations

import ast
import inspect
import zipfile

import pytest

from tests.contracts import ENGINES, RECEIVERS, problems, resolve, sources
from tests.fakes import make_config
from tests.gpu_wheel import differing, installed, named_files, reached_files

pytestmark = pytest.mark.stack


@pytest.mark.parametrize("path", sources())
def test_every_call_of_a_library_exists_and_binds(path):
    assert problems(path, sources()[path]) == []


def test_every_file_with_a_receiver_is_there_and_uses_it():
    for path, receivers in RECEIVERS.items():
        for name in receivers:
            assert f"{name}." in sources()[path], (path, name)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("await self._llm.beside('m', {})", "AsyncLLM has no beside"),
        ("await self._llm.init_transfer()", "has no init_transfer"),
        ("await self._llm.generate()", "missing a required argument"),
        ("self._llm.collective_rpc('m', keywords={})", "unexpected keyword argument 'keywords'"),
        ("await self._llm.engine_core.pause_scheduler_async(how='keep')", "unexpected keyword argument 'how'"),
        ("from vllm import NoSuchThing", "NoSuchThing"),
        ("from vllm import SamplingParams\nSamplingParams(colour=1)", "colour"),
        ("import deepspeed\ndeepspeed.initialise()", "deepspeed has no initialise"),
        ("import torch\ntorch.distributed.all_reduce()", "missing a required argument"),
        ("print(result.prompt_colours)", "RequestOutput has no prompt_colours"),
    ],
)
def test_a_call_that_a_library_does_not_take_is_found(line, wrong):
    source = "async def f(self, result):\n" + "\n".join(f"    {part}" for part in line.split("\n"))
    assert any(wrong in problem for problem in problems("rollout/engine.py", source))


def test_the_engine_in_this_process_has_no_call_that_vllm_s_has_not():
    """Else ``Engine`` would come to rely on something that is missing on GPUs."""
    theirs, ours = map(resolve, ENGINES)
    core = resolve(RECEIVERS["rollout/engine.py"]["self._llm.engine_core"][0])
    for name, method in inspect.getmembers(ours, inspect.isfunction):
        if not name.startswith("_"):
            there = getattr(theirs, name, None) or getattr(core, name)
            assert inspect.iscoroutinefunction(method) == inspect.iscoroutinefunction(there), name


@pytest.mark.parametrize("name", ["ShmWeightTransferEngine", "ProvedNcclEngine", "ProvedIpcEngine"])
def test_receivers_take_what_vllm_s_worker_gives_them(name):
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    ours = resolve(f"rollout.weight_receiver:{name}")
    assert not inspect.isabstract(ours)
    for method, base in inspect.getmembers(WeightTransferEngine, inspect.isfunction):
        if method != "__init__":
            assert len(inspect.signature(getattr(ours, method)).parameters) == len(inspect.signature(base).parameters)


def test_the_worker_s_own_methods_hide_none_of_vllm_s():
    from vllm.v1.worker.gpu_worker import Worker

    from rollout.weight_receiver import MillraceWorker

    assert not [name for name in vars(MillraceWorker) if not name.startswith("__") and hasattr(Worker, name)]
    assert inspect.signature(Worker.update_weights).parameters.keys() >= {"update_info"}
    for name in ("start_weight_update", "finish_weight_update", "init_weight_transfer_engine"):
        assert callable(getattr(Worker, name))


def test_vllm_s_trainer_calls_nothing_that_our_source_and_our_client_lack():
    """What vLLM's sender does with the client and the weights that ``NcclSender`` gives it."""
    from vllm.distributed.weight_transfer import nccl_engine

    from learner.device_senders import _DrivenByThePool, _PrintedSource

    tree = ast.parse(inspect.getsource(nccl_engine.NCCLTrainerWeightTransferEngine))
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]:
        for name, ours in (("client", _DrivenByThePool), ("source", _PrintedSource)):
            if ast.unparse(call.value).split(".")[-1] == name:
                assert hasattr(ours, call.attr), (name, call.attr)


@pytest.fixture
def on_gpus(monkeypatch):
    """The platform that vLLM's own configuration asks, as one with GPUs."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)


@pytest.mark.parametrize("changes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {}])
def test_arguments_of_an_engine_on_gpus_are_vllm_s_and_workers_are_processes_of_its_own(on_gpus, model_dir, changes):
    from vllm import AsyncEngineArgs
    from vllm.config import ParallelConfig
    from vllm.v1.executor import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from rollout.vllm_setup import engine_arguments

    settings = {"model.path": str(model_dir)} | {f"rollout.{key}": value for key, value in changes.items()}
    given = engine_arguments(make_config(**settings), 0, "dummy")
    arguments = AsyncEngineArgs(**given)
    backend = arguments.distributed_executor_backend
    assert backend == ("mp" if changes else None)
    for key, value in changes.items():
        assert getattr(arguments, key) == value
    if changes:
        # In the placement group of an engine vLLM's own choice would be Ray.
        parallel = ParallelConfig(**changes, distributed_executor_backend=backend, placement_group=object())
        assert parallel.distributed_executor_backend == "mp"
        assert parallel.world_size == 2
        assert Executor.get_class(type("Config", (), {"parallel_config": parallel})) is MultiprocExecutor
        assert MultiprocExecutor.supports_pp


def test_float32_stays_float32_in_triton_s_products():
    """Triton's default, TF32, differs from the learner by more than the canary allows."""
    import triton.knobs

    from rollout.vllm_setup import engine_environment

    assert engine_environment(make_config())["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" in inspect.getsource(triton.knobs)


def test_the_memory_for_keys_of_an_engine_on_cpus_is_shared_out_to_its_workers(model_dir):
    from rollout.vllm_setup import engine_arguments

    settings = {"model.path": str(model_dir), "rollout.kv_cache_gib": 2, "rollout.tensor_parallel_size": 2}
    arguments = engine_arguments(make_config(**settings), 0, "dummy")
    assert arguments["kv_cache_memory_bytes"] == 1 << 30
    assert arguments["distributed_executor_backend"] == "mp"


@pytest.mark.slow
def test_a_file_of_the_cuda_wheel_that_differs_is_found(tmp_path):
    site, files = installed(), {"vllm/v1/engine/async_llm.py", "vllm/_version.py", "vllm/version.py"}
    assert files <= reached_files(site)
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for file in files - {"vllm/version.py"}:
            wheel.writestr(file, (site / file).read_bytes() + b"#" * file.count("_version"))
        assert differing(wheel, site, files) == ["vllm/version.py"]
        wheel.writestr("vllm/version.py", "something else")
        assert differing(wheel, site, files) == ["vllm/version.py"]
        assert "vllm/v1/engine/async_llm.py" in named_files(site)
