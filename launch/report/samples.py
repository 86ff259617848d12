"""Stored completions for a page: groups chosen evenly, tokens as text with log-prob and policy version, within a budget.

``run_data`` calls it. Which groups are kept depends on their mean reward alone: they are spread evenly from the worst
to the best of a step, so that a thinned page is no selection of the good ones. What was left out is told.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import stored_groups
from launch.report.rows import rounded

BUDGET = 2_600_000
"""Bytes of all runs' completions on a page."""
MAX_TOKENS = 1200
"""Tokens of a completion that are shown one by one; of longer ones the beginning and the end."""
MAX_TEXT = 4000
"""Characters of a prompt, or of a completion without tokens."""
MAX_EXTRA = 200

Piece = Callable[[int], tuple[str, bool]]
"""The text of a token, and whether it is a special one, which is no part of a completion's text."""
Group = dict[str, Any]
Stored = list[dict[str, Any]]
"""The rows of a group as they lie in the file."""


def load_pieces(source: str) -> Piece | None:
    """The text of single tokens by the tokenizer in ``source``; None if it cannot be loaded here. Runs no foreign code."""
    if not Path(source).is_dir():  # A name would be looked up on the network.
        return None
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except Exception:  # Whatever is wrong with it, completions are still shown as text.
        return None
    if len(tokenizer) < 2:
        return None
    specials = set(tokenizer.all_special_ids)

    def piece(number: int) -> tuple[str, bool]:
        raw = str(tokenizer.convert_ids_to_tokens(number) or "")
        if number in specials:
            return raw, True
        text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
        return " " + text.lstrip(" ") if raw.startswith("▁") else text or raw, False

    return piece


def read_samples(
    folder: Path, load: Callable[[], Piece | None], budget: int, notes: list[str]
) -> dict[str, Any] | None:
    """Groups of the stored steps, within ``budget`` bytes; None if none is stored.

    ``load`` gives the text of a token. ``tokens`` of the result is the vocabulary to which completions refer by index.
    """
    files = list(stored_groups.sample_files(folder).values())
    if not files:
        return None
    piece, vocabulary = load(), Vocabulary()
    if piece is None:
        notes.append("Completions: the tokenizer of the run could not be loaded here, so they are shown as plain text.")
    stored, notes[len(notes) :] = _steps(files)
    total = sum(len(groups) for groups in stored)
    stored, per_step = _share_out(stored, budget, piece is not None)
    kept = [group for groups in stored for group in _spread(groups, per_step)]
    if len(kept) < total:
        notes.append(
            f"Completions: {len(kept):,} of {total:,} stored groups, at most {per_step} a step from {len(stored)} of "
            f"{len(files)} stored steps, spread evenly from the lowest mean reward to the highest."
        )
    cut = len([row for group in kept for row in group if row["tokens"] > MAX_TOKENS])
    if cut:
        notes.append(f"Completions: of {cut} with more than {MAX_TOKENS:,} tokens the middle is left out.")
    groups = [_group(group, piece, vocabulary) for group in kept]
    parts = list(dict.fromkeys(name for group in groups for name in group["parts"]))
    return {"groups": groups, "parts": parts, "tokens": vocabulary.texts, "specials": sorted(vocabulary.specials)}


