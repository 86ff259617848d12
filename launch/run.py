"""The entry point: ``python launch/run.py CONFIG.toml [--section.field value ...]``, also as ``millrace train``.

Reads and checks the configuration, prepares model and data, connects to the cluster, builds the three pools and
hands them to the controller. Exit code 0 on success, 2 for wrong input, 128 + N after signal N, 1 for anything else. Heavy libraries are
imported late, so that ``--help`` and a mistyped key answer at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python puts launch/ on the path, where the packages beside it are not found.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.interrupts import Interrupted, cancelling, story
from launch.options import ConfigOptions, guarded
from shared.config import Config
from shared.config_loader import config_file, load_config
from shared.errors import InputError, visible

if TYPE_CHECKING:
    from launch.controller import Controller
    from launch.display import Screen
    from launch.parts import Parts
    from launch.preflight import Prepared
    from launch.resume import Point
    from launch.run_folder import RunFolder
    from rollout.prompts import PromptStream


DEVICES = ("a100-80", "h100-80", "h200", "b200", "l40s")
"""Data sheets of ``hardware.DEVICES``, which imports too much for the options."""


def main(arguments: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    return guarded(arguments, _train_command, parser())


def resume(arguments: list[str] | None = None) -> int:
    """``millrace resume RUN``: go on with a run, as its own folder says it was; returns the exit code."""
    return guarded(arguments, _resume_command, resume_parser())


def parser() -> ConfigOptions:
    """Options of ``millrace train``."""
    examples = """
        millrace train quickstart                                  # two-digit addition on two cores, a minute
        millrace train my.toml --learner.lr 2e-6 --run.steps 500   # any setting
        millrace train my.toml --dry-run                           # check everything, start nothing
        millrace train --help learning_rate                        # settings with a word in name or meaning
        ray job submit --working-dir . -- python launch/run.py my.toml
        """
    text = """
millrace train CONFIG: train a model with the settings of one or several TOML files.

Everything is checked first: settings, model, rows, rewards, memory. Whatever is wrong is one line with its fix. The run
then writes all that it does into the folder run.output_dir. Give the same command again after an interruption, and the
run continues from its newest checkpoint. Exit codes: 0 for success, 2 for wrong input, 1 for anything else.
"""
    options = ConfigOptions("train", text.strip(), examples)
    _common(options)
    return options


def resume_parser() -> ConfigOptions:
    """Options of ``millrace resume``."""
    text = """
millrace resume RUN: continue a run from its newest good checkpoint.

