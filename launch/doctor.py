"""``millrace doctor CONFIG``: try the reward functions before a run, without a model.

The doctor makes completions from your rows: right, wrong, empty, long and broken ones. It gives them to every reward
function of the configuration and prints what it finds: exceptions, a wrong number of values, a value that never changes,
a wrong sign, jumps, slowness. Rewards that want a form which it cannot guess, such as JSON with certain keys, need
completions of yours (``--completions``) or of the model (``--sample``). Nothing is trained and no run folder is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.doctor_rules import ERROR, Finding, Verdict, judge, unequal_scales
from launch.doctor_samples import Sample, canary_samples, samples_for
from launch.gold_rows import rows_without_score
from launch.options import ConfigOptions, check_output, guarded
from launch.score import read_rows
from rollout.reward_loading import isolation_of, reward_name, reward_place
from rollout.reward_worker import RewardWorker
from shared.config import Config
from shared.config_loader import config_file, load_config
from shared.config_reward import Reward, RewardFunction
from shared.errors import InputError, RewardFailed, raise_all, visible
from shared.types import Prompt

ALONE = 12
"""Samples that are also scored each by itself."""
STATE = {"global_step": 0, "epoch": 0, "max_steps": 1, "log_history": []}


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code: 0 clean or warnings, 2 errors."""
    return guarded(arguments, _doctor, parser())


def parser() -> ConfigOptions:
    """The verb's options."""
    examples = """
        millrace doctor my.toml                              # canned completions
        millrace doctor my.toml --completions rows.jsonl     # and yours
        millrace doctor my.toml --sample 4                   # and the model's own
        """
    options = ConfigOptions("doctor", __doc__, examples)
    text = 'also score these: one {"completion": "..."} a line, with "prompt" too if it belongs to one row'
    options.add_argument("--completions", metavar="FILE.jsonl", help=text)
    text = "also let the model answer N prompts, in an engine that is started for it"
    options.add_argument("--sample", type=int, default=0, metavar="N", help=text)
    options.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write every sample with its value to this file"
    )
    return options


def _doctor(arguments: list[str]) -> None:
    from launch.preflight import prepare

    options, files, settings = parser().parse_config(arguments)
    source = config_file(files[-1])
    config = load_config(files, settings)
    check_output("--output", options.output, (".json",), "doctor.json")
    # Of the model only the tokenizer is used, unless it is to answer: then a built-in one has to be trained.
    prepared = prepare(config, source.name, source.parent, probing=False, rehearsal=not options.sample)
    rows = read_rows(Path(options.completions)) if options.completions else []
    prompts, extra = _with_given(prepared.train.prompts, rows)
    if options.sample:
        for number, texts in enumerate(asyncio.run(sample(prepared.config, prompts[: options.sample]))):
            extra.setdefault(number, []).extend(texts)
    verdicts = examine(prepared.config, prompts, extra=extra)
    for verdict in verdicts:
        print(visible(verdict.render()))
    findings = [
        (finding.level != ERROR, verdict.name, finding.text) for verdict in verdicts for finding in verdict.findings
    ]
    _, name, text = min(findings, key=lambda entry: entry[0], default=(False, "", ""))
    print(visible(f"advice: {name} {text}") if findings else "advice: nothing found; the rewards look usable")
    if options.output:
        options.output.write_text(json.dumps([v.as_dict() for v in verdicts], indent=1), encoding="utf-8")
        print(f"every sample with its value: {options.output}")
    _raise_errors(verdicts, prepared.config, source.name)


def _with_given(prompts: list[Prompt], rows: list[dict[str, Any]]) -> tuple[list[Prompt], dict[int, list[str]]]:
    """Return the first prompts and those of ``rows``, and the completions of ``rows`` by number of their prompt.

    A row without a prompt, or with one that is not among ``prompts``, belongs to the first.
    """
    known = {_asked(prompt.text): prompt for prompt in reversed(prompts)}
    shown = prompts[:8]
    given: dict[int, list[str]] = {}
    for row in rows:
        prompt = known.get(_asked(row.get("prompt")), prompts[0])
        if not any(prompt is other for other in shown):
            shown.append(prompt)
        number = next(i for i, other in enumerate(shown) if prompt is other)
        given.setdefault(number, []).append(str(row["completion"]))
    return shown, given


def _asked(prompt: Any) -> str:
    """Return what a prompt, text or messages, asks last."""
    return str(prompt[-1].get("content") if isinstance(prompt, list) and prompt else prompt)


async def sample(config: Config, prompts: list[Prompt]) -> list[list[str]]:
    """Completions of the model itself, one group for each prompt, from a vLLM engine of its own."""
    from rollout.engine import Engine, Sampling

    engine = Engine(config, load_format="safetensors")
    try:
        how = Sampling.training(config, 0)
        groups = await asyncio.gather(*(engine.generate(prompt.token_ids, how, 0) for prompt in prompts))
    finally:
        await engine.close()
    return [[completion.text for completion in group] for group in groups]


def probe(config: Config, origin: str, prompts: list[Prompt]) -> list[str]:
    """The doctor's errors on a few canned samples, as exceptions; its warnings, as lines. Loads no reward model.

    Rows that a built-in reward can never pay are among the warnings.

    Raises ``InputErrors`` with what every call of the run would run into.
    """
    verdicts = examine(config, prompts[:2], small=True)
    _raise_errors(verdicts, config, origin)
    lines = [
        f"warning[W320] {origin}: reward {verdict.name}: {finding.text}"
        for verdict in verdicts
        for finding in verdict.findings
    ]
    return lines + rows_without_score(config, origin, prompts)


