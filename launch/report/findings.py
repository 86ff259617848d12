"""What the recorded rows of a run say in words: findings with their numbers and the setting to change.

``millrace report`` shows them beside the verdict on the run's time. Every rule is a function of the rows and the
configuration; it returns at most one finding, and none where its numbers were not recorded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from launch.report.rows import Row, numbers, split_rows
from shared.config import Config

PROBLEM, NOTICE, GOOD = "problem", "notice", "good"
FEWEST = 8
"""Steps below which no trend is told."""


@dataclass(frozen=True)
class Finding:
    """Something about a run that its owner should know."""

    level: str
    """``problem``, ``notice`` or ``good``."""
    title: str
    text: str
    """With the numbers."""
    change: str = ""
    """The settings to change, and how."""


@dataclass(frozen=True)
class Recorded:
    """The rows of a run, and its configuration."""

    steps: list[Row]
    evaluations: list[Row]
    config: Config

    def late(self, name: str) -> float | None:
        """Mean of the last quarter of the steps."""
        return _mean(_quarter(numbers(self.steps, name), last=True))

    def last(self, name: str) -> float:
        """The newest value; 0 if there is none."""
        return (numbers(self.steps, name) or [0.0])[-1]

    def flat(self) -> tuple[float, float]:
        """Late shares of the groups that had only the best reward, and only the worst; a tie is counted in both."""
        return self.late("frac_reward_zero_std/all_best") or 0.0, self.late("frac_reward_zero_std/all_worst") or 0.0


def findings(rows: list[Row], config: Config) -> list[Finding]:
    """All findings on ``rows``, problems first."""
    run = Recorded(*split_rows(rows), config)
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    return sorted(found, key=lambda f: (PROBLEM, NOTICE, GOOD).index(f.level))


def _quarter(values: list[float], last: bool) -> list[float]:
    count = math.ceil(len(values) / 4)
    return values[-count:] if last else values[:count]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


# --- is it learning? ---


def _reward(run: Recorded) -> Finding | None:
    values = numbers(run.steps, "reward")
    if len(values) < FEWEST:
        return None
    first, last = _quarter(values, last=False), _quarter(values, last=True)
    before, after = sum(first) / len(first), sum(last) / len(last)
    noise = 2 * math.hypot(_error(first), _error(last))
    said = f"{before:.3g} over the first {len(first)} steps, {after:.3g} over the last {len(last)} (noise ±{noise:.2g})"
    if after - before > noise:
        return Finding(GOOD, "The reward rose", f"The mean reward was {said}.")
    lr, prompts = run.config.learner.lr, run.config.learner.prompts_per_step
    if before - after > noise:
        change = f"lower learner.lr (now {lr:g}), or raise algorithm.kl.coef (now {run.config.algorithm.kl.coef:g})"
        return Finding(PROBLEM, "The reward fell", f"The mean reward was {said}.", change)
    best, worst = run.flat()
    if best > max(worst, 0.5):
        return None  # Solved: the rule of groups without signal says so.
    change = f"raise learner.lr (now {lr:g}), learner.prompts_per_step (now {prompts}) or run.steps"
    return Finding(PROBLEM, "The reward did not move", f"The mean reward was {said}.", change)


def _evaluation(run: Recorded) -> Finding | None:
    scores = [(row["step"], value) for row in run.evaluations for value in numbers([row], "eval/reward")]
    if len(scores) < 2:
        return None
    (_, first), (end, last) = scores[0], scores[-1]
    step, best = max(scores, key=lambda s: s[1])
    if best - last > 0.1 * max(best - min(score for _, score in scores), 1e-12) and best - last > 0.01 * abs(best):
        text = f"The held-out reward was best at step {step}, {best:.3g}; at step {end} it was {last:.3g}."
        change = "eval.early_stopping = { name = 'patience', ... } keeps the best checkpoint and ends the run in time"
        return Finding(NOTICE, "The best evaluation is not the last", text, change)
    if last > first:
        text = f"The held-out reward went from {first:.3g} to {last:.3g} at step {end}."
        return Finding(GOOD, "Held-out rows improved", text)
    return None


def _signal(run: Recorded) -> Finding | None:
    share = run.late("frac_reward_zero_std")
    if share is None or share <= 0.5:
        return None
    best, worst = run.flat()
    if best == worst > 0.5:
        text = f"In {best:.0%} of the latest groups no completion was better or worse than another; the mean reward is {run.late('reward') or 0:.3g}."
        change = "run millrace doctor: it says whether the reward tells completions apart"
        return Finding(PROBLEM, "All completions have the same reward", text, change)
    text = f"In {share:.0%} of the latest groups all completions had the same reward ({best:.0%} all best, {worst:.0%} all worst)."
    zero, size = run.config.algorithm.zero_variance, run.config.rollout.group_size
    if best > worst:
        change = f"harder rows in data.train; algorithm.zero_variance = 'resample' (now {zero!r}) fills the steps"
        return Finding(NOTICE, "Most prompts are solved: little is left to learn", text, change)
    change = f"easier rows in data.train, a reward that grades, or a larger rollout.group_size (now {size})"
    return Finding(PROBLEM, "Most groups carry no signal", text, change)


def _truncated(run: Recorded) -> Finding | None:
    share, longest = run.late("completions/clipped_ratio"), run.config.rollout.max_new_tokens
    if share is None or share <= 0.2:
        return None
    text = f"{share:.0%} of the latest completions hit the limit of {longest:,} tokens and were cut before their end."
    change = (
        f"raise rollout.max_new_tokens (now {longest}), or set algorithm.truncation_penalty or algorithm.mask_truncated"
    )
    return Finding(PROBLEM if share > 0.5 else NOTICE, "Many completions are truncated", text, change)


# --- is the policy sound? ---


def _kl(run: Recorded) -> Finding | None:
    values = numbers(run.steps, "kl")
    if len(values) < FEWEST:
        return None
    half = sum(values[len(values) // 4 : len(values) // 2]) / max(len(values) // 2 - len(values) // 4, 1)
    late = run.late("kl") or 0.0
    if late <= 0.5 or (late < 5 and late <= 3 * half):
        return None
    kl = run.config.algorithm.kl
    text = f"The KL to the reference is {late:.3g} nats a token over the last quarter, {half:.3g} over the second."
    change = f"raise algorithm.kl.coef (now {kl.coef:g}) or lower learner.lr (now {run.config.learner.lr:g})"
    return Finding(NOTICE, "The KL grows fast", text, change)


def _entropy(run: Recorded) -> Finding | None:
    values = numbers(run.steps, "entropy")
    if len(values) < FEWEST:
        return None
    first, last = sum(values[:3]) / 3, run.late("entropy") or 0.0
    if last >= 0.2 * first:
        return None
    text = f"The entropy of a token fell from {first:.3g} to {last:.3g} nats: completions of a prompt become alike."
    change = "algorithm.entropy = { name = 'bonus', coef = 0.001 }, a larger high in algorithm.policy_loss, or a lower learner.lr"
    return Finding(NOTICE, "The entropy collapses", text, change)


def _staleness(run: Recorded) -> Finding | None:
    bound, late = run.config.rollout.max_staleness, run.late("staleness/mean")
    if not bound or late is None or late < 0.95 * bound:
        return None
    ess = run.late("importance_sampling/ess")
    weighed = "" if ess is None or ess < 0.5 else f" The effective sample size is {ess:.2f} all the same."
    text = f"Groups are {late:.2f} steps old on average, the bound is {bound}: all are begun as early as it allows."
    change = f"if the learner bounds this run, a lower rollout.max_staleness (now {bound}) gives fresher data at the same speed"
    return Finding(NOTICE, "Staleness is at its bound", text + weighed, change)


def _sample_size(run: Recorded) -> Finding | None:
    names = ("importance_sampling/ess", "off_policy/ess")
    shares = [(late, name) for name in names if (late := run.late(name)) is not None]
    if not shares or min(shares)[0] >= 0.5:
        return None
    late, name = min(shares)
    text = f"{name} is {late:.2f}: weighted by how likely the policy finds them now, tokens count as {late:.0%} of their number."
    bound, lr = run.config.rollout.max_staleness, run.config.learner.lr
    change = f"lower rollout.max_staleness (now {bound}) or learner.lr (now {lr:g})"
    return Finding(PROBLEM, "The effective sample size is low", text, change)


def _clipping(run: Recorded) -> Finding | None:
    share = run.late("clip_ratio/region_mean")
    if share is None or share <= 0.2:
        return None
    text = f"{share:.0%} of the latest tokens lie outside the clip range and give no gradient."
    updates, lr = run.config.updates_per_batch, run.config.learner.lr
    change = f"lower learner.lr (now {lr:g}), the updates on one batch (now {updates}) or rollout.max_staleness"
    return Finding(NOTICE, "Many tokens are clipped", text, change)


def _gradient(run: Recorded) -> Finding | None:
    norms, limit = numbers(run.steps, "grad_norm"), run.config.learner.max_grad_norm
    over = sum(norm > limit for norm in norms)
    if len(norms) < FEWEST or over < 0.9 * len(norms):
        return None
    typical = sorted(norms)[len(norms) // 2]
    text = (
        f"The gradient exceeded {limit:g} in {over} of {len(norms)} steps (median {typical:.3g}) and was scaled down."
    )
    change = f"raise learner.max_grad_norm (now {limit:g}) if a step is to keep its size, or leave it: learner.lr then sets the pace"
    return Finding(NOTICE, "Nearly every gradient is scaled down", text, change)


def _canary(run: Recorded) -> Finding | None:
    gaps, limit = numbers(run.steps, "sync/canary_gap"), run.config.canary_tolerance
    if not gaps or max(gaps) <= 0.5 * limit:
        return None
    text = f"On the canary prompt engines and learner differed by up to {max(gaps):.2g} nats; {limit:g} ends the run."
    return Finding(
        NOTICE, "Engines and learner drift apart", text, "model.dtype, or rollout.canary_tolerance if it is meant"
    )


# --- did everything work? ---


def _failed(run: Recorded) -> Finding | None:
    failed, trained = run.last("groups/failed"), run.last("groups/trained") + run.last("groups/filtered")
    if not failed:
        return None
    share = failed / max(failed + trained, 1)
    allowed = run.config.reward.max_failed_groups
    text = f"{failed:,.0f} groups ({share:.1%}) were dropped because they could not be generated or scored; {allowed} end the run."
    timeout = run.config.reward.timeout_s
    change = f"look into failed/ in the run folder and run millrace doctor; reward.timeout_s is {timeout:g}"
    return Finding(PROBLEM if share > 0.01 else NOTICE, "Groups failed", text, change)


def _restarts(run: Recorded) -> Finding | None:
    restarts = max(numbers(run.steps, "engines/restarts"), default=0.0)
    if not restarts:
        return None
    again = run.last("engines/redispatched")
    text = f"Engines were started again {restarts:,.0f} times; {again:,.0f} groups went to another engine."
    change = f"stacks.txt and the logs say why; run.max_restarts is {run.config.run.max_restarts}"
    return Finding(NOTICE, "Engines were restarted", text, change)


def _lost(run: Recorded) -> Finding | None:
    lost, trained = run.last("samples/lost"), run.last("samples/trained") + run.last("samples/filtered")
    if not lost:
        return None
    text = (
        f"{lost:,.0f} completions ({lost / max(lost + trained, 1):.1%}) were lost with a process and generated again."
    )
    return Finding(NOTICE, "Completions were lost", text)


def _refused(run: Recorded) -> Finding | None:
    refused = run.last("groups/step_refused")
    if not refused:
        return None
    text = f"Optimizer steps with a gradient that is not finite were refused; {refused:,.0f} groups went with them."
    change = f"lower learner.lr (now {run.config.learner.lr:g}), or look at failed/step-*.parquet"
    return Finding(PROBLEM, "Steps were refused", text, change)


def _reward_calls(run: Recorded) -> Finding | None:
    names = ("timeouts", "worker_restarts", "retries")
    counts = {name: max(numbers(run.steps, f"reward_pool/{name}"), default=0.0) for name in names}
    if not any(counts.values()):
        return None
    said = ", ".join(f"{count:,.0f} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    reward = run.config.reward
    change = f"millrace doctor; reward.timeout_s (now {reward.timeout_s:g}), reward.retries (now {reward.retries})"
    return Finding(NOTICE, "Calls of the reward failed", f"In the reward workers there were {said}.", change)


def _wasted(run: Recorded) -> Finding | None:
    work = run.late("goodput/work")
    if work is None or work >= 0.5:
        return None
    text = f"{work:.0%} of the tokens sampled lately changed the policy; the others had no advantage, or were masked or replaced."
    change = "data.train with prompts that are sometimes solved, or a larger rollout.group_size"
    return Finding(NOTICE, "Most sampled tokens teach nothing", text, change)


RULES: tuple[Callable[[Recorded], Finding | None], ...] = (
    *(_reward, _evaluation, _signal, _truncated),
    *(_kl, _entropy, _staleness, _sample_size, _clipping, _gradient, _canary),
    *(_failed, _restarts, _lost, _refused, _reward_calls, _wasted),
)
