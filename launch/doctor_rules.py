"""The doctor's rules: from the values that a reward function gave to canned samples, to findings in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.doctor_samples import Sample, target_length
from rollout.scores import Scores
from shared.config import Config
from shared.config_reward import RewardFunction

ERROR, WARNING = "error", "warning"
HUGE = 1000.0
WARN_S_PER_STEP = 10.0


@dataclass(frozen=True)
class Finding:
    """Something about one reward function that its user should know."""

    level: str
    rule: str
    text: str
    code: str = ""
    expected: str = "a reward that can be learned from"
    fix: str = "correct the function, or accept the finding"


@dataclass(frozen=True)
class Row:
    """One sample with its value; NaN for None."""

    prompt: int
    sample: Sample
    value: float


@dataclass
class Verdict:
    """What the doctor saw of one reward function."""

    index: int
    name: str
    isolation: str
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    """Seconds per completion, of every call."""
    table: str = ""

    def add(self, number: int, samples: list[Sample], scores: Scores) -> None:
        """Take in one prompt's values."""
        values = scores.parts[self.name].tolist()
        self.rows += [Row(number, sample, value) for sample, value in zip(samples, values, strict=True)]
        self.latencies.append(scores.seconds[self.name] / max(len(samples), 1))
        if scores.metrics.pop("changed_input", 0.0) and not any(f.rule == "changes its input" for f in self.findings):
            self.findings.append(
                Finding(WARNING, "changes its input", "changes the lists it is given; they are copies")
            )

    def compare(self, rows: list[Row], again: list[float], turned: list[float], alone: list[float]) -> None:
        """The same samples scored a second time, in reverse order, and each alone (as many as there are)."""
        for rule, values, said in (
            ("not repeatable", again, "gives another value when called again"),
            ("depends on company", turned, "gives another value when the batch is permuted"),
            ("depends on company", alone, "gives another value when the sample comes alone"),
        ):
            for row, value in zip(rows, values, strict=False):
                if not (row.value == value or (math.isnan(row.value) and math.isnan(value))):
                    text = f"{said}: {row.value:g}, then {value:g} for {row.sample.text[:30]!r}"
                    self.findings.append(Finding(WARNING, rule, text))
                    return

    @property
    def values(self) -> np.ndarray:
        """All numbers that came back."""
        given = np.array([row.value for row in self.rows])
        return given[~np.isnan(given)]

    def render(self) -> str:
        """A line of figures and a line for each finding."""
        if not self.rows:
            head = f"{self.name}: no value"
        else:
            none = sum(math.isnan(row.value) for row in self.rows) / len(self.rows)
            shown = (
                f"min {self.values.min():.4g}  mean {self.values.mean():.4g}  max {self.values.max():.4g}  "
                if self.values.size
                else ""
            )
            late = 1e3 * float(np.quantile(self.latencies, 0.95))
            head = f"{self.name}: {'ok' if not self.findings else 'see below'}  {shown}None {none:.0%}  {late:.2f} ms a completion ({self.isolation})"
        return "\n".join(
            [head, *(f"  {f.level}: {f.rule}: {f.text}" for f in self.findings), *([self.table] if self.table else [])]
        )

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        rows = [
            {
                "prompt": r.prompt,
                "kind": r.sample.kind,
                "completion": r.sample.text[:200],
                "value": None if math.isnan(r.value) else r.value,
            }
            for r in self.rows
        ]
        return {
            "name": self.name,
            "isolation": self.isolation,
            "findings": [f.__dict__ for f in self.findings],
            "samples": rows,
        }


def judge(verdict: Verdict, spec: RewardFunction, config: Config) -> None:
    """Apply every rule to the collected values; findings that the user accepted are left out."""
    values = verdict.values
    if not values.size:
        verdict.findings.append(Finding(WARNING, "always None", f"no number on {len(verdict.rows)} samples"))
        verdict.findings = [f for f in verdict.findings if f.level == ERROR or f.rule not in spec.accept]
        return
    _constant(verdict, values)
    _slow(verdict, spec, config)
    _length(verdict, spec)
    _gold(verdict)
    _empty(verdict, values)
    if np.abs(values).max() > HUGE:
        most = values[np.abs(values).argmax()]
        verdict.findings.append(
            Finding(WARNING, "huge", f"reaches {most:g}; without a bound one sample rules its group")
        )
    verdict.findings = [f for f in verdict.findings if f.level == ERROR or f.rule not in spec.accept]


def _constant(verdict: Verdict, values: np.ndarray) -> None:
    if values.min() < values.max():
        return
    if any(row.sample.kind == "given" for row in verdict.rows):
        text = f"is {values[0]:g} on all {values.size} samples, the given ones too: nothing to learn (is completion a message list?)"
    else:
        text = (
            f"is {values[0]:g} on all {values.size} canned samples: nothing to learn (is completion a message list?). If none of "
            "them can have the form that it wants, show it some that do: millrace doctor with --completions FILE.jsonl or --sample 4"
        )
    verdict.findings.append(Finding(WARNING, "constant", text))


def _slow(verdict: Verdict, spec: RewardFunction, config: Config) -> None:
    """Against its own deadline, and as a share of a step."""
    per_completion = float(np.quantile(verdict.latencies, 0.95))
    size, workers = config.rollout.group_size, config.reward.workers
    deadline = spec.timeout_s or config.reward.timeout_s
    per_step = per_completion * config.completions_per_step / workers
    if per_completion * size > deadline / 4:
        text = f"a group of {size} takes {per_completion * size:.2g} s of its {deadline:g} s"
        verdict.findings.append(Finding(WARNING, "slow", text))
    elif per_step > WARN_S_PER_STEP:
        needed = math.ceil(per_completion * config.completions_per_step / WARN_S_PER_STEP)
        text = f"scoring a step takes about {per_step:.0f} s with {workers} workers; {needed} would bring it to {WARN_S_PER_STEP:g} s"
        verdict.findings.append(Finding(WARNING, "slow", text))


