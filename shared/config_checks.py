"""Checks of a configuration that involve more than one value: E103, E104, E108, E405, E504.

Everything here is decided before a resource is taken. Each check names the keys, what was found and the nearest
value that works.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from shared.config import Config
from shared.errors import InputError

Refuse = Callable[..., None]


def disagreements(config: Config, origin: str) -> list[InputError]:
    """All problems of ``config``, placed in the file ``origin``."""
    problems: list[InputError] = []

    def refuse(code: str, what: str, key: str, found: object, expected: str, fix: str) -> None:
        problems.append(InputError(code, what, f"{origin}:{key}", str(found), expected, fix))

    def disagree(keys: str, found: object, expected: str, fix: str) -> None:
        refuse("E108", "options disagree", keys, found, expected, fix)

    _sizes(config, refuse, disagree)
    _engines(config, refuse, disagree)
    _sampling(config, disagree)
    _old_logprobs(config, disagree)
    _reference(config, disagree)
    _early_stopping(config, disagree)
    return problems


def warnings(config: Config, origin: str) -> list[str]:
    """Combinations that are allowed and seldom meant, one line each."""
    kl, updates = config.algorithm.kl, config.updates_per_batch
    lines = []
    if kl.coef > 0 and kl.estimator == "k1" and not (kl.corrected or kl.straight_through):
        lines.append(
            f"warning[W110] {origin}:algorithm.kl.estimator: the gradient of k1 in the loss is zero in expectation; use k2 or k3"
        )
    if kl.coef > 0 and kl.reward_coef > 0:
        lines.append(f"warning[W111] {origin}:algorithm.kl: the KL counts twice, in the loss and in the reward")
    if 0 < config.rollout.max_staleness < updates:
        lines.append(
            f"warning[W112] {origin}:rollout.max_staleness: {config.rollout.max_staleness} is below the {updates} updates "
            "per batch, so generation waits for training; set a multiple of them to overlap"
        )
    flight, admitted = config.sequences_in_flight // config.rollout.num_engines, config.max_num_seqs
    if flight > admitted:
        lines.append(
            f"warning[W113] {origin}:rollout.vllm.max_num_seqs: up to {flight} completions are in flight for an engine that "
            f"admits {admitted}, the rest wait in its queue; raise it, or lower rollout.max_staleness or learner.prompts_per_step"
        )
    return lines + _shared_cores(config, origin)


def _shared_cores(config: Config, origin: str) -> list[str]:
    """W505 if two engines are bound to one core."""
    owners: dict[int, list[int]] = {}
    for engine in range(config.rollout.num_engines):
        for core in config.rollout.cores(engine) or ():
            owners.setdefault(core, []).append(engine)
    shared = [core for core, engines in sorted(owners.items()) if len(engines) > 1]
    if not shared:
        return []
    engines = len({engine for core in shared for engine in owners[core]})
    found = f"{engines} engines on core{'s' if len(shared) > 1 else ''} {', '.join(map(str, shared))}"
    return [
        f"warning[W505] engines share cores — {origin}:rollout.cpu_cores. Found {found}, expected separate lists. "
        'Fix: one list per engine separated by "|", or "nobind"'
    ]


def _sizes(c: Config, refuse: Refuse, disagree: Refuse) -> None:
    if c.rollout.group_size < 2 and c.algorithm.advantage.name not in ("reinforce_pp", "batch_mean"):
        fix = "set 8; one completion has no group to compare with"
        refuse("E103", "group too small", "rollout.group_size", c.rollout.group_size, ">= 2", fix)
    sequences, ranks = c.completions_per_step, c.learner.num_ranks
    if sequences % ranks:
        least = ranks // math.gcd(ranks, c.rollout.group_size)
        near = max(1, round(c.learner.prompts_per_step / least)) * least
        expected, fix = f"a multiple of learner.num_ranks = {ranks}", f"learner.prompts_per_step = {near} (nearest)"
        found = f"{c.learner.prompts_per_step} x rollout.group_size = {sequences} completions"
        refuse("E104", "batch does not divide", "learner.prompts_per_step", found, expected, fix)
    updates = c.updates_per_batch
    if c.run.steps % updates:
        near = max(1, round(c.run.steps / updates)) * updates
        expected = f"a multiple of steps_per_batch x epochs_per_batch = {updates}"
        disagree("run.steps, learner.epochs_per_batch", c.run.steps, expected, f"run.steps = {near}")
    budget = c.learner.max_tokens_per_microbatch
    if c.max_model_len > budget:
        key = "learner.max_tokens_per_microbatch"
        expected = f">= max_prompt_tokens + max_new_tokens = {c.max_model_len} (one whole sequence)"
        disagree(key, budget, expected, f"{key} = {c.max_model_len}")


def _engines(c: Config, refuse: Refuse, disagree: Refuse) -> None:
    ranks, workers = c.learner.num_ranks, c.rollout.workers_per_engine
    if c.rollout.colocate and (c.rollout.num_engines != ranks or workers > 1):
        found = f"{c.rollout.num_engines} engines of {workers} GPUs, {ranks} learner ranks"
        keys, fix = "rollout.colocate, rollout.num_engines", f"rollout.num_engines = {ranks}"
        disagree(keys, found, "one engine of one GPU for every learner rank", fix)
    most = c.rollout.max_engines
    if 0 < most < c.rollout.num_engines:
        least = f">= rollout.num_engines = {c.rollout.num_engines}, or 0"
        disagree("rollout.max_engines", most, least, "rollout.max_engines = 0")
    if c.rollout.colocate and (most or c.rollout.weights == "host"):
        key = "max_engines" if most else "weights"
        needed = "engines that stay where the learner is"
        disagree(f"rollout.colocate, rollout.{key}", getattr(c.rollout, key), needed, "drop one of the two")
    if c.model.dtype == "float16":
        expected, fix = "bfloat16 or float32", 'model.dtype = "bfloat16"'
        refuse("E405", "dtype not supported", "model.dtype", "float16", expected, fix)
    lists = c.rollout.cpu_cores.split("|")
    if 1 < len(lists) != c.rollout.num_engines:
        expected, fix = f"one per engine ({c.rollout.num_engines})", 'rollout.cpu_cores = "nobind"'
        disagree("rollout.cpu_cores", f"{len(lists)} lists", expected, fix)
    elif any(cores and len(cores) < workers for cores in map(c.rollout.cores, range(c.rollout.num_engines))):
        expected, fix = f"a core for each of {workers} workers of an engine", 'rollout.cpu_cores = "nobind"'
        disagree("rollout.cpu_cores, rollout.tensor_parallel_size", c.rollout.cpu_cores, expected, fix)
    gib = c.rollout.kv_cache_gib
    if not isinstance(gib, int) or gib < 1:
        refuse("E504", "bad KV size", "rollout.kv_cache_gib", gib, "an integer >= 1", "rollout.kv_cache_gib = 1")


def _sampling(c: Config, disagree: Refuse) -> None:
    truncated = [
        key for key, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)) if getattr(c.rollout, key) != neutral
    ]
    for key in truncated if c.rollout.truncated_sampling == "refuse" else []:
        expected = "the full distribution, which the learner scores"
        fix = 'remove it, or rollout.truncated_sampling = "renormalise"'
        disagree(f"rollout.{key}", getattr(c.rollout, key), expected, fix)
    kl = c.algorithm.kl
    if truncated and "full" in (kl.estimator if kl.coef else "", kl.reward_estimator if kl.reward_coef else ""):
        key = "estimator" if kl.coef and kl.estimator == "full" else "reward_estimator"
        fix = f'algorithm.kl.{key} = "{"k3" if key == "estimator" else "k1"}", or rollout.{truncated[0]} at its default'
        disagree(f"algorithm.kl, rollout.{truncated[0]}", "full with truncated sampling", "one of the two", fix)
    if kl.reward_coef and c.algorithm.combine == "normalize_then_sum":
        keys = "algorithm.combine, algorithm.kl.reward_coef"
        disagree(keys, "normalize_then_sum with KL in the reward", "one of the two", "algorithm.kl.reward_coef = 0.0")
    if c.algorithm.combine == "normalize_then_sum" and c.algorithm.advantage.name != "grpo":
        keys, fix = "algorithm.combine, algorithm.advantage.name", 'algorithm.advantage.name = "grpo"'
        disagree(keys, f"normalize_then_sum with {c.algorithm.advantage.name}", "advantage grpo", fix)
    if kl.reward_coef and c.algorithm.zero_variance != "keep":
        keys, fix = "algorithm.zero_variance, algorithm.kl.reward_coef", 'algorithm.zero_variance = "keep"'
        disagree(keys, c.algorithm.zero_variance, "keep (equal scores with different KL carry signal)", fix)


def _old_logprobs(c: Config, disagree: Refuse) -> None:
    mode, level, key = c.algorithm.old_logprobs, c.algorithm.importance_sampling.level, "algorithm.old_logprobs"
    if mode == "rollout" and level != "none":
        expected, fix = (
            'level "none" (the correction would count twice)',
            'algorithm.importance_sampling.level = "none"',
        )
        disagree(f"{key}, algorithm.importance_sampling.level", f"rollout with {level}", expected, fix)
    if mode == "rollout" and c.algorithm.rejection.name != "none":
        expected, fix = "old log-probs of the learner, to compare with the engine's", f'{key} = "auto"'
        disagree(f"{key}, algorithm.rejection", f"rollout with {c.algorithm.rejection.name}", expected, fix)
    if level == "none" and c.algorithm.importance_sampling.normalise:
        keys = "algorithm.importance_sampling.normalise, algorithm.importance_sampling.level"
        fix = "algorithm.importance_sampling.normalise = false"
        disagree(keys, "normalise without weights", "a level of weights", fix)
    truncates = c.rollout.top_p < 1 or c.rollout.top_k > 0 or c.rollout.min_p > 0
    needs_pass = [
        ("learner.steps_per_batch, learner.epochs_per_batch", c.updates_per_batch > 1 and mode == "current"),
        ("algorithm.kl.reward_coef", c.algorithm.kl.reward_coef > 0 and mode == "current"),
        ("algorithm.top_entropy_quantile", c.algorithm.top_entropy_quantile < 1 and mode in ("current", "rollout")),
        ("algorithm.kl.reward_estimator", _full_in_reward(c) and mode in ("current", "rollout")),
        ("rollout.truncated_sampling", truncates and mode in ("current", "rollout")),
        ("algorithm.importance_sampling.normalise", c.algorithm.importance_sampling.normalise and mode == "current"),
    ]
    for other, wrong in needs_pass:
        if wrong:
            expected = "old log-probs from a pass before the first update"
            disagree(f"{key}, {other}", mode, expected, f'{key} = "auto"')


def _full_in_reward(c: Config) -> bool:
    return c.algorithm.kl.reward_coef > 0 and c.algorithm.kl.reward_estimator == "full"


def _reference(c: Config, disagree: Refuse) -> None:
    kl = c.algorithm.kl
    if c.needs_reference:
        if kl.control.name == "adaptive" and kl.schedule.name != "constant":
            keys, fix = "algorithm.kl.control, algorithm.kl.schedule", 'algorithm.kl.schedule.name = "constant"'
            disagree(keys, f"adaptive with {kl.schedule.name}", "one of the two", fix)
        return
    for key, set_ in (
        ("algorithm.reference_sync_steps", c.algorithm.reference_sync_steps > 0),
        ("algorithm.kl.control", kl.control.name != "fixed"),
        ("algorithm.kl.corrected", kl.corrected),
        ("algorithm.kl.straight_through", kl.straight_through),
    ):
        if set_:
            expected = "a reference, which is there only with a KL coefficient above 0"
            disagree(f"{key}, algorithm.kl.coef", "no reference model", expected, "algorithm.kl.coef = 0.001")


def _early_stopping(c: Config, disagree: Refuse) -> None:
    if c.eval.early_stopping.name in ("none", "best"):
        return
    if c.data.eval is None:
        disagree("eval.early_stopping, data.eval", "no evaluation rows", "data.eval", "set data.eval")
    if not c.eval.every_steps:
        disagree("eval.early_stopping, eval.every_steps", 0, "evaluations during training", "eval.every_steps = 10")
