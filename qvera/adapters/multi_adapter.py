"""Many adapters in one process: their vectors as rows of stacked tensors, and batches whose rows name their adapters.

A thousand adapters as PEFT would hold them are 420,000 parameters for a model of 210 linears. Here a layer has one
fp32 tensor of each kind for all adapters of a seed. They share A and B whatever their rank (a smaller pair is a prefix
of a larger one), so a batch costs one low-rank product for each bank in it: for each seed, and each kind of adapter
where there are several (``b_groups``, ``input_scale``).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from torch import nn

from qvera.adapters.config import PEFT_TYPE, PREFIX, QveraConfig
from qvera.adapters.files.adapter_file import read_adapter, read_config, require_tokens
from qvera.adapters.files.save_load import load_vectors
from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.products import functional
from qvera.adapters.products.row_vectors import TokenSlots, expand_rows, scale_rows
from qvera.adapters.projection import SharedProjection, require_projection, vera_scale
from qvera.kernels.columns import scaled_columns
from qvera.models import linear
from qvera.utils import accelerator
from qvera.utils.errors import InputError

BASE = "__base__"
"""PEFT's name for "no adapter" in ``adapter_names``."""


@dataclasses.dataclass
class SeedBank:
    """The adapters of one seed: row i of each tensor is adapter i, its d already multiplied with the layer's scale.

    With one b for each linear their ranks may differ, and d is filled up with zeros; with ``b_groups`` above 1 all have
    the same rank, since where a group's columns lie depends on it.
    """

    seed: int
    names: dict[str, int]
    layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    """Layer name → d [adapters, rank], b [adapters, groups, out_features], a [adapters, in_features] or None."""


class _Part(NamedTuple):
    """The rows of a batch that go through one pair A, B, with the vectors of each row."""

    rows: torch.Tensor | None  # None: all of them
    pair: SharedProjection
    d: torch.Tensor  # [rows, r], with the scale in it
    b: torch.Tensor  # [rows, groups, m]
    a: torch.Tensor | None  # [rows, n]


