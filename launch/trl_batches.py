"""TRL's sizes and counts in Millrace's units: completions per device become prompts per step, epochs become steps.

Part of the rules that ``launch/trl_rules.py`` applies. One pass forward in TRL is ``per_device x processes`` completions;
``gradient_accumulation_steps`` passes are one optimizer step, ``steps_per_generation`` passes are one generated batch.
"""

from __future__ import annotations

import math
from typing import Any

from launch.trl_translation import Translation

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
CUTS = ("steps_per_generation", "generation_batch_size", "gradient_accumulation_steps")
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
NEVER = 1e9


def batches(t: Translation) -> None:
    """learner.prompts_per_step, steps_per_batch and epochs_per_batch, and run.steps. Raises ``InputError`` E104, E108."""
    group, passes, accumulate = t["num_generations"], t["num_iterations"], t["gradient_accumulation_steps"]
    if t["per_device_train_batch_size"] * accumulate * group * passes < 1:
        found = f"{t['per_device_train_batch_size']} x {accumulate}, groups of {group}, {passes} iterations"
        raise t.refuse("E102", "per_device_train_batch_size", found, "numbers above 0", "correct them")
    forward = t["per_device_train_batch_size"] * t.processes
    slices = _slices(t, forward)
    if forward * slices % group:
        found = f"{forward * slices} completions generated together on {t.processes} processes"
        fix = f"num_generations = {group} has to divide them; --processes N says how many processes there are"
        raise t.refuse("E104", "num_generations", found, f"a multiple of {group}, as TRL wants it too", fix)
    step, whole = forward * accumulate, forward * slices // group
    if slices % accumulate == 0 and step % group == 0:
        prompts, cut = step // group, slices // accumulate
    elif accumulate % (slices * passes) == 0:
        prompts, cut = step // (group * passes), 1
        if passes > 1:
            text = "the repeated passes fall into one optimizer step there, so they change nothing and are left out"
            t.differs("num_iterations", text)
        passes = 1
    else:
        prompts = max(1, round(step / group))
        cut = max(1, round(whole / prompts))
        text = f"a step of {step} completions is no whole number of groups or batches of {group * whole}; nearest taken"
        t.differs("steps_per_generation, gradient_accumulation_steps", text)
    t.put("learner.prompts_per_step", prompts, *SIZES, "num_generations")
    t.put("learner.steps_per_batch", cut, *CUTS)
    t.put("learner.epochs_per_batch", passes, "num_iterations")
    t.updates = cut * passes
    if cut > 1:
        text = "TRL deals a group's completions over the steps of a batch; here every step holds whole groups"
        t.differs("steps_per_generation", text)
    if slices != accumulate and t["loss_type"] in ("dapo", "cispo", "vespo"):
        t.differs(
            "loss_type", "TRL divides a step by the mean tokens of the whole batch, Millrace by those of the step"
        )
    _steps(t, whole, slices)


