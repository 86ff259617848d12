"""TRL's sizes and counts in Millrace's units: completions per device become prompts per step, epochs become steps.

Part of the rules that ``rules`` applies. One pass forward in TRL is ``per_device x processes`` completions;
``gradient_accumulation_steps`` passes are one optimizer step, ``steps_per_generation`` passes are one generated batch.
"""

from __future__ import annotations

import math
from typing import Any

from launch.trl.settings import number
from launch.trl.translation import Translation
from shared.errors import InputError

SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes", "num_generations")
CUTS = ("steps_per_generation", "generation_batch_size", "gradient_accumulation_steps")


def batches(t: Translation) -> None:
    """learner.prompts_per_step, steps_per_batch and epochs_per_batch, and run.steps. Raises ``InputError`` E104."""
    group, passes, accumulate = t["num_generations"], t["num_iterations"], t["gradient_accumulation_steps"]
    step, forward = (
        t.processes * accumulate * t["per_device_train_batch_size"],
        t.processes * t["per_device_train_batch_size"],
    )
    together = t["generation_batch_size"] or forward * (t["steps_per_generation"] or accumulate)
    if min(step, together, passes, group) < 1 or together % group or together % forward:
        found = f"{together} completions generated together, {forward} at a time on {t.processes} processes"
        fix = f"num_generations = {group} has to divide them; --processes N says how many processes there are"
        place, expected = (
            f"{t.found.path.name}:num_generations",
            f"a multiple of {group} and of {forward}, as TRL wants it",
        )
        raise InputError("E104", "batch does not divide", place, found, expected, fix)
    prompts, whole = max(1, round(step / group)), together // group
    cut = max(1, round(whole / prompts))
    if together % step or step % group:
        text = f"a step of {step} completions is no whole number of groups or batches of {together}; nearest taken"
        t.differs("steps_per_generation, gradient_accumulation_steps", text)
    t.put("learner.prompts_per_step", prompts, *SIZES)
    t.put("learner.steps_per_batch", cut, *CUTS)
    t.put("learner.epochs_per_batch", passes, "num_iterations")
    _steps(t, whole, cut * passes, together * passes / step)


def _steps(t: Translation, whole: int, updates: int, per_batch: float) -> None:
    """run.steps: max_steps, or epochs of the rows that are known. TRL leaves out rows that fill no generated batch."""
    given, epochs = "max_steps", t["num_train_epochs"]
    if t.rows is not None:
        t.steps_per_epoch = max(1, math.ceil(t.rows // whole * per_batch))
    if t["max_steps"] > 0:
        wanted = t["max_steps"]
    elif t.steps_per_epoch is not None:
        wanted = math.ceil(epochs * t.steps_per_epoch)
        given = f"{epochs:g} epochs of {t.rows} rows, {t.steps_per_epoch} steps each"
    else:
        wanted, given = t.steps, "no number of rows to make epochs of"
        each = f"ROWS // {whole}" + (f" x {per_batch:g}" if per_batch != 1 else "")
        text = f"the number of rows is not known: run.steps should be {epochs:g} x ({each}); --rows N works it out"
        t.differs("num_train_epochs", text)
    t.steps = math.ceil(wanted / updates) * updates
    if t.steps != wanted:
        t.differs("run.steps", f"{wanted} steps become {t.steps}: whole batches")
    t.keys["run.steps"], t.origins["run.steps"] = t.steps, given


def every(t: Translation, value: float) -> int:
    """A count of steps; below 1 it is a share of all of them."""
    return int(value) if value >= 1 else math.ceil(value * t.steps)


def schedule(t: Translation) -> None:
    """learner.schedule, with TRL's warm-up: its first step has rate 0. Raises ``InputError`` E102."""
    name, extra = str(t["lr_scheduler_type"]).lower(), dict(t["lr_scheduler_kwargs"] or {})
    chosen: dict[str, Any] = {"name": name if name in ("linear", "cosine") else "constant"}
    if name == "cosine_with_min_lr":
        least, share = (extra.pop(key, None) for key in ("min_lr", "min_lr_rate"))
        place = f"{t.found.path.name}:lr_scheduler_kwargs.min_lr"
        if least is not None:
            share = number(least, place) / (t["learning_rate"] or 1.0)
        chosen = {"name": "cosine", "final_fraction": number(share or 0.0, f"{place}_rate")}
    elif name not in ("constant", "linear", "cosine", "constant_with_warmup"):
        t.lacks("lr_scheduler_type", "constant, linear and cosine are there; written as constant")
    count = every(t, t["warmup_steps"] or t["warmup_ratio"]) if name != "constant" else 0
    if count:
        chosen |= {"warmup_steps": count, "warmup_from_zero": True}
    for key, given in extra.items():
        t.lacks(f"lr_scheduler_kwargs.{key}", "the schedule has no such argument", given)
    t.put("learner.schedule", chosen, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")


def cadence(t: Translation) -> None:
    """How often to evaluate, to save, and to write completions."""
    strategy = t["eval_strategy"] if t.given("eval_strategy") else t["evaluation_strategy"]
    if t.found.eval and strategy != "no":
        t.keys["data.eval"], t.origins["data.eval"] = t.found.eval, "eval_dataset"
        steps = t["eval_steps"] or t["logging_steps"]
        value = _per_epoch(t, "eval_strategy") if strategy == "epoch" else every(t, steps)
        t.put("eval.every_steps", value, "eval_strategy", "eval_steps")
    elif t.found.eval and t.found.path.suffix == ".py":  # Elsewhere the split has a default name, and may not be there.
        t.differs("eval_dataset", 'never evaluated while eval_strategy is "no": data.eval is left out')
    saving = t["save_strategy"]
    often = 0 if saving == "no" else _per_epoch(t, "save_strategy") if saving == "epoch" else every(t, t["save_steps"])
    t.put("run.checkpoint_every", often, "save_strategy", "save_steps")
    t.put("run.keep_checkpoints", (t["save_total_limit"] or 1000) if saving != "no" else 2, "save_total_limit")
    if t["log_completions"]:
        t.put("run.samples_every", every(t, t["logging_steps"]), "log_completions", "logging_steps")


def _per_epoch(t: Translation, name: str) -> int:
    if t.steps_per_epoch is None:
        t.differs(name, "the number of rows is not known, so an epoch is no number of steps: once, at the end")
    return t.steps_per_epoch or 0
