"""The ``millrace`` command: one verb a module, imported when it is asked for.

Each verb's module has ``main(arguments) -> exit code`` and ``parser()``, which the help and the shell's completion read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import NoReturn

GROUPS = {
    "a run": {
        "train": ("launch.run:main", "train a policy"),
        "resume": ("launch.run:resume", "go on with a run from its newest checkpoint"),
        "scale": ("launch.scale:main", "change the number of engines of a run that goes on"),
    },
    "before": {
        "configs": ("launch.shipped:main", "the configurations and recipes that ship, to read and to copy"),
        "import-trl": ("launch.import_trl:main", "a TRL script, or the arguments of one, as a configuration"),
        "doctor": ("launch.doctor:main", "run the reward functions on canned completions and say what is wrong"),
        "score": ("launch.score:main", "score stored completions with reward functions"),
        "plan": ("launch.plan:main", "how to share devices between engines and learner, and what to expect"),
    },
    "after": {
        "show": ("launch.show:main", "browse prompts, completions, rewards and tokens in the terminal"),
        "report": ("launch.report.page:main", "one HTML page that explains a run, or compares several"),
        "eval": ("launch.evaluate:main", "score a model on held-out rows, greedy or with pass@k"),
        "replay": ("launch.replay:main", "train again on a run's stored groups, and compare the weights"),
    },
    "measuring": {
        "bench": ("launch.bench:main", "throughput of each part beside its own limit"),
        "simulate": ("launch.simulate:main", "the control plane with up to thousands of simulated engines"),
    },
    "this command": {
        "completion": ("launch.completion:main", "what bash, zsh or tcsh need to complete its words"),
    },
}
VERBS = {verb: entry for group in GROUPS.values() for verb, entry in group.items()}


def entry() -> NoReturn:
    """The command itself: ends at once, whatever threads libraries have left behind."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> int:
    """Dispatch to a verb; exit code 2 for an unknown one."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"millrace {_version()}")
        return 0
    if arguments[0] not in VERBS:
        from shared.errors import InputError, nearest

        guess = nearest(arguments[0], VERBS)
        expected, fix = f"one of {', '.join(VERBS)}", f"millrace {guess}" if guess else "millrace --help"
        print(InputError("E106", "unknown verb", "command line", arguments[0], expected, fix), file=sys.stderr)
        print("exit code 2", file=sys.stderr)
        return 2
    module, _, name = VERBS[arguments[0]][0].partition(":")
    return int(getattr(importlib.import_module(module), name)(arguments[1:]))


def usage() -> str:
    """All verbs, by when they are wanted."""
    lines = ["usage: millrace VERB [options]        millrace VERB --help for each"]
    for title, verbs in GROUPS.items():
        lines += ["", f"{title}:"] + [f"  {verb:<12}{meaning}" for verb, (_, meaning) in verbs.items()]
    lines += [
        "",
        "to begin:",
        "  millrace train quickstart --dry-run   # check everything, start nothing",
        "  millrace train quickstart             # two-digit addition on two cores, without a GPU or a download",
        "  millrace configs gsm8k > my.toml      # a configuration to start one's own from",
    ]
    return "\n".join(lines)


def _version() -> str:
    import importlib.metadata

    for name in ("millrace-rl", "millrace"):  # The second where it was installed before the name changed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of a source tree that is not installed"