def _raise_errors(verdicts: list[Verdict], config: Config, origin: str) -> None:
    problems = []
    for verdict in verdicts:
        for finding in (finding for finding in verdict.findings if finding.level == ERROR):
            key = f"{origin}:reward.functions[{verdict.index}]"
            code, what, place = "E320", f"reward {verdict.name} refused", key
            if finding.code:  # What a call in the run would end with, in the same words.
                code, what = finding.code, finding.rule
                place = f"{reward_place(config.reward.functions[verdict.index])}, {key}"
            problems.append(InputError(code, what, place, finding.text, finding.expected, finding.fix))
    raise_all(problems)


def examine(
    config: Config, prompts: list[Prompt], small: bool = False, extra: dict[int, list[str]] | None = None
) -> list[Verdict]:
    """One verdict per reward function, each run by itself on samples made from ``prompts``; ``extra`` are real ones."""
    verdicts = []
    for index, spec in enumerate(config.reward.functions):
        if small and spec.model is not None:
            continue  # Loading a reward model twice costs more than it finds.
        verdicts.append(_examine(config, index, spec, prompts, small, extra or {}))
    if not small:
        unequal_scales(verdicts, config.reward.functions)
    return verdicts


def _examine(
    config: Config, index: int, spec: RewardFunction, prompts: list[Prompt], small: bool, extra: dict[int, list[str]]
) -> Verdict:
    settings = config.reward.model_copy(update={"functions": [spec]})
    verdict = Verdict(index, reward_name(spec), isolation_of(spec))
    worker = RewardWorker(settings, isolate=True)
    try:
        for number, prompt in enumerate(prompts):
            samples = samples_for(prompt, prompts, spec, small=small or spec.function is None)
            samples += [Sample("given", text) for text in extra.get(number, [])]
            _run(worker, verdict, number, prompt, samples)
            if any(finding.level == ERROR for finding in verdict.findings):
                return verdict
        if not small:
            _repeat(worker, verdict, prompts)
            _watch_for_execution(settings, verdict, prompts[0])
    finally:
        worker.close()
    judge(verdict, spec, config)
    return verdict


def _run(worker: RewardWorker, verdict: Verdict, number: int, prompt: Prompt, samples: list[Sample]) -> None:
    """Score one prompt's samples in one call; if it fails, each alone, to name the culprit."""
    group = (number, prompt, tuple(sample.completion() for sample in samples))
    try:
        scores = worker.score([group], STATE, watch=True)[0]
    except RewardFailed as failure:
        verdict.findings.append(_blame(worker, failure, number, prompt, samples))
        return
    verdict.add(number, samples, scores)


def _blame(worker: RewardWorker, failure: RewardFailed, number: int, prompt: Prompt, samples: list[Sample]) -> Finding:
    if failure.code in ("E302", "E303"):
        return Finding(ERROR, failure.what, str(failure.found), failure.code, failure.expected, failure.fix)
    for sample in samples:
        try:
            worker.score([(number, prompt, (sample.completion(),))], STATE)
        except RewardFailed as alone:
            found = f"{alone.found} on the {sample.kind} completion {sample.text[:40]!r}"
            return Finding(ERROR, alone.what, found, alone.code, alone.expected, alone.fix)
    return Finding(ERROR, failure.what, str(failure.found), failure.code, failure.expected, failure.fix)


def _repeat(worker: RewardWorker, verdict: Verdict, prompts: list[Prompt]) -> None:
    """The same samples again, and in reverse order: the same values must come back."""
    rows = [row for row in verdict.rows if row.prompt == 0]
    completions = [row.sample.completion() for row in rows]
    try:
        again = worker.score([(0, prompts[0], tuple(completions))], STATE)[0].parts[verdict.name]
        turned = worker.score([(0, prompts[0], tuple(completions[::-1]))], STATE)[0].parts[verdict.name][::-1]
        alone = [
            float(worker.score([(0, prompts[0], (completion,))], STATE)[0].parts[verdict.name][0])
            for completion in completions[:ALONE]
        ]
    except RewardFailed as failure:
        verdict.findings.append(Finding(ERROR, "raises at the second call", str(failure.found), failure.code))
        return
    verdict.compare(rows, again.tolist(), turned.tolist(), alone)


def _watch_for_execution(settings: Reward, verdict: Verdict, prompt: Prompt) -> None:
    """Canary completions that try to make a file, in the isolation that the run would use."""
    with tempfile.TemporaryDirectory(prefix="millrace-canary-") as scratch:
        canary = Path(scratch) / "canary"
        worker = RewardWorker(settings)
        for sample in canary_samples(canary):
            with contextlib.suppress(RewardFailed):
                worker.score([(0, prompt, (sample.completion(),))], STATE)
        worker.close()
        if canary.exists() and verdict.isolation != "sandbox":
            said = "executes the text of completions: a canary made a file"
            fix = 'isolation = "sandbox"'
            verdict.findings.append(
                Finding(ERROR, "executes text", said, "E320", "no execution outside a sandbox", fix)
            )


if __name__ == "__main__":
    sys.exit(main())
