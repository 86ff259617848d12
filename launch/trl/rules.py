"""What TRL's settings mean in Millrace's: one function a theme, each of a few lines, over one ``Translation``.

``launch/import_trl.py`` calls ``translate``. What is merely copied, or said, stands in ``settings.txt``; batches, steps and
schedules in ``sizes``; here is what takes several settings together. Values that TRL refuses are not looked for: the
configuration that comes out is checked as any other.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launch.trl.settings import settings, trainer_arguments
from launch.trl.sizes import batches, cadence, schedule
from launch.trl.translation import Translation
from shared.errors import InputError, one_line

# loss_type -> policy loss (clip: sequence_clip, by importance_sampling_level) and aggregation.
LOSSES = {
    "grpo": ("clip", "sequence_mean"),
    "bnpo": ("clip", "chunk_token_mean"),
    "dapo": ("clip", "token_mean"),
    "dr_grpo": ("clip", "constant"),
    "luspo": ("clip", "sequence_sum"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
    "vespo": ("vespo", "token_mean"),
}
# Arguments of policy losses and of the entropy, by TRL's name.
ARGUMENTS = {
    "clip": {"low": "epsilon", "high": "epsilon_high", "delta": "delta"},
    "cispo": {"cap": "epsilon_high"},
    "sapo": {"tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg"},
    "vespo": {
        f"{ours}_{sign}": f"vespo_{theirs}_{sign}"
        for ours, theirs in (("k", "k"), ("lam", "lambda"))
        for sign in ("pos", "neg")
    },
}
ADAPTIVE = {"target": "target", "delta": "coef_delta", "lowest": "coef_min", "highest": "coef_max"}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
NEVER = 1e9
"""Above every ratio and norm."""
SINKS = ("tensorboard", "wandb", "trackio")


def translate(t: Translation) -> None:
    """Fill ``t``. Raises ``InputError`` E102, E104 or E105."""
    for row in settings().values():
        if row.fate == "copied" and t[row.name] is not None:
            t.put(row.keys[0], t[row.name], row.name)
    for rule in (_model, _lengths, _sampling, _engines, _rewards, batches, _loss, _reference, _importance, schedule):
        rule(t)
    for rule in (_optimizer, _sharding, cadence, _files):
        rule(t)
    for name, line in t.found.trainer.items():
        known = trainer_arguments().get(name)
        t.without.append(f"{name} (line {line}): {known.text if known else 'unknown to GRPOTrainer'}")
    t.account()


def _model(t: Translation) -> None:
    options: dict[str, Any] = {"dtype": None, "revision": "main"} | dict(t["model_init_kwargs"] or {})
    revision, older, kind = options.pop("revision"), options.pop("torch_dtype", None), options.pop("dtype")
    t.keys["model.path"] = f"{t.found.model}@{revision}" if t.found.model and revision != "main" else t.found.model
    for name, value in options.items():
        if name not in ("use_cache", "device_map", "low_cpu_mem_usage"):
            t.lacks(f"model_init_kwargs.{name}", "dtype and revision alone are taken", value)
    half = t["fp16"] or t["bf16"] in (None, True) or (kind or older) in ("bfloat16", "float16")
    t.put("model.dtype", "bfloat16" if half else "float32", "bf16", "fp16", "model_init_kwargs")


def _lengths(t: Translation) -> None:
    """Prompt and completion limits, and the token budget of a micro-batch."""
    longest = t["vllm_max_model_length"] or t["vllm_max_model_len"] or 0
    completion, prompt = t["max_completion_length"], t["max_prompt_length"]
    if completion is None:
        completion = max(longest - (prompt or 512), 512)
    if prompt is None and longest > completion:
        prompt = longest - completion
    elif prompt is None:
        prompt = 512
        text = "TRL takes prompts of any length; here those over 512 tokens are refused"
        t.differs("rollout.max_prompt_tokens", text)
    t.put("rollout.max_new_tokens", completion, "max_completion_length")
    t.put("rollout.max_prompt_tokens", prompt, "max_prompt_length", "vllm_max_model_length", "vllm_max_model_len")
    budget = max(1, t["per_device_train_batch_size"]) * (prompt + completion)
    t.put("learner.max_tokens_per_microbatch", budget, why="per_device_train_batch_size of the longest sequences")


def _sampling(t: Translation) -> None:
    values = {"top_p": t["top_p"], "top_k": max(t["top_k"] or 0, 0), "min_p": t["min_p"] or 0.0}
    for name, value in values.items():
        t.put(f"rollout.{name}", value, name)
    if list(values.values()) != [1.0, 0, 0.0]:
        t.put("rollout.truncated_sampling", "renormalise", *values)
    t.put("rollout.max_staleness", 0, why="TRL samples and trains in turn")


def _engines(t: Translation) -> None:
    """TRL's processes become learner ranks; its colocated vLLM colocated engines, its server engines of their own."""
    width = t["vllm_tensor_parallel_size"] if t["use_vllm"] else 1
    names = ("use_vllm", "vllm_mode", "vllm_tensor_parallel_size")
    t.put("learner.num_ranks", t.processes, why=f"{t.processes} training processes")
    if t["use_cpu"] or t["no_cuda"] or (t["use_vllm"] and t["vllm_mode"] == "server"):
        return
    if width > 1:
        t.put("rollout.tensor_parallel_size", width, "vllm_tensor_parallel_size")
    else:
        t.put("rollout.colocate", True, *names)
        vllm = {"gpu_memory_utilization": t["vllm_gpu_memory_utilization"]} if t["use_vllm"] else {}
        t.put("rollout.vllm", vllm, "vllm_gpu_memory_utilization")
    t.put("rollout.num_engines", max(1, t.processes // width), *names)


def _rewards(t: Translation) -> None:
    weights = [{"weight": weight} for weight in t["reward_weights"] or []]
    missing = len(t.found.rewards) - len(weights)
    t.keys["reward.functions"] = [table | more for table, more in zip(t.found.rewards, weights + [{}] * missing)]
    text = "TRL waits for a reward as long as it takes; here a call that takes longer is ended and repeated"
    t.differs("reward.timeout_s", f"{text} (10 s, unless you set it)")


def _loss(t: Translation) -> None:
    """The policy loss, how it is averaged, the scale of the advantages, and the entropy bonus."""
    kind, level = t["loss_type"], t["importance_sampling_level"]
    name, _ = LOSSES.get(kind, (kind, "token_mean"))
    arguments = ARGUMENTS.get(name, {})
    high = t["epsilon"] if t["epsilon_high"] is None else t["epsilon_high"]
    loss = {ours: high if theirs == "epsilon_high" else t[theirs] for ours, theirs in arguments.items()}
    if loss.get("delta", 0) is None:
        del loss["delta"]
    if level not in ("token", "sequence"):
        t.lacks("importance_sampling_level", "token and sequence are there; written as token")
    if level == "sequence" and name in ("cispo", "sapo"):
        loss["unit"] = "sequence"
    chosen = {"name": "sequence_clip" if level == "sequence" and name == "clip" else name} | loss
    t.put("algorithm.policy_loss", chosen, "loss_type", "importance_sampling_level", *arguments.values())
    _aggregation(t)
    scale = {True: "group", False: "none"}.get(t["scale_rewards"], t["scale_rewards"])
    t.put("algorithm.advantage", {"name": "grpo"} | ({"scale": scale} if scale != "group" else {}), "scale_rewards")
    if t["use_adaptive_entropy"]:
        given = {ours: t[f"entropy_{theirs}"] for ours, theirs in ADAPTIVE.items()}
        t.put("algorithm.entropy", {"name": "adaptive"} | given, "use_adaptive_entropy")
    elif t["entropy_coef"]:
        t.put("algorithm.entropy", {"name": "bonus", "coef": t["entropy_coef"]}, "entropy_coef")


def _aggregation(t: Translation) -> None:
    """What the loss is divided by: the step's, the generated batch's or each micro-batch's tokens or sequences."""
    kind, cut = t["loss_type"], t.keys.get("learner.steps_per_batch", 1)
    _, name = LOSSES.get(kind, (kind, "token_mean"))
    if name == "token_mean" and cut > 1:  # There the tokens of the whole generated batch, divided by its steps.
        name = "batch_token_mean"
    arguments = {}
    if name == "constant":
        arguments = {"length": t["max_completion_length"] or 512}
    if name == "chunk_token_mean":
        arguments = {"sequences": max(1, t["per_device_train_batch_size"])}
        t.differs("loss_type", "bnpo averages micro-batches of shuffled sequences; here a chunk holds neighbours")
    t.put("algorithm.aggregation", {"name": name} | arguments, "loss_type")
    if t["mask_truncated_completions"] and name in ("token_mean", "batch_token_mean"):
        text = "TRL's number of tokens includes those of masked completions; here it does not"
        t.differs("mask_truncated_completions", text)


def _reference(t: Translation) -> None:
    if not t["beta"]:
        t.put("algorithm.kl", {"coef": 0.0}, "beta")
    else:
        corrected: bool | str = bool(t["use_bias_correction_kl"])
        if corrected and t["loss_type"] == "vespo" and t["importance_sampling_level"] == "sequence":
            corrected = "sequence"  # The level moves vespo's KL alone.
        kl = {"coef": t["beta"], "estimator": "k3", "corrected": corrected}
        t.put("algorithm.kl", kl, "beta", "use_bias_correction_kl")
    if t["sync_ref_model"]:
        t.put("algorithm.reference_sync_steps", t["ref_model_sync_steps"], "sync_ref_model", "ref_model_sync_steps")
        t.put("algorithm.reference_sync_alpha", t["ref_model_mixup_alpha"], "ref_model_mixup_alpha")


def _importance(t: Translation) -> None:
    """The correction for what the engines sampled, which TRL makes for vLLM alone."""
    mode, on, highest, low, cap = names = [
        f"vllm_importance_sampling_{name}" for name in ("mode", "correction", "clip_max", "clip_min", "cap")
    ]
    if not t["use_vllm"]:
        text = "TRL samples with the trained weights themselves; vLLM's small mismatch is corrected here, by token, up to 3"
        t.differs("use_vllm", text)
    elif not t[on]:
        t.put("algorithm.importance_sampling", {"level": "none"}, *names)
    else:
        level, _, kind = t[mode].partition("_")
        most = t[highest] if t[cap] is None else t[cap]
        chosen = {"level": level, "mode": kind, "high": NEVER if most is None else most}
        t.put("algorithm.importance_sampling", chosen | ({} if t[low] is None else {"low": t[low]}), *names)


def _optimizer(t: Translation) -> None:
    if str(t["optim"]) not in ADAMW:
        t.lacks("optim", "the optimizer is AdamW with float32 moments")
    t.put("learner.betas", [t["adam_beta1"], t["adam_beta2"]], "adam_beta1", "adam_beta2")
    t.put("learner.max_grad_norm", t["max_grad_norm"] or NEVER, "max_grad_norm")


def _sharding(t: Translation) -> None:
    """ZeRO's stage: in DeepSpeed's own table or file, or in the name of one of TRL's configurations of accelerate.

    Raises ``InputError`` E105.
    """
    given, stage = t["deepspeed"], re.search(r"zero([123])", str(t["accelerate_config"]))
    if isinstance(given, str):
        given = _deepspeed(t, given)
    if isinstance(given, dict):
        zero = given.get("zero_optimization")
        t.put("learner.zero_stage", zero.get("stage", 0) if isinstance(zero, dict) else 0, "deepspeed")
    elif stage:
        t.put("learner.zero_stage", int(stage[1]), "accelerate_config")
    elif given or t.processes > 1:
        t.found.skip(0, "what DeepSpeed or accelerate shard is in a file of theirs: set learner.zero_stage")


def _deepspeed(t: Translation, given: str) -> Any:
    """What the setting ``deepspeed`` says in JSON, or a file of it that is there; else the setting itself."""
    try:
        if given.startswith("{"):
            return json.loads(given)
        return json.loads(Path(given).read_text(encoding="utf-8")) if Path(given).is_file() else given
    except (OSError, ValueError, RecursionError) as error:
        place = f"{t.found.path.name}:deepspeed"
        found, fix = (
            f"{one_line(given, 40)}: {one_line(error)}",
            "correct it, or leave it out and set learner.zero_stage",
        )
        raise InputError("E105", "cannot parse DeepSpeed's configuration", place, found, "valid JSON", fix) from None


def _files(t: Translation) -> None:
    """The run folder and who is told."""
    if not t.given("output_dir"):
        t.put("run.output_dir", "trainer_output", "output_dir")
    told = t["report_to"] if isinstance(t["report_to"], list) else [t["report_to"]]
    t.put("run.sinks", [name for name in told if name in SINKS], "report_to")
    if set(map(str, told)) - {*SINKS, "none", "None"}:
        t.lacks("report_to", "metrics.jsonl in the run folder holds every number")
