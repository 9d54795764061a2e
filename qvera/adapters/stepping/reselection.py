"""Which places of a weight have values: SpIEL's rules for dropping and growing (arXiv 2401.16405, section 3.2).

Every so many steps a share of the values, those of smallest size, is dropped, and as many places are grown, at zero:

- by accumulated gradient (AG): candidates are the k places where the gradient of one micro-batch is largest. Their
  gradients are summed over some steps, and those with the largest sums are grown.
- by momentum approximation (MA): the places where the product of SM3's row and column accumulators is largest.

Neither ever has a tensor of the weight's size: gᵀ x and the products come as blocks of rows (`sparse.largest_places`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from qvera.adapters.hooks import TrainingHook
from qvera.adapters.products.sparse import largest_places, largest_products, row_blocks, sampled_product
from qvera.adapters.stepping.sparse_optim import AgedAdamW, Seeds, SparseSM3
from qvera.distributed.group import Group
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.adapted_forward import AdaptedForward


class Candidates:
    """The places of one weight that may get a value next, and their gradients, summed over optimizer steps.

    Attributes:
        indices: the places, int32 [k], sorted; None before the first micro-batch.
        total: sum of their gradients over the steps counted, [k] in fp32 or wider.
        squares: sum of the squares of the steps' gradients.
        steps: how many steps were counted.
        agreed: whether the places stay when a step is dropped: a step was counted, or all ranks have these.
    """

    def __init__(self, count: int) -> None:
        self.count, self.steps = count, 0
        self.indices: torch.Tensor | None = None
        self.agreed = False
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
        if not self.agreed:
            self.indices = None

    def agree(self, indices: torch.Tensor) -> None:
        """Take these places, and forget the gradients of the step that is under way."""
        self.indices, self._step, self.agreed = indices, None, True

    def step_gradient(self) -> torch.Tensor:
        """The gradients of the step that is under way, [k]; to be summed over ranks in place."""
        if self._step is None:  # this rank had no rows
            assert self.indices is not None
            self._step = torch.zeros(len(self.indices), device=self.indices.device)
        return self._step

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
        self.agreed = True


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


class SparseLayer(NamedTuple):
    """A linear with sparse values, for `Reselection`."""

    layer: AdaptedForward
    values: nn.Parameter  # [k]
    places: torch.Tensor  # int32 [k]


class Reselection(TrainingHook):
    """Changes the places of sparse values between optimizer steps.

    Steps ``accumulate``, ``every`` + ``accumulate``, 2 ``every`` + ``accumulate``, .. are followed by a change, but for
    the run's last step. It moves ``drop_share`` of the values, times the share of the run's steps that are left. The
    first one moves all of them where ``places_are_random``.

    Several ranks: the candidates are those of rank 0's first micro-batch. The step that finds them is not counted then,
    since the others have no gradients at these places yet.

    Args:
        layers: by name. Their `AdaptedForward.gradient_watch` is set while gradients are accumulated.
        optimizer: of all values. Its class says how new places are chosen.
        every: steps from one change to the next.
        accumulate: steps over which gradients are summed before each, at most ``every``.
        drop_share: see above.
        total_steps: of the run.
        places_are_random: at the start; False: another training chose them.
        group: the run's processes.

    Raises:
        InputError: several processes, and no step is left to accumulate gradients in.
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        optimizer: AgedAdamW | SparseSM3,
        every: int,
        accumulate: int,
        drop_share: float,
        total_steps: int,
        places_are_random: bool = True,
        group: Group | None = None,
    ) -> None:
        self.layers, self.optimizer, self.group = dict(layers), optimizer, group or Group()
        self.every, self.accumulate, self.drop_share, self.total_steps = every, accumulate, drop_share, total_steps
        self.places_are_random = places_are_random
        self.candidates: dict[str, Candidates] = {}
        if self.group.world_size > 1 and accumulate == 1 and isinstance(optimizer, AgedAdamW):
            raise InputError(
                "adapter.accumulate_steps: is 1, and with several processes the first of these steps only finds the "
                "candidates. Set it to 2 or more."
            )

    def before_step(self, step: int) -> None:
        """Watch gradients in the steps before a change; drop what an attempt without a step has left."""
        if (step - 1) % self.every >= self.accumulate or not isinstance(self.optimizer, AgedAdamW):
            return
        for name, (layer, values, _) in self.layers.items():
            candidates = self.candidates.setdefault(name, Candidates(len(values)))
            candidates.drop_step()
            layer.gradient_watch = candidates.watch

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """Count the step's gradients, and change the places where it is time."""
        for layer, *_ in self.layers.values():
            layer.gradient_watch = None
        if self.candidates:
            self._end_step(loss_scale)
        if step % self.every == self.accumulate % self.every:
            left = max(0.0, 1 - step / self.total_steps)
            moves_all = step == self.accumulate and self.places_are_random
            for name in self.layers if left else ():
                self._change(name, 1.0 if moves_all else self.drop_share * left)
            self.candidates = {}

    def _end_step(self, loss_scale: float) -> None:
        several = self.group.world_size > 1
        if several and not all(candidates.agreed for candidates in self.candidates.values()):
            for name, candidates in self.candidates.items():  # one at a time: together they are as large as the adapter
                found = {} if candidates.indices is None else {name: candidates.indices.cpu()}
                candidates.agree(self.group.broadcast_tensors(found)[name].to(self.layers[name].values.device))
            return
        for candidates in self.candidates.values():
            if several:
                self.group.all_reduce([candidates.step_gradient()])
            candidates.end_step(loss_scale)

    def _change(self, name: str, share: float) -> None:
        _, values, places = self.layers[name]
        if isinstance(self.optimizer, SparseSM3):
            state = self.optimizer.state_of(values)
            change = by_momentum(places, values, share, state["row"], state["column"])
            self.optimizer.take_over(values, change.slots, replace(places, values, change))
            return
        found = self.candidates[name]
        if found.indices is None or found.total is None or found.squares is None:  # no token came through the layer
            return
        change = by_accumulated_gradient(places, values, share, found.indices, found.total)
        chosen = change.chosen
        seeds = Seeds(found.total[chosen] / found.steps, found.squares[chosen] / found.steps, found.steps)
        self.optimizer.take_over(values, change.slots, replace(places, values, change), seeds)

    def state_dict(self) -> dict[str, Any]:
        """The candidates and their sums, between the steps before a change."""
        found: dict[str, Any] = {}
        for name, candidates in self.candidates.items():
            for part in ("indices", "total", "squares"):
                if (tensor := getattr(candidates, part)) is not None:
                    found[f"{name}:{part}"] = tensor
            found[f"{name}:steps"] = candidates.steps
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.candidates = {}
        for key, value in state.items():
            name, _, part = key.rpartition(":")
            candidates = self.candidates.setdefault(name, Candidates(len(self.layers[name].values)))
            on_device = value.to(self.layers[name].values.device) if isinstance(value, torch.Tensor) else value
            setattr(candidates, part, on_device)
            candidates.agreed = True
