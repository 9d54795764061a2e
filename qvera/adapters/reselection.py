"""Which places of a weight have values: SpIEL's rules for dropping and growing (arXiv 2401.16405, section 3.2).

Every so many steps a share of the values, those of smallest size, is dropped, and as many places are grown, at zero:

- by accumulated gradient (AG): candidates are the k places where the gradient of one micro-batch is largest. Their
  gradients are summed over some steps, and those with the largest sums are grown.
- by momentum approximation (MA): the places where the product of SM3's row and column accumulators is largest.

Neither ever has a tensor of the weight's size: gᵀ x and the products come as blocks of rows (`sparse.largest_places`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qvera.adapters.sparse import largest_places, largest_products, row_blocks, sampled_product


class Candidates:
    """The places of one weight that may get a value next, and their gradients, summed over optimizer steps.

    Attributes:
        indices: the places, int32 [k], sorted; None before the first micro-batch.
        total: sum of their gradients over the steps counted, [k] in fp32 or wider.
        squares: sum of the squares of the steps' gradients.
        steps: how many steps were counted.
    """

    def __init__(self, count: int) -> None:
        self.count, self.steps = count, 0
        self.indices: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None
        self._step: torch.Tensor | None = None

    @torch.no_grad()
    def watch(self, g: torch.Tensor, x: torch.Tensor) -> None:
        """Add a micro-batch: the gradient of the output [T, m] and the input [T, n]. The first one finds the places."""
        if self.indices is None:
            self.indices, self._step = largest_products(g, x, self.count)
            return
        found = sampled_product(g, x, self.indices)
        self._step = found if self._step is None else self._step + found

    def drop_step(self) -> None:
        """Forget the micro-batches of a step that was not taken; in the first step the places too."""
        self._step = None
        if self.steps == 0:
            self.indices = None

    def end_step(self, loss_scale: float = 1.0) -> None:
        """Count the micro-batches since the last call as the gradient of one step, divided by the loss scale."""
        if self._step is None:
            return
        step, self._step = self._step / loss_scale, None
        if self.total is None or self.squares is None:
            self.total, self.squares = torch.zeros_like(step), torch.zeros_like(step)
        self.total += step
        self.squares.addcmul_(step, step)
        self.steps += 1


class Replacement(NamedTuple):
    """Which values get which new places."""

    slots: torch.Tensor
    """The values that are dropped, as positions among the weight's values, [c]."""
    places: torch.Tensor
    """The places that are grown, int32 [c]; none has a value now."""
    chosen: torch.Tensor | None = None
    """By accumulated gradient: their positions among the candidates, [c]."""


def smallest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Positions of the share (rounded down) of ``values`` [k] with the smallest size, smallest first."""
    return values.abs().topk(int(len(values) * share), largest=False, sorted=True).indices


def by_accumulated_gradient(
    indices: torch.Tensor, values: torch.Tensor, share: float, candidates: torch.Tensor, total: torch.Tensor
) -> Replacement:
    """The replacement by the largest |total| among the candidates that keep no value.

    A place that is among the dropped and among the grown stays as it is, with its value. Where too few candidates are
    left, fewer values are dropped.

    Args:
        indices: the places of the values, int32 [k].
        values: [k].
        share: how many of them to drop.
        candidates: places, int32.
        total: the sum of gradients at each candidate.
    """
    dropped = smallest(values, share)
    stays = torch.ones_like(values, dtype=torch.bool)
    stays[dropped] = False
    free = (~torch.isin(candidates, indices[stays])).nonzero().squeeze(1)
    best = total[free].abs().topk(min(len(dropped), len(free)), sorted=True).indices
    grown = free[best]
    places = candidates[grown]
    new = ~torch.isin(places, indices[dropped])
    slots = dropped[~torch.isin(indices[dropped], places)]
    grown = grown[new]
    return Replacement(slots[: len(grown)], candidates[grown], grown)


def by_momentum(
    indices: torch.Tensor, values: torch.Tensor, share: float, row: torch.Tensor, column: torch.Tensor
) -> Replacement:
    """The replacement by the largest row_i column_j among the places without a value. What is dropped stays out.

    Args:
        indices: the places of the values, int32 [k], sorted.
        values: [k].
        share: how many of them to drop.
        row: SM3's accumulator of each row [m].
        column: of each column [n].
    """
    dropped = smallest(values, share)
    products = (rows.unsqueeze(1) * column for rows in row_blocks(row, len(column)))
    places, _ = largest_places(products, len(dropped), skip=indices)
    return Replacement(dropped[: len(places)], places)


@torch.no_grad()
def replace(indices: torch.Tensor, values: torch.Tensor, change: Replacement) -> torch.Tensor:
    """Give the values their new places, in place; grown ones start at zero and all are sorted by place again.

    Returns:
        For each value its slot before, [k].
    """
    indices[change.slots] = change.places
    values[change.slots] = 0.0
    order = indices.argsort()
    indices.copy_(indices[order])
    values.copy_(values[order])
    return order
