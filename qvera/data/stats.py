"""The counts of a data set: its sources, what its rows lost on their way, and how long they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qvera.data.chat_template import OWN
from qvera.data.row_tables import Rows
from qvera.data.tokenization import Counts


@dataclass(frozen=True, slots=True)
class SourceStats:
    """One source of a mixture: its training rows, how many of an epoch it gives with its weight, what they look like."""

    path: str
    weight: float
    rows: int
    taken: int
    format: str
    template: str

    @property
    def template_text(self) -> str:
        """The template as a person reads it."""
        return "the tokenizer's own" if self.template == OWN else self.template

    @property
    def layout(self) -> str:
        """Format and template in a few words."""
        return self.format + ("" if self.format == "text" else f", template: {self.template_text}")


@dataclass(slots=True)
class DataStats:
    """What happened to the rows. Token counts are of the training rows, after truncation.

    Attributes:
        truncated_rows: rows, train and eval, that lost tokens to max_length, max_source_length or max_target_length.
        truncated_tokens: how many tokens they lost.
        split_rows: rows, train and eval, that were split because they were longer than max_length.
        split_parts: how many rows they became (parts without a trained token are left out).
        dropped: reason → sources of rows that are left out.
        spelled_rows: rows whose text spells special tokens (such as ``</s>``), which are read as those tokens.
        repeated_rows: eval rows that are, token for token, also training rows (by a 64-bit hash of their tokens).
        found: names of the cache's entries that rows came from; sources that are not among them were tokenized now.
        histogram_edges, histogram_counts: training rows by length in tokens; counts[i] is of
            edges[i] <= T < edges[i + 1].
    """

    sources: list[SourceStats] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    train_rows: int = 0
    eval_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    split_rows: int = 0
    split_parts: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    spelled_rows: int = 0
    repeated_rows: int = 0
    pads_with_eos: bool = False
    found: list[str] = field(default_factory=list)
    histogram_edges: list[int] = field(default_factory=list)
    histogram_counts: list[int] = field(default_factory=list)

    @property
    def format(self) -> str:
        """Of the rows; of a mixture each one once, by commas, the first source's first."""
        return ", ".join(dict.fromkeys(source.format for source in self.sources))

    @property
    def template(self) -> str:
        """As `format`."""
        return ", ".join(dict.fromkeys(source.template for source in self.sources))

    def add_source(self, source: SourceStats, unused: list[str], pads_with_eos: bool) -> None:
        """Note what a source looks like."""
        self.sources.append(source)
        self.unused_columns += [name for name in unused if name not in self.unused_columns]
        self.pads_with_eos = pads_with_eos

    def add_counts(self, counts: Counts, found: str | None) -> None:
        """Note what a source's rows lost, and the cache's entry that they came from."""
        for name in ("truncated_rows", "truncated_tokens", "split_rows", "split_parts", "spelled_rows"):
            setattr(self, name, getattr(self, name) + getattr(counts, name))
        for reason, sources in counts.dropped.items():
            self.dropped.setdefault(reason, []).extend(sources)
        self.found += [] if found is None else [found]

    @property
    def dropped_rows(self) -> int:
        return sum(map(len, self.dropped.values()))

    def to_dict(self) -> dict[str, Any]:
        """The ``data`` object of run.json."""
        return {
            "train_rows": self.train_rows,
            "eval_rows": self.eval_rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "longest_tokens": self.longest_tokens,
            "truncated_rows": self.truncated_rows,
            "truncated_tokens": self.truncated_tokens,
            "split_rows": self.split_rows,
            "split_parts": self.split_parts,
            "dropped_rows": self.dropped_rows,
            "dropped": {reason: len(sources) for reason, sources in self.dropped.items()},
            "repeated_rows": self.repeated_rows,
            "sources": [asdict(source) for source in self.sources],
            "format": self.format,
            "template": self.template,
            "length_histogram": {"edges": self.histogram_edges, "counts": self.histogram_counts},
        }


def count(stats: DataStats, train: Rows, held_out: Rows) -> None:
    """Count the rows into ``stats``, by what is known of all of them without a look at any."""
    lengths = train.lengths
    stats.train_rows, stats.eval_rows = len(train), len(held_out)
    stats.tokens = int(lengths.sum(dtype=np.int64))
    stats.trained_tokens = int(train.trained_tokens.sum(dtype=np.int64))
    stats.longest_tokens = int(lengths.max())
    # by sorting: hashes are no table's indices, and numpy 2.0 overflows where it tries 64 unsigned bits as such
    stats.repeated_rows = int(np.isin(held_out.ids_hash, train.ids_hash, kind="sort").sum())
    stats.histogram_edges, stats.histogram_counts = length_histogram(lengths)


def length_histogram(lengths: np.ndarray, bins: int = 10) -> tuple[list[int], list[int]]:
    """At most ``bins`` intervals of equal, round width that cover ``lengths``.

    Returns:
        edges [k + 1] and counts [k]; all intervals but the last are open on the right.
    """
    low, high = int(lengths.min()), int(lengths.max())
    width = next(w for w in _round_widths() if low // w * w + bins * w > high)
    edges = [low // width * width]
    while edges[-1] <= high:
        edges.append(edges[-1] + width)
    counts, _ = np.histogram(lengths, bins=edges)
    return edges, counts.tolist()


def _round_widths() -> Iterator[int]:
    for power in itertools.count():
        yield from (10**power, 2 * 10**power, 5 * 10**power)
