"""More than one adapter: many on one base, and arithmetic between them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.config import KINDS, PEFT_TYPE, vector_shapes
from qvera.adapters.multi_adapter import empty_bank
from qvera.adapters.projection import vera_scale
from qvera.adapters.save_load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, read_config, require_tokens
from qvera.export.deltas import PREFIX, AdapterDeltas, Delta
from qvera.export.lora import require_empty
from qvera.utils.errors import InputError


def load_adapters(
    model: nn.Module, directories: Mapping[str, Path], progress: Callable[[int], None] | None = None
) -> PeftModel:
    """Put many QVERA adapters on a loaded base, as banked vectors; ranks, seeds and targets may differ.

    Rows of one batch then name theirs: ``model(..., adapter_names=[...])``, or `qvera.evaluation.generate.generate` with ``adapters``.
    They are for answers, not for training.

    Args:
        directories: name → adapter directory.
        progress: called with the number of adapters read.

    Raises:
        InputError: one of them is no QVERA adapter, or not one for this model.
    """
    if not directories:
        raise InputError("load_adapters: takes at least one adapter directory.")
    configs = {name: _read_config(Path(directory)) for name, directory in directories.items()}
    for name, config in configs.items():
        require_tokens(config, directories[name], None)  # many adapters would each want rows of their own
    seeds: dict[int, list[str]] = {}
    for name, config in configs.items():
        seeds.setdefault(config.projection_seed, []).append(name)
    targets: set[str] = set()
    for name, config in configs.items():
        if isinstance(config.target_modules, str):
            raise InputError(f"{directories[name]}: its targets are a pattern, not names; many adapters need names.")
        targets |= set(config.target_modules or ())
    peft_model: Any = None
    for seed, names in seeds.items():  # one ordinary, unchanged adapter a seed draws the pair and makes the layers
        rank = max(configs[name].rank for name in names)
        config = QveraConfig(rank=rank, target_modules=targets, projection_seed=seed, task_type="CAUSAL_LM")
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=f"seed-{seed}")  # type: ignore[arg-type]
        else:
            peft_model.add_adapter(f"seed-{seed}", config)
    peft_model.requires_grad_(False)
    peft_model.eval()
    layers = {n: m for n, m in peft_model.named_modules() if isinstance(m, QveraLinear)}
    for name, layer in layers.items():
        layer._layer_name = name
    device = next(iter(layers.values())).qvera_b[f"seed-{next(iter(seeds))}"].device
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    alike: dict[tuple[int, int, bool, int], list[str]] = {}
    for name, config in configs.items():
        key = config.projection_seed, config.b_groups, config.input_scale, config.rank if config.b_groups > 1 else 0
        alike.setdefault(key, []).append(name)
    banks, done = [], 0
    for (seed, groups, scaled, _), names in alike.items():
        bank = empty_bank(seed, max(configs[name].rank for name in names), groups, scaled, names, sizes, device)
        for index, name in enumerate(names):
            config, vectors = read_adapter(Path(directories[name]))
            _fill(bank.values[index], bank.columns, config, vectors, layers, Path(directories[name]))
            done += 1
            if progress is not None:
                progress(done)
        banks.append(bank)
    peft_model.base_model.__dict__["banks"] = banks
    return peft_model


def _read_config(directory: Path) -> QveraConfig:
    config = read_config(directory)
    if config.peft_type != PEFT_TYPE:
        raise InputError(f"{directory}: is an adapter of PEFT's VeRA; many adapters on one base are QVERA's only.")
    return config


def _fill(
    row: torch.Tensor,
    columns: dict[str, tuple[int, int]],
    config: QveraConfig,
    vectors: dict[str, torch.Tensor],
    layers: dict[str, QveraLinear],
    source: Path,
) -> None:
    """Copy one adapter's vectors into its row of a bank, the layer's scale multiplied into d."""
    names = {key.rpartition(".")[0] for key in vectors}
    for name in names:
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


def same_directions(adapters: Sequence[AdapterDeltas]) -> str | None:
    """None where a weighted sum of these adapters is again a VeRA adapter: one seed, rank, b_groups, layers, d and a. Else why not.

    Then Σ w diag(b) B diag(d) A = diag(Σ w b) B diag(d) A, exactly. Training with ``adapter.train_d: false`` makes it so.
    """
    first = adapters[0]
    for other in adapters[1:]:
        for what, ours, theirs in (
            ("kind", first.config.peft_type, other.config.peft_type),
            ("seed", _seed(first.config), _seed(other.config)),
            ("rank", first.A.shape[0], other.A.shape[0]),
            ("b_groups", first.groups, other.groups),
            ("input_scale", first.input_scale, other.input_scale),
            ("set of layers", first.layers.keys(), other.layers.keys()),
        ):
            if ours != theirs:
                return f"they differ in {what}"
        if not (torch.equal(first.A, other.A) and torch.equal(first.B, other.B)):
            return "they differ in their projections"
        for name, delta in first.layers.items():
            if not torch.equal(delta.d, other.layers[name].d):
                return f"they differ in d (first at {name}); adapters trained with adapter.train_d: false do not"
            a = other.layers[name].a
            if delta.a is not None and a is not None and not torch.equal(delta.a, a):
                return f"they differ in a (first at {name}); adapters trained without adapter.input_scale have none"
    return None


def _seed(config: Any) -> Any:
    return getattr(config, "projection_seed", getattr(config, "projection_prng_key", None))


def weighted_sum(adapters: Sequence[AdapterDeltas], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The vectors of Σ w ΔW as a VeRA adapter: scaling, negation, averages and interpolation are all this.

    Returns:
        Keys and fp32 tensors of a QVERA adapter file.

    Raises:
        InputError: the sum is no VeRA adapter (`same_directions`), or there is not one weight for each.
    """
    _check_weights(adapters, weights)
    why = same_directions(adapters)
    if why is not None:
        raise InputError(
            f"the sum of these adapters is not a VeRA adapter: {why}. With --to lora it is written exactly, as a LoRA of rank "
            f"{sum(a.A.shape[0] for a in adapters)}."
        )
    vectors = {}
    for name, delta in adapters[0].layers.items():
        b = sum(w * a.layers[name].b.double() for w, a in zip(weights, adapters, strict=True))
        vectors[f"{PREFIX}{name}.qvera_b"] = torch.as_tensor(b).float()
        vectors[f"{PREFIX}{name}.qvera_d"] = delta.d.clone()
        if delta.a is not None:
            vectors[f"{PREFIX}{name}.qvera_a"] = delta.a.clone()
    return vectors


