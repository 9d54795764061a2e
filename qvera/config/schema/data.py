"""The section ``data`` of a recipe."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from qvera.config.fields import Bool, Fraction, NonEmpty, OnlyWith, Passes, Positive, Section, Seed
from qvera.config.plugins import extensible

_CAUSAL = OnlyWith("task: causal-lm")
_OF_TEXTS = OnlyWith("task: causal-lm", "task: sequence-classification")
_OF_IMAGES = OnlyWith("task: image-classification")
_LABELLED = OnlyWith("task: sequence-classification", "task: image-classification")
_EVALUATED = OnlyWith("data.eval_path", "data.eval_split", "data.eval_fraction")


MOST_ROW_CHARACTERS = 4 * 2**20


class DataSource(Section):
    """Rows of one kind, and how they become text."""

    path: NonEmpty
    """A .jsonl, .json, .csv, .tsv or .parquet file, a directory of such files, or a hub dataset id. Images may also be
    in a directory with a folder for each class."""
    weight: Passes = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.5 is every other row (chosen by ``data.seed``, the same
    rows in every epoch). To give a small source half of an epoch, weigh it by rows: 1,000 rows beside 10,000 need a
    weight of 10."""
    split: NonEmpty = "train"
    """The split of a hub dataset."""
    config_name: str | None = None
    """The configuration of a hub dataset."""
    revision: str | None = None
    """The branch, tag or commit of a hub dataset."""
    format: Literal[
        "auto",
        "alpaca",
        "messages",
        "sharegpt",
        "prompt-completion",
        "text",
        "classification",
        "image",
        "preference",
        "unpaired-preference",
        "prompt",
    ] = "auto"
    """The layout of a row. ``auto`` looks at the column names of the first row and reports what it found.
    ``classification`` (a text, maybe a ``text_pair``, and a ``label``) is that of ``task: sequence-classification``,
    ``image`` (an ``image`` and a ``label``) that of ``task: image-classification``, ``preference`` that of
    ``training.objective: dpo`` and ``orpo``, ``unpaired-preference`` that of ``kto``, and ``prompt`` (a ``prompt`` or
    ``messages``; the other columns are for the reward) that of ``grpo``."""
    columns: dict[str, str] = {}
    """The names of your columns where they differ from the format's: ``{prompt: question, completion: answer}``."""
    template: Annotated[NonEmpty, _CAUSAL] = "auto"
    """The chat template. ``auto``: the tokenizer's own; if it has none, ``plain`` for prompt-completion and text rows,
    else ``alpaca``. Or a named one: alpaca, chatml, llama-2, llama-3, mistral, zephyr, plain."""
    label_names: list[NonEmpty] = []
    """The names of integer labels, from 0, where the answers are such labels: ``[negative, positive]``. Without it a
    number is trained as text. Of the classification tasks the classes, in order; without it they are those
    of a hub dataset's own label names, or the labels of the training rows, sorted."""
    system: Annotated[str | None, _CAUSAL] = None
    """The system prompt of rows that have none of their own. ``qvera generate`` and ``qvera chat`` use it too."""
    limit: Positive | None = None
    """Use only the first rows of ``path``; of many adapters, of each. Default: all."""


