"""Many adapters in one process: their vectors as rows of one tensor, and batches whose rows name different adapters.

A thousand adapters as PEFT would hold them are 420,000 parameters for a model of 210 linears. Here a seed's adapters
are one fp32 tensor [adapters, vectors' length], of which every layer reads two column ranges. Adapters of one seed
share A and B whatever their rank (a smaller pair is a prefix of a larger one), so a batch costs one low-rank product
for each bank in it: for each seed, and each kind of adapter where there are several (``b_groups``, ``input_scale``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from qvera.adapters import functional
from qvera.adapters.config import KINDS, PEFT_TYPE, QveraConfig, vector_shapes
from qvera.adapters.layer import QveraLinear
from qvera.adapters.low_rank import LowRankPath
from qvera.adapters.projection import SharedProjection, vera_scale
from qvera.adapters.save_load import read_adapter, read_config, require_tokens
from qvera.models import linear
from qvera.utils.errors import InputError

BASE = "__base__"
"""PEFT's name for "no adapter" in ``adapter_names``."""


@dataclasses.dataclass
class SeedBank:
    """The adapters of one seed: row i of ``values`` is adapter i, its d already multiplied with the layer's scale.

    With one b for each linear their ranks may differ (``rank`` is the largest); with ``groups`` above 1 all have this
    rank, since where a group's columns lie depends on it.
    """

    seed: int
    rank: int
    groups: int
    input_scale: bool
    names: dict[str, int]
    values: torch.Tensor
    columns: dict[str, tuple[int, int]]
    """Layer name → where its d (``rank`` values) and its b begin; behind b comes a, with ``input_scale``."""

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


class _Part(NamedTuple):
    """The rows of a batch that go through one pair A, B, with the vectors of each row."""

    rows: torch.Tensor | None
    """None: all of them"""
    pair: SharedProjection
    d: torch.Tensor
    """[rows, r], with the scale in it"""
    b: torch.Tensor
    """[rows, groups, m]"""
    a: torch.Tensor | None
    """[rows, n]"""


