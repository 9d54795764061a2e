"""Everything that a run reads from the recipe's ``data``: tokenized rows of all sources, mixed, counted and shown."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qvera.config import plugins
from qvera.config.sections import DataSection
from qvera.data.cache import tokenized
from qvera.data.chat_template import NAMED_TEMPLATES, OWN, ChatTemplate
from qvera.data.conversations import LABELLED, UNRENDERED
from qvera.data.images import ImageProcessor, images_of
from qvera.data.labelled import Labels, few_of_each_label, labels_of, new_labels, rows_by_label
from qvera.data.rows import Example, Rows, concatenated
from qvera.data.sampler import weighted
from qvera.data.source import encoder_of, members_of, template_of, with_label_names
from qvera.data.tokenization import RowCounts, decode
from qvera.utils.adapter_names import directory_names, shown_name, similar_names
from qvera.utils.errors import InputError
from qvera.utils.formatting import counted, first_of
from qvera.utils.progress import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qvera.data.source import Processor


_ALL_NAMED = 12
"""Up to this many adapters are listed by name."""
_SHOWN = 5
"""A warning lists up to this many names."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of one adapter, in the order of the data."""

    name: str
    train: np.ndarray  # int64 [n], n >= 1; row numbers in Datasets.train
    eval: np.ndarray  # int64 [k]; row numbers in Datasets.eval
    repeated_rows: int  # held-out rows with the same tokens as one of its training rows


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of a run. Every list except ``trained`` has names."""

    trained: list[AdapterRows] = field(default_factory=list)  # in order of first appearance
    without_rows: list[str] = field(default_factory=list)  # not trained, because no training rows are left
    only_held_out: list[str] = field(default_factory=list)  # only in data.eval_path; not read
    without_held_out: list[str] = field(default_factory=list)  # trained, but not scored
    similar: list[list[str]] = field(default_factory=list)  # groups of names that look nearly the same

    @property
    def counts(self) -> str:
        """The number of adapters and their training rows, as text. Of many, only those with fewest and most rows."""

        def listed(adapters: Sequence[AdapterRows]) -> str:
            return ", ".join(f"{shown_name(each.name)} ({len(each.train):,})" for each in adapters)

        if len(self.trained) <= _ALL_NAMED:
            return f"{len(self.trained):,}: {listed(self.trained)}"
        ranked = sorted(self.trained, key=lambda adapter: len(adapter.train))
        fewest, median, most = listed(ranked[:3]), len(ranked[len(ranked) // 2].train), listed(ranked[:-4:-1])
        return f"{len(ranked):,}. Rows to train on: fewest {fewest}; median {median:,}; most {most}"

    def to_dict(self) -> dict[str, Any]:
        """The counts and names for ``data`` in run.json."""
        names = {name: getattr(self, name) for name in ("without_rows", "only_held_out", "similar")}
        return {"trained": len(self.trained), **names}

    def warnings(self) -> list[str]:
        """Warnings to show before the first step."""
        texts: dict[str, Sequence[str | Sequence[str]]] = {
            "Adapters without a row after cutting, which are not trained: {}. Raise data.max_length, or change "
            "data.too_long.": self.without_rows,
            "Adapters without held-out rows, which are trained but not scored: {}.": self.without_held_out,
            "Adapters with held-out rows alone, which nothing trains or scores: {}. Are these names the same in "
            "data.path?": self.only_held_out,
            "Names that are nearly the same, of different adapters: {}.": self.similar,
        }
        return [text.format(_listed(names)) for text, names in texts.items() if names]


def _listed(names: Sequence[str | Sequence[str]]) -> str:
    """The first names, or groups of names, as text."""
    groups = [[each] if isinstance(each, str) else each for each in names]
    return first_of([" and ".join(map(repr, group)) for group in groups], _SHOWN)


def take_adapters(names: Sequence[str], train: Rows, held_out: Rows, holds_out: bool = False) -> Adapters:
    """Group rows by adapter.

    Raises InputError: two names differ only by case, and one is too long for a directory name of its own.
    """
    directory_names(names)
    number_of = {name: number for number, name in enumerate(names)}
    owner_of = []  # int64 [n] each: the adapter's number of each row; a new name gets the next number
    for rows in (train, held_out):
        owners, places = rows.owners()
        owner_of.append(np.array([number_of.setdefault(n, len(number_of)) for n in owners], dtype=np.int64)[places])
    repeated = np.zeros(len(number_of), dtype=np.int64)
    if len(held_out):
        hashes, kind = np.unique(np.concatenate([train.ids_hash, held_out.ids_hash]), return_inverse=True)
        pair = np.concatenate(owner_of) * len(hashes) + kind  # one number for each adapter and row
        is_repeated = np.isin(pair[len(train) :], pair[: len(train)], kind="sort")
        repeated = np.bincount(owner_of[1][is_repeated], minlength=len(number_of))
    every = [members_of(each, len(number_of)) for each in owner_of]
    # names with held-out rows alone come last, behind ``names``
    found = [AdapterRows(*each) for each in zip(names, *every, repeated.tolist(), strict=False)]
    trained = [each for each in found if len(each.train)]
    return Adapters(
        trained,
        without_rows=[each.name for each in found if not len(each.train)],
        only_held_out=list(number_of)[len(names) :],
        without_held_out=[each.name for each in trained if holds_out and not len(each.eval)],
        similar=similar_names(names),
    )


@dataclass(frozen=True, slots=True)
class SourceStats:
    """One source of a mixture."""

    path: str
    weight: float
    rows: int  # training rows before weighting
    taken: int  # training rows of an epoch
    format: str
    template: str

    @property
    def template_text(self) -> str:
        """The template's name for messages."""
        return "the tokenizer's own" if self.template == OWN else self.template

    @property
    def layout(self) -> str:
        """Format and template, for messages."""
        return self.format if self.format in UNRENDERED else f"{self.format}, template: {self.template_text}"