def stacked_factors(
    adapters: Sequence[AdapterDeltas], weights: Sequence[float]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Σ w ΔW as a LoRA of rank r₁ + r₂ + ..., exactly: A' of all stacked [Σ r, n], w B' of all side by side [m, Σ r], fp32.

    Layers that only some of the adapters have get zeros for the others.
    """
    _check_weights(adapters, weights)
    shapes: dict[str, Delta] = {}
    for adapter in adapters:
        for name, delta in adapter.layers.items():
            if shapes.setdefault(name, delta).shape != delta.shape:
                raise InputError(f"the adapters have {name} in different shapes: they belong to different base models.")
    factors = {}
    for name, delta in shapes.items():
        m, n = delta.shape
        As, Bs = [], []
        for weight, adapter in zip(weights, adapters, strict=True):
            rank = adapter.A.shape[0]
            here = adapter.layers.get(name)
            A, B = here.lora() if here is not None else (torch.zeros(rank, n), torch.zeros(m, rank))
            As.append(A)
            Bs.append(weight * B)
        factors[name] = (torch.cat(As), torch.cat(Bs, dim=1))
    return factors


def _check_weights(adapters: Sequence[AdapterDeltas], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise InputError(f"--weights: got {len(weights)} for {len(adapters)} adapters; give one for each.")


def write_vectors(source: Path, vectors: dict[str, torch.Tensor], out: Path) -> None:
    """A QVERA adapter directory with the config of ``source`` and these vectors.

    Raises:
        InputError: ``out`` is not new or empty.
    """
    require_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    save_file(vectors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def union(adapters: Sequence[AdapterDeltas]) -> AdapterDeltas:
    """The first adapter with the layers and targets of all, for `export_lora` with `stacked_factors`."""
    layers = {name: delta for adapter in reversed(adapters) for name, delta in adapter.layers.items()}
    config = adapters[0].config
    names = [a.config.target_modules for a in adapters]
    if all(not isinstance(targets, str) for targets in names):
        config = dataclasses.replace(config, target_modules=sorted({t for targets in names for t in targets}))
    return AdapterDeltas(config, adapters[0].A, adapters[0].B, layers)
