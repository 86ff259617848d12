"""The entry point: ``python launch/run.py CONFIG.toml [--section.field value ...]``, also as ``millrace train``.

Reads and checks the configuration, prepares model and data, connects to the cluster, builds the three pools and
hands them to the controller. Exit code 0 on success, 2 for wrong input, 1 for anything else. Heavy libraries are
imported late, so that ``--help`` and a mistyped key answer at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python puts launch/ on the path, where the packages beside it are not found.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shared.config import Config
from shared.config_loader import known_keys, load_config
from shared.errors import InputError, MillraceError, one_line

if TYPE_CHECKING:
    from launch.parts import Parts
    from launch.preflight import Prepared
    from launch.resume import Point
    from launch.run_folder import RunFolder
    from rollout.prompts import PromptStream


def main(arguments: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    return guarded(sys.argv[1:] if arguments is None else arguments, _train_command)


def _train_command(arguments: list[str]) -> None:
    files, overrides = parse(arguments)
    train(load_config(files, overrides), Path(files[-1]), dry_run="--dry-run" in arguments)


def guarded(arguments: list[str], verb: Callable[[list[str]], None], help_text: str = "") -> int:
    """Run ``verb``; print help, or at most one error without a traceback, and return the exit code."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        if help_text:
            print(help_text)
        else:
            print_help()
        return 0 if arguments else 2
    debug = "--debug" in arguments
    # Threads that spin while they wait take the cores from the other processes; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        verb(arguments)
        return 0
    except MillraceError as error:
        if debug:
            raise
        print(f"{error}\nexit code {error.exit_code}", file=sys.stderr, flush=True)
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
        print(f"interrupted; the last checkpoint stands\nexit code {code}", file=sys.stderr, flush=True)
        return code
    except Exception as error:  # A bug of ours or a fault of a machine: the one case that needs its traceback.
        if debug:
            raise
        traceback.print_exc()
        print(
            f"error[E000] unexpected {type(error).__name__}: {one_line(error)}\nexit code 1",
            file=sys.stderr,
            flush=True,
        )
        return 1


def parse(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Configuration files and ``--section.field value`` overrides. Raises ``InputError`` E105 or E106."""
    files: list[str] = []
    overrides: dict[str, str] = {}
    rest = [a for a in arguments if a not in ("--debug", "--dry-run")]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            files.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and "." in rest[0]):
                raise InputError(
                    "E106", "bad override", f"command line:--{key}", "no value", "a value", f"--{key} VALUE"
                )
            value = rest.pop(0)
        overrides[key.replace("-", "_")] = value
    if not files:
        raise InputError(
            "E105",
            "no config",
            "command line",
            "no file",
            "a TOML file",
            "python launch/run.py launch/configs/quickstart.toml",
        )
    return files, overrides


def train(config: Config, source: Path, dry_run: bool = False) -> None:
    """Check everything, then run the whole loop."""
    from launch.preflight import prepare
    from launch.resume import find
    from launch.run_folder import resolve_output
    from rollout.prompts import PromptStream

    started = time.monotonic()
    prepared = prepare(config, source.name, source.parent)
    stream = PromptStream(prepared.train.prompts, config.run.seed, config.data.shuffle)
    output = resolve_output(config.run.output_dir)
    point = find(prepared.config, output, stream)
    for warning in prepared.warnings:
        print(warning, flush=True)
    evaluated = point is not None and (not prepared.held_out or point.state["evaluated"] == point.version)
    if point is not None and point.version >= config.run.steps and evaluated:
        print(f"{output}: complete at step {point.version}; raise run.steps to go on", flush=True)
        return
    session = Session(prepared, source.name, output, stream, point)
    asyncio.run(session.run(started, dry_run))


@dataclass
class Session:
    """A checked configuration on its way through Ray: the parts live as long, the controllers one after the other."""

    prepared: Prepared
    origin: str
    output: Path
    stream: PromptStream
    point: Point | None
    """Where to go on from; None: at the beginning."""
    name: Any = None
    """Held on the cluster, so that no other run takes it."""

    async def run(self, began: float, dry_run: bool) -> None:
        """Start the parts and train; with ``dry_run`` stop before anything is started."""
        from launch.cluster import check_resources, claim, nodes, ray_session
        from launch.garbage import collected_by_the_clock
        from launch.parts import started
        from launch.placement import table
        from launch.run_folder import RunFolder, dump_config
        from launch.scale import obey

        config = self.prepared.config
        task = asyncio.current_task()
        assert task is not None
        async with ray_session(config):
            # `ray job stop` and preemption send it, and wait three seconds. Only now: Ray has put a handler there too.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
            needs = check_resources(config, self.origin)
            if dry_run:
                begin = f"from {self.point.place}" if self.point else "at step 0"
                print(f"{dump_config(config)}\n# begins {begin}; placement:\n{table(needs, nodes())}", flush=True)
                print("# dry run: everything checked, nothing started", flush=True)
                return
            self.name = claim(self.output)
            folder = RunFolder(config, self.output)
            try:
                async with started(config, needs, folder.path) as parts, collected_by_the_clock():
                    took = f"{time.monotonic() - began:.0f} s"
                    print(f"engines, learner and reward workers up after {took} ({await parts.where()})", flush=True)
                    scaling = asyncio.create_task(obey(folder.path, parts.engines))
                    await self._lives(folder, parts)
                    scaling.cancel()
            finally:
                folder.finish()

    async def _lives(self, folder: RunFolder, parts: Parts) -> None:
        """Train to the end; a learner that is lost is built again and goes on from the newest checkpoint."""
        from launch.controller import Controller
        from launch.stacks import dump_stacks
        from shared.errors import LearnerLost, Stalled

        config, lost = self.prepared.config, 0
        partners = (parts.engines, parts.rewards, parts.learners, folder)
        while True:
            try:
                if lost:
                    await self._recover(folder, parts)
                folder.rewind(self.point)
                controller = Controller(config, self.stream, self.prepared.held_out, *partners)
                if self.point is not None:
                    await parts.learners.load(str(self.point.place))
                    controller.restore(self.point.state, self.point.queued(config, self.stream))
                return await controller.run()
            except LearnerLost as error:
                lost += 1
                if lost > config.run.max_restarts:
                    raise
                print(f"warning[W902] learner lost ({lost} of {config.run.max_restarts} times) — {error}", flush=True)
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


def print_help() -> None:
    """Usage and every setting with its default and meaning."""
    print("usage: python launch/run.py CONFIG.toml [MORE.toml ...] [--section.field VALUE ...] [--dry-run] [--debug]\n")
    for key, field in known_keys().items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        print(f"  --{key}  ({default})\n        {field.description}")


if __name__ == "__main__":
    # Ray and vLLM leave threads behind that can hold up a normal exit; everything of ours is closed by now.
    code = main()
    sys.stdout.flush()
    os._exit(code)