@extensible("DataKeys")
class DataSection(DataSource):
    """Where rows come from, how they become text, and which tokens are trained."""

    mixture: list[DataSource] = []
    """More sources, mixed with ``path``. Each is a mapping of the keys above, with its own format, template and
    weight."""
    eval_path: str | None = None
    """A file of held-out rows; with ``adapter_files`` a directory of files with the same names. Default:
    ``eval_fraction`` of each source is held out, chosen by ``seed``."""
    eval_split: NonEmpty | None = None
    """The split of a hub dataset whose rows are held out, such as ``validation``: of ``eval_path`` where that is a hub
    dataset id, else of ``path``."""
    eval_fraction: Fraction = 0.0
    """The share of each source that is held out for evaluation; of many adapters, of each. 0: none."""
    train_on: Annotated[Literal["assistant", "last", "all"], _CAUSAL] = "assistant"
    """Which tokens the loss covers: every assistant turn, only the last one, or all tokens."""
    max_length: Annotated[int, Strict(), Field(ge=8, lt=2**31), _OF_TEXTS] = 1024
    """The most tokens of a row. ``too_long`` sets what happens to longer rows; they are counted and reported."""
    too_long: Annotated[Literal["cut-end", "cut-start", "split", "drop"], _OF_TEXTS] = "cut-end"
    """What happens to a longer row: cut at the end, cut at the start (after the BOS token), split into several rows, or
    dropped."""
    max_source_length: Annotated[Positive | None, _CAUSAL] = None
    """The most tokens before the first trained token (VeRA's instruction runs: 768). Default: no limit."""
    max_target_length: Annotated[Positive | None, _CAUSAL] = None
    """The most tokens from the first trained token on (VeRA's instruction runs: 256). Default: no limit."""
    prefix_once: Annotated[Bool, _CAUSAL] = True
    """Compute the common beginning of a batch's rows (a system prompt, an instruction) once for all of them, where that
    is faster. The results are the same. Only for Llama-like models with sdpa or eager attention. Attention then tells
    rows apart by a mask, or by their offsets on a GPU that runs torch's variable-length attention."""
    packing: Annotated[Bool, _CAUSAL] = False
    """Put as many rows as fit into one sequence of ``max_length`` tokens, without padding. Each row attends only to
    itself, and losses and gradients are those of padded rows (tested with sdpa and eager attention and with offsets,
    not on a GPU and not with flash-attn). Replaces ``training.per_device_train_batch_size``."""
    group_by_length: Annotated[Bool, _OF_TEXTS] = False
    """Put rows of similar length into one optimizer step. Less padding, but the order is less random."""
    tokenize_processes: Positive | None = None
    """Processes that tokenize texts or check images. Default: one, and one per core when the rest would take one
    process another minute. The rows are the same. Tokenized rows are kept in a cache (``qvera cache ls``)."""
    eval_limit: Annotated[Positive | None, _EVALUATED] = None
    """Use only the first held-out rows of each source; of many adapters, of each. Default: all."""
    adapter_column: Annotated[NonEmpty | None, _CAUSAL] = None
    """The column that names the adapter each row trains: many adapters (VeRA or LoRA) in one run, each with rows,
    order, steps, schedule and held-out rows of its own. A name is a text or a whole number; 1 and "1" are the same."""
    adapter_files: Annotated[Bool, _CAUSAL] = False
    """As ``adapter_column``, where ``path`` is a directory: each of its files has the rows of one adapter, which is
    called as the file is without its suffix."""
    augment: Annotated[Literal["none", "crop-flip"], _OF_IMAGES] = "none"
    """What is done to training images. ``crop-flip``: a random part of the image, of 8 to 100 % of its area, at the
    model's size, flipped left to right every other time. It is drawn anew in each step, from ``seed``, the step and the
    row alone."""
    regression: Annotated[Bool | Literal["auto"], OnlyWith("task: sequence-classification")] = "auto"
    """Whether labels are numbers to come near to, and not classes. ``auto``: where a label of the training rows has a
    fraction."""
    rows_per_label: Annotated[Positive | None, _LABELLED] = None
    """Train on only so many rows of each label, chosen by ``seed``. Default: all."""
    max_row_characters: Positive = MOST_ROW_CHARACTERS
    """The most characters of a row of JSONL or CSV. A longer one is an error, and is never read as a whole. All tokens
    of a row are in memory at once, at a hundred bytes each."""
    shuffle: Bool = True
    """Shuffle the rows anew in each epoch. ``false``: the order of the file."""
    seed: Seed = 0
    """The seed of the order of rows, and of the choice of held-out rows."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield keys that contradict each other."""
        if self.held_out_path is not None and self.eval_fraction > 0:
            key = "eval_split" if self.eval_path is None else "eval_path"
            yield "eval_fraction", f"held-out rows already come from data.{key}; remove one of the two."
        if self.held_out_path == self.path and self.eval_split == self.split:
            yield "eval_split", f"is data.split too ({self.split}), so nothing would be held out. Name another split."
        if self.has_adapters:
            yield from self._adapter_contradictions()
        if self.regression is True and self.rows_per_label is not None:
            yield "rows_per_label", "counts the rows of classes, and data.regression has none; remove one of the two."
        for key, source in self.sources("label_names"):
            if len(set(source.label_names)) < len(source.label_names):
                yield key, "names a label twice; each class has a name of its own."
        if self.regression is True and self.label_names:
            yield "label_names", "are names of classes, and data.regression has none; remove one of the two."
        if self.format == "classification" and self.too_long == "split":
            yield "too_long", "split: a text has one label, which its parts have not; use cut-end, cut-start or drop."

    def _adapter_contradictions(self) -> Iterator[tuple[str, str]]:
        key = "adapter_files" if self.adapter_files else "adapter_column"
        if self.adapter_column is not None and self.adapter_files:
            yield "adapter_files", "and data.adapter_column both name the rows' adapters; remove one of the two."
        if self.packing:
            yield (
                "packing",
                f"would put rows of several adapters (data.{key}) into one sequence, where one that diverges spoils "
                "the others; remove it.",
            )
        if self.mixture:
            yield "mixture", f"data.{key} takes all rows from data.path; put them into one file or directory."
        if self.weight != 1:
            yield "weight", f"each adapter (data.{key}) has rows of its own; set training.num_train_epochs instead."

    def sources(self, key: str) -> Iterator[tuple[str, DataSource]]:
        """This section and each part of ``mixture``, with the name that ``key`` (of this section) has there."""
        yield key, self
        section, dot, name = key.rpartition(".")
        for number, part in enumerate(self.mixture):
            yield f"{section}{dot}mixture.{number}.{name}", part

    @property
    def has_adapters(self) -> bool:
        """Whether each row names the adapter that it trains, so that the run trains many."""
        return self.adapter_column is not None or self.adapter_files

    @property
    def owner_column(self) -> tuple[str, str] | None:
        """The column that says what each row belongs to, and to what kind of thing: ``data.KIND_column`` names it."""
        return None if self.adapter_column is None else (self.adapter_column, "adapter")

    @property
    def has_held_out_rows(self) -> bool:
        """Whether the recipe names rows to evaluate on."""
        return self.held_out_path is not None or self.eval_fraction > 0

    @property
    def held_out_path(self) -> str | None:
        """Where held-out rows come from that are not drawn from the training rows; None: there are none such."""
        return self.path if self.eval_path is None and self.eval_split is not None else self.eval_path
