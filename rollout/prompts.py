"""Rows become prompts: load, check, apply the chat template, tokenise, and hand out in a seeded order.

The position in the data is one integer, so a run resumes exactly. Invariant: a prompt is never cut; what cannot be
used is refused, or dropped and counted when the configuration says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.datasets import Rows, read
from rollout.row_checks import check_code_rows
from shared.config import Config
from shared.config_data import Source
from shared.errors import InputError, nearest, one_line, raise_all
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

    @property
    def columns(self) -> list[str]:
        """What reward functions find beside the completions; empty without prompts."""
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
        sizes = []
        for i, source in enumerate(sources):
            where = f"{key}[{i}]" if len(sources) > 1 else key
            rows = read(source, split, where)
            dropped["filtered"] += rows.filtered
            before = len(prompts)
            reader = _Reader(config, tokenizer, rows, key)
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
        return cls(prompts, dropped, [*zip(used, shares, strict=True)] if weights else [])


class _Reader:
    """The rows of one source on their way to prompts."""

    def __init__(self, config: Config, tokenizer: Any, rows: Rows, key: str) -> None:
        self._config, self._rows = config, rows
        self._encode = _encoder(config, tokenizer, key)
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
            empty = not text or (isinstance(text, str) and not text.strip())
            shown, ids = ("", []) if empty else self._encode(text, place)
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
        for place, row in self._rows.rows:
            if row.get(column) is None and column not in row:
                usual = (c for c in ("prompt", "question", "messages", "problem") if c in row)
                guess = nearest(column, row) or next(usual, None)
                fix = f'data.prompt_column = "{guess}"' if guess else "set data.prompt_column"
                file, _, number = place.rpartition(":")
                found = f"{', '.join(row)} in row {number}"
                raise InputError("E202", "no such column", f"{file}:{column}", found, column, fix)
        taken = sorted(RESERVED & {c for _, row in self._rows.rows for c in row})
        if taken:
            found, fix = ", ".join(taken), "rename the column"
            file = self._rows.rows[0][0].rpartition(":")[0]
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


def _encoder(config: Config, tokenizer: Any, key: str) -> Callable[[Any, str], tuple[Any, list[int]]]:
    """``(text or messages, their row) -> (prompt as the rewards see it, token ids)``."""
    import jinja2

    template = config.model.chat_template or tokenizer.chat_template
    system = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt else []

    origin = key.rpartition("data.")[0]

    def encode(value: Any, place: str) -> tuple[Any, list[int]]:
        if isinstance(value, str) and not config.data.chat:
            if system:
                keys, found = f"{origin}data.system_prompt, data.chat", f"a system prompt, and text in {place}"
                raise InputError("E108", "options disagree", keys, found, "messages", "data.chat = true")
            return value, tokenizer(value)["input_ids"]
        messages = system + ([{"role": "user", "content": value}] if isinstance(value, str) else list(value))
        if template is None:
            fix = "set model.chat_template"
            raise InputError(
                "E403",
                "no chat template",
                f"{origin}model.tokenizer",
                f"messages in {place}",
                "a template or plain prompts",
                fix,
            )
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # The last two: contents that it cannot join.
            where, found = f"{origin}model.chat_template", f"{one_line(error)} for {place}"
            raise InputError(
                "E403", "chat template failed", where, found, "a template for these messages", "correct it"
            ) from None
        return messages, tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode


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
