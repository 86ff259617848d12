"""What TRL's settings mean in Millrace's: one function a theme, each of a few lines, over one ``Translation``.

``launch/import_trl.py`` calls ``translate``. What is merely copied stands in ``launch/data/trl/settings.txt``, sizes and
schedules in ``launch/trl_batches.py``; here is what takes several settings together.
"""

from __future__ import annotations

from typing import Any

from launch.trl_batches import batches, cadence, optimizer, schedule
from launch.trl_settings import settings, trainer_arguments
from launch.trl_system import engines, files, lengths, model, sharding
from launch.trl_translation import Translation

# loss_type -> policy loss (empty: clip or sequence_clip, by importance_sampling_level) and aggregation.
LOSSES = {
    "grpo": ("", "sequence_mean"),
    "bnpo": ("", "token_mean"),
    "dapo": ("", "token_mean"),
    "dr_grpo": ("", "constant"),
    "luspo": ("", "sequence_sum"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
    "vespo": ("vespo", "token_mean"),
}
# Arguments of policy losses, by TRL's name.
SAPO = {"tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg"}
VESPO = {"k_pos": "vespo_k_pos", "lam_pos": "vespo_lambda_pos", "k_neg": "vespo_k_neg", "lam_neg": "vespo_lambda_neg"}
ADAPTIVE = {
    "target": "entropy_target",
    "delta": "entropy_coef_delta",
    "lowest": "entropy_coef_min",
    "highest": "entropy_coef_max",
}
SAMPLING = {"temperature", "top_p", "top_k", "min_p"}
UNBOUNDED = 1e9  # A ratio is at most e^20.


def translate(t: Translation) -> list[str]:
    """Fill ``t``; returns the names of settings without meaning here. Raises ``InputError`` E102, E104 or E108."""
    _generation_arguments(t)
    for row in settings().values():
        if row.fate == "copied" and t[row.name] is not None:
            t.put(row.keys[0], t[row.name], row.name)
    for rule in (model, _data, lengths, _sampling, engines, _rewards, batches, _loss, _advantage, _kl):
        rule(t)
    for rule in (_importance, _entropy, schedule, optimizer, sharding, cadence, files):
        rule(t)
    for name, line in t.found.trainer.items():
        known = trainer_arguments().get(name)
        t.without.append(f"{name} (line {line}): {known.text if known else 'unknown to GRPOTrainer'}")
    return t.account()


def _generation_arguments(t: Translation) -> None:
    """generation_kwargs wins over settings of the same name."""
    extra = t["generation_kwargs"]
    for name, value in dict(extra).items() if isinstance(extra, dict) else ():
        if name in SAMPLING:
            t.found.settings[name] = value
        elif name in ("max_tokens", "max_new_tokens"):
            t.found.settings["max_completion_length"] = value
        elif name in ("stop", "stop_strings"):
            t.put("rollout.stop", [value] if isinstance(value, str) else list(value), "generation_kwargs")
        else:
            t.lacks(f"generation_kwargs.{name}", "the learner could not score what it samples", value)


def _data(t: Translation) -> None:
    train = t.found.train
    t.keys["data.train"], t.origins["data.train"] = train.file if train else None, "train_dataset"


def _sampling(t: Translation) -> None:
    top_k = t["top_k"] if t["top_k"] and t["top_k"] > 0 else 0
    neutral = {"top_p": (t["top_p"], 1.0), "top_k": (top_k, 0), "min_p": (t["min_p"] or 0.0, 0.0)}
    for name, (value, _) in neutral.items():
        t.put(f"rollout.{name}", value, name)
    filtered = [name for name, (value, off) in neutral.items() if value != off]
    if filtered:
        t.put("rollout.truncated_sampling", "renormalise", *filtered)
        text = "the learner applies the same filter to its own distribution; in TRL it scores the whole one"
        t.differs(", ".join(filtered), text)
    if t["use_vllm"] and t.given("vllm_server_timeout") and t["vllm_server_timeout"] > 0:
        t.put("rollout.start_timeout_s", t["vllm_server_timeout"], "vllm_server_timeout")
    t.put("rollout.max_staleness", 0, why="TRL samples and trains in turn")


def _rewards(t: Translation) -> None:
    found, weights = t.found.rewards, t["reward_weights"]
    if weights is not None and len(weights) != len(found):
        expected = f"one for each of {len(found)} reward functions"
        raise t.refuse("E102", "reward_weights", f"{len(weights)} weights", expected, "correct them")
    weighed = [table | ({"weight": float(weights[i])} if weights else {}) for i, table in enumerate(found)]
    t.keys["reward.functions"] = weighed
    if found:
        text = "TRL waits for a reward as long as it takes; here a call that takes longer is ended and repeated"
        t.differs("reward.timeout_s", f"{text} (10 s, unless you set it)")


def _loss(t: Translation) -> None:
    kind, by_row = t["loss_type"], t["importance_sampling_level"] == "sequence"
    if kind not in LOSSES:
        raise t.refuse("E102", "loss_type", kind, f"one of {', '.join(LOSSES)}", 'loss_type = "dapo"')
    high = t["epsilon"] if t["epsilon_high"] is None else t["epsilon_high"]
    name, aggregation = LOSSES[kind]
    names = ["loss_type", "importance_sampling_level", "epsilon", "epsilon_high"]
    loss: dict[str, Any] = {"name": "sequence_clip" if by_row else "clip", "low": t["epsilon"], "high": high}
    if name == "cispo":
        loss = {"name": name, "cap": float(high)}
        if high < 1:
            t.differs(
                "epsilon_high", f"cispo takes it for the cap itself: no token weighs more than {high}; 5.0 is usual"
            )
    elif name:
        arguments = SAPO if name == "sapo" else VESPO
        loss = {"name": name} | {ours: t[theirs] for ours, theirs in arguments.items()}
        names = ["loss_type", *arguments.values()]
    elif t["delta"] is not None:
        if t["delta"] > 1 + high:
            loss["delta"] = t["delta"]
            names.append("delta")
        else:
            t.lacks("delta", f"here it has to be above 1 + {high}; left out")
    if by_row and name in ("cispo", "sapo"):
        t.lacks("importance_sampling_level", f"{name} has one ratio a token")
    if kind == "bnpo" and (t["gradient_accumulation_steps"] > 1 or t.processes > 1):
        t.differs("loss_type", "bnpo is the token mean of each micro-batch; here it is that of the whole step")
    t.put("algorithm.policy_loss", loss, *names)
    chosen = {"name": aggregation} | ({"length": t["max_completion_length"] or 512} if kind == "dr_grpo" else {})
    t.put("algorithm.aggregation", chosen, "loss_type")


def _advantage(t: Translation) -> None:
    scale = {True: "group", False: "none"}.get(t["scale_rewards"], t["scale_rewards"])
    if scale not in ("group", "batch", "none"):
        raise t.refuse("E102", "scale_rewards", scale, "group, batch or none", 'scale_rewards = "group"')
    t.put("algorithm.advantage", {"name": "grpo"} | ({"scale": scale} if scale != "group" else {}), "scale_rewards")


def _kl(t: Translation) -> None:
    if t["beta"] < 0:
        raise t.refuse("E102", "beta", t["beta"], "a number >= 0", "beta = 0.0")
    if not t["beta"]:
        t.put("algorithm.kl", {"coef": 0.0}, "beta")
        if t["sync_ref_model"]:
            raise t.refuse("E108", "sync_ref_model", "beta = 0", "a reference, as TRL wants it too", "set beta")
        return
    corrected = bool(t["use_bias_correction_kl"])
    t.put("algorithm.kl", {"coef": t["beta"], "estimator": "k3", "corrected": corrected}, "beta")
    if corrected and not t.given("use_bias_correction_kl"):
        t.defaults.append(
            "algorithm.kl.corrected = true: TRL's default use_bias_correction_kl = True; Millrace's is false"
        )
    if corrected and t["loss_type"] == "vespo":
        t.differs("use_bias_correction_kl", "with vespo here by the row's ratio, there by the token's")
    if t["sync_ref_model"]:
        if t["ref_model_sync_steps"] % t.updates:
            t.differs(
                "ref_model_sync_steps", f"the reference moves between generated batches, of {t.updates} steps each"
            )
        t.put("algorithm.reference_sync_steps", t["ref_model_sync_steps"], "sync_ref_model", "ref_model_sync_steps")
        t.put("algorithm.reference_sync_alpha", t["ref_model_mixup_alpha"], "ref_model_mixup_alpha")


def _importance(t: Translation) -> None:
    """The correction for what the engines sampled, which TRL makes for vLLM alone."""
    names = [f"vllm_importance_sampling_{name}" for name in ("correction", "mode", "clip_max", "clip_min", "cap")]
    if not t["use_vllm"]:
        text = "TRL samples with the trained weights themselves; vLLM's small mismatch is corrected here, by token, up to 3"
        t.differs("use_vllm", text)
        return
    if not t["vllm_importance_sampling_correction"]:
        t.put("algorithm.importance_sampling", {"level": "none"}, *names)
        return
    level, _, mode = t["vllm_importance_sampling_mode"].partition("_")
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        expected = "token_truncate, token_mask, sequence_truncate or sequence_mask"
        raise t.refuse("E102", names[1], t[names[1]], expected, f'{names[1]} = "sequence_mask"')
    if t["loss_type"] == "vespo" and level == "sequence":
        expected = "token_truncate or token_mask, as TRL wants it too"
        raise t.refuse("E108", names[1], f"{t[names[1]]} with vespo", expected, f'{names[1]} = "token_truncate"')
    cap = t["vllm_importance_sampling_cap"]
    high = t["vllm_importance_sampling_clip_max"] if cap is None else cap
    chosen = {"level": level, "mode": mode, "high": UNBOUNDED if high is None else high}
    if t["vllm_importance_sampling_clip_min"] is not None:
        chosen["low"] = t["vllm_importance_sampling_clip_min"]
    t.put("algorithm.importance_sampling", chosen, *names)


def _entropy(t: Translation) -> None:
    if t["use_adaptive_entropy"]:
        arguments = {ours: t[theirs] for ours, theirs in ADAPTIVE.items()}
        t.put("algorithm.entropy", {"name": "adaptive"} | arguments, "use_adaptive_entropy", *ADAPTIVE.values())
        if t["entropy_coef"] != t["entropy_coef_min"]:
            t.differs("entropy_coef", "the adaptive coefficient starts at its lowest value here")
    elif t["entropy_coef"] > 0:
        t.put("algorithm.entropy", {"name": "bonus", "coef": t["entropy_coef"]}, "entropy_coef")
    elif t["entropy_coef"]:
        t.lacks("entropy_coef", "a bonus is not negative here")
