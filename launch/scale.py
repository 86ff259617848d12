"""``millrace scale RUN --engines N``: change the number of engines of a run while it trains.

The command writes what you ask for into the run folder. The run looks there every second, starts or stops engines, and
answers in the same folder. Nothing listens on the network: the right to write to the run folder is the right to scale the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from launch.options import Options, guarded
from rollout.engine_pool import EnginePool
from shared.errors import InputError, MillraceError, one_line, visible

ASKED, ANSWERED = "scale.asked.json", "scale.answered.json"
LOOK_EVERY_S = 1.0


class NoAnswer(MillraceError):
    """The run did not take the wish."""


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    return guarded(arguments, _scale, parser())


def parser() -> Options:
    """The verb's options."""
    options = Options("scale", __doc__, "millrace scale runs/my --engines 6")
    options.add_argument("run", type=Path, help="the run folder")
    options.add_argument("--engines", type=int, required=True, help="engines that it shall have")
    options.add_argument("--timeout-s", type=float, default=60.0, help="longest wait for the run's answer")
    return options


def _scale(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    print(ask(options.run, options.engines, options.timeout_s), flush=True)


def ask(folder: Path, engines: int, timeout_s: float) -> str:
    """The answer of the run in ``folder``. Raises ``InputError`` E603 if none is going on there, or what the run refuses."""
    if not is_live(folder):
        place, expected = f"command line:{folder}", "the folder of a run that is going on"
        raise InputError("E603", "no such run", place, "nobody who writes there", expected, "check the path")
    wish = uuid.uuid4().hex
    _write(folder / ASKED, {"wish": wish, "engines": engines})
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = _read(folder / ANSWERED)
        if answer.get("wish") == wish:
            if answer["refused"]:
                raise InputError(*answer["refused"])
            return visible(answer["text"])
        time.sleep(0.1)
    raise NoAnswer(f"{folder}: no answer within {timeout_s:g} s; engines may still be finishing what they sample")


async def obey(folder: Path, engines: EnginePool) -> None:
    """Do what is asked in ``folder``, for as long as the run goes on. What was asked of an earlier run is gone by then."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        wish = _read(folder / ASKED)
        if not wish:
            continue
        (folder / ASKED).unlink(missing_ok=True)
        answer: dict[str, Any] = {"wish": wish["wish"], "text": "", "refused": None}
        try:
            answer["text"] = await engines.scale(int(wish["engines"]))
            print(f"scaled: {answer['text']}", flush=True)
        except InputError as error:
            answer["refused"] = error.args
        except Exception as error:  # Whatever the cluster said: the run goes on as it is.
            answer["text"] = f"not scaled: {type(error).__name__}: {one_line(error)}"
            print(f"warning[W507] {answer['text']}", flush=True)
        try:
            _write(folder / ANSWERED, answer)
        except OSError as error:
            print(f"warning[W601] no answer written to {folder}: {one_line(error)}", flush=True)


def is_live(folder: Path) -> bool:
    """Whether somebody holds the folder's lock."""
    try:
        with (folder / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole, or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content), encoding="utf-8")
    os.replace(draft, path)


if __name__ == "__main__":
    sys.exit(main())
