"""Read the headers of a model's safetensors files: names, types and shapes of the weights, without their values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shared.errors import InputError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Types of weights that can be trained, as safetensors names them."""


def weight_files(path: Path) -> list[Path]:
    """Return the files that transformers loads from ``path``: one whole file, else the shards of the index.

    Without either, return every safetensors file but Mistral's second copy of the same weights.
    """
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    named = _named_by_index(path)
    return [path / name for name in named] or sorted(
        file for file in path.glob("*.safetensors") if not file.name.startswith("consolidated")
    )


def _named_by_index(path: Path) -> list[str]:
    """Return the file names in the index of shards, sorted; none if there is no readable index."""
    try:
        names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def read_tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``dtype`` and ``shape`` of every tensor of a checked model folder, by name."""
    tensors: dict[str, dict[str, Any]] = {}
    for file in weight_files(path):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tensors |= {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    return tensors


def count_parameters(path: Path) -> int:
    """Return the number of weights of a checked model folder, by the headers of its files."""
    return sum(math.prod(tensor["shape"]) for tensor in read_tensors(path).values())


def check_files(path: Path, problems: list[InputError]) -> None:
    """Add E409 (no safetensors) and E411 (missing, broken or adapter files) for the folder ``path`` to ``problems``."""
    files = weight_files(path)
    if not files or not ((path / WHOLE).is_file() or (path / INDEX).is_file()):
        kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
        others = sorted(file.name for kind in kinds for file in path.glob(kind))
        found, fix = ", ".join(others) or "no weights", "convert it once on a trusted machine"
        if any(name.endswith(".safetensors") for name in others):
            fix = f"name the file {WHOLE}, or add the index {INDEX} of its shards"
        problems.append(InputError("E409", "no safetensors", str(path), found, WHOLE, fix))
        return
    if not (path / WHOLE).is_file() and not _named_by_index(path):
        found, expected = "no weight_map of names and files", "the index of the shards"
        problems.append(InputError("E411", "broken weights", f"{path}/{INDEX}", found, expected, "download it again"))
        return
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        place, found = f"{path}/{INDEX}", f"{_some(missing)} of {len(files)} files missing"
        expected = "every file that the index names"
        problems.append(InputError("E411", "weights missing", place, found, expected, "download it again"))
    if (path / "adapter_config.json").is_file():
        found, fix = "adapter_config.json", "merge the adapter into the model and save that, or remove the adapter"
        expected = "one set of weights"
        problems.append(InputError("E411", "adapter beside the model", str(path), found, expected, fix))
    for file in files:
        if file.is_file():
            _check_file(file, problems)


def _check_file(file: Path, problems: list[InputError]) -> None:
    """Add E411 if ``file`` is no whole safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length) if 0 < length < size else b"")
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            ends: list[int] | None = [
                tensor["data_offsets"][1] for tensor in tensors if math.prod(tensor["shape"]) >= 0
            ]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            ends = None
    if ends is None:
        found, expected = f"{size} bytes without a header", "a safetensors file"
        problems.append(InputError("E411", "broken weights", str(file), found, expected, "download it again"))
        return
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        found, expected = f"{size} bytes", f"{whole} bytes by its header"
        problems.append(InputError("E411", "broken weights", str(file), found, expected, "download it again"))


def check_types(path: Path, problems: list[InputError]) -> None:
    """Add E412 if weights of the folder ``path`` are quantised: matrices that are no floating-point numbers."""
    for name, tensor in read_tensors(path).items():
        if tensor["dtype"] not in FLOATS and len(tensor["shape"]) > 1 and name.endswith("weight"):
            found, expected = f"{name} in {tensor['dtype']}", "weights in float32, float16 or bfloat16"
            fix = "use the model that is not quantised"
            problems.append(InputError("E412", "quantised weights", str(path), found, expected, fix))
            return


def _some(names: list[str], most: int = 3) -> str:
    """Return the first names, and an ellipsis for the others."""
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])