@dataclass(slots=True)
class DataStats(RowCounts):
    """Counts of all rows. Token counts are of the training rows, after truncation."""

    sources: list[SourceStats] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    train_rows: int = 0
    eval_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    most_trained_tokens: int = 0  # of a row
    longest_tokens: int = 0
    repeated_rows: int = 0  # eval rows with the same tokens as a training row
    pads_with_eos: bool = False  # the tokenizer has no pad token
    default_templates: list[str] = field(default_factory=list)  # used because none was given
    cache_entries: list[str] = field(default_factory=list)  # names of the entries that rows came from
    histogram_edges: list[int] = field(default_factory=list)  # in tokens
    histogram_counts: list[int] = field(default_factory=list)  # [i] has edges[i] <= tokens < edges[i + 1]
    adapters: Adapters | None = None  # of a run that trains many
    unused_label_names: list[str] = field(default_factory=list)  # of answers, names that no row has
    new_labels: list[str] = field(default_factory=list)  # `qvera.data.labelled.new_labels`
    verdicts: set[bool] = field(default_factory=set)  # of judged answers: good ones, bad ones or both
    labels: Labels | None = None
    label_rows: list[int] = field(default_factory=list)  # training rows of each class
    eval_label_rows: list[int] = field(default_factory=list)  # held-out rows of each class

    @property
    def unused_labels(self) -> bool:
        """Whether a column that is not read is named like one of labels."""
        return self.labels is None and not {"label", "labels"}.isdisjoint(self.unused_columns)

    @property
    def targets_text(self) -> str:
        """A phrase that says what the loss covers, for messages."""
        if self.format == "prompt":
            return "the model answers them while it is trained"
        if self.labels is None:
            return f"the loss covers {self.trained_tokens:,} of {self.tokens:,} tokens"
        if self.labels.is_regression:
            return "each row's label is a number"
        counts = [f"{name}: {rows:,}" for name, rows in zip(self.labels.names, self.label_rows, strict=True)]
        return f"{len(counts)} classes ({', '.join(counts[:8])}{', ...' * (len(counts) > 8)})"

    @property
    def format(self) -> str:
        """The formats of all sources, each once, separated by commas."""
        return ", ".join(dict.fromkeys(source.format for source in self.sources))

    @property
    def template(self) -> str:
        """The templates of all sources, each once, separated by commas."""
        return ", ".join(dict.fromkeys(source.template for source in self.sources))

    @property
    def dropped_rows(self) -> int:
        """Rows left out for any reason."""
        return sum(map(len, self.dropped.values()))

    def to_dict(self) -> dict[str, Any]:
        """The ``data`` object of run.json."""
        counts = ["train_rows", "eval_rows", "tokens", "trained_tokens", "longest_tokens", "truncated_rows"]
        counts += ["truncated_tokens", "split_rows", "split_parts", "dropped_rows"]
        found: dict[str, Any] = {
            **{name: getattr(self, name) for name in counts},
            "dropped": {reason: len(sources) for reason, sources in self.dropped.items()},
            "repeated_rows": self.repeated_rows,
            "sources": [asdict(source) for source in self.sources],
            "format": self.format,
            "template": self.template,
            "length_histogram": {"edges": self.histogram_edges, "counts": self.histogram_counts},
        }
        if self.adapters is not None:
            found["adapters"] = self.adapters.to_dict()
        if self.labels is not None:
            found["labels"] = {
                "names": list(self.labels.names),
                "is_regression": self.labels.is_regression,
                "train_rows": self.label_rows,
                "eval_rows": self.eval_label_rows,
            }
        return found


