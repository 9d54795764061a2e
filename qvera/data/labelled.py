"""Rows with a label: a text, a pair of texts, or an image. Labels become targets."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvera.config.sections import DataSection
from qvera.data.conversations import LabelledRow
from qvera.data.images import StoredImage
from qvera.data.rows import Example, Rows, concatenated, padded_arrays
from qvera.data.sampler import random_order
from qvera.data.tokenization import RowCounts, RowTokenizer
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.formatting import first_of

VALUE = "value"
"""The name of a regression's one output."""
_NOTHING = np.zeros(0, np.int32)


class LabelledTokenizer(RowTokenizer):
    """Rows → examples, with the special tokens that the tokenizer itself puts around a text or a pair.

    The last token stands for the one target, the label (`Example.is_labelled`). If the tokenizer knows no pairs, a line
    break joins the two texts. No row is longer than the tokenizer's model_max_length.
    """

    def _is_empty(self, row: Any) -> bool:
        return not row.content.strip()

    def empty_rows_message(self, sources: Sequence[str]) -> str:
        """See `RowTokenizer.empty_rows_message`."""
        return f"{first_of(sources)}: the text is empty. Fill it in, or remove the row."

    def encode(self, rows: Sequence[LabelledRow]) -> tuple[list[Example], RowCounts]:
        """See `RowTokenizer.encode`."""
        counts, examples = RowCounts(), []
        asked, most = self.section.max_length, self.encoder.tokenizer.model_max_length
        limit = min(asked, most)
        for row in rows:
            counts.special_token_rows += bool(self.template.special.search(row.whole))
            ids, pair_start = self._ids(row)
            if len(ids) > limit and self.section.too_long == "drop":
                whose = "data.max_length" if asked <= most else "the tokenizer's model_max_length"
                counts.dropped.setdefault(f"longer than {whose} ({limit})", []).append(row.source)
                continue
            if len(ids) > limit:
                counts.truncated_rows += 1
                counts.truncated_tokens += len(ids) - limit
                # The tokenizer cuts, because a slice of the ids would lose the special tokens at the end.
                ids, pair_start = self._ids(row, truncation=True, max_length=limit)
            trained = np.zeros(len(ids), dtype=bool)
            trained[-1:] = True
            whole = np.asarray(ids, np.int32)
            examples.append(Example(whole, trained, row.source, _NOTHING, row.whole, row.label, row.owner, pair_start))
        return examples, counts

    def _ids(self, row: LabelledRow, **options: Any) -> tuple[list[int], int | None]:
        """Return the row's ids, and the place where the second text begins if the tokenizer gives token types."""
        tokenizer = self.encoder.tokenizer
        # The side is a setting of the tokenizer, which others use too, so it is put back.
        side, count = tokenizer.truncation_side, tokenizer.num_special_tokens_to_add
        tokenizer.truncation_side = "left" if self.section.too_long == "cut-start" else "right"
        try:
            knows_pairs = row.text_pair is not None and count(pair=True) > count(pair=False)
            texts = (row.content, row.text_pair) if knows_pairs else (row.whole,)
            found = tokenizer(*texts, return_attention_mask=False, verbose=False, **options)
        finally:
            tokenizer.truncation_side = side
        kinds = found.get("token_type_ids") or []
        return found["input_ids"], kinds.index(1) if 1 in kinds else None


class ImageEncoder:
    """Stands in for an `Encoder` where rows are images: each patch counts as one token."""

    tokenizer = None
    pad_id = 0
    pads_with_eos = False

    def __init__(self, patches: int) -> None:
        self.patches = patches

    def sha256(self) -> str:
        """Return a key of the encoding. Rows hold absolute paths, so the working directory is a part of it."""
        return f"{self.patches} tokens, from {Path.cwd()}"


class ImageReader(RowTokenizer):
    """Rows → examples. Each image is decoded once as a check, and stored as it was.

    An example has one token for each patch. The last one stands for its one target, the label (`Example.is_labelled`).
    """

    def _is_empty(self, row: Any) -> bool:
        return False

    def encode(self, rows: Sequence[LabelledRow]) -> tuple[list[Example], RowCounts]:
        """See `RowTokenizer.encode`."""
        tokens = self.encoder.patches  # type: ignore[attr-defined]
        ids, trained = np.zeros(tokens, np.int32), np.zeros(tokens, dtype=bool)
        trained[-1:] = True
        examples = []
        for row in rows:
            image = StoredImage(row.content, row.source)
            # Decoding finds a damaged image now instead of in the middle of training.
            image.open()
            where = row.content if isinstance(row.content, str) else ""
            examples.append(Example(ids, trained, row.source, _NOTHING, where, row.label, row.owner, images=(image,)))
        return examples, RowCounts()


