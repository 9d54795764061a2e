"""Many adapters in one process: their vectors as rows of one tensor, and batches whose rows name different adapters.

A thousand adapters as PEFT would hold them are 420,000 parameters for a model of 210 linears; here a seed's adapters are one
fp32 tensor [adapters, numbers], of which every layer reads two column ranges. Adapters of one seed share A and B whatever
their rank (a smaller pair is a prefix of a larger one), so a batch costs one low-rank product for each bank in it: for each
seed, and each kind of adapter where there are several (``b_groups``, ``input_scale``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

BASE = "__base__"
"""PEFT's name for "no adapter" in ``adapter_names``."""


@dataclasses.dataclass
class SeedBank:
    """The adapters of one seed: row i of ``values`` is adapter i, its d already multiplied with the layer's scale.

    With one b a linear their ranks may differ (``rank`` is the largest); with ``groups`` above 1 all have this rank, since where a
    group's columns lie depends on it.
    """

    seed: int
    rank: int
    groups: int
    input_scale: bool
    names: dict[str, int]
    values: torch.Tensor
    columns: dict[str, tuple[int, int]]
    """Layer name → where its d (``rank`` numbers) and its b begin; behind b comes a, with ``input_scale``."""

    def vectors(
        self, layer: str, rows: torch.Tensor, in_features: int, out_features: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """D [k, rank], b [k, groups, out_features] and a [k, in_features] (or None) of these adapters in that layer.

        None where none of them changes it.
        """
        if layer not in self.columns:
            return None
        d, b = self.columns[layer]
        end = b + self.groups * out_features
        a = self.values[rows, end : end + in_features] if self.input_scale else None
        return self.values[rows, d:b], self.values[rows, b:end].unflatten(1, (self.groups, out_features)), a


def empty_bank(
    seed: int,
    rank: int,
    groups: int,
    input_scale: bool,
    names: Sequence[str],
    layers: Mapping[str, tuple[int, int]],
    device: torch.device,
) -> SeedBank:
    """A bank of zeros for these adapters and these layers (name → in_features, out_features)."""
    columns, width = {}, 0
    for layer, (in_features, out_features) in layers.items():
        columns[layer] = (width, width + rank)
        width += rank + groups * out_features + (in_features if input_scale else 0)
    values = torch.zeros(len(names), width, device=device)
    return SeedBank(seed, rank, groups, input_scale, {name: i for i, name in enumerate(names)}, values, columns)


@dataclasses.dataclass
class RowPlan:
    """Which adapter each row of a batch uses, made once for all layers."""

    rows: int
    banked: list[tuple[SeedBank, torch.Tensor | None, torch.Tensor]]
    """For each seed: its bank, the rows of the batch (None: all of them), and the adapter of each of those."""
    live: list[tuple[tuple[str, ...], torch.Tensor | None]]
    """Adapters that are ordinary parameters: the names of some rows, and those rows."""


def plan_rows(names: Sequence[str], banks: Sequence[SeedBank], device: torch.device) -> RowPlan:
    """The plan of a batch whose rows use ``names``; a name that no bank has is taken for an ordinary adapter's."""

    def where(rows: list[int]) -> torch.Tensor | None:
        return None if len(rows) == len(names) else torch.tensor(rows, device=device)

    plan = RowPlan(len(names), [], [])
    left = [i for i, name in enumerate(names) if name != BASE]
    for bank in banks:
        mine = [i for i in left if names[i] in bank.names]
        if mine:
            adapters = torch.tensor([bank.names[names[i]] for i in mine], device=device)
            plan.banked.append((bank, where(mine), adapters))
        left = [i for i in left if names[i] not in bank.names]
    if left:
        plan.live.append((tuple(names[i] for i in left), where(left)))
    return plan
