"""Which rows train which of many adapters (``data.adapter_column``, ``data.adapter_files``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qvera.data.rows import Rows
from qvera.data.source import members_of
from qvera.utils.adapter_names import alike_names, directory_names, shown_name


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
    alike: list[list[str]] = field(default_factory=list)  # groups of names that look nearly the same

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
        return {
            "trained": len(self.trained),
            "without_rows": self.without_rows,
            "only_held_out": self.only_held_out,
            "alike": self.alike,
        }

    def warnings(self) -> list[str]:
        """Warnings to show before the first step."""
        lines = []
        if self.without_rows:
            lines.append(
                f"Adapters without a row after cutting, which are not trained: {_listed(self.without_rows)}. Raise "
                "data.max_length, or change data.too_long."
            )
        if self.without_held_out:
            lines.append(
                f"Adapters without held-out rows, which are trained but not scored: {_listed(self.without_held_out)}."
            )
        if self.only_held_out:
            lines.append(
                f"Adapters with held-out rows alone, which nothing trains or scores: {_listed(self.only_held_out)}. "
                "Are these names the same in data.path?"
            )
        if self.alike:
            groups = [" and ".join(map(repr, group)) for group in self.alike[:_SHOWN]]
            more = f", and {len(self.alike) - _SHOWN:,} more groups" if len(self.alike) > _SHOWN else ""
            lines.append(f"Names that are nearly the same, of different adapters: {'; '.join(groups)}{more}.")
        return lines


_ALL_NAMED = 12
"""Up to this many adapters are listed by name."""
_SHOWN = 5
"""A warning lists up to this many names."""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def take_adapters(names: Sequence[str], train: Rows, held_out: Rows, holds_out: bool = False) -> Adapters:
    """Group rows by adapter.

    Raises:
        InputError: two names differ only by case, and one is too long for a directory name of its own.
    """
    directory_names(names)
    number_of = {name: number for number, name in enumerate(names)}
    of_train, of_eval = (_numbers(rows, number_of) for rows in (train, held_out))
    only_held_out = list(number_of)[len(names) :]
    rows_of = members_of(of_train, len(number_of))
    eval_of = members_of(of_eval, len(number_of))
    repeated = _repeated(of_train, train, of_eval, held_out, len(number_of))
    every = zip(names, rows_of, eval_of, repeated.tolist(), strict=False)  # those with held-out rows alone come last
    found = [AdapterRows(*each) for each in every]
    trained = [each for each in found if len(each.train)]
    without_rows = [each.name for each in found if not len(each.train)]
    without_held_out = [each.name for each in trained if not len(each.eval)] if holds_out else []
    return Adapters(trained, without_rows, only_held_out, without_held_out, alike_names(names))


def _numbers(rows: Rows, number_of: dict[str, int]) -> np.ndarray:
    """Each row's adapter number, int64 [n]. A new name gets the next number."""
    names, places = rows.distinct_owners()
    return np.array([number_of.setdefault(name, len(number_of)) for name in names], dtype=np.int64)[places]


def _repeated(of_train: np.ndarray, train: Rows, of_eval: np.ndarray, held_out: Rows, adapters: int) -> np.ndarray:
    """Held-out rows of each adapter that are also its training rows, int64 [adapters]."""
    if not len(held_out):
        return np.zeros(adapters, dtype=np.int64)
    hashes, kind = np.unique(np.concatenate([train.ids_hash, held_out.ids_hash]), return_inverse=True)
    pair = np.concatenate([of_train, of_eval]) * len(hashes) + kind  # one number for each adapter and row
    is_repeated = np.isin(pair[len(train) :], pair[: len(train)], kind="sort")
    return np.bincount(of_eval[is_repeated], minlength=adapters)