RUN is the folder of the run. The settings are those that lie there; --section.field VALUE changes one, such as run.steps.
"""
    examples = "millrace resume runs/my --run.steps 1000"
    options = ConfigOptions("resume", text.strip(), examples, takes=("RUN", "the folder of a run"))
    _common(options)
    return options


def _common(options: ConfigOptions) -> None:
    text = "check everything, show settings, placement and memory, and start no part of a run; reward functions are tried on a "
    text += "few made-up samples, so a reward service is sent them"
    options.add_argument("--dry-run", action="store_true", help=text)
    text = "with --dry-run: plan for GPUs of this data sheet, which need not be here"
    options.add_argument("--device", choices=DEVICES, default="", help=text)
    text = "run.trace = true: keep the whole timeline of all processes, for Perfetto (ledger/trace.json)"
    options.add_argument("--trace", action="store_true", help=text)


def _train_command(arguments: list[str]) -> None:
    options, files, settings = parser().parse_config(arguments)
    train(
        load_config(files, _traced(options, settings)),
        config_file(files[-1]),
        dry_run=options.dry_run,
        device=options.device,
    )


def _resume_command(arguments: list[str]) -> None:
    options, folders, settings = resume_parser().parse_config(arguments)
    folder = Path(folders[0]).absolute()
    if not (folder / "config.toml").is_file():
        fix = "check the path"
        raise InputError("E603", "nothing to resume", folders[0], "no config.toml", "the folder of a run", fix)
    here = {"run.output_dir": str(folder), "run.resume": "auto"}
    file, settings = folder / "config.toml", _traced(options, here | settings)
    train(load_config([str(file)], settings), file, dry_run=options.dry_run, device=options.device)


def _traced(options: Any, settings: dict[str, str]) -> dict[str, str]:
    return settings | {"run.trace": "true"} if options.trace else settings


def train(config: Config, source: Path, dry_run: bool = False, device: str = "") -> None:
    """Check everything, then run the whole loop; ``source`` names the configuration in messages.

    A ``dry_run`` starts nothing, and plans for GPUs of the data sheet ``device`` if one is named.
    """
    if device and not dry_run:
        fix = "add --dry-run, or leave it out"
        raise InputError("E102", "device without a dry run", "--device", device, "a dry run", fix)
    if dry_run:
        from launch.dry_run import dry_run as rehearse

        session = prepare_session(config, source, rehearsal=True)
        if session is not None:
            rehearse(session.prepared.config, source.name, session.output, session.point, device)
        return
    session = prepare_session(config, source)
    if session is not None:
        asyncio.run(session.run())


def prepare_session(
    config: Config, source: Path, screen: Screen | None = None, rehearsal: bool = False
) -> Session | None:
    """Everything that can be checked before an actor exists; None if the run is complete already.

    ``screen`` is told of the progress in place of the terminal; a ``rehearsal`` makes no model and tells no phases.
    """
    from launch.dry_run import check_room, contents
    from launch.preflight import prepare
    from launch.replaced import length_of
    from launch.resume import dated, find, undo_unfinished
    from launch.run_folder import resolve_output

    began = time.monotonic()
    if not rehearsal:
        print(f"checking {source.name}: settings, model, data and rewards", flush=True)
    output = resolve_output(config.run.output_dir)
    undo_unfinished(output)
    config = dated(config, output)
    prepared = prepare(config, source.name, source.parent, rehearsal=rehearsal)
    stream = prepared.train.stream(config)
    point = find(prepared.config, output, stream, source.name)
    if not rehearsal:  # A dry run tells it after placement and memory.
        check_room(prepared.config, output, source.name)
    for warning in prepared.warnings:
        print(visible(warning), flush=True)
    if config.run.resume == "overwrite" and (length := length_of(output)):
        print(f'replaces a {length} in {output}, once it has a checkpoint (run.resume = "overwrite")', flush=True)
    evaluated = point is not None and (not prepared.held_out or point.state["evaluated"] == point.version)
    if point is not None and point.version >= config.run.steps and evaluated:
        print(f"{output}: complete at step {point.version}; raise run.steps to go on", flush=True)
        return None
    if not rehearsal:
        print(contents(prepared), flush=True)
    return Session(prepared, source.name, output, stream, point, began, screen)


@dataclass
class Session:
    """A checked configuration on its way through Ray: the parts live as long, the controllers one after the other."""

    prepared: Prepared
    origin: str
    output: Path
    stream: PromptStream
    point: Point | None
    """Where to go on from; None: at the beginning."""
    began: float
    """When the start began, on the monotonic clock."""
    screen: Screen | None = None
    name: Any = None
    """Held on the cluster, so that no other run takes it."""
    folder: RunFolder | None = None
    controller: Controller | None = None
    """The newest one; None before training."""

    async def run(self) -> None:
        """Start the parts and train. Raises ``Interrupted`` when a signal ends the run; what was learned is saved first."""
        task = asyncio.current_task()
        assert task is not None
        with cancelling(task) as caught:
            try:
                await self._run()
            except asyncio.CancelledError:
                if caught.number is None:
                    raise
                raise Interrupted(caught.number, self._story()) from None

    def _story(self) -> str:
        """Return what the interrupted run has saved, and how to continue it."""
        point, folder = self.point.version if self.point else 0, self.folder
        learned = self.controller.version if self.controller else point
        replaced = folder.replaced if folder else ""
        return story(self.output, learned, replaced, self.prepared.config.run.resume)

    async def _run(self) -> None:
        from launch.cluster import check_resources, claim, ray_session
        from launch.garbage import collected_by_the_clock
        from launch.parts import started
        from launch.room import room_of
        from launch.run_folder import RunFolder
        from launch.scale import obey

        config = self.prepared.config
        address = os.environ.get("RAY_ADDRESS")
        print(f"waiting for Ray at {address}" if address else "starting a private Ray", flush=True)
        async with ray_session(config):
            needs = check_resources(config, self.origin)
            self.name = claim(self.output)
            folder = self.folder = RunFolder(config, self.output, self.screen)
            print(f"starting {needs.words}; what they print is in {folder.path / 'logs'}", flush=True)
            if not config.rollout.vllm.get("enforce_eager"):
                print(
                    "engines compile the model as they start; rollout.vllm.enforce_eager = true leaves it out",
                    flush=True,
                )
            try:
                async with started(config, needs, folder.path) as parts, collected_by_the_clock():
                    took = f"{time.monotonic() - self.began:.0f} s"
                    print(f"engines, learner and reward workers up after {took} ({await parts.where()})", flush=True)
                    folder.room = room_of(needs)
                    scaling = asyncio.create_task(obey(folder.path, parts.engines))
                    await self._lives(folder, parts)
                    scaling.cancel()
            finally:
                folder.finish()

    async def _lives(self, folder: RunFolder, parts: Parts) -> None:
        """Train to the end. After the loss of the learner or of a device link, rebuild it and continue from the newest checkpoint."""
        from launch.controller import Controller
        from launch.stacks import dump_stacks
        from shared.errors import LearnerLost, LinkLost, Stalled

        config, held_out, lost = self.prepared.config, self.prepared.held_out, 0
        partners = (parts.engines, parts.rewards, parts.learners, folder)
        while True:
            try:
                if lost:
                    await self._recover(folder, parts)
                folder.rewind(self.point)
                controller = self.controller = Controller(config, self.stream, held_out, *partners)
                if self.point is not None:
                    await parts.learners.load(str(self.point.place))
                    controller.restore(self.point.state, self.point.queued(config, self.stream))
                then = (
                    f"an evaluation on {len(held_out):,} rows" if held_out and self.point is None else "the next step"
                )
                print(f"sending the first weights to the engines; then comes {then}", flush=True)
                return await controller.run()
            except (LearnerLost, LinkLost) as error:
                lost += 1
                if lost > config.run.max_restarts:
                    raise
                what = "device link" if isinstance(error, LinkLost) else "learner"
                print(f"warning[W902] {what} lost ({lost} of {config.run.max_restarts} times) — {error}", flush=True)
            except Stalled:
                print(f"what everyone does: {dump_stacks(folder.path)}", flush=True)
                raise

    async def _recover(self, folder: RunFolder, parts: Parts) -> None:
        from launch.resume import Point
        from shared.checkpoints import newest

        started = time.monotonic()
        await parts.rebuild_learner()
        found = newest(folder.path / "checkpoints")
        self.point = Point.at(*found) if found else None
        self.stream.cursor = 0
        print(f"learner built again in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    # Ray and vLLM leave threads behind that can hold up a normal exit; everything of ours is closed by now.
    code = main()
    sys.stdout.flush()
    os._exit(code)
