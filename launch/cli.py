"""The ``millrace`` command: one verb a module."""

from __future__ import annotations

import sys

VERBS = {
    "train": ("launch.run", "train a policy: millrace train CONFIG.toml [--section.field VALUE ...]"),
    "scale": ("launch.scale", "change the number of engines of a run that goes on: millrace scale RUN --engines N"),
    "plan": ("launch.plan", "share devices between engines and learner: millrace plan CONFIG.toml --devices N"),
    "simulate": ("launch.simulate", "the control plane with simulated engines: millrace simulate --engines 1000"),
    "replay": ("launch.replay", "train again on a run's stored groups: millrace replay RUN [--to STEP]"),
    "doctor": ("launch.doctor", "run the reward functions on canned completions and say what is wrong"),
    "score": ("launch.score", "score stored completions: millrace score --reward NAME --data ROWS.jsonl --json"),
    "bench": ("launch.bench", "measure throughput: millrace bench rewards [--json]"),
    "import-trl": ("launch.import_trl", "a TRL script or its arguments as a configuration: millrace import-trl FILE"),
    "evaluate": ("launch.evaluate", "score a model directory: millrace evaluate CONFIG.toml [--model.path DIR]"),
}


def main() -> int:
    """Dispatch to a verb; exit code 2 for an unknown one."""
    import importlib

    from shared.errors import nearest

    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: millrace VERB ...\n" + "\n".join(f"  {name:10s} {text}" for name, (_, text) in VERBS.items()))
        return 0 if arguments else 2
    if arguments[0] not in VERBS:
        guess = nearest(arguments[0], VERBS)
        fix = f"did you mean {guess}?" if guess else "see --help"
        print(
            f"error[E106] unknown verb — command line. Found {arguments[0]}, expected one of {', '.join(VERBS)}. Fix: {fix}",
            file=sys.stderr,
        )
        return 2
    return int(importlib.import_module(VERBS[arguments[0]][0]).main(arguments[1:]))
