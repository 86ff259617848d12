"""Builds, at installation, what DeepSpeed would otherwise compile at the first start of a learner on a CPU."""

from __future__ import annotations

import sys


def main() -> int:
    """Build DeepSpeed's shared-memory operator; in an environment that cannot, say why."""
    import torch

    from launch.environment import check_environment
    from learner.distributed import find_tools
    from shared.errors import InputErrors

    if torch.cuda.is_available():
        return 0
    try:
        check_environment()
    except InputErrors as problems:
        print(problems, file=sys.stderr)
        return problems.exit_code
    find_tools()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        builder.load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
