"""Judges a model by its configuration and the headers of its safetensors files; its weights are not loaded.

Nor is any code that ships with it: whether that may run is settled here, before a library opens the folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launch.model_config import check_config, check_quantised
from launch.model_weights import check_files, check_types, read_tensors
from rollout import hub
from shared.config import Config
from shared.errors import InputError, InputErrors, nearest, raise_all

PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
"""A hub model at one commit: ``org/name@<commit>``."""
OURS = {
    "trust_remote_code": "model.trust_remote_code",
    "load_format": "safetensors alone",
    "model": "model.path",
    "tokenizer": "model.tokenizer",
}
"""Arguments of vLLM that would go around the checks of this module, and what settles them."""


def check_code(config: Config, origin: str) -> None:
    """Raises ``InputErrors`` E408 or E704: code of a model runs only if trusted, and then only what was there to review."""
    problems = []
    trusted = config.model.trust_remote_code
    for key in config.rollout.vllm.keys() & OURS:
        place, fix = f"{origin}:rollout.vllm.{key}", "remove it"
        problems.append(InputError("E704", "unsafe setting", place, "set", OURS[key], fix))
    sources = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer or config.model.path}
    for key, source in sources.items():
        place, expected = f"{origin}:{key}", "a directory, or org/name@COMMIT (40 hex digits)"
        if trusted and not Path(source).is_dir():
            found = f'code of "{source}" at whatever revision is newest'
            problems.append(InputError("E408", "custom code not pinned", place, found, expected, "name the commit"))
        for name in ("config.json", "tokenizer_config.json"):
            references = _code_references(Path(source) / name)
            if references and not trusted:
                found, fix = f"auto_map in its {name}", "review the code, then model.trust_remote_code = true"
                fix += " with a directory or org/name@COMMIT"
                problems.append(InputError("E408", "custom code refused", place, found, "none", fix))
            elsewhere = next((text for text in references if "--" in text), None)
            if trusted and elsewhere:
                found, fix = f'"{elsewhere}" in its {name}', "copy that code beside the model"
                problems.append(InputError("E408", "custom code not pinned", place, found, "code beside it", fix))
    # A tokenizer in the model's own directory is one source, said once.
    raise_all(list({problem.found: problem for problem in problems[::-1]}.values())[::-1])


def _code_references(path: Path) -> list[str]:
    """What ``auto_map`` in a JSON file names: ``module.Class``, or ``repository--module.Class``; empty if unreadable."""
    try:
        table = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
    except (OSError, ValueError, AttributeError):
        return []
    values = table.values() if isinstance(table, dict) else [table]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [str(one) for one in flat if one is not None]


def check_model(config: Config, origin: str, ours: bool = False) -> list[str]:
    """Return warnings about the model's files, of which no weight is read.

    With ``ours`` the folder is one that Millrace made: transformers, slow to import, is not asked about it.

    Raises ``InputErrors`` E108, E401, E406-E413, and E704 for settings that would go around these checks.
    """
    check_code(config, origin)
    path = Path(config.model.path)
    raw = _read_config(path, f"{origin}:model.path")
    problems: list[InputError] = []
    check_files(path, problems)
    check_quantised(path, raw, problems)
    if ours:
        check_config(config, origin, raw, _has_gpu(), problems)
        raise_all(problems)
        return _slow_types(config, origin)
    return _slow_types(config, origin) + _ask_transformers(config, origin, raw, problems)


def _ask_transformers(config: Config, origin: str, raw: dict[str, Any], problems: list[InputError]) -> list[str]:
    """Return warnings about a model whose class, weights and save are tried without values; see ``check_model``."""
    from learner import meta_model
    from learner.small_twin import check_twin

    path, trusted = config.model.path, config.model.trust_remote_code
    try:
        configuration = meta_model.read(path, raw, trusted)
        check_config(config, origin, meta_model.canonical(configuration), _has_gpu(), problems)
        raise_all(problems)
        check_types(Path(path), problems)
        raise_all(problems)
        model = meta_model.build(path, configuration, trusted)
        check_twin(path, model)
    except InputError as error:
        raise InputErrors([*problems, error]) from None
    warnings = meta_model.rehearse_save(path, model)
    return warnings + meta_model.check_weights(path, model, read_tensors(Path(path)))


def _read_config(path: Path, place: str) -> dict[str, Any]:
    """Return ``config.json`` of the folder ``path``. Raises ``InputError`` E401."""
    if not (path / "config.json").is_file():
        found = f'"{path}" (no {"config.json" if path.is_dir() else "such directory"})'
        expected, fix = "a Hugging Face model directory, or org/name of the hub", "check the path"
        similar = (
            nearest(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()]) if path.parent.is_dir() else None
        )
        if similar and not path.exists():
            fix = f"did you mean {path.parent / similar}?"
        elif "@" in str(path) and hub.NAMED.fullmatch(str(path).partition("@")[0]):
            fix = f"{str(path).partition('@')[0]}@COMMIT, with all 40 hex digits"
        raise InputError("E401", "model not found", place, found, expected, fix)
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}")
    except ValueError as error:
        file, expected = f"{path}/config.json", "a JSON object"
        raise InputError("E401", "model not readable", file, str(error), expected, "download it again") from None
    return raw


def _slow_types(config: Config, origin: str) -> list[str]:
    """Return W405 if the weights are float32 on GPUs, whose tensor cores multiply bfloat16."""
    if config.model.dtype != "float32" or not _has_gpu():
        return []
    text = "float32 on a GPU is up to 15 times slower than bfloat16 and takes twice the memory"
    return [f'warning[W405] {origin}:model.dtype: {text}; set model.dtype = "bfloat16"']


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
