"""The counts of a data set: its sources, what its rows lost, and how long they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qvera.data.chat_template import OWN
from qvera.data.rows import Rows
from qvera.data.tokenization import RowCounts

if TYPE_CHECKING:
    from qvera.data.tokenize_source import TokenizedSource


@dataclass(frozen=True, slots=True)
class SourceStats:
    """One source of a mixture: its training rows, its share of an epoch, and what the rows look like."""

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
class DataStats(RowCounts):
    """What happened to the rows, train and eval, besides `RowCounts`.

    Token counts are of the training rows, after truncation.

    Attributes:
        repeated_rows: eval rows that are, token for token, also training rows (by a 64-bit hash of their tokens).
        pads_with_eos: the tokenizer has no pad token.
        default_templates: named templates that were chosen because the tokenizer has no chat template and the recipe
        names none.
        cache_entries: names of the cache's entries that rows came from; other sources were tokenized now.
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
    repeated_rows: int = 0
    pads_with_eos: bool = False
    default_templates: list[str] = field(default_factory=list)
    cache_entries: list[str] = field(default_factory=list)
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

    def add_source(self, about: SourceStats, source: TokenizedSource) -> None:
        """Note what a source looks like and what its rows lost."""
        self.sources.append(about)
        self.unused_columns += [name for name in source.unused_columns if name not in self.unused_columns]
        self.cache_entries += [source.cache_entry] if source.cache_entry else []
        self.add(source.counts)

    def count(self, train: Rows, held_out: Rows) -> None:
        """Count the rows by the columns that lie beside them; no row is read."""
        self.train_rows, self.eval_rows = len(train), len(held_out)
        self.tokens = int(train.lengths.sum(dtype=np.int64))
        self.trained_tokens = int(train.trained_tokens.sum(dtype=np.int64))
        self.longest_tokens = int(train.lengths.max())
        # by sorting: hashes are no table's indices, and numpy 2.0 overflows where it tries 64 unsigned bits as such
        self.repeated_rows = int(np.isin(held_out.ids_hash, train.ids_hash, kind="sort").sum())
        self.histogram_edges, self.histogram_counts = length_histogram(train.lengths)

    @property
    def dropped_rows(self) -> int:
        """Rows that are left out, for whatever reason."""
        return sum(map(len, self.dropped.values()))

    def to_dict(self) -> dict[str, Any]:
        """The ``data`` object of run.json."""
        counts = ["train_rows", "eval_rows", "tokens", "trained_tokens", "longest_tokens", "truncated_rows"]
        counts += ["truncated_tokens", "split_rows", "split_parts", "dropped_rows"]
        return {
            **{name: getattr(self, name) for name in counts},
            "dropped": {reason: len(sources) for reason, sources in self.dropped.items()},
            "repeated_rows": self.repeated_rows,
            "sources": [asdict(source) for source in self.sources],
            "format": self.format,
            "template": self.template,
            "length_histogram": {"edges": self.histogram_edges, "counts": self.histogram_counts},
        }


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
