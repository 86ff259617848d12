"""Stop strings as vLLM can obey them: one that is a special token is no text, so it has to be a stop token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def stop_arguments(strings: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """Arguments of ``SamplingParams`` by which each of ``strings`` ends a completion.

    vLLM compares strings with decoded text. Special tokens are left in that text, for strings such as ``<|im_end|>`` and a
    newline; a string that is one special token and nothing else needs no text at all.
    """
    tokens = {string: token for string in strings if (token := _special_token(string, tokenizer)) is not None}
    texts = [string for string in strings if string not in tokens]
    return {
        "stop": texts or None,
        "stop_token_ids": sorted(set(tokens.values())) or None,
        "detokenize": bool(texts),
        "skip_special_tokens": not texts,
    }


def _special_token(string: str, tokenizer: Any) -> int | None:
    """The id of the special token that ``string`` is; None for text."""
    ids = tokenizer.encode(string, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids)[0] != string:
        return None  # Several tokens, or one that stands for what the tokenizer does not know.
    return None if tokenizer.decode(ids, skip_special_tokens=True) else int(ids[0])