def _length(verdict: Verdict, spec: RewardFunction) -> None:
    """Direction against a declared objective; jumps; and, for rewards of length, the table to look at."""
    swept = {len(row.sample.text): row.value for row in verdict.rows if row.sample.kind == "length"}
    lengths = np.array(sorted(n for n, value in swept.items() if not math.isnan(value)))
    if len(lengths) < 3:
        return
    values = np.array([swept[int(n)] for n in lengths])
    target, objective = target_length(spec), spec.objective or {}
    wanted = {
        "target_length": -np.abs(lengths - float(objective.get("value", target))),
        "longer": lengths,
        "shorter": -lengths,
    }
    kind = objective.get("kind")
    if kind in wanted and values.min() != values.max():
        correlation = rank_correlation(wanted[str(kind)], values)
        meant = (
            f"completions approach {objective['value']} characters"
            if kind == "target_length"
            else f"completions get {kind}"
        )
        if correlation < -0.2:
            text = f"falls as {meant}: it will be maximised in the wrong direction. Did you mean -abs(...)?"
            verdict.findings.append(
                Finding(
                    ERROR, "reversed", text, "E320", "a reward that rises with the objective", "return the negative"
                )
            )
        elif correlation < 0.2:
            verdict.findings.append(
                Finding(
                    WARNING, "unrelated", f"does not follow its objective ({kind}): rank correlation {correlation:.2f}"
                )
            )
    inner = int(values.argmin())
    if kind is None and 0 < inner < len(values) - 1 and values[0] > values[inner] < values[-1] and len(set(values)) > 3:
        text = f"is lowest at {lengths[inner]} characters and grows away from it: it drives lengths away. Did you mean -abs(...)?"
        verdict.findings.append(Finding(WARNING, "reversed?", text))
    if len(set(values.tolist())) > 3:
        spread = values.max() - values.min()
        for i in np.flatnonzero((np.diff(lengths) == 1) & (np.abs(np.diff(values)) > spread / 2)):
            text = f"{values[i]:g} at {lengths[i]} characters, {values[i + 1]:g} at {lengths[i + 1]}"
            verdict.findings.append(Finding(WARNING, "jump", text))
            break
    if kind is None and "len" in verdict.name.lower():
        shown = "  ".join(
            f"{n}:{v:.3g}"
            for n, v in zip(lengths[:: max(1, len(lengths) // 8)], values[:: max(1, len(values) // 8)], strict=False)
        )
        verdict.table = f"  reward by length (higher is better; is that the direction you want?): {shown}"


def _gold(verdict: Verdict) -> None:
    """A right answer must not score below a wrong one of the same form."""
    for number in {row.prompt for row in verdict.rows}:
        right = [r.value for r in verdict.rows if r.prompt == number and r.sample.kind == "gold"]
        wrong = [r.value for r in verdict.rows if r.prompt == number and r.sample.kind == "wrong"]
        worse = [(g, w) for g, w in zip(right, wrong, strict=False) if g < w]
        # Forms that differ in length alone are no evidence against rewards that look at length.
        if right and len(worse) == len(right) and "len" not in verdict.name.lower():
            text = f"gives the right answer {worse[0][0]:g} and a wrong one {worse[0][1]:g}"
            fix = "check the comparison, or its sign"
            verdict.findings.append(Finding(ERROR, "gold not best", text, "E320", "gold above wrong", fix))
            return


def _empty(verdict: Verdict, values: np.ndarray) -> None:
    empty = [row.value for row in verdict.rows if row.sample.kind == "empty"]
    if empty and values.min() != values.max() and np.nanmax(empty) >= values.max():
        text = f"an empty completion gets the best value, {values.max():g}: likely to be exploited"
        verdict.findings.append(Finding(WARNING, "best when empty", text))


def unequal_scales(verdicts: list[Verdict], functions: list[RewardFunction]) -> None:
    """With several functions: one whose weighted spread is a hundredth of another's has no say."""
    real = {}
    for verdict in verdicts:  # The very long sample says nothing about usual spreads.
        usual = np.array([row.value for row in verdict.rows if row.sample.kind != "long" and not math.isnan(row.value)])
        if usual.size > 1 and usual.std() > 0:
            real[verdict.name] = abs(functions[verdict.index].weight) * float(usual.std())
    if len(real) < 2 or max(real.values()) <= 100 * min(real.values()):
        return
    smallest, largest = min(real, key=lambda n: real[n]), max(real, key=lambda n: real[n])
    text = f"its weighted spread is {real[smallest]:.2g}, that of {largest} {real[largest]:.2g}: it has no say; consider normalize_then_sum"
    next(v for v in verdicts if v.name == smallest).findings.append(Finding(WARNING, "unequal scale", text))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, with equal values sharing their rank."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        return (ends - (counts - 1) / 2)[inverse]

    ra, rb = ranks(np.asarray(a, dtype=float)), ranks(np.asarray(b, dtype=float))
    if ra.std() == 0 or rb.std() == 0:
        return 0.0
    return float(np.corrcoef(ra, rb)[0, 1])
