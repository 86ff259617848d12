"""``millrace bench WORKLOAD``: throughput, each beside its own limit, as a table and with ``--json`` as one line."""

from __future__ import annotations

import importlib
import json
import sys

from launch.options import Options, guarded
from shared.errors import InputError, nearest

WORKLOADS = {
    "rollout": "launch.bench_rollout",
    "learner": "launch.bench_learner",
    "sync": "launch.bench_sync",
    "hosts": "launch.bench_hosts",
    "rewards": "launch.bench_rewards",
    "loop": "launch.bench_loop",
    "check": "launch.bench_check",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the verb and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return guarded(given, _bench, parser(given[0] if given and given[0] in WORKLOADS else ""))


def parser(workload: str = "") -> Options:
    """The verb's options for one ``workload``; without one, what there is."""
    if not workload:
        firsts = {
            name: (importlib.import_module(where).__doc__ or "").split("\n")[0] for name, where in WORKLOADS.items()
        }
        lines = [f"  {name:<9}{first.partition(': ')[2].strip()}" for name, first in firsts.items()]
        text = "\n".join([f"{__doc__}\n\nworkloads (millrace bench WORKLOAD --help):", *lines])
        options = Options("bench", text, "millrace bench loop --shape short --ceilings --json")
        options.add_argument("workload", choices=list(WORKLOADS), help="what is measured")
        return options
    module = importlib.import_module(WORKLOADS[workload])
    options = Options(f"bench {workload}", module.__doc__, f"millrace bench {workload} --json")
    options.add_argument("workload", choices=list(WORKLOADS), help="what is measured")
    module.add_options(options)
    options.add_argument("--json", action="store_true", help="print one JSON line last")
    return options


def _bench(arguments: list[str]) -> None:
    workload = arguments[0] if arguments else ""
    if workload not in WORKLOADS:
        guess = nearest(workload, WORKLOADS) or next(iter(WORKLOADS))
        expected = f"one of {', '.join(WORKLOADS)}"
        raise InputError(
            "E107", "unknown bench workload", "command line", workload, expected, f"millrace bench {guess}"
        )
    options = parser(workload).parse_args(arguments)
    result = importlib.import_module(WORKLOADS[workload]).run(options)
    if options.json:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
