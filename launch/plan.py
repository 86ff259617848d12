"""``millrace plan CONFIG.toml --devices N``: how to divide devices between engines and learner, before you rent them.

For every way to divide them it prints how long a step takes, how many samples a second come out of it, how long engines
and learner wait, and what for; then the best way, with a picture. How long the parts take is measured here in three
minutes, read from a file (``--timings``), or worked out from a data sheet (``--device``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from launch.hardware import DEVICES, memory_report, timings_of
from launch.options import ConfigOptions, check_number, check_output, guarded
from launch.plan_model import Prediction, as_split, check_devices, predict, shares, splits, staleness_needed
from launch.timings import Timings
from shared.config import Config
from shared.config_loader import config_file, load_config
from shared.errors import InputError

PICTURES = (".png", ".pdf", ".svg")


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _plan, parser())


def parser() -> ConfigOptions:
    """The verb's options."""
    options = ConfigOptions(
        "plan",
        __doc__,
        """
        millrace plan my.toml --devices 8                               # from a profile on this machine, three minutes
        millrace plan my.toml --devices 64 --device h200 --mean-tokens 3000  # from a data sheet
        """,
    )
    options.add_argument("--devices", type=int, required=True, help="GPUs, or cores without them, to share out")
    options.add_argument("--timings", type=Path, help="JSON of timings instead of a profile")
    options.add_argument("--device", choices=list(DEVICES), help="plan for this device by its data sheet")
    options.add_argument("--mean-tokens", type=float, help="with --device: mean length of a completion")
    options.add_argument("--prompt-tokens", type=float, help="with --device: mean length of a prompt")
    options.add_argument("--save", type=Path, help="write the timings to this file")
    options.add_argument("--picture", type=Path, default=Path("plan.png"), help="where to draw")
    options.add_argument("--json", action="store_true", help="print one JSON line last")
    return options


def _plan(arguments: list[str]) -> None:
    options, files, settings = parser().parse_config(arguments)
    config, source = load_config(files, settings), config_file(files[-1])
    _check(options, config, source.name)
    config, timings = _timings(options, config, source)
    if options.save:
        timings.save(options.save)
    ways = splits(config, timings, options.devices)
    best = ways[0]
    needed = staleness_needed(config, timings, best.engines, best.ranks)
    _print(config, timings, ways, needed, options.device)
    draw(config, timings, options.devices, options.picture)
    print(f"picture: {options.picture}", flush=True)
    if options.json:
        rows = [dataclasses.asdict(split) for split in ways]
        print(json.dumps({"best": rows[0], "splits": rows, "staleness_needed": needed}), flush=True)


def _check(options: Any, config: Config, origin: str) -> None:
    """Whatever can be refused before the work. Raises ``InputError`` E102, E108, E501 or E601."""
    fix = "drop one of the two"
    if options.timings and options.device:
        raise InputError("E108", "options disagree", "command line", "--timings with --device", "one of them", fix)
    for option, limit in (("mean", "max_new_tokens"), ("prompt", "max_prompt_tokens")):
        value = getattr(options, f"{option}_tokens")
        if value is not None and not options.device:
            found = f"--{option}-tokens without --device"
            raise InputError("E108", "options disagree", "command line", found, "both", "--device h200")
        check_number(f"--{option}-tokens", value, 1, getattr(config.rollout, limit), f"rollout.{limit}")
    check_devices(config, origin)
    if not shares(config, options.devices):
        width = config.rollout.workers_per_engine
        expected = f"{width} for an engine and a number of ranks that divides {config.completions_per_step} completions"
        place, fix = "command line:--devices", f"--devices {width + 1}"
        raise InputError("E501", "nothing to share out", place, str(options.devices), expected, fix)
    check_output("--save", options.save)
    check_output("--picture", options.picture, PICTURES)


def _timings(options: Any, config: Config, source: Path) -> tuple[Config, Timings]:
    """The configuration with its files found, and what its parts take."""
    if options.timings:
        return config, Timings.load(options.timings)
    from launch.builtin import resolve
    from launch.preflight import prepare
    from launch.profile import profile

    if options.device:
        mean = options.mean_tokens or config.rollout.max_new_tokens / 2
        prompt = options.prompt_tokens or config.rollout.max_prompt_tokens / 2
        device, config = DEVICES[options.device], resolve(config, source.name, make_model=False)
        return config, timings_of(config, device, mean, config.rollout.max_new_tokens, prompt)
    prepared = prepare(config, source.name, source.parent, probing=False)
    stream = prepared.train.stream(config)
    return prepared.config, asyncio.run(profile(prepared.config, stream, source.name))


def _print(config: Config, timings: Timings, ways: list[Prediction], needed: int, device: str | None) -> None:
    print("engines  ranks   step s  samples/s   tokens/s  engines idle  learner idle  waits for")
    for split in sorted(ways, key=lambda p: p.engines):
        mark = "  <- best" if split is ways[0] else ""
        print(
            f"{split.engines:7d}  {split.ranks:5d}  {split.step_s:7.3f}  {split.samples_per_s:9,.1f}  "
            f"{split.tokens_per_s:9,.0f}  {split.engine_idle:12.0%}  {split.learner_idle:12.0%}  {split.bound}{mark}"
        )
    best = ways[0]
    print(
        f"best: rollout.num_engines = {best.engines}, learner.num_ranks = {best.ranks}; max_staleness {needed} gives 95 % "
        f"of what more would (now {config.rollout.max_staleness})"
    )
    if device:
        config = as_split(config, best.engines, best.ranks, best.staleness)
        for line in memory_report(config, DEVICES[device], best.ranks, best.running, timings):
            print(line)


def draw(config: Config, timings: Timings, devices: int, path: Path) -> None:
    """Samples per second over the split, for some bounds of staleness; and who idles under the configured one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ways = sorted(splits(config, timings, devices), key=lambda p: p.engines)
    engines = [p.engines for p in ways]
    figure, (rates, idle) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=120)
    for staleness in sorted({0, 1, 4, config.rollout.max_staleness}):
        values = [predict(config, timings, p.engines, p.ranks, staleness).samples_per_s for p in ways]
        width = 2.5 if staleness == config.rollout.max_staleness else 1.2
        rates.plot(engines, values, "o-", markersize=3, linewidth=width, label=f"max_staleness {staleness}")
    rates.set(xlabel=f"engines, of {devices} devices", ylabel="samples per second", ylim=(0, None))
    rates.legend()
    idle.plot(engines, [100 * p.engine_idle for p in ways], "o-", markersize=3, label="engines")
    idle.plot(engines, [100 * p.learner_idle for p in ways], "o-", markersize=3, label="learner")
    idle.set(xlabel=f"engines, of {devices} devices", ylabel="idle, %", ylim=(0, 100))
    idle.legend()
    for axis in (rates, idle):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