@dataclasses.dataclass
class RowPlan:
    """Which adapter each row of a batch uses, made once for all layers, and the forward pass of such a batch."""

    rows: int
    banked: list[tuple[SeedBank, torch.Tensor | None, torch.Tensor]]
    """For each bank: the rows of the batch (None: all of them), and the adapter of each of those."""
    unbanked: list[tuple[str, torch.Tensor | None]]
    """For each adapter that is ordinary parameters: its name, and its rows (None: all of them)."""

    def forward(self, layer: QveraLinear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """base(x), and for each row of x [rows, ..., n] the low-rank path of its own adapter.

        The MLPs of some models (OPT, Llama 4) get [rows · tokens, n].

        Raises:
            ValueError: adapters are merged into the base, or the batch has another number of rows.
        """
        if x.dim() == 2 and x.shape[0] != self.rows and x.shape[0] % self.rows == 0:  # all tokens behind each other
            return self.forward(layer, x.view(self.rows, -1, x.shape[-1]), *args, **kwargs).flatten(0, 1)
        if x.shape[0] != self.rows:
            raise ValueError(f"adapter_names: has {self.rows} names for a batch of {x.shape[0]} rows.")
        result = base_output(layer, x, *args, **kwargs)
        if layer.disable_adapters:
            return result
        dtype = linear.compute_dtype(layer.base_layer, x)
        middle = (1,) * (x.dim() - 2)
        for rows, pair, d, b, a in self._banked_parts(layer):
            rank = d.shape[1]
            own = x if rows is None else x[rows]
            if a is not None:
                own = scaled_columns(own.to(dtype), a.view(len(a), *middle, -1))
            z = pair.project(own, rank, dtype)  # shared by q, k and v where all rows take part and none has an a
            B = pair.B[: layer.out_features, :rank]
            z = scaled_columns(z, d.view(len(d), *middle, -1))
            b = b.view(len(b), *middle, *b.shape[1:])
            if rows is None:
                result = functional.outward(z, B, b, result)
            else:
                result = result.index_add(0, rows, functional.outward(z, B, b).to(result.dtype))
        for name, rows in self.unbanked:
            if not layer.carries(name):
                continue
            if rows is None:
                result = layer.add_adapter(name, x, result)
            else:
                result = result.index_copy(0, rows, layer.add_adapter(name, x[rows], result[rows]))
        return result

    def _banked_parts(self, layer: QveraLinear) -> Iterator[_Part]:
        for bank, rows, adapters in self.banked:
            if layer.spec.name not in bank.layers:  # made by an adapter that was put on later
                continue
            d, b, a = bank.layers[layer.spec.name]
            pair = next(
                p for p in layer.qvera_projection.values() if isinstance(p, SharedProjection) and p.seed == bank.seed
            )
            yield _Part(rows, pair, d[adapters], b[adapters], None if a is None else a[adapters])


def base_output(layer: QveraLinear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """W x of a batch whose rows use different adapters; ValueError where adapters are merged into the base."""
    if layer.merged:
        raise ValueError("adapter_names: adapters are merged into the base weights; unmerge them first.")
    if layer.holds_inference_weight and not layer._inference_adapters and not torch.is_grad_enabled():
        return layer.inference_product(x)
    return layer.base_layer(x, *args, **kwargs)


def add_own_paths(
    layer: QveraLinear,
    x: torch.Tensor,
    result: torch.Tensor,
    own: Mapping[str, torch.Tensor],
    pair: SharedProjection,
    tokens: TokenSlots | None,
) -> torch.Tensor:
    """result + b_i ⊙ B (s d_i ⊙ A (a_i ⊙ x_i)) for the adapter i of each token (`row_vectors`).

    Args:
        layer: on which; it says s and the compute dtype.
        x: its input [..., n].
        result: its output [..., m] without adapters.
        own: ``qvera_d`` [R, r], ``qvera_b`` [R, m] or [R, G, m] and, where the adapters have one, ``qvera_a`` [R, n].
        pair: A and B of all of them.
        tokens: the adapter of each token; None: there is one.
    """
    dtype, rank = linear.compute_dtype(layer.base_layer, x), own["qvera_d"].shape[-1]
    inner = scale_rows(x.to(dtype), own["qvera_a"], tokens) if "qvera_a" in own else x
    z = pair.project(inner, rank, dtype)  # shared by q, k and v, which read the same x, where there is no a
    scale, B = vera_scale(rank, layer.in_features), pair.B[: layer.out_features, :rank]
    return expand_rows(result, z, own["qvera_d"], own["qvera_b"], B, scale, tokens)


def plan_rows(names: Sequence[str], banks: Sequence[SeedBank], device: torch.device) -> RowPlan:
    """The plan of a batch whose rows use ``names``; a name that no bank has is taken for an ordinary adapter's."""

    def placed(rows: list[int], adapters: Sequence[int] = ()) -> tuple[torch.Tensor | None, torch.Tensor]:
        arrays = {"rows": np.array(rows, dtype=np.int64), "adapters": np.array(adapters, dtype=np.int64)}
        sent = accelerator.tensors_on(device, arrays)
        return None if len(rows) == len(names) else sent["rows"], sent["adapters"]

    plan = RowPlan(len(names), [], [])
    left = [i for i, name in enumerate(names) if name != BASE]
    for bank in banks:
        mine = [i for i in left if names[i] in bank.names]
        if mine:
            plan.banked.append((bank, *placed(mine, [bank.names[names[i]] for i in mine])))
        left = [i for i in left if names[i] not in bank.names]
    for name in dict.fromkeys(names[i] for i in left):
        plan.unbanked.append((name, placed([i for i in left if names[i] == name])[0]))
    return plan


def load_adapters(
    model: nn.Module, directories: Mapping[str, Path], progress: Callable[[int], None] | None = None
) -> PeftModel:
    """Put many QVERA adapters on a loaded base model; ranks, seeds and targets may differ.

    Rows of one batch then name theirs: ``model(..., adapter_names=[...])``, or `qvera.evaluation.generate.generate`
    with ``adapters``. They are for answers, not for training.

    Args:
        model: the loaded base model.
        directories: adapter name → directory.
        progress: called with the number of adapters read.

    Raises:
        InputError: one of them is no QVERA adapter, or not one for this model.
    """
    if not directories:
        raise InputError("load_adapters: takes at least one adapter directory.")
    configs = {name: _read_config(Path(directory)) for name, directory in directories.items()}
    alone = {name: config for name, config in configs.items() if not method_of(config).is_banked}
    banked = {name: config for name, config in configs.items() if name not in alone}
    peft_model = _put_on_seeds(model, banked) if banked else None
    done = 0
    for name, config in alone.items():
        peft_model = _put_on_alone(model, peft_model, name, config, Path(directories[name]))
        done += 1
        if progress is not None:
            progress(done)
    assert peft_model is not None
    layers = {m.spec.name: m for m in peft_model.modules() if isinstance(m, QveraLinear)}
    kinds: dict[tuple[int, int, bool, int], dict[str, QveraConfig]] = {}
    for name, config in banked.items():
        key = config.projection_seed, config.b_groups, config.input_scale, config.rank if config.b_groups > 1 else 0
        kinds.setdefault(key, {})[name] = config
    banks = [_empty_bank(kind, layers) for kind in kinds.values()]
    for bank in banks:
        for name in bank.names:
            _fill(bank, name, configs[name], Path(directories[name]), layers)
            done += 1
            if progress is not None:
                progress(done)
    peft_model.base_model.__dict__["banks"] = banks
    return peft_model


def _read_config(directory: Path) -> QveraConfig:
    return require_shareable(read_config(directory), directory)


def require_shareable(config: QveraConfig | VeraConfig, directory: Path) -> QveraConfig:
    """The config of an adapter that can be one of many on a model.

    Raises:
        InputError: it is PEFT's own VeRA, or has more than vectors: rows of tokens, whole modules, biases; or its
            targets are a pattern.
    """
    if not isinstance(config, QveraConfig):
        raise InputError(
            f"{directory}: is an adapter of PEFT's VeRA; many on one model have to be {PEFT_TYPE} adapters."
        )
    require_tokens(config, directory, None)  # many adapters would each want rows of their own
    if config.modules_to_save or config.bias != "none":
        raise InputError(
            f"{directory}: has trained modules or biases beside its vectors; load it alone (load_adapter)."
        )
    if isinstance(config.target_modules, str):
        raise InputError(f"{directory}: its targets are a pattern, not names; many adapters need names.")
    return config


def require_projection_of(config: QveraConfig, specs: Sequence[LinearSpec], directory: Path) -> None:
    """Compare what an adapter's config says of its projections with those that its seed gives for its linears.

    Raises:
        InputError: they differ.
    """
    if not specs or config.projection_sha256 is None:
        return
    try:
        require_projection(config, max(p.in_features for p in specs), max(p.out_features for p in specs))
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def _put_on_seeds(model: nn.Module, configs: Mapping[str, QveraConfig]) -> PeftModel:
    """One ordinary, unchanged adapter for each seed. It draws the pair and makes the layers, by their names."""
    targets = {target for config in configs.values() for target in config.target_modules or ()}
    ranks: dict[int, int] = {}
    for config in configs.values():
        ranks[config.projection_seed] = max(config.rank, ranks.get(config.projection_seed, 0))
    fresh = {
        f"__seed_{seed}__": QveraConfig(rank=rank, target_modules=targets, projection_seed=seed, task_type="CAUSAL_LM")
        for seed, rank in ranks.items()
    }
    first, *others = fresh
    peft_model = get_peft_model(model, fresh[first], adapter_name=first)  # type: ignore[arg-type]
    for name in others:
        peft_model.add_adapter(name, fresh[name])
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _put_on_alone(
    model: nn.Module, peft_model: PeftModel | None, name: str, config: QveraConfig, directory: Path
) -> PeftModel:
    """One adapter as ordinary parameters, on the model or beside those that are on it."""
    if peft_model is None:
        peft_model = get_peft_model(model, config, adapter_name=name)  # type: ignore[arg-type]
    else:
        peft_model.add_adapter(name, config)
    load_vectors(peft_model, read_adapter(directory)[1], str(directory), name)
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _empty_bank(configs: Mapping[str, QveraConfig], layers: Mapping[str, QveraLinear]) -> SeedBank:
    """A bank of zeros for these adapters, which are of one kind, and these layers."""
    count, rank, first = len(configs), max(config.rank for config in configs.values()), next(iter(configs.values()))
    bank = SeedBank(first.projection_seed, {name: i for i, name in enumerate(configs)}, {})
    for name, layer in layers.items():
        device = layer.base_layer.weight.device
        d = torch.zeros(count, rank, device=device)
        b = torch.zeros(count, first.b_groups, layer.out_features, device=device)
        bank.layers[name] = d, b, torch.zeros(count, layer.in_features, device=device) if first.input_scale else None
    return bank


def _fill(
    bank: SeedBank, adapter: str, config: QveraConfig, directory: Path, layers: Mapping[str, QveraLinear]
) -> None:
    """Copy one adapter's vectors into its row of a bank, the layer's scale multiplied into d."""
    row, found = bank.names[adapter], dict[str, dict[str, torch.Tensor]]()
    for key, vector in read_adapter(directory)[1].items():
        found.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = vector
    for name, own in found.items():
        layer = layers.get(name.removeprefix(PREFIX))
        if layer is None:
            raise InputError(f"{directory}: its vectors of {name} do not fit this model.")
        expected = method_of(config).tensors(config, layer.spec)
        given = {kind: tuple(vector.shape) for kind, vector in own.items()}
        if given != expected:
            raise InputError(f"{directory}: {name} has the vectors {given}, this model and its config need {expected}.")
        d, b, a = bank.layers[layer.spec.name]
        d[row, : config.rank] = own["qvera_d"] * vera_scale(config.rank, layer.in_features)
        b[row] = own["qvera_b"]
        if a is not None:
            a[row] = own["qvera_a"]
    require_projection_of(config, [layers[name.removeprefix(PREFIX)].spec for name in found], directory)
