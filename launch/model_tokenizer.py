"""Load a model's tokenizer, and compare the ids that occur with the rows of the model's embeddings."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.config import Config
from shared.errors import InputError, one_line
from shared.types import Prompt

ADDED_TOKENS = 8
"""Upper bound on special tokens that a tokenizer class adds beyond its files."""


def load_tokenizer(config: Config, origin: str, light: bool) -> Any:
    """Return the configured tokenizer. Raises ``InputError`` E401.

    With ``light``, use ``PreTrainedTokenizerFast`` if there is a tokenizer.json: importing ``AutoTokenizer`` takes longer
    than all other checks, and differs at most by an added BOS or EOS token.
    """
    source, trusted = config.model.tokenizer or config.model.path, config.model.trust_remote_code
    rows = _rows(Path(config.model.path))
    tokenizer = None
    try:
        if light and (Path(source) / "tokenizer.json").is_file() and not trusted:
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
        if tokenizer is None or (rows and len(tokenizer) > rows - ADDED_TOKENS):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
    except Exception as error:  # A damaged file surfaces as whatever its parser raises.
        place = f"{origin}:model.tokenizer"
        raise InputError(
            "E401", "tokenizer not found", place, one_line(error), "a tokenizer directory", "check the path"
        ) from None
    if len(tokenizer) < 2:  # transformers makes an empty one where the files are missing.
        place, found = f"{origin}:model.tokenizer", f"no tokenizer files in {source}"
        raise InputError("E401", "tokenizer not found", place, found, "a tokenizer directory", "check the path")
    return tokenizer


def rehearse_save(origin: str, tokenizer: Any) -> None:
    """Save ``tokenizer`` as a checkpoint does, into a folder that is removed. Raises ``InputError`` E413."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # Whatever a library raises at the save.
        place, expected = f"{origin}:model.tokenizer", "a tokenizer that transformers can save"
        fix = "correct the file that it names"
        raise InputError("E413", "cannot be saved", place, one_line(error), expected, fix) from None


def check_ids(config: Config, origin: str, tokenizer: Any, prompts: Iterable[Prompt]) -> list[str]:
    """Return a warning if the tokenizer knows ids for which the model has no embedding.

    Raises ``InputError`` E402 if one of them occurs: in a prompt, as a stop string, or as the only end of a completion.
    """
    rows = _rows(Path(config.model.path))
    if not rows or len(tokenizer) <= rows:
        return []
    place, expected = f"{origin}:model.tokenizer", f"ids below {rows}, the embedding rows"
    fix = "use the model's own tokenizer"
    found = _occurring(config, tokenizer, rows, prompts)
    if found:
        raise InputError("E402", "tokenizer does not fit", place, found, expected, fix)
    highest = sorted(id for id in tokenizer.get_vocab().values() if id >= rows)
    some = ", ".join(_named(tokenizer, id) for id in highest[:3]) + (", …" if len(highest) > 3 else "")
    told = f"Found {len(highest)} ids without an embedding: {some}. None occurs"
    return [f"warning[W402] tokenizer is larger than the model — {place}. {told}"]


def _occurring(config: Config, tokenizer: Any, rows: int, prompts: Iterable[Prompt]) -> str:
    """Return where an id of ``rows`` or more occurs, in words; nothing if it does not."""
    for prompt in prompts:
        highest = int(prompt.token_ids.max(initial=0))
        if highest >= rows:
            return f'{_named(tokenizer, highest)} in the prompt "{one_line(prompt.text, 40)}"'
    ids = tokenizer.get_vocab()
    for text in config.rollout.stop:
        if ids.get(text, 0) >= rows:
            return f"{_named(tokenizer, ids[text])} in rollout.stop"
    ends = _ends(Path(config.model.path)) | ({tokenizer.eos_token_id} - {None})
    if ends and min(ends) >= rows:
        return f"{_named(tokenizer, min(ends))}, which ends a completion"
    return ""


def _named(tokenizer: Any, token: int) -> str:
    return f"token {token} ({tokenizer.convert_ids_to_tokens(token)})"


def _rows(path: Path) -> int | None:
    """Return the rows of the embeddings of the model in ``path``, by its configuration."""
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    text = raw.get("text_config")
    rows = raw.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return rows if isinstance(rows, int) else None


def _ends(path: Path) -> set[int]:
    """Return the ids that end a completion by the files of the model in ``path``."""
    ends: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            ids = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
            ends |= {id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int)}
    return ends


def names_pad_token(config: Config) -> bool:
    """Return whether the tokenizer's own files name a pad token; transformers may add one of its class."""
    folder = Path(config.model.tokenizer or config.model.path)
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    return any(re.search(r'"pad_token":\s*["{]', file.read_text(encoding="utf-8")) for file in files if file.is_file())
