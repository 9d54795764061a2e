"""Where the tensors of an adapter lie in a row of numbers: a bank of adapters is one tensor [slots, numbers]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch


class Columns(NamedTuple):
    """Where one tensor of an adapter lies in its row."""

    start: int
    shape: tuple[int, ...]

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The tensor in one row [numbers] of a bank, or in all of them [slots, numbers]: a view of this shape."""
        part = rows[..., self.start : self.start + math.prod(self.shape)]
        return part.view(*rows.shape[:-1], *self.shape)


class VectorLayout:
    """The columns of an adapter's tensors, one after the other.

    Attributes:
        columns: key in an adapter file → its columns.
        numbers: how many numbers an adapter has.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """``shapes``: key → shape, in the order of the columns."""
        self.columns: dict[str, Columns] = {}
        self.numbers = 0
        for key, shape in shapes.items():
            self.columns[key] = Columns(self.numbers, tuple(shape))
            self.numbers += math.prod(shape)

    def put(self, row: torch.Tensor, vectors: Mapping[str, torch.Tensor]) -> None:
        """Copy an adapter's vectors, by their keys in an adapter file, into a row [numbers].

        Raises:
            ValueError: a key is missing or unknown, or a shape is another one.
        """
        if set(vectors) != set(self.columns):
            wrong = sorted(set(vectors) ^ set(self.columns))
            raise ValueError(f"these vectors are not those of an adapter of this model: {', '.join(wrong[:3])}")
        for key, columns in self.columns.items():
            if tuple(vectors[key].shape) != columns.shape:
                raise ValueError(f"{key} has the shape {tuple(vectors[key].shape)}, not {columns.shape}")
            columns.of(row).copy_(vectors[key].detach())

    def take(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """A copy of the vectors in a row [numbers], by their keys in an adapter file."""
        return {key: columns.of(row).clone() for key, columns in self.columns.items()}
