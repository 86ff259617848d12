"""Rows become prompts: load, check, apply the chat template, tokenise, and hand out in a seeded order.

The position in the data is one integer, so a run resumes exactly. Invariant: a prompt is never cut; what cannot be
used is refused, or dropped and counted when the configuration says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.chat import ChatTemplate
from rollout.datasets import Rows, read
from rollout.messages import messages_of, options_of, tools_of
from rollout.row_checks import check_code_rows
from shared.config import Config
from shared.config_data import Source
from shared.errors import InputError, nearest, raise_all
from shared.types import Prompt

RESERVED = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}
"""Keywords that reward functions get from Millrace; a column of that name would hide them."""


@dataclass
class PromptSet:
    """The usable rows of all sources, tokenised."""

    prompts: list[Prompt]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    mixture: list[tuple[int, float]] = field(default_factory=list)
    """Of weighted sources: prompts, and share."""
    warnings: list[str] = field(default_factory=list)
    """What was noticed in the rows, one line each."""

    @property
    def columns(self) -> list[str]:
        """What reward functions find beside the completions: the columns of all sources; empty without prompts."""
        return list(self.prompts[0].columns) if self.prompts else []

    def stream(self, config: Config) -> PromptStream:
        """The prompts in the order in which ``config`` trains on them."""
        return PromptStream(self.prompts, config.run.seed, config.data.shuffle, self.mixture)

    @classmethod
    def load(cls, config: Config, sources: list[Source], split: str, key: str, tokenizer: Any) -> PromptSet:
        """Read, check and tokenise ``sources``; ``split`` where they name none.

        Raises ``InputErrors`` E202, E206, E207, E208, E403 and those of ``datasets.read``.
        """
        prompts: list[Prompt] = []
        dropped = dict.fromkeys(("blank", "long", "filtered"), 0)
        sizes, encoder = [], _Encoder(config, tokenizer, key)
        for i, source in enumerate(sources):
            where = f"{key}[{i}]" if len(sources) > 1 else key
            rows = read(source, split, where)
            dropped["filtered"] += rows.filtered
            before = len(prompts)
            reader = _Reader(config, encoder, rows)
            prompts += reader.prompts(before)
            dropped["blank"] += len(reader.blank)
            dropped["long"] += len(reader.long)
            sizes.append(len(prompts) - before)
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and len(weights) < len(sources):
            found, fix = f"{len(weights)} weights for {len(sources)} sources", "set weight for all or none"
            raise InputError("E108", "options disagree", f"{key}.weight", found, "one each, or none", fix)
        used = [size for size in sizes if size]
        shares = [weight for size, weight in zip(sizes, weights) if size]
        mixture = [*zip(used, shares, strict=True)] if weights else []
        return cls(_with_all_columns(prompts), dropped, mixture, encoder.warnings())


def _with_all_columns(prompts: list[Prompt]) -> list[Prompt]:
    """``prompts`` where each has the columns of all sources; a value that is not there is None."""
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return [
        prompt
        if len(prompt.columns) == len(columns)
        else replace(prompt, columns={name: prompt.columns.get(name) for name in columns})
        for prompt in prompts
    ]


class _Reader:
    """The rows of one source on their way to prompts."""

    def __init__(self, config: Config, encoder: _Encoder, rows: Rows) -> None:
        self._config, self._rows, self._encoder = config, rows, encoder
        self.blank: list[str] = []
        self.long: list[tuple[str, int]] = []

    def prompts(self, first_id: int) -> list[Prompt]:
        """Those that can be used, numbered from ``first_id``. Raises ``InputErrors``."""
        self._check_columns()
        column, limit, prompts = self._config.data.prompt_column, self._config.rollout.max_prompt_tokens, []
        used = []
        for index, (place, row) in enumerate(self._rows.rows):
            text = row[column]
            if text is not None and not isinstance(text, str | list):
                found, fix = type(text).__name__, f"write {column} as text"
                raise InputError("E206", "prompt is no text", place, found, "text or messages", fix)
            shown, ids = self._encoder.encode(text, row, place)
            if not ids:
                self.blank.append(place)
            elif len(ids) > limit:
                self.long.append((place, len(ids)))
            else:
                columns = {c: v for c, v in row.items() if c not in ("prompt", "completion", "completion_ids")}
                token_ids = np.asarray(ids, dtype=np.int32)
                prompts.append(Prompt(first_id + index, token_ids, shown, columns, self._rows.name))
                used.append((place, row))
        problems = check_code_rows(self._config.reward.functions, used)
        _refuse(self._config, self.blank, self.long, limit, problems)
        return prompts

    def _check_columns(self) -> None:
        column = self._config.data.prompt_column
        place, row = self._rows.rows[0]  # All rows of a source have the same columns.
        file, _, number = place.rpartition(":")
        if column not in row:
            usual = (c for c in ("prompt", "question", "messages", "problem") if c in row)
            guess = nearest(column, row) or next(usual, None)
            fix = f'data.prompt_column = "{guess}"' if guess else "set data.prompt_column"
            found = f"{', '.join(row)} in row {number}"
            raise InputError("E202", "no such column", f"{file}:{column}", found, column, fix)
        taken = sorted(RESERVED & set(row))
        if taken:
            found, fix = ", ".join(taken), "rename the column"
            raise InputError("E202", "column name taken", file, found, "no argument of a reward function", fix)


def _refuse(
    config: Config, blank: list[str], long: list[tuple[str, int]], limit: int, problems: list[InputError]
) -> None:
    if blank and config.data.on_bad_row == "error":
        place = blank[0] + (f" (and {len(blank) - 1} more)" if len(blank) > 1 else "")
        fix = 'remove them or data.on_bad_row = "drop"'
        problems.append(InputError("E207", "blank prompts", place, f"{len(blank)} empty prompts", "text", fix))
    if long and config.data.on_long_prompt == "error":
        place = long[0][0] + (f" (and {len(long) - 1} more)" if len(long) > 1 else "")
        fix = 'raise it or data.on_long_prompt = "drop"'
        found, expected = f"up to {max(n for _, n in long)} tokens", f"<= rollout.max_prompt_tokens = {limit}"
        problems.append(InputError("E208", "prompts too long", place, found, expected, fix))
    raise_all(problems)


class _Encoder:
    """Makes token ids of the prompts of a setting: plain text as the tokenizer would, messages by the chat template."""

    def __init__(self, config: Config, tokenizer: Any, key: str) -> None:
        self._origin = key.rpartition("data.")[0]
        self._chat, self._system, self._tokenizer = config.data.chat, config.data.system_prompt, tokenizer
        self._template = ChatTemplate(config, tokenizer, self._origin)
        self._first, self._last = _added_tokens(tokenizer)
        self._left_off = False
        """True once the tokenizer would have put an end token behind a prompt."""

    def encode(self, value: Any, row: dict[str, Any], place: str) -> tuple[Any, list[int]]:
        """The prompt as the rewards see it, and its token ids; none for a blank one. Raises ``InputError``."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return "", []
        if isinstance(value, str) and not self._chat:
            if self._system:
                keys, found = f"{self._origin}data.system_prompt, data.chat", f"a system prompt, and text in {place}"
                raise InputError("E108", "options disagree", keys, found, "messages", "data.chat = true")
            return value, self._plain_ids(value)
        messages = messages_of([{"role": "user", "content": value}] if isinstance(value, str) else value, place)
        asked = next((m for m in reversed(messages) if m["role"] != "assistant"), None)
        if not messages or (asked and asked["role"] == "user" and not asked["content"].strip()):
            return "", []
        messages = [{"role": "system", "content": self._system}] * bool(self._system) + messages
        text = self._template.render(messages, tools_of(row, place), options_of(row, place), place)
        return messages, self._ids(text)

    def warnings(self) -> list[str]:
        """What was noticed in all prompts so far, one line each."""
        lines = self._template.warnings()
        if self._left_off:
            said = f"Found {self._tokenizer.decode(self._last)} behind every text, expected nothing behind a prompt."
            lines.append(f"warning[W213] end token left off prompts — {self._origin}model.tokenizer. {said}")
        return lines

    def _plain_ids(self, text: str) -> list[int]:
        """Token ids with what the tokenizer puts in front, unless ``text`` begins with it, and nothing behind."""
        ids = self._ids(text)
        self._left_off = bool(self._last)
        return ids if ids[: len(self._first)] == self._first else self._first + ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that ``tokenizer`` puts before and behind every text."""
    for text in ("a", "1", "\n"):
        bare, full = list(tokenizer(text, add_special_tokens=False)["input_ids"]), list(tokenizer(text)["input_ids"])
        for start in range(len(full) if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return [], []


class PromptStream:
    """Endless prompts in a seeded order; ``cursor`` is the whole state."""

    def __init__(
        self, prompts: list[Prompt], seed: int, shuffle: bool = True, mixture: Sequence[tuple[int, float]] = ()
    ) -> None:
        """``mixture``: of each source in turn, how many of ``prompts`` are its and what share of an epoch they make.

        Without one, an epoch has every prompt once; with one, a source's rows take turns over the epochs.
        """
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self.cursor = 0
        """Prompts handed out so far; also the next group's id."""
        sizes = [size for size, _ in mixture] or [len(prompts)]
        total = sum(weight for _, weight in mixture)
        self._starts, self._sizes = np.cumsum([0, *sizes[:-1]]), sizes
        self._counts = [max(1, round(len(prompts) * weight / total)) for _, weight in mixture] or sizes
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.cursor / sum(self._counts)

    def at(self, position: int) -> Prompt:
        """The prompt at ``position``, in its epoch's order."""
        epoch, row = divmod(position, sum(self._counts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._prompts[int(self._order[row])]

    def next(self) -> tuple[int, Prompt]:
        """``(group_id, prompt)`` at the cursor, which moves on."""
        group_id = self.cursor
        self.cursor += 1
        return group_id, self.at(group_id)

    @cached_property
    def digest(self) -> str:
        """What tells one dataset from another: sha256 over all token ids and shares, in the files' order."""
        hasher = hashlib.sha256()
        for prompt in self._prompts:
            hasher.update(len(prompt.token_ids).to_bytes(4, "little") + prompt.token_ids.tobytes())
        if self._counts != self._sizes:
            hasher.update(repr(self._counts).encode())
        return hasher.hexdigest()

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """Rows of an epoch: a permutation, or each source's next ``counts`` rows spread among the others'."""
        if self._counts == self._sizes:
            return self._permutation((self._seed, epoch), len(self._prompts))
        rows = [self._turn(source, epoch) for source in range(len(self._sizes))]
        merged = np.concatenate(rows)
        if self._shuffle:
            return merged[self._permutation((self._seed, epoch), len(merged))]
        at = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in rows])
        return merged[np.argsort(at, kind="stable")]

    def _turn(self, source: int, epoch: int) -> NDArray[np.int64]:
        """The rows of ``source`` whose turn it is, in its own endless order of permutations."""
        count, size = self._counts[source], self._sizes[source]
        rounds, rows = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
        for number in np.unique(rounds):
            here = rounds == number
            rows[here] = self._permutation((self._seed, int(number), source + 1), size)[rows[here]]
        return self._starts[source] + rows

    def _permutation(self, seed: tuple[int, ...], size: int) -> NDArray[np.int64]:
        return np.random.default_rng(seed).permutation(size) if self._shuffle else np.arange(size)
