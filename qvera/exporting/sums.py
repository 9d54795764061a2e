"""Weighted sums of adapters: one of our adapters where that is exact, else a LoRA."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from qvera.adapters.config import PREFIX
from qvera.adapters.save_load import ADAPTER_CONFIG
from qvera.exporting.deltas import AdapterDeltas, Delta
from qvera.exporting.lora import LIMITS, write_adapter
from qvera.utils.errors import InputError
from qvera.utils.files import read_json
from qvera.utils.safetensors_io import TensorSpec


def same_directions(adapters: Sequence[AdapterDeltas]) -> str | None:
    """Say why a weighted sum is not a VeRA adapter; None where seed, rank, layers, d and a are the same.

    Then Σ w diag(b) B diag(d) A = diag(Σ w b) B diag(d) A. ``adapter.train_d: false`` keeps d the same.
    """
    first = adapters[0]
    if not all(adapter.ours for adapter in adapters):
        return "one of them is an adapter of PEFT's own VeRA"
    if any(delta.factors.vectors is None for delta in first.layers.values()):
        return f"the method {first.method} has no vectors d and b"
    if first.pair is None:
        return "their linears have a pair of A and B each"
    for other in adapters[1:]:
        for what in ("method", "seed", "rank", "groups", "input_scale"):
            if getattr(first, what) != getattr(other, what):
                return f"they differ in {'b_groups' if what == 'groups' else what}"
        if first.layers.keys() != other.layers.keys():
            return "they differ in set of layers"
        if other.pair is None or not all(map(torch.equal, first.pair, other.pair)):
            return "they differ in their projections"
        for name, delta in first.layers.items():
            ours, theirs = delta.factors, other.layers[name].factors
            if not _equal(ours.d, theirs.d):
                return f"they differ in d (first at {name}); adapters trained with adapter.train_d: false do not"
            if not _equal(ours.a, theirs.a):
                return f"they differ in a (first at {name}); adapters trained without adapter.input_scale have none"
    return None


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def weighted_sum(adapters: Sequence[AdapterDeltas], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Return the vectors of Σ w ΔW as a VeRA adapter, for scaling, negation, averages and interpolation.

    InputError: the sum is no VeRA adapter (`same_directions`), or there is not one weight for each.
    """
    _check_weights(adapters, weights)
    if (why := same_directions(adapters)) is not None:
        rank = sum(adapter.rank for adapter in adapters)
        way = f" With --to lora it is written exactly, as a LoRA of rank {rank}."
        can = all(adapter.is_low_rank for adapter in adapters)
        raise InputError(f"the sum of these adapters is not a VeRA adapter: {why}.{way * can}")
    vectors = {}
    for name, delta in adapters[0].layers.items():
        total = torch.zeros((), dtype=torch.float64)
        for weight, adapter in zip(weights, adapters, strict=True):
            b = adapter.layers[name].factors.b
            assert b is not None
            total = total + weight * b.double()
        vectors[f"{PREFIX}{name}.qvera_b"] = total.float()
        for kind, vector in (("d", delta.factors.d), ("a", delta.factors.a)):
            if vector is not None:
                vectors[f"{PREFIX}{name}.qvera_{kind}"] = vector
    return vectors


def stacked_factors(
    adapters: Sequence[AdapterDeltas], weights: Sequence[float]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return Σ w ΔW as an exact LoRA of rank Σ r in fp32: all A' stacked [Σ r, n], all w B' side by side [m, Σ r].

    An adapter that lacks a layer has zeros there.
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
            here, rank = adapter.layers.get(name), adapter.rank
            A, B = here.lora() if here is not None else (torch.zeros(rank, n), torch.zeros(m, rank))
            As.append(A)
            Bs.append(weight * B)
        factors[name] = (torch.cat(As), torch.cat(Bs, dim=1))
    return factors


def _check_weights(adapters: Sequence[AdapterDeltas], weights: Sequence[float]) -> None:
    if any(adapter.magnitude for adapter in adapters):
        raise InputError(
            "adapter.magnitude: an adapter that scales the rows of W + ΔW can't be added to another one or scaled. "
            "Export it with --to lora or --to merged."
        )
    if len(adapters) != len(weights):
        raise InputError(f"--weights: got {len(weights)} for {len(adapters)} adapters; give one for each.")


def write_vectors(source: Path, vectors: dict[str, torch.Tensor], out: Path, chat_template: str | None = None) -> None:
    """Write an adapter of these vectors, with the config of ``source`` else. InputError: ``out`` is not empty."""
    specs = [TensorSpec(name, vector.dtype, tuple(vector.shape)) for name, vector in vectors.items()]
    config = read_json(source / ADAPTER_CONFIG, "an adapter's config")
    config["chat_template"] = chat_template  # that of the source may hold its system prompt
    write_adapter(out, config, specs, iter(vectors.values()), chat_template=chat_template)


def union(adapters: Sequence[AdapterDeltas]) -> AdapterDeltas:
    """Return the first adapter with the layers and targets of all, for `export_lora` with `stacked_factors`."""
    # Reversed, so that a layer of several adapters is the first one's.
    layers = {name: delta for adapter in reversed(adapters) for name, delta in adapter.layers.items()}
    configs = [adapter.config for adapter in adapters]
    limited = any(getattr(one, limit, None) is not None for one in configs for limit in LIMITS)
    if limited or any(isinstance(one.target_modules, str) for one in configs):
        targets = sorted(layers)
    else:
        targets = sorted({target for one in configs for target in one.target_modules})
    return AdapterDeltas(dataclasses.replace(configs[0], target_modules=targets), adapters[0].pair, layers)
