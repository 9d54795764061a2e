"""A recipe's ``data`` → everything that a run reads: the tokenized rows of all sources, mixed and counted."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qvera.config import plugins
from qvera.config.schema import DataSection
from qvera.data.adapter_rows import AdapterRows, Adapters, take_adapters
from qvera.data.cache import tokenized, tokenized_uncached
from qvera.data.chat_template import OWN, ChatTemplate
from qvera.data.conversations import LABELLED, UNRENDERED
from qvera.data.images import ImageProcessor
from qvera.data.labelled import Labels, few_of_each_label, labels_of
from qvera.data.rows import Rows, concatenated
from qvera.data.sampler import random_order
from qvera.data.source import encoder_of, template_of, with_label_names
from qvera.data.tokenization import RowCounts
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.data.source import Processor


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
        return self.format + ("" if self.format in UNRENDERED else f", template: {self.template_text}")


@dataclass(slots=True)
class DataStats(RowCounts):
    """What happened to the rows, train and eval, besides `RowCounts`.

    Token counts are of the training rows, after truncation.

    Attributes:
        repeated_rows: eval rows that are, token for token, also training rows (by a 64-bit hash of their tokens).
        pads_with_eos: the tokenizer has no pad token.
        default_templates: named templates that were chosen where neither the tokenizer nor the recipe has one.
        adapters: of a run that trains many.
        cache_entries: names of the cache's entries that rows came from; other sources were tokenized now.
        histogram_edges, histogram_counts: training rows by length in tokens; counts[i] is of
            edges[i] <= T < edges[i + 1].
        labels: of labelled texts. ``label_rows``: training rows of each class, ``eval_label_rows``: held-out ones.
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
    adapters: Adapters | None = None
    labels: Labels | None = None
    label_rows: list[int] = field(default_factory=list)
    eval_label_rows: list[int] = field(default_factory=list)

    @property
    def targets_text(self) -> str:
        """What the loss covers, in a few words."""
        if self.labels is None:
            return f"the loss covers {self.trained_tokens:,} of {self.tokens:,} tokens"
        if self.labels.is_regression:
            return "each row's label is a number"
        counts = zip(self.labels.names, self.label_rows, strict=True)
        shown = ", ".join(f"{name}: {count:,}" for name, count in itertools.islice(counts, 8))
        return f"{len(self.labels.names)} classes ({shown}" + (", ...)" if len(self.labels.names) > 8 else ")")

    @property
    def format(self) -> str:
        """Of the rows; of a mixture each one once, by commas, the first source's first."""
        return ", ".join(dict.fromkeys(source.format for source in self.sources))

    @property
    def template(self) -> str:
        """As `format`."""
        return ", ".join(dict.fromkeys(source.template for source in self.sources))

    @property
    def dropped_rows(self) -> int:
        """Rows that are left out, for whatever reason."""
        return sum(map(len, self.dropped.values()))

    def to_dict(self) -> dict[str, Any]:
        """The ``data`` object of run.json."""
        counts = ["train_rows", "eval_rows", "tokens", "trained_tokens", "longest_tokens", "truncated_rows"]
        counts += ["truncated_tokens", "split_rows", "split_parts", "dropped_rows"]
        others = {} if self.adapters is None else {"adapters": self.adapters.to_dict()}
        if self.labels is not None:
            names, counts_of = list(self.labels.names), (self.label_rows, self.eval_label_rows)
            others["labels"] = {"names": names, "is_regression": self.labels.is_regression}
            others["labels"] |= dict(zip(("train_rows", "eval_rows"), counts_of, strict=True))
        return {
            **{name: getattr(self, name) for name in counts},
            "dropped": {reason: len(sources) for reason, sources in self.dropped.items()},
            "repeated_rows": self.repeated_rows,
            "sources": [asdict(source) for source in self.sources],
            "format": self.format,
            "template": self.template,
            "length_histogram": {"edges": self.histogram_edges, "counts": self.histogram_counts},
            **others,
        }