@dataclass(frozen=True, slots=True)
class Labels:
    """The meaning of the rows' labels."""

    names: tuple[str, ...]  # classes in the order of the model's outputs; `VALUE` alone for a regression
    is_regression: bool = False

    def targets(self, rows: Sequence[Example]) -> np.ndarray:
        """Class numbers, int64 [n], or a regression's values, fp32 [n].

        Raises InputError: an unknown label; names the row.
        """
        if self.is_regression:
            for row in rows:
                if _as_number(str(row.reference)) is None:
                    raise InputError(
                        f"{row.source}: the label {row.reference!r} is no number, and this is a regression "
                        "(data.regression). Fix the row (decimals are as in 2.5), or set data.regression: false for "
                        "classes."
                    )
            return np.array([float(str(row.reference)) for row in rows], np.float32)
        numbers = {name: number for number, name in enumerate(self.names)}
        for row in rows:
            if row.reference not in numbers:
                # a spreadsheet's 2,5 too
                is_number = _as_number(str(row.reference).replace(",", ".")) is not None
                value = " Where labels are numbers to come near to, set data.regression: true; decimals are as in 2.5."
                raise InputError(
                    f"{row.source}: has the label {row.reference!r}{did_you_mean(str(row.reference), self.names)} "
                    f"Expected {first_of(self.names, 8)}: those of data.label_names, or without it of the training "
                    "rows. Fix the row, or train on such rows. Each part of data.mixture has label_names of its own."
                    f"{value if is_number else ''}"
                )
        return np.array([numbers[str(row.reference)] for row in rows], np.int64)

    def counts(self, rows: Rows) -> list[int]:
        """Rows of each class; empty for a regression."""
        found = {} if self.is_regression else rows_by_label(rows)
        return [] if self.is_regression else [found.get(name, 0) for name in self.names]


def few_of_each_label(sources: Sequence[Rows], count: int, seed: int) -> list[Rows]:
    """At most ``count`` rows of each label over all sources, chosen by ``seed``, in their old order.

    Raises InputError: a label is a fraction, so it is no class.
    """
    columns = [(rows.table["reference"], rows.chosen) for rows in sources]
    names = [name for column, at in columns for name in (column if at is None else column.take(at)).to_pylist()]
    for row, name in enumerate(names):
        if (value := _as_number(name)) is not None and not value.is_integer():
            raise InputError(
                f"data.rows_per_label: counts the rows of classes, and {concatenated(sources)[row].source} has the "
                f"label {name}, a number of a regression. Remove the key, or set data.limit."
            )
    # The first ``count`` of each label in random order, marked at their old places.
    seen: Counter[str] = Counter()
    taken = np.zeros(len(names), dtype=bool)
    for row in random_order(len(names), seed, 2**62).tolist():
        seen[names[row]] += 1
        taken[row] = seen[names[row]] <= count
    parts = np.split(taken, np.cumsum([len(rows) for rows in sources])[:-1])
    return [rows.take(np.flatnonzero(part)) for rows, part in zip(sources, parts, strict=True)]


def _references(rows: Rows) -> Iterator[pa.Array]:
    """Yield the references of the rows chunk by chunk, in the table's order: those of all may not fit into RAM."""
    chosen, start = None if rows.chosen is None else np.sort(rows.chosen), 0
    for chunk in rows.table["reference"].chunks:
        if chosen is None:
            yield chunk
        else:
            low, high = np.searchsorted(chosen, (start, start + len(chunk)))
            yield chunk.take(pa.array(chosen[low:high] - start))
        start += len(chunk)


def rows_by_label(rows: Rows, most: float = math.inf) -> dict[str, int]:
    """Label → number of rows. With more than ``most`` labels it is of the first rows only: answers may be no labels."""
    found: Counter[str] = Counter()
    for chunk in _references(rows):
        if len(found) > most:
            break
        found.update({entry["values"].as_py(): entry["counts"].as_py() for entry in pc.value_counts(chunk)})
    return dict(found)


