"""The sample ledger: every prompt admitted and every completion generated has one fate, and the sums always close.

The controller tells it what happens; ``ledger/samples.jsonl`` gets one line a group when its fate is known. Law,
checked at every step in groups, samples and tokens: sampled = trained + filtered + stale + failed + lost + open.
A checkpoint holds a mark of it; a run that goes on from there cuts the file at the mark, and names what was cut.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.errors import MillraceError

FATES = ("trained", "filtered", "stale", "failed")
UNITS = ("groups", "samples", "tokens")


class LedgerBroken(MillraceError):
    """The sums of the sample ledger do not close: a bug of ours, or a damaged file."""


class SampleLedger:
    """The fates of one run's groups. Every group is closed exactly once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = path.read_bytes() if path.exists() else b""
        self._written = self._bytes = len(content)
        """On the disk, and with what is still to be written."""
        self._hash = hashlib.sha256(content)
        self._unwritten: list[bytes] = []
        self.counts: Counter[str] = Counter()
        """``unit/sampled``, ``unit/<fate>``; units are groups, samples and tokens."""
        self.reasons: Counter[str] = Counter()
        """Groups filtered or failed, by reason."""
        self.open: dict[int, tuple[int, int]] = {}
        """Groups without a fate: id -> samples and tokens generated for it so far."""

    def admit(self, group_id: int) -> None:
        """A prompt is going to be rolled out."""
        assert group_id not in self.open, group_id
        self.open[group_id] = (0, 0)
        self.counts["groups/sampled"] += 1

    def sampled(self, group_id: int, samples: int, tokens: int) -> None:
        """Completions of an admitted group have come."""
        before = self.open[group_id]
        self.open[group_id] = (before[0] + samples, before[1] + tokens)
        self.counts.update({"samples/sampled": samples, "tokens/sampled": tokens})

    def close(self, group_id: int, fate: str, reason: str = "", **facts: Any) -> tuple[int, int]:
        """The group's one and only fate, with ``facts`` such as the step that trained it; its samples and tokens."""
        assert fate in FATES, fate
        samples, tokens = self.open.pop(group_id)
        self.counts.update({f"groups/{fate}": 1, f"samples/{fate}": samples, f"tokens/{fate}": tokens})
        if reason:
            self.reasons[reason] += 1
            facts = {"reason": reason} | facts
        self._write({"group": group_id, "fate": fate, **facts, "samples": samples, "tokens": tokens})
        return samples, tokens

    def lose(self, group_id: int) -> None:
        """What was generated for an open group is gone with a process; it will be generated again."""
        samples, tokens = self.open[group_id]
        self.open[group_id] = (0, 0)
        self.counts.update({"samples/lost": samples, "tokens/lost": tokens})

    def check(self, in_flight: Iterable[int]) -> None:
        """Raises ``LedgerBroken`` unless the sums close and exactly ``in_flight`` have no fate yet."""
        self.flush()
        mine, theirs = set(self.open), set(in_flight)
        if mine != theirs:
            raise LedgerBroken(f"groups without a fate {sorted(mine - theirs)}, unknown groups {sorted(theirs - mine)}")
        still = {"groups": len(mine), "samples": 0, "tokens": 0}
        for samples, tokens in self.open.values():
            still["samples"] += samples
            still["tokens"] += tokens
        for unit in UNITS:
            known = sum(self.counts[f"{unit}/{fate}"] for fate in (*FATES, "lost")) + still[unit]
            if known != self.counts[f"{unit}/sampled"]:
                raise LedgerBroken(f"{self.counts[f'{unit}/sampled']} {unit} sampled, {known} accounted for")

    def metrics(self) -> dict[str, float]:
        """All counts so far, and groups filtered or failed by reason."""
        rows = {f"groups/{fate}": float(self.counts[f"groups/{fate}"]) for fate in FATES}
        rows |= {f"samples/{fate}": float(self.counts[f"samples/{fate}"]) for fate in (*FATES, "lost")}
        return rows | {f"groups/{reason}": float(n) for reason, n in self.reasons.items()}

    def verdict(self) -> str:
        """One sentence that accounts for every sample."""
        fates = ", ".join(f"{self.counts[f'samples/{fate}']:,} {fate}" for fate in (*FATES, "lost"))
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.reasons.most_common())
        left = sum(samples for samples, _ in self.open.values())
        text = f"{self.counts['samples/sampled']:,} completions: {fates}, {left:,} not needed any more"
        return f"{text} (groups: {reasons})" if reasons else text

    def mark(self) -> dict[str, Any]:
        """This moment, for a checkpoint; what is written after it can be cut off again."""
        self.flush()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        return {
            "bytes": self._bytes,
            "sha256": self._hash.hexdigest(),
            "counts": dict(self.counts),
            "reasons": dict(self.reasons),
            "open": [[group_id, *numbers] for group_id, numbers in self.open.items()],
        }

    def rewind(self, mark: dict[str, Any]) -> int:
        """Go back to ``mark``; lines after it move to ``samples.cut.jsonl``. Returns how many groups were cut.

        Raises ``LedgerBroken`` if the lines before the mark are not those of the checkpoint.
        """
        self.flush()
        if not is_at(self._path, mark):
            raise LedgerBroken(f"{self._path}: the first {mark['bytes']} bytes are not those that the checkpoint saw")
        content = self._path.read_bytes()
        kept, cut = content[: mark["bytes"]], content[mark["bytes"] :]
        if cut:
            with self._path.with_suffix(".cut.jsonl").open("ab") as aside:
                aside.write(cut)
        os.truncate(self._path, mark["bytes"])
        self._written = self._bytes = mark["bytes"]
        self._hash = hashlib.sha256(kept)
        self.counts, self.reasons = Counter(mark["counts"]), Counter(mark["reasons"])
        self.open = {group_id: (samples, tokens) for group_id, samples, tokens in mark["open"]}
        return cut.count(b"\n")

    def flush(self) -> None:
        """Write what came since the last time, whole or not at all. Raises ``OSError``."""
        with self._path.open("ab") as file:
            try:
                file.writelines(self._unwritten)
                file.flush()
            except OSError:
                os.truncate(self._path, self._written)
                raise
        self._written = self._bytes
        self._unwritten.clear()

    def _write(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        self._unwritten.append(line)
        self._bytes += len(line)
        self._hash.update(line)


def is_at(path: Path, mark: dict[str, Any]) -> bool:
    """Whether the ledger in ``path`` begins with the lines that it had at ``mark``."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[: mark["bytes"]]).hexdigest() == str(mark["sha256"])