@dataclass(slots=True)
class Datasets:
    """Everything that a run reads from its data.

    Attributes:
        train, eval: rows in file order, one source after the other; ``eval`` is empty where the recipe holds none out.
        stats: counts for the preview and run.json.
        template: the template that was used (for the first source of a mixture); None for images.
        pad_id: for `collate`.
        part_names: where a schedule divides the rows, the names that ``train.part_of`` has the numbers of.
        set_aside: rows that are not trained, by name (`plugins.Schedule.divide`).
    """

    train: Rows
    eval: Rows
    stats: DataStats
    template: ChatTemplate | None
    pad_id: int
    part_names: list[str] = field(default_factory=list)
    set_aside: dict[str, Rows] = field(default_factory=dict)

    @property
    def labels(self) -> Labels | None:
        """What the labels of labelled texts mean; None where rows are no such."""
        return self.stats.labels

    @property
    def adapters(self) -> list[AdapterRows]:
        """The rows of each of many adapters, in order of first appearance; empty where the recipe has none."""
        return [] if self.stats.adapters is None else self.stats.adapters.trained

    @property
    def adapters_without_rows(self) -> list[str]:
        """Names of adapters whose rows were all dropped or cut away; they are not trained."""
        return [] if self.stats.adapters is None else self.stats.adapters.without_rows

    def first_rows(self, count: int) -> Rows:
        """``count`` training rows to look at: the first of each source in turn, then the second of each, and so on.

        Rows that a weight repeats come last. Of many adapters: the first row of each, then the second.

        Raises:
            InputError: ``count`` is negative.
        """
        if count < 0:
            raise InputError(f"--rows {count}: takes a whole number of rows to show, such as 3.")
        turns: list[tuple[int, int, int]] = []  # (pass over the source, place within it, place among all rows)
        for number, adapter in enumerate(self.adapters[:count]):
            turns += [(place, number, row) for place, row in enumerate(adapter.train[:count].tolist())]
        start = 0
        for source in self.stats.sources if not turns else ():
            turns += [(at // source.rows, at, start + at) for at in range(min(count, source.taken))]
            start += source.taken
        return self.train.take(np.array([row for *_, row in sorted(turns)[:count]], dtype=np.int64))


def data_sha256(datasets: Datasets) -> str:
    """SHA-256 over all rows' tokens, masks and tasks: equal where two machines read the same data the same way."""
    digest = hashlib.sha256()
    for rows in (datasets.train, datasets.eval, *datasets.set_aside.values()):
        for column in (rows.lengths, rows.ids_hash, rows.mask_hash):
            digest.update(len(column).to_bytes(8, "little") + np.ascontiguousarray(column).tobytes())
    if (part_of := getattr(datasets.train, "part_of", None)) is not None:
        names = json.dumps([datasets.part_names, list(datasets.set_aside)])
        digest.update(np.ascontiguousarray(part_of).tobytes() + names.encode())
    for adapter in datasets.adapters:
        for part in (adapter.name.encode(), adapter.train.tobytes(), adapter.eval.tobytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def build_datasets(
    section: DataSection,
    processor: Processor,
    console: Console | None = None,
    cached: bool = True,
    labels: Labels | None = None,
) -> Datasets:
    """Read, check, render and tokenize the rows that a recipe names, or find them in the cache.

    Args:
        section: the recipe's ``data``.
        processor: the base model's tokenizer, or its image processor.
        console: where warnings and the progress bar of a long run go (default: stderr).
        cached: False: no copy of the rows stays on disk, for rows that are somebody else's.
        labels: those of a trained model, for labelled rows that are scored; None: the rows say which there are.

    Raises:
        InputError: anything wrong with the recipe's ``data``, a file, a row or the tokenizer.
    """
    if labels is not None and not labels.is_regression:
        section = section.replace(label_names=list(labels.names))
    encoder = encoder_of(section, processor)
    stats = DataStats(pads_with_eos=encoder.pads_with_eos)
    sections = [with_label_names(each) for each in _sources(section)]
    read = tokenized if cached else tokenized_uncached
    sources = [read(each, encoder, console) for each in sections]
    divided = [schedule.divide(section, sections, sources) for schedule in plugins.schedules()]
    part_names, set_aside = next((parts for parts in divided if parts is not None), ([], {}))
    if section.rows_per_label is not None:
        few = few_of_each_label([source.train for source in sources], section.rows_per_label, section.seed)
        for source, rows in zip(sources, few, strict=True):
            source.train = rows
    for number, (about, source) in enumerate(zip(sections, sources, strict=True)):
        count = len(source.train)
        if about.weight != 1:
            source.train = source.train.take(weighted(count, about.weight, section.seed, number))
        looks = source.format, source.template
        stats.sources.append(SourceStats(about.path, about.weight, count, len(source.train), *looks))
        stats.add(source.counts)
        stats.unused_columns += [name for name in source.unused_columns if name not in stats.unused_columns]
        if source.cache_entry:
            stats.cache_entries.append(source.cache_entry)
        if about.template == "auto" and source.format not in UNRENDERED and source.template != OWN:
            stats.default_templates.append(source.template)
    train = concatenated([source.train for source in sources])
    held_out = concatenated([source.eval for source in sources])
    stats.train_rows, stats.eval_rows = len(train), len(held_out)
    stats.tokens = int(train.all_tokens.sum(dtype=np.int64))
    stats.trained_tokens = int(train.trained_tokens.sum(dtype=np.int64))
    stats.longest_tokens = int(train.lengths.max())
    if section.has_adapters:
        stats.adapters = take_adapters(sources[0].adapters, train, held_out, section.has_held_out_rows)
        stats.repeated_rows = sum(adapter.repeated_rows for adapter in stats.adapters.trained)
    else:
        # by sorting: hashes are no table's indices, and numpy 2.0 overflows where it tries 64 unsigned bits as such
        stats.repeated_rows = int(np.isin(held_out.ids_hash, train.ids_hash, kind="sort").sum())
    if isinstance(processor, ImageProcessor):
        for part in (train, held_out, *set_aside.values()):
            part.processor = processor
    if section.format in LABELLED:
        stats.labels = found = labels or labels_of(
            section, train, held_out, *set_aside.values(), known=sections[0].label_names
        )
        stats.label_rows, stats.eval_label_rows = found.counts(train), found.counts(held_out)
    stats.histogram_edges, stats.histogram_counts = length_histogram(train.lengths)
    template = template_of(section, encoder, sources[0].format)
    return Datasets(train, held_out, stats, template, encoder.pad_id, part_names, set_aside)


def _sources(section: DataSection) -> list[DataSection]:
    """``path`` and each part of the mixture as a section; ``eval_path`` and ``eval_split`` are the first's."""
    sources = [section.model_copy(update={"mixture": []})]
    for part in section.mixture:
        fraction = section.eval_fraction if section.held_out_path is None else 0.0
        own = {"mixture": [], "eval_path": None, "eval_split": None, "eval_fraction": fraction, **dict(part)}
        sources.append(section.model_copy(update=own))
    return sources


def weighted(count: int, weight: float, seed: int, number: int) -> np.ndarray:
    """Repeat each row as its source's weight says: whole passes, and a part drawn by ``seed``; at least one row.

    Args:
        count: the source's rows.
        number: the source's place in the mixture; each draws for itself.

    Returns:
        The numbers of rows, pass after pass, int64.
    """
    passes = int(weight)
    more = round((weight - passes) * count)
    if passes == 0:
        more = max(more, 1)
    chosen = np.sort(random_order(count, seed, 2**63 + number)[:more])
    return np.concatenate([np.tile(np.arange(count), passes), chosen])


def length_histogram(lengths: np.ndarray, bins: int = 10) -> tuple[list[int], list[int]]:
    """At most ``bins`` intervals of equal, round width that cover ``lengths``.

    Returns:
        edges [k + 1] and counts [k]; all intervals but the last are open on the right.
    """
    low, high = int(lengths.min()), int(lengths.max())
    round_widths = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    width = next(w for w in round_widths if low // w * w + bins * w > high)
    edges = list(range(low // width * width, (high // width + 2) * width, width))
    counts, _ = np.histogram(lengths, bins=edges)
    return edges, counts.tolist()