class Vocabulary:
    """The texts of the tokens on the page, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._index: dict[int, int] = {}
        self.specials: set[int] = set()
        """Where special tokens stand."""

    def index(self, number: int, piece: Piece) -> int:
        """Where the text of token ``number`` stands."""
        if number not in self._index:
            self._index[number] = len(self.texts)
            text, special = piece(number)
            self.texts.append(text)
            self.specials |= {self._index[number]} if special else set()
        return self._index[number]

    def text(self, places: list[int]) -> str:
        """What the tokens at ``places`` spell, without the special ones."""
        return "".join(self.texts[place] for place in places if place not in self.specials)


def _steps(files: list[Path]) -> tuple[list[list[Stored]], list[str]]:
    """Per readable file its groups, each a list of rows; and notes on what could not be read."""
    stored, damaged, unread = [], 0, 0
    for path in files:
        try:
            groups, damaged_here = stored_groups.read_samples(path)
        except OSError:  # A running run may be writing it.
            unread += 1
            continue
        damaged += damaged_here
        stored.append(groups)
    notes = [f"Completions: {unread} of {len(files)} files could not be read."] if unread else []
    notes += [f"Completions: {damaged} groups with damaged rows are left out."] if damaged else []
    return stored, notes


def _share_out(stored: list[list[Stored]], budget: int, with_tokens: bool) -> tuple[list[list[Stored]], int]:
    """The steps to keep, and how many groups of each."""
    sizes = [_size(group, with_tokens) for groups in stored for group in groups]
    if not sizes:
        return stored, 0
    fitting = budget / (sum(sizes) / len(sizes))
    if fitting >= len(stored):
        return stored, _per_step([len(groups) for groups in stored], fitting)
    count = max(1, int(fitting))
    places = sorted({round(i * (len(stored) - 1) / max(count - 1, 1)) for i in range(count)})
    return [stored[place] for place in places], 1


def _per_step(counts: list[int], fitting: float) -> int:
    """The largest number a step with which all fit."""
    per_step = max(counts)
    while per_step > 1 and sum(min(count, per_step) for count in counts) > fitting:
        per_step -= 1
    return per_step


def _size(group: Stored, with_tokens: bool) -> int:
    """About how many bytes a group takes on the page."""
    size = 120 + len(group[0]["prompt"][:MAX_TEXT].encode())
    for row in group:
        size += 90 + (7 * min(row["tokens"], MAX_TOKENS) if with_tokens else 0)
        if not with_tokens or not row["completion"].isascii():
            size += len(row["completion"][:MAX_TEXT].encode())
        size += sum(min(len(str(v)), MAX_EXTRA) + 20 for name, v in row.items() if name.startswith("extra/"))
    return size


def _spread(groups: list[Stored], count: int) -> list[Stored]:
    """``count`` groups, evenly from the lowest mean reward to the highest, in the order in which they were stored."""
    if len(groups) <= count:
        return groups

    def mean(index: int) -> float:
        rewards = [row["reward"] for row in groups[index] if row["reward"] is not None]
        value = sum(rewards) / max(len(rewards), 1)
        return -math.inf if math.isnan(value) else value

    ranked = sorted(range(len(groups)), key=mean)
    chosen = {ranked[int((i + 0.5) * len(groups) / count)] for i in range(count)}
    return [group for i, group in enumerate(groups) if i in chosen]


def _group(rows: Stored, piece: Piece | None, vocabulary: Vocabulary) -> Group:
    first = rows[0]
    names = stored_groups.names_of(first) or {}
    parts = list(names.get("parts", []))
    return {
        "step": first["step"],
        "id": first["group_id"],
        "prompt": _middle_cut(_conversation(first["prompt"]), MAX_TEXT),
        "parts": parts,
        "completions": [_completion(row, parts, names.get("extra", []), piece, vocabulary) for row in rows],
    }


def _completion(
    row: dict[str, Any], parts: list[str], extra: list[str], piece: Piece | None, vocabulary: Vocabulary
) -> dict[str, Any]:
    """Short keys: there are thousands. ``k`` tokens, ``l`` log-probs in hundredths of a nat below 0, ``v`` version spans."""
    kept: dict[str, Any] = {
        "f": row["finish_reason"],
        "n": row["tokens"],
        "r": rounded(row["reward"], 4),
        "a": rounded(row["advantage"], 4),
        "p": [rounded(row.get(f"rewards/{name}"), 4) for name in parts],
    }
    kept |= {"x": {name: str(row.get(f"extra/{name}"))[:MAX_EXTRA] for name in extra}} if extra else {}
    if piece is None:
        return kept | {"t": _middle_cut(row["completion"], MAX_TEXT)}
    places = list(range(row["tokens"]))
    if len(places) > MAX_TOKENS:
        kept["cut"] = [head := MAX_TOKENS * 2 // 3, row["tokens"] - MAX_TOKENS]
        places = [*places[:head], *places[head + row["tokens"] - MAX_TOKENS :]]
    ids, logprobs = row["token_ids"], row["rollout_logprobs"]
    kept["k"] = [vocabulary.index(ids[place], piece) for place in places]
    kept["l"] = [_hundredths(logprobs[place]) for place in places]
    if vocabulary.text(kept["k"]) != row["completion"]:  # Characters of several tokens, or a part that is left out.
        kept["t"] = _middle_cut(row["completion"], MAX_TEXT)
    return kept | {"v": row["versions"]}


def _conversation(prompt: str) -> str:
    """A prompt that was stored as a list of chat messages, as one reads it; any other as it is."""
    try:
        messages = ast.literal_eval(prompt) if prompt.startswith("[{") else None
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages or ()) or prompt
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        return prompt


def _hundredths(logprob: float | None) -> int | None:
    return None if logprob is None or not math.isfinite(logprob) else round(-100 * logprob)


def _middle_cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} […{len(text) - limit:,} characters left out…] {text[-(limit // 3) :]}"
