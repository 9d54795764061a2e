"""Which rows train which of many adapters (``data.adapter_column``, ``data.adapter_files``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qvera.data.rows import Rows
from qvera.data.source import members_of
from qvera.utils.adapter_names import directory_names, shown_name, similar_names

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
        """How many adapters there are, and their training rows. Of many, only the fewest and the most rows."""

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
        texts = (
            (
                self.without_rows,
                "Adapters without a row after cutting, which are not trained: {}. Raise data.max_length, or change "
                "data.too_long.",
            ),
            (self.without_held_out, "Adapters without held-out rows, which are trained but not scored: {}."),
            (
                self.only_held_out,
                "Adapters with held-out rows alone, which nothing trains or scores: {}. Are these names the same in "
                "data.path?",
            ),
        )
        lines = []
        for names, text in texts:
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            lines += [text.format(", ".join(map(repr, names[:_SHOWN])) + more)] if names else []
        if self.similar:
            groups = "; ".join(" and ".join(map(repr, group)) for group in self.similar[:_SHOWN])
            more = f", and {len(self.similar) - _SHOWN:,} more groups" if len(self.similar) > _SHOWN else ""
            lines.append(f"Names that are nearly the same, of different adapters: {groups}{more}.")
        return lines


def take_adapters(names: Sequence[str], train: Rows, held_out: Rows, holds_out: bool = False) -> Adapters:
    """Group rows by adapter.

    Raises InputError: two names differ only by case, and one is too long for a directory name of its own.
    """
    directory_names(names)
    number_of = {name: number for number, name in enumerate(names)}
    owner_of = []  # int64 [n] each: the adapter's number of each row; a new name gets the next number
    for rows in (train, held_out):
        owners, places = rows.distinct_owners()
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
