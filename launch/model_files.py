"""Judges a model by its configuration and the headers of its safetensors files; its weights are not loaded.

Nor is any code that ships with it: whether that may run is settled here, before a library opens the folder.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.errors import InputError, raise_all

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
"""A hub model at one commit: ``org/name@<commit>``."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@.*)?")
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


def check_model(config: Config, origin: str) -> None:
    """Raises ``InputErrors`` E401, E406-E411 from the model's files alone, E704 from what would pass by them."""
    check_code(config, origin)
    path, place = Path(config.model.path), f"{origin}:model.path"
    if not (path / "config.json").is_file():
        named = ", and no cached hub model of that name" if HUB_NAME.fullmatch(config.model.path) else ""
        found = f'"{path}" (no {"config.json" if path.is_dir() else f"such directory{named}"})'
        raise InputError("E401", "model not found", place, found, "a Hugging Face model directory", "check the path")
    problems = []
    try:
        shape = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(shape, dict):
            raise ValueError(f"a {type(shape).__name__}")
    except ValueError as error:
        raise InputError(
            "E401", "model not readable", f"{path}/config.json", str(error), "a JSON object", "download it again"
        ) from None
    heads, context = shape.get("num_attention_heads"), shape.get("max_position_embeddings")
    tp = config.rollout.tensor_parallel_size
    if heads and heads % tp:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        fix = f"use {max(n for n in divisors if n <= tp)}"
        place_tp = f"{origin}:rollout.tensor_parallel_size"
        problems.append(
            InputError("E406", "heads do not split", place_tp, f"{tp} for {heads} heads", f"one of {divisors}", fix)
        )
    if context and config.max_model_len > context:
        longest = context - config.rollout.max_prompt_tokens
        found = f"{config.rollout.max_prompt_tokens} + {config.max_model_len - config.rollout.max_prompt_tokens} = {config.max_model_len}"
        fix = f"at most {longest} new tokens" if longest > 0 else f"rollout.max_prompt_tokens below {context}"
        problems.append(
            InputError(
                "E407",
                "sequence too long",
                f"{origin}:rollout.max_new_tokens",
                found,
                f"<= {context} (model context)",
                fix,
            )
        )
    for key, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        if shape.get(key, neutral) not in (None, neutral):
            expected = "logits straight from the output head, which the learner's chunked log-probs assume"
            place_key = f"{path}/config.json:{key}"
            problems.append(
                InputError(
                    "E412", "output head not supported", place_key, str(shape[key]), expected, "use another model"
                )
            )
    if config.algorithm.old_logprobs == "current" and shape.get("attention_dropout"):
        keys, fix = f"{origin}:algorithm.old_logprobs", 'algorithm.old_logprobs = "auto"'
        found = f"current with attention_dropout {shape['attention_dropout']}"
        problems.append(InputError("E108", "options disagree", keys, found, "a pass without dropout", fix))
    _check_head_dim(path, shape, problems)
    _check_weights(path, problems)
    raise_all(problems)


def _check_head_dim(path: Path, shape: dict[str, Any], problems: list[InputError]) -> None:
    import torch

    if torch.cuda.is_available() or not shape.get("num_attention_heads"):
        return
    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    if head_dim not in CPU_HEAD_DIMS:
        expected = ", ".join(map(str, CPU_HEAD_DIMS)) + " (CPU attention)"
        problems.append(
            InputError(
                "E410",
                "head_dim not supported",
                f"{path}/config.json:head_dim",
                str(head_dim),
                expected,
                "use another model",
            )
        )


def count_parameters(path: Path) -> int:
    """Of a model that was checked, by the headers of its weight files."""
    total = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


def _check_weights(path: Path, problems: list[InputError]) -> None:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        found = ", ".join(others) or "no weights"
        problems.append(
            InputError(
                "E409", "no safetensors", str(path), found, "model.safetensors", "convert it once on a trusted machine"
            )
        )
    for file in files:
        size, header = file.stat().st_size, {}
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(length) if 0 < length < size else b"")
                ends: list[int] | None = [
                    tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"
                ]
            except (ValueError, AttributeError, KeyError, TypeError, IndexError):
                ends = None
        if ends is not None and "lm_head.bias" in header:
            expected = "an output head without bias"
            problems.append(
                InputError(
                    "E412", "output head not supported", str(file), "lm_head.bias", expected, "use another model"
                )
            )
        if ends is None:
            problems.append(
                InputError(
                    "E411",
                    "broken weights",
                    str(file),
                    f"{size} bytes without a header",
                    "a safetensors file",
                    "download it again",
                )
            )
            continue
        whole = 8 + length + max(ends, default=0)
        if size != whole:
            problems.append(
                InputError(
                    "E411",
                    "broken weights",
                    str(file),
                    f"{size} bytes",
                    f"{whole} bytes by its header",
                    "download it again",
                )
            )