@dataclasses.dataclass
class RowPlan:
    """Which adapter each row of a batch uses, made once for all layers, and the forward pass of such a batch."""

    rows: int
    banked: list[tuple[SeedBank, torch.Tensor | None, torch.Tensor]]
    """For each bank: the rows of the batch (None: all of them), and the adapter of each of those."""
    live: list[tuple[tuple[str, ...], torch.Tensor | None]]
    """Adapters that are ordinary parameters: the names of some rows, and those rows."""

    def forward(self, layer: LowRankPath, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """base(x), and for each row of x [rows, ..., n] the low-rank path of its own adapter.

        Raises:
            ValueError: adapters are merged into the base, or the batch has another number of rows.
        """
        if layer.merged:
            raise ValueError("adapter_names: adapters are merged into the base weights; unmerge them first.")
        if x.shape[0] != self.rows:
            raise ValueError(f"adapter_names: has {self.rows} names for a batch of {x.shape[0]} rows.")
        if layer.holds_inference_weight and not layer._inference_adapters and not torch.is_grad_enabled():
            result = layer.inference_product(x)
        else:
            result = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters or not isinstance(layer, QveraLinear):
            return result
        dtype = linear.compute_dtype(layer.base_layer, x)
        middle = (1,) * (x.dim() - 2)
        for rows, pair, d, b, a in self._parts(layer, x.device):
            rank = d.shape[1]
            own = x if rows is None else x[rows]
            if a is not None:
                own = own.to(dtype) * a.to(dtype).view(len(a), *middle, -1)
            z = pair.project(own, rank, dtype)  # shared by q, k and v where all rows take part and none has an a
            B = pair.B[: layer.out_features, :rank]
            z = z * d.to(dtype).view(len(d), *middle, -1)
            change = functional.outward(z, B, b.view(len(b), *middle, *b.shape[1:])).to(result.dtype)
            result = result + change if rows is None else result.index_add(0, rows, change)
        return result

    def _parts(self, layer: QveraLinear, device: torch.device) -> Iterator[_Part]:
        for bank, rows, adapters in self.banked:
            vectors = bank.vectors(layer.full_name, adapters, layer.in_features, layer.out_features)
            if vectors is not None:
                pair = next(p for p in layer.qvera_projection.values() if p.seed == bank.seed)
                yield _Part(rows, pair, *vectors)
        for names, rows in self.live:
            for name in dict.fromkeys(n for n in names if layer.carries(n)):
                chosen = [i for i, other in enumerate(names) if other == name]
                picked = torch.tensor(chosen, device=device)
                _, _, d, b, scale, a = layer.parts(name)
                count = len(chosen)
                yield _Part(
                    picked if rows is None else rows[picked],
                    layer.qvera_projection[name],
                    (d * scale).expand(count, -1),
                    functional.grouped(b).expand(count, -1, -1),
                    None if a is None else a.expand(count, -1),
                )


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


def load_adapters(
    model: nn.Module, directories: Mapping[str, Path], progress: Callable[[int], None] | None = None
) -> PeftModel:
    """Put many QVERA adapters on a loaded base model; ranks, seeds and targets may differ.

    Rows of one batch then name theirs: ``model(..., adapter_names=[...])``, or `qvera.evaluation.generate.generate`
    with ``adapters``. They are for answers, not for training.

    Args:
        model: the base model.
        directories: name → adapter directory.
        progress: called with the number of adapters read.

    Raises:
        InputError: one of them is no QVERA adapter, or not one for this model.
    """
    if not directories:
        raise InputError("load_adapters: takes at least one adapter directory.")
    configs = {name: _read_config(Path(directory)) for name, directory in directories.items()}
    peft_model, layers = _put_on_seeds(model, configs)
    device = next(iter(layers.values())).base_layer.weight.device
    kinds: dict[tuple[int, int, bool, int], list[str]] = {}
    for name, config in configs.items():
        key = config.projection_seed, config.b_groups, config.input_scale, config.rank if config.b_groups > 1 else 0
        kinds.setdefault(key, []).append(name)
    banks, done = [], 0
    for names in kinds.values():
        bank = _empty_bank({name: configs[name] for name in names}, layers, device)
        for index, name in enumerate(names):
            directory = Path(directories[name])
            _fill(bank.values[index], bank.columns, configs[name], read_adapter(directory)[1], layers, directory)
            done += 1
            if progress is not None:
                progress(done)
        banks.append(bank)
    peft_model.base_model.__dict__["banks"] = banks
    return peft_model


def _read_config(directory: Path) -> QveraConfig:
    config = read_config(directory)
    if not isinstance(config, QveraConfig):
        raise InputError(f"{directory}: is an adapter of PEFT's VeRA; load_adapters takes {PEFT_TYPE} adapters only.")
    require_tokens(config, directory, None)  # many adapters would each want rows of their own
    if config.modules_to_save or config.bias != "none":
        raise InputError(
            f"{directory}: has trained modules or biases beside its vectors; load it alone (load_adapter)."
        )
    if isinstance(config.target_modules, str):
        raise InputError(f"{directory}: its targets are a pattern, not names; many adapters need names.")
    return config


def _put_on_seeds(model: nn.Module, configs: Mapping[str, QveraConfig]) -> tuple[PeftModel, dict[str, QveraLinear]]:
    """One ordinary, unchanged adapter for each seed. It draws the pair and makes the layers, by their names."""
    targets = {target for config in configs.values() for target in config.target_modules or ()}
    peft_model: Any = None
    for seed in dict.fromkeys(config.projection_seed for config in configs.values()):
        rank = max(config.rank for config in configs.values() if config.projection_seed == seed)
        config = QveraConfig(rank=rank, target_modules=targets, projection_seed=seed, task_type="CAUSAL_LM")
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=f"seed-{seed}")  # type: ignore[arg-type]
        else:
            peft_model.add_adapter(f"seed-{seed}", config)
    peft_model.requires_grad_(False)
    peft_model.eval()
    layers = {n: m for n, m in peft_model.named_modules() if isinstance(m, QveraLinear)}
    for name, layer in layers.items():
        layer.full_name = name
    return peft_model, layers


def _empty_bank(
    configs: Mapping[str, QveraConfig], layers: Mapping[str, QveraLinear], device: torch.device
) -> SeedBank:
    """A bank of zeros for these adapters, which are of one kind, and these layers."""
    rank, first = max(config.rank for config in configs.values()), next(iter(configs.values()))
    columns, width = {}, 0
    for name, layer in layers.items():
        columns[name] = (width, width + rank)
        width += rank + first.b_groups * layer.out_features + (layer.in_features if first.input_scale else 0)
    values = torch.zeros(len(configs), width, device=device)
    index = {name: i for i, name in enumerate(configs)}
    return SeedBank(first.projection_seed, rank, first.b_groups, first.input_scale, index, values, columns)


def _fill(
    row: torch.Tensor,
    columns: Mapping[str, tuple[int, int]],
    config: QveraConfig,
    vectors: Mapping[str, torch.Tensor],
    layers: Mapping[str, QveraLinear],
    source: Path,
) -> None:
    """Copy one adapter's vectors into its row of a bank, the layer's scale multiplied into d."""
    for name in {key.rpartition(".")[0] for key in vectors}:
        layer = layers.get(name)
        if layer is None:
            raise InputError(f"{source}: its vectors of {name} do not fit this model.")
        expected = vector_shapes(config, layer.in_features, layer.out_features)
        given = {kind: tuple(vectors[f"{name}.{kind}"].shape) for kind in KINDS if f"{name}.{kind}" in vectors}
        if given != expected:
            raise InputError(f"{source}: {name} has the vectors {given}, this model and its config need {expected}.")
        b, d, *more = (vectors[f"{name}.{kind}"].flatten() for kind in expected)
        at_d, at_b = columns[name]
        row[at_d : at_d + config.rank] = d * vera_scale(config.rank, layer.in_features)
        behind = torch.cat([b, *more])
        row[at_b : at_b + behind.numel()] = behind