def _slices(t: Translation, forward: int) -> int:
    """Passes forward of one generated batch."""
    size, slices = t["generation_batch_size"], t["steps_per_generation"]
    # What TrainingArguments wrote holds both, the one computed from the other.
    if size is not None and slices is not None and size != slices * forward:
        found, expected = f"{size} with steps_per_generation = {slices}", "one of the two"
        raise t.refuse("E108", "generation_batch_size", found, expected, "drop one of the two")
    if slices is not None:
        return int(slices)
    if size is None:
        return int(t["gradient_accumulation_steps"])
    if size % forward or size < forward:
        expected, fix = f"a multiple of {forward}", f"generation_batch_size = {max(1, round(size / forward)) * forward}"
        raise t.refuse("E104", "generation_batch_size", size, expected, fix)
    return int(size // forward)


def _steps(t: Translation, whole: int, slices: int) -> None:
    """run.steps: max_steps, or epochs of the rows that are known. TRL leaves out rows that fill no generated batch."""
    accumulate, epochs = t["gradient_accumulation_steps"], t["num_train_epochs"]
    forwards = slices * t["num_iterations"]
    if t.rows is not None:
        if t.rows < whole:
            expected, fix = f">= {whole}, the prompts of one generated batch", "make the batch smaller"
            raise t.refuse("E104", "train_dataset", f"{t.rows} rows", expected, fix)
        t.steps_per_epoch = max(1, math.ceil(t.rows // whole * forwards / accumulate))
    names: tuple[str, ...]
    if t["max_steps"] > 0:
        wanted, names, why = t["max_steps"], ("max_steps",), ""
    elif t.steps_per_epoch is not None:
        wanted, names = math.ceil(epochs * t.steps_per_epoch), ("num_train_epochs",)
        why = f"{epochs:g} epochs of {t.rows} rows, {t.steps_per_epoch} steps each"
    else:
        wanted, names, why = t.steps, (), "no number of rows to make epochs of"
        each = f"ROWS // {whole}" + (f" x {forwards} / {accumulate}" if forwards != accumulate else "")
        text = f"the number of rows is not known: run.steps should be {epochs:g} x ({each}); --rows N works it out"
        t.differs("num_train_epochs", text)
    t.steps = math.ceil(wanted / t.updates) * t.updates
    if t.steps != wanted:
        t.differs(
            "max_steps" if t["max_steps"] > 0 else "num_train_epochs", f"{wanted} steps become {t.steps}: whole batches"
        )
    t.put("run.steps", t.steps, *names, why=why)
    if why and "run.steps" in t.origins:
        t.origins["run.steps"] = why


def every(t: Translation, value: float) -> int:
    """A count of steps; below 1 it is a share of all of them."""
    return int(value) if value >= 1 else math.ceil(value * t.steps)


def schedule(t: Translation) -> None:
    """learner.schedule, with TRL's warm-up: its first step has rate 0."""
    name, table = str(t["lr_scheduler_type"]).lower().removeprefix("schedulertype."), t["lr_scheduler_kwargs"]
    extra: dict[str, Any] = dict(table) if isinstance(table, dict) else {}
    names = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
    chosen: dict[str, Any] = {"name": name if name in ("constant", "linear", "cosine") else "constant"}
    if name == "cosine_with_min_lr":
        least = extra.pop("min_lr", None)
        share = extra.pop("min_lr_rate", 0.0) if least is None else least / (t["learning_rate"] or 1.0)
        chosen = {"name": "cosine", "final_fraction": float(share)}
    elif name == "cosine_with_restarts" and extra.pop("num_cycles", 1) == 1:
        chosen["name"] = "cosine"
    elif name not in ("constant", "linear", "cosine", "constant_with_warmup"):
        t.lacks("lr_scheduler_type", "constant, linear and cosine are there; written as constant")
    warmup = t["warmup_steps"] or t["warmup_ratio"]
    count = every(t, warmup) if name != "constant" else 0
    if count:
        chosen |= {"warmup_steps": count, "warmup_from_zero": True}
    for key, given in extra.items():
        t.lacks(f"lr_scheduler_kwargs.{key}", "the schedule has no such argument", given)
    t.put("learner.schedule", chosen, *names)


def optimizer(t: Translation) -> None:
    """AdamW's numbers and the limit of the gradient."""
    if str(t["optim"]) not in ADAMW:
        t.lacks("optim", "the optimizer is AdamW with float32 moments")
    t.put("learner.betas", [t["adam_beta1"], t["adam_beta2"]], "adam_beta1", "adam_beta2")
    norm = t["max_grad_norm"]
    t.put("learner.max_grad_norm", norm if norm > 0 else NEVER, "max_grad_norm")
    if t["weight_decay"]:
        t.differs("weight_decay", "TRL leaves out biases and norms; here it acts on every parameter")


def cadence(t: Translation) -> None:
    """How often to evaluate, to save, and to write completions."""
    found = t.found
    strategy = t["eval_strategy"] if t.given("eval_strategy") else t["evaluation_strategy"]
    if found.eval is not None and strategy == "no":
        if found.path.suffix == ".py":  # Elsewhere the split has a default name, and may not be there.
            t.differs("eval_dataset", 'never evaluated while eval_strategy is "no": data.eval is left out')
    elif found.eval is not None:
        t.keys["data.eval"], t.origins["data.eval"] = found.eval.file, "eval_dataset"
        steps = t["eval_steps"] or t["logging_steps"]
        value = _per_epoch(t, "eval_strategy") if strategy == "epoch" else every(t, steps)
        t.put("eval.every_steps", value, "eval_strategy", "eval_steps")
        text = "one greedy completion a row, before the first step and after the last too; TRL samples num_generations"
        t.differs("eval_strategy", text)
    saving = t["save_strategy"]
    if saving == "best":
        t.lacks("save_strategy", "eval.early_stopping keeps the best checkpoint beside the newest")
    often = 0 if saving == "no" else every(t, t["save_steps"])
    often = _per_epoch(t, "save_strategy") if saving == "epoch" else often
    t.put("run.checkpoint_every", often, "save_strategy", "save_steps")
    t.put("run.keep_checkpoints", (t["save_total_limit"] or 1000) if saving != "no" else 2, "save_total_limit")
    if t["log_completions"]:
        t.put("run.samples_every", every(t, t["logging_steps"]), "log_completions", "logging_steps")


def _per_epoch(t: Translation, name: str) -> int:
    if t.steps_per_epoch is None:
        t.differs(name, "the number of rows is not known, so an epoch is no number of steps: once, at the end")
        return 0
    return t.steps_per_epoch
