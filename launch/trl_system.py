"""The model, its engines and ranks, lengths and files: TRL's settings of what runs where.

Part of the rules that ``launch/trl_rules.py`` applies. TRL's processes become learner ranks; its colocated vLLM becomes
colocated engines, its server becomes engines of their own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launch.trl_translation import Translation
from shared.errors import one_line

OWN_DEEPSPEED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
OWN_DEEPSPEED |= {"gradient_clipping", "optimizer", "scheduler", "bf16", "fp16", "steps_per_print"}


def model(t: Translation) -> None:
    """Which model, of which type, with whose tokenizer."""
    extra = t["model_init_kwargs"]
    options: dict[str, Any] = dict(extra) if isinstance(extra, dict) else {}
    path, revision = t.found.model, options.pop("revision", None)
    if path and revision and revision != "main":
        path = f"{path}@{revision}"
        if not re.fullmatch("[0-9a-f]{40}", str(revision)):
            t.differs("revision", f'"{revision}" is no commit: a hub model is pinned by org/name@COMMIT')
    t.keys["model.path"], t.origins["model.path"] = path, "model"
    if t.found.tokenizer and t.found.tokenizer != t.found.model:
        t.keys["model.tokenizer"], t.origins["model.tokenizer"] = t.found.tokenizer, "processing_class"
    kind = options.pop("dtype", None) or options.pop("torch_dtype", None)
    if options.pop("trust_remote_code", False):
        t.put("model.trust_remote_code", True, "model_init_kwargs")
    for name, value in options.items():
        if name not in ("use_cache", "device_map", "low_cpu_mem_usage", "torch_dtype"):
            t.lacks(f"model_init_kwargs.{name}", "dtype and revision alone are taken", value)
    half = t["fp16"] or (t["bf16"] if t["bf16"] is not None else True) or kind in ("bfloat16", "float16")
    if t["fp16"]:
        t.lacks("fp16", "float16 is refused; written as bfloat16")
    if kind not in (None, "float32"):
        text = f"{kind} weights and moments there; here the learner keeps both in float32 and computes in model.dtype"
        t.differs("dtype", text)
    t.put("model.dtype", "bfloat16" if half else "float32", "bf16", "fp16", "model_init_kwargs")


def lengths(t: Translation) -> None:
    """Prompt and completion limits, and the token budget of a micro-batch."""
    longest = t["vllm_max_model_length"] or t["vllm_max_model_len"]
    completion, prompt = t["max_completion_length"], t["max_prompt_length"]
    if completion is None:
        completion = longest - (prompt or 512) if longest and longest > (prompt or 512) else 512
        t.differs(
            "max_completion_length",
            f"without a limit there; here {completion} tokens, which rollout.max_new_tokens sets",
        )
    if prompt is not None:
        t.differs(
            "max_prompt_length", 'cut from the left there; refused here, or left out with data.on_long_prompt = "drop"'
        )
    elif longest and longest > completion:
        prompt = longest - completion
    else:
        prompt = 512
        t.differs(
            "rollout.max_prompt_tokens", "TRL takes prompts of any length; here those over 512 tokens are refused"
        )
    t.put("rollout.max_new_tokens", completion, "max_completion_length")
    t.put("rollout.max_prompt_tokens", prompt, "max_prompt_length", "vllm_max_model_length", "vllm_max_model_len")
    budget = max(1, t["per_device_train_batch_size"]) * (prompt + completion)
    t.put("learner.max_tokens_per_microbatch", budget, why="per_device_train_batch_size of the longest sequences")


def engines(t: Translation) -> None:
    """Where engines live: TRL's colocated vLLM shares GPUs with the learner, its server has its own."""
    width = t["vllm_tensor_parallel_size"] if t["use_vllm"] else 1
    names = ("use_vllm", "vllm_mode", "vllm_tensor_parallel_size")
    t.put("learner.num_ranks", t.processes, why=f"{t.processes} training processes")
    if t["use_cpu"] or t["no_cuda"]:
        return
    vllm: dict[str, Any] = {}
    if t["use_vllm"] and t["vllm_mode"] == "server":
        text = "how the server was started is not in this file: set rollout.num_engines, tensor_parallel_size and rollout.vllm"
        t.differs("vllm_mode", text)
    elif width > 1:
        t.put("rollout.num_engines", max(1, t.processes // width), *names)
        t.put("rollout.tensor_parallel_size", width, "vllm_tensor_parallel_size")
        text = f"colocated engines have one GPU each; those of {width} get GPUs of their own, beside the learner's"
        t.differs("vllm_tensor_parallel_size", text)
    else:
        t.put("rollout.colocate", True, *names)
        t.put("rollout.num_engines", t.processes, *names)
        vllm = {"gpu_memory_utilization": t["vllm_gpu_memory_utilization"]} if t["use_vllm"] else {}
    if t["vllm_model_impl"] != "vllm":
        vllm["model_impl"] = t["vllm_model_impl"]
    t.put("rollout.vllm", vllm, "vllm_gpu_memory_utilization", "vllm_model_impl")


def sharding(t: Translation) -> None:
    """ZeRO's stage, and DeepSpeed's further keys."""
    table = _deepspeed(t)
    stage = re.fullmatch(r"(?:.*/)?zero([123])(?:\.yaml)?", str(t["accelerate_config"]))
    zero = table.pop("zero_optimization", None)
    zero = {k: v for k, v in zero.items() if v != "auto"} if isinstance(zero, dict) else {}
    if stage or "stage" in zero:
        t.put(
            "learner.zero_stage", int(stage.group(1)) if stage else zero.pop("stage"), "deepspeed", "accelerate_config"
        )
    elif t["fsdp"]:
        shards = {True: "full_shard"}.get(t["fsdp"], str(t["fsdp"]))
        t.put("learner.zero_stage", 2 if "grad_op" in shards else 3, "fsdp")
        t.differs("fsdp", "DeepSpeed's ZeRO shards instead")
    elif t.processes > 1:
        t.found.skip(0, "accelerate's own configuration says what is sharded: set learner.zero_stage")
    rest = {k: v for k, v in table.items() if k not in OWN_DEEPSPEED and v != "auto"}
    if rest or zero:
        t.differs("deepspeed", "its further keys pass through as they are; the optimizer stays torch's AdamW")
    t.put("learner.deepspeed", rest | ({"zero_optimization": zero} if zero else {}), "deepspeed")


def _deepspeed(t: Translation) -> dict[str, Any]:
    given = t["deepspeed"]
    if not isinstance(given, str):
        return dict(given or {})
    for path in (Path(given), t.found.path.parent / given):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            return table if isinstance(table, dict) else {}
        except (OSError, ValueError):
            continue
    t.found.skip(0, f"deepspeed = {one_line(given, 60)} is not read: set learner.zero_stage and learner.deepspeed")
    return {}


def files(t: Translation) -> None:
    """The run folder and who is told."""
    if not t.given("output_dir"):
        t.put("run.output_dir", "trainer_output", "output_dir")
    if t["overwrite_output_dir"]:
        t.put("run.resume", "overwrite", "overwrite_output_dir")
    reports = t["report_to"] if isinstance(t["report_to"], list) else [t["report_to"]]
    if {"tensorboard", "all"} & set(reports):
        t.put("run.tensorboard", True, "report_to")
    others = sorted({str(name) for name in reports} - {"tensorboard", "all", "none", "None"})
    if others:
        t.lacks("report_to", "metrics.jsonl in the run folder holds every number")