_ROWS_OF_A_LABEL = 10
"""Answers are taken for labels where each is that of as many training rows, in the mean."""


def new_labels(train: Rows, held_out: Rows) -> list[str]:
    """The answers of held-out rows that no training row has; none where answers are no labels."""
    known: set[str | None] = set()
    for chunk in _references(train):
        known.update(chunk.unique().to_pylist())
        if len(known) * _ROWS_OF_A_LABEL > len(train):
            return []
    known.add(None)
    new: dict[str, None] = {}
    for chunk in _references(held_out):
        new.update(dict.fromkeys(answer for answer in chunk.unique().to_pylist() if answer not in known))
    return list(new)


def labels_of(section: DataSection, train: Rows, *held_out: Rows, known: Sequence[str] = ()) -> Labels:
    """Find the labels of the training rows, and check those of the held-out rows against them.

    Classes are ``data.label_names``. Without them they are ``known`` (a hub dataset's own names, maybe without rows)
    and then the other labels, sorted by value or by name. A fraction makes a regression, unless ``data.regression``
    says. Raises InputError: fewer than two classes, hardly a row for each, a class without training rows, or a label
    that is no class or no number.
    """
    found = rows_by_label(train)
    numbers = {label: _as_number(label) for label in found}
    all_numbers = None not in numbers.values()
    has_fraction = any(value is not None and not value.is_integer() for value in numbers.values())
    asked = section.regression if section.format == "classification" else False  # an image has a class
    # Whole numbers alone may be classes (0, 1, 2), so only a fraction makes a regression without being asked.
    if asked is True or (asked == "auto" and has_fraction and all_numbers and not section.label_names):
        labels = Labels((VALUE,), True)
        for rows in (train, *held_out):
            if None in map(_as_number, rows_by_label(rows)):
                labels.targets(rows)
        return labels
    others = sorted(found.keys() - set(known))
    if all_numbers:
        others.sort(key=lambda label: numbers[label] or 0.0)
    lost = {label for rows in held_out for label in rows_by_label(rows)} - found.keys()
    if section.label_names:
        lost &= {*section.label_names}
    if lost and section.held_out_path is None and not section.mixture:
        raise InputError(
            f"{section.path}: data.eval_fraction holds out all rows with the label {first_of(sorted(lost))}. Set "
            "another data.seed, name held-out rows with data.eval_path, or mend the label if it is misspelt."
        )
    if unused := [name for name in section.label_names if name not in found]:
        raise InputError(
            f"data.label_names: no training row of {section.path} has the label {first_of(unused)}. Add rows of it, or "
            "remove the name."
        )
    if len(found) < 2:
        raise InputError(
            f"{section.path}: all {len(train):,} training rows have the label {min(found)!r}, and a classifier needs "
            "two labels. Add rows of another label, or name the right column in data.columns ({label: YOUR_COLUMN})."
        )
    if section.rows_per_label is None and len(found) > max(40, 0.9 * len(train)):
        raise InputError(
            f"{section.path}: {len(found):,} labels in {len(train):,} training rows: nearly all occur once. Is the "
            "column an id or an answer? Name that of the labels in data.columns ({label: YOUR_COLUMN}). Numbers to "
            "come near to are written as in 2.5."
        )
    labels = Labels(tuple(section.label_names or [*known, *others]))
    for rows in (train, *held_out):
        if rows_by_label(rows).keys() - set(labels.names):
            labels.targets(rows)
    return labels


def _as_number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def labelled_arrays(examples: Sequence[Example], tokens: int, pad_id: int, masked: bool) -> dict[str, np.ndarray]:
    """Rows padded on the right to ``tokens``: ``input_ids``, and maybe ``attention_mask`` and ``token_type_ids``.

    All are int64 [B, T]. ``masked`` is for models whose tokens see the padding behind them. Token types are 1 from the
    second text on; they are there if any row has a ``pair_start``.
    """
    arrays = padded_arrays(examples, tokens, pad_id, masked)
    starts = np.array([tokens if e.pair_start is None else e.pair_start for e in examples])
    if (starts < tokens).any():
        columns, lengths = np.arange(tokens), np.array([len(example.input_ids) for example in examples])
        types = (columns >= starts[:, None]) & (columns < lengths[:, None])
        arrays["token_type_ids"] = types.astype(np.int64)
    return arrays
