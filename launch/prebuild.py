"""Builds, at installation, what DeepSpeed would otherwise compile at the first start of a learner on a CPU."""

from __future__ import annotations

import sys


def main() -> int:
    """Build DeepSpeed's shared-memory operator; without a compiler say so and go on, as DeepSpeed will ask again."""
    import shutil

    import torch

    if torch.cuda.is_available():
        return 0
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=_path()) is None]
    if missing:
        found = f"no {' and no '.join(missing)}"
        print(
            f"error[E703] cannot build ops — environment. Found {found}, expected g++ and ninja. Fix: install them",
            file=sys.stderr,
        )
        return 2
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        builder.load(verbose=False)
    return 0


def _path() -> str:
    import os

    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


if __name__ == "__main__":
    sys.exit(main())