@dataclass(slots=True)
class Datasets:
    """Everything that a run reads from its data. Rows are in file order, one source after another."""

    train: Rows
    eval: Rows  # empty if the recipe holds none out
    stats: DataStats
    template: ChatTemplate | None  # the first source's; None for images
    pad_id: int
    part_names: list[str] = field(default_factory=list)  # for the numbers in ``train.part_of``
    set_aside: dict[str, Rows] = field(default_factory=dict)  # not trained; `plugins.Schedule.divide`

    @property
    def labels(self) -> Labels | None:
        """The meaning of the labels of labelled rows; None for other rows."""
        return self.stats.labels

    @property
    def adapters(self) -> list[AdapterRows]:
        """The rows of each adapter, in order of first appearance; empty unless the run trains many."""
        return [] if self.stats.adapters is None else self.stats.adapters.trained

    @property
    def adapters_without_rows(self) -> list[str]:
        """Names that are not trained: all their rows were dropped or cut away."""
        return [] if self.stats.adapters is None else self.stats.adapters.without_rows

    def template_beside(self, system: str | None) -> str | None:
        """Return the chat template to save beside an adapter (`ChatTemplate.beside`)."""
        return None if self.template is None else self.template.beside(system)

    def first_rows(self, count: int) -> Rows:
        """``count`` training rows to show, from each source (or adapter) in turn.

        Rows that a weight repeats come last. Raises InputError if ``count`` is negative.
        """
        if count < 0:
            raise InputError(f"--rows {count}: takes a whole number of rows to show, such as 3.")
        # Sorted by the first two numbers, rows alternate between the sources (or adapters).
        turns: list[tuple[int, int, int]] = []  # (pass over the source, place within it, place among all rows)
        for number, adapter in enumerate(self.adapters[:count]):
            turns += [(place, number, row) for place, row in enumerate(adapter.train[:count].tolist())]
        start = 0
        for source in self.stats.sources if not turns else ():
            turns += [(at // source.rows, at, start + at) for at in range(min(count, source.taken))]
            start += source.taken
        return self.train.take(np.array([row for *_, row in sorted(turns)[:count]], dtype=np.int64))


def data_sha256(datasets: Datasets) -> str:
    """SHA-256 over what all rows teach: tokens, masks, labels, tasks, columns that a reward reads."""
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
    progress_file: Path | None = None,
) -> Datasets:
    """Read, check, render and tokenize the rows of a recipe, or find them in the cache.

    Args:
        processor: the base model's tokenizer or image processor.
        cached: False: leave no copy on disk, for somebody else's rows.
        labels: the labels of a trained model that is to be scored; None: they are found in the rows.
        progress_file: gets how many rows are tokenized (`Phase`).

    Raises:
        InputError: anything wrong with the recipe's ``data``, a file, a row or the tokenizer.
    """
    if labels is not None and not labels.is_regression:
        section = section.replace(label_names=list(labels.names))
    encoder = encoder_of(section, processor)
    stats = DataStats(pads_with_eos=encoder.pads_with_eos)
    # each part of the mixture as a section; only the first keeps ``eval_path`` and ``eval_split``
    sections = [section.model_copy(update={"mixture": []})]
    for part in section.mixture:
        fraction = section.eval_fraction if section.held_out_path is None else 0.0
        own = {"mixture": [], "eval_path": None, "eval_split": None, "eval_fraction": fraction, **dict(part)}
        sections.append(section.model_copy(update=own))
    sections = [with_label_names(each) for each in sections]
    # Each source is read, checked and held out from by itself. What follows joins them.
    with Phase(console or Console(stderr=True), "reading rows", file=progress_file) as show:
        sources = [tokenized(each, encoder, show, cached) for each in sections]
    # Rows are divided and thinned out before the weights, which may repeat some of them.
    divided = [schedule.divide(section, sections, sources) for schedule in plugins.schedules_of(data=section)]
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
    stats.most_trained_tokens = int(train.trained_tokens.max())
    stats.longest_tokens = int(train.lengths.max())
    stats.verdicts = set(train.table["desirable"].unique().to_pylist()) - {None}
    if section.has_adapters:
        stats.adapters = take_adapters(sources[0].adapters, train, held_out, section.has_held_out_rows)
        stats.repeated_rows = sum(adapter.repeated_rows for adapter in stats.adapters.trained)
    else:
        # by sorting: hashes are no table's indices, and numpy 2.0 overflows where it tries 64 unsigned bits as such
        stats.repeated_rows = int(np.isin(held_out.ids_hash, train.ids_hash, kind="sort").sum())
    for part in (train, held_out, *set_aside.values()):
        # Tables hold images as files do, so rows need what makes a model's input of them.
        part.processor = processor if isinstance(processor, ImageProcessor) else images_of(processor)
    if section.format in LABELLED:
        # A part that is set aside is no training data, so its labels are checked like those of held-out rows.
        known, others = sections[0].label_names, set_aside.values()
        stats.labels = labels or labels_of(section, train, held_out, *others, known=known)
        stats.label_rows, stats.eval_label_rows = stats.labels.counts(train), stats.labels.counts(held_out)
    else:
        stats.new_labels = new_labels(train, held_out)
        found = rows_by_label(train) if section.label_names else ()
        stats.unused_label_names = [name for name in section.label_names if name not in found]
    stats.histogram_edges, stats.histogram_counts = length_histogram(train.lengths)
    template = template_of(section, encoder, sources[0].format)
    return Datasets(train, held_out, stats, template, encoder.pad_id, part_names, set_aside)


def length_histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """At most ten intervals of equal, round width that cover ``lengths``.

    Returns:
        edges [k + 1] and counts [k]. Only the last interval includes its right edge.
    """
    low, high = int(lengths.min()), int(lengths.max())
    round_widths = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    width = next(w for w in round_widths if low // w * w + 10 * w > high)
    edges = list(range(low // width * width, (high // width + 2) * width, width))
    counts, _ = np.histogram(lengths, bins=edges)
    return edges, counts.tolist()


_SHOWN_ROWS = 2
_SHOWN_TOKENS = 400
_BAR_WIDTH = 40
_REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")
"""Matches a special token that is repeated four times or more, as the tokens of an image are."""


def print_preflight(datasets: Datasets, processor: Any, console: Console, rows: int | None = None) -> None:
    """Print counts, a histogram of lengths, what was cut or dropped, and example rows (see `Datasets.first_rows`).

    Trained tokens stand in ⟦…⟧ too, so that a log file shows them. ``rows`` None: two, or one for each source if there
    are more.
    """
    stats = datasets.stats
    console.print(_summary(stats))
    for line in data_warnings(stats):
        console.print(Text(line, style="yellow"))
    if not isinstance(datasets.train.processor, ImageProcessor):  # whose images are all equally long
        console.print()
        console.print(Text("Training rows by length (tokens)", style="bold"))
        edges, highest = stats.histogram_edges, max(stats.histogram_counts, default=0)
        digits = len(f"{edges[-1]:,}")
        width = max(min(_BAR_WIDTH, console.width - 2 * digits - len(f" –     {highest:,}")), 1)
        for low, high, count in zip(edges[:-1], edges[1:], stats.histogram_counts, strict=True):
            bar = "█" * max(round(width * count / highest), 1 if count else 0)
            console.print(Text(f"{low:>{digits},} – {high - 1:>{digits},}  {bar:<{width}}  {count:,}"))
    for example in datasets.first_rows(max(_SHOWN_ROWS, len(stats.sources)) if rows is None else rows):
        console.print()
        if example.is_labelled:
            label = Text.assemble((example.source, "bold"), "  label: ", (str(example.reference), "green"))
            console.print(label, soft_wrap=True)
            if example.image is None:
                text = decode(processor, example.input_ids.tolist())
                console.print(Text(text if len(text) <= 1_600 else f"{text[:800]} … {text[-800:]}"))
            else:
                console.print("{} x {} pixels".format(*example.image.open().size))
            continue
        for image in example.images:
            console.print("image of {} x {} pixels".format(*image.open().size))
        for word, row in example.previewed():
            console.print(Text.assemble((example.source, "bold"), f"  ⟦{word}⟧"))
            console.print(_mark_trained(row, processor))
    console.print()


def _summary(stats: DataStats) -> Table:
    table = Table(Column(style="bold"), Column(), box=None, show_header=False, pad_edge=False)
    mean = stats.tokens / stats.train_rows
    rows = f"{stats.train_rows:,} to train on"
    if stats.eval_rows:
        rows += f", {stats.eval_rows:,} held out"
    table.add_row("Rows", rows)
    if stats.adapters is not None:
        table.add_row("Adapters", Text(stats.adapters.counts))
    if len(stats.sources) == 1:
        table.add_row("Format", stats.sources[0].layout)
    else:
        for source in stats.sources:
            count = f"{source.rows:,} x {source.weight:g}" if source.rows else "none is trained"
            text = f"{source.taken:,} from {source.path} ({count}): {source.layout}"
            table.add_row("  of these", Text(text))
    table.add_row("Tokens", f"{stats.tokens:,} (mean {mean:,.0f}, longest {stats.longest_tokens:,} a row)")
    counts = f"{stats.trained_tokens:,} tokens, {stats.trained_tokens / stats.tokens:.1%}"
    is_counted = stats.labels is None and stats.format != "prompt"
    name = "Trained" if stats.labels is None else "Labels"
    table.add_row(name, counts if is_counted else Text(stats.targets_text))
    table.add_row("Truncated", f"{stats.truncated_rows:,} rows, {stats.truncated_tokens:,} tokens cut off")
    if stats.split_rows:
        table.add_row("Split", f"{stats.split_rows:,} rows into {stats.split_parts:,}")
    table.add_row("Dropped", f"{stats.dropped_rows:,} rows")
    if stats.cache_entries:
        table.add_row("Tokenized", f"before; found in the cache ({', '.join(stats.cache_entries)})")
    if stats.unused_columns:
        table.add_row("Not read", Text("columns " + ", ".join(stats.unused_columns)))
        if stats.unused_labels:
            text = "To train a classifier of these labels, set task: sequence-classification; on good and bad answers, "
            table.add_row("", Text(f"{text}training.objective: kto."))
    return table


def label_warnings(stats: DataStats) -> list[str]:
    """What may be wrong with the names of a classifier's labels, a sentence each."""
    lines, names = [], stats.labels.names if stats.labels is not None else ()
    if similar := similar_names(names):
        lines.append(
            f"Labels that differ only by case or spaces are classes of their own: {_listed(similar)}. Is that meant?"
        )
    if any("," in name for name in names) and all(re.fullmatch(r"-?\d+(,\d+)?", name) for name in names):
        lines.append(
            f"Labels such as {names[0]} are classes. For numbers write 2.5, not 2,5, and data.regression: true."
        )
    return lines


def data_warnings(stats: DataStats) -> list[str]:
    """Warnings about the rows, a sentence or two each."""
    lines = []
    if stats.default_templates:
        templates = " and ".join(dict.fromkeys(stats.default_templates))
        lines.append(
            f"The tokenizer has no chat template, so rows are written with the template {templates}. "
            f"Set data.template to choose one: {', '.join(NAMED_TEMPLATES)}."
        )
    if stats.truncated_rows:
        lines.append(
            f"Cut to length: {counted(stats.truncated_rows, 'row')} lost {counted(stats.truncated_tokens, 'token')}, "
            f"{stats.truncated_targets:,} of them trained ones. Raise data.max_length (or max_source_length, "
            "max_target_length where you set it), or see data.too_long."
        )
    for reason, sources in stats.dropped.items():
        lines.append(f"Dropped, {reason}: {first_of(sources, 3)}")
    if stats.adapters is not None:
        lines += stats.adapters.warnings()
    if stats.repeated_rows:
        whose = " of the same adapter" if stats.adapters is not None else ""
        lines.append(
            f"Held-out rows that are also training rows{whose}: {stats.repeated_rows:,}. Held-out scores will flatter."
        )
    if stats.eval_rows > stats.train_rows:
        lines.append(
            f"More rows are held out than trained on: {stats.eval_rows:,} and {stats.train_rows:,}. data.eval_fraction "
            "is the share that is held out; data.eval_limit scores only the first of them."
        )
    if stats.labels is not None and stats.eval_rows > 1 and sum(map(bool, stats.eval_label_rows)) == 1:
        label = stats.labels.names[max(range(len(stats.eval_label_rows)), key=stats.eval_label_rows.__getitem__)]
        lines.append(
            f"All {stats.eval_rows:,} held-out rows have the label {label}, so their scores say little. "
            "data.eval_limit takes the first rows of a file; shuffle the file, or hold out more."
        )
    lines += label_warnings(stats)
    if stats.unused_label_names:
        lines.append(
            f"No row has {first_of(stats.unused_label_names)} of data.label_names. Its first name is that of 0."
        )
    if stats.new_labels:
        answers = first_of([*map(repr, stats.new_labels)])
        lines.append(f"No training row has the answer {answers}, which a held-out row has. Is it misspelt?")
    if stats.own_system_rows:
        total = stats.train_rows + stats.eval_rows
        lines.append(
            f"data.system is not in {min(stats.own_system_rows, total):,} of {total:,} rows, which have one of their "
            "own. Answers to prompts without one are asked with data.system."
        )
    for role, sources in stats.silent.items():
        where = first_of(list(dict.fromkeys(sources)))
        lines.append(f"Rows in which the {role} says nothing: {where}. Fill the turn in, or leave the row out.")
    if 2 * stats.unanswered_rows > stats.train_rows + stats.eval_rows:
        lines.append(
            f"Conversations that end with a user's or system turn: {stats.unanswered_rows:,}. Only what the assistant "
            "says is trained, and it reads what stands before. Are roles swapped, or is a turn in the wrong place?"
        )
    if len(stats.verdicts) == 1:
        kind, other = ("good", "false") if True in stats.verdicts else ("bad", "true")
        lines.append(f"All rows are {kind} answers, and kto learns from both kinds. Add rows with the label {other}.")
    if stats.special_token_rows:
        lines.append(
            f"Rows whose text contains special tokens (such as </s>), which are read as those tokens: "
            f"{stats.special_token_rows:,}. A prompt already in a chat template gets a second one around it."
        )
    if stats.unwritten_reasoning_rows:
        lines.append(
            f"Rows with reasoning that the chat template leaves out: {stats.unwritten_reasoning_rows:,}. It is not "
            "trained, also with data.train_on: all. Another data.template may write it."
        )
    if stats.pads_with_eos:
        lines.append("The tokenizer has no pad token: batches are padded with eos, masked out of attention and loss.")
    return lines


def _mark_trained(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Show a row with its trained tokens in ⟦…⟧ and green. Beyond 400 tokens, the middle of long runs is left out."""
    stretches, out = example.stretches(), Text()
    budget = max(_SHOWN_TOKENS // len(stretches), 8)
    for ids, trained in stretches:
        if len(ids) > budget:
            half = budget // 2
            left_out = f" … {len(ids) - 2 * half:,} tokens … "
            shown = decode(tokenizer, ids[:half]) + left_out + decode(tokenizer, ids[-half:])
        else:
            shown = decode(tokenizer, ids)
        shown = _REPEATED.sub(lambda found: f"{found[1]} (x {len(found[0]) // len(found[1])})", shown)
        out.append(f"⟦{shown}⟧" if trained else shown, style="green" if trained else "dim")
    return out
