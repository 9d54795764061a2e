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
    """The rows of one adapter, in the order of the data.

    Attributes:
        name: as in the data.
        train: int64 [n], n >= 1; numbers of rows in ``Datasets.train``.
        eval: int64 [k]; numbers of rows in ``Datasets.eval``.
        repeated_rows: held-out rows that are, token for token, also training rows of this adapter.
    """

    name: str
    train: np.ndarray
    eval: np.ndarray
    repeated_rows: int


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of a run.

    Attributes:
        trained: those with training rows, in order of first appearance.
        without_rows: names of those whose training rows were all dropped or cut away; they are not trained.
        only_held_out: names of those that have held-out rows alone, in ``data.eval_path``; nothing reads these rows.
        without_held_out: names of those that are trained without a held-out row, where the recipe holds rows out.
        alike: groups of different names that look nearly the same (`qvera.utils.adapter_names.alike_names`).
    """

    trained: list[AdapterRows] = field(default_factory=list)
    without_rows: list[str] = field(default_factory=list)
    only_held_out: list[str] = field(default_factory=list)
    without_held_out: list[str] = field(default_factory=list)
    alike: list[list[str]] = field(default_factory=list)

    @property
    def counts(self) -> str:
        """How many there are and how many training rows they have; of many, those with the fewest and the most."""

        def listed(adapters: Sequence[AdapterRows]) -> str:
            return ", ".join(f"{shown_name(each.name)} ({len(each.train):,})" for each in adapters)

        if len(self.trained) <= _ALL_NAMED:
            return f"{len(self.trained):,}: {listed(self.trained)}"
        ranked = sorted(self.trained, key=lambda adapter: len(adapter.train))
        fewest, median, most = listed(ranked[:3]), len(ranked[len(ranked) // 2].train), listed(ranked[:-4:-1])
        return f"{len(ranked):,}. Rows to train on: fewest {fewest}; median {median:,}; most {most}"

    def to_dict(self) -> dict[str, Any]:
        """What run.json's ``data`` has of them; each adapter's own facts are under ``adapters``."""
        return {
            "trained": len(self.trained),
            "without_rows": self.without_rows,
            "only_held_out": self.only_held_out,
            "alike": self.alike,
        }

    def warnings(self) -> list[str]:
        """What a person should know about them before the first step, a sentence or two each."""
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
"""At most so many adapters are all named with their rows."""
_SHOWN = 5
"""Names that a sentence shows."""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def take_adapters(names: Sequence[str], train: Rows, held_out: Rows, holds_out: bool = False) -> Adapters:
    """The adapters of a run's rows.

    Args:
        names: of all adapters that the training rows named, those whose rows are all gone too.
        holds_out: whether the recipe holds rows out.

    Raises:
        InputError: a name is too long for a directory beside one that differs from it only by case.
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
    """Each row's adapter, int64 [n]; a name that is new gets the next number."""
    names, places = rows.distinct_owners()
    return np.array([number_of.setdefault(name, len(number_of)) for name in names], dtype=np.int64)[places]


def _repeated(of_train: np.ndarray, train: Rows, of_eval: np.ndarray, held_out: Rows, adapters: int) -> np.ndarray:
    """For each adapter its held-out rows that are also its training rows, int64 [adapters]."""
    if not len(held_out):
        return np.zeros(adapters, dtype=np.int64)
    hashes, kind = np.unique(np.concatenate([train.ids_hash, held_out.ids_hash]), return_inverse=True)
    pair = np.concatenate([of_train, of_eval]) * len(hashes) + kind  # one number for each adapter and row
    is_repeated = np.isin(pair[len(train) :], pair[: len(train)], kind="sort")
    return np.bincount(of_eval[is_repeated], minlength=adapters)
