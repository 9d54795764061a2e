"""Adapters that other tools load: a whole LoRA, a truncated LoRA, and PEFT's own VeRA.

A VeRA adapter is a LoRA of rank r with A' = diag(s d) A and B' = diag(b) B (VeRA, arXiv 2310.11454, equation 2). The
LoRA has r (m + n) values a layer instead of r + m. It is exact up to the rounding of its factors. With ``b_groups`` or
``input_scale`` it is a LoRA too, but no VeRA of PEFT; with ``magnitude`` it is PEFT's DoRA.
"""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, VeraConfig
from transformers import PreTrainedModel

from qvera.adapters.adapter_file import lora_config
from qvera.adapters.config import PREFIX
from qvera.adapters.methods import method_of
from qvera.adapters.peft_compat import PeftPlace, Places, other_places, require_kept
from qvera.adapters.save_load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, portable_name
from qvera.exporting.deltas import AdapterDeltas, Delta
from qvera.models.safetensors_stream import write_shard
from qvera.utils import formatting
from qvera.utils.errors import InputError
from qvera.utils.files import CHAT_TEMPLATE, new_directory, require_space
from qvera.utils.safetensors_io import FACTS, TensorSpec

LIMITS = ("exclude_modules", "layers_to_transform")
"""Settings that exclude linears which the targets name. Configs written here name the rest in full instead."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank in vLLM 0.14

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # layer, or layer.number of an expert → A' [r, n] and B' [m, r]


def serving_text(rank: int, is_dora: bool = False) -> str:
    """Name the setting with which engines serve this rank, or what to do if they can't."""
    if is_dora:
        return "vLLM takes no DoRA (adapter.magnitude): give it the whole model, by --to merged"
    place = next((known for known in VLLM_RANKS if known >= rank), None)
    if place is None:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}: cut it with --rank. SGLang reads the rank from the adapter"
    return f"vLLM takes it with --max-lora-rank {place}; SGLang reads the rank from the adapter"


def truncation_text(errors: Mapping[str, float], own: int, rank: int) -> str:
    """Say what a smaller rank loses, from the errors of `truncate` by layer, with a conclusion."""
    ordered = sorted(errors, key=errors.__getitem__)
    low, high, typical = ordered[0], ordered[-1], errors[ordered[len(ordered) // 2]]
    line = (
        f"rank {rank} of {own}: relative error of ΔW (Frobenius) {typical:.2g} in the median layer, from "
        f"{errors[low]:.2g} ({low}) to {errors[high]:.2g} ({high})"
    )
    if typical < 0.05:
        return f"{line}. Little is lost."
    lost = "Most" if typical > 0.5 else "Part"
    return (
        f"{line}. {lost} of what was trained is lost: the change is spread over all {own} directions. Leave out --rank "
        "for the whole LoRA, which `qvera export` merges into the base."
    )


def rounding_text(dtype: torch.dtype) -> str:
    """Say how exact a whole LoRA is in this dtype."""
    if dtype == torch.float32:
        return "exact: its factors are the adapter's own in float32"
    name = str(dtype).removeprefix("torch.")
    return (
        f"its factors are rounded to {name} (relative {torch.finfo(dtype).eps / 2:.0e} each); --dtype float32 writes "
        "them exactly, in twice the size"
    )


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Find the best approximation of ΔW = B A by rank k: A'' [k, n] and B'' [m, k] in fp32, and its error.

    This is the truncated SVD (Eckart and Young), taken of the small factors (QR of each, then the SVD of an r x r
    core), never of a dense ΔW. The error is relative to ‖ΔW‖, in Frobenius norms.
    """
    left, left_core = torch.linalg.qr(B.double())  # [m, p], [p, r]
    right, right_core = torch.linalg.qr(A.double().t())  # [n, q], [q, r]
    U, S, Vh = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    # Each factor gets the root of the singular values, so both have the same norm.
    root, whole = S[:rank].sqrt(), S.norm()
    error = (S[rank:].norm() / whole).item() if whole > 0 else 0.0
    kept_B, kept_A = (left @ U[:, :rank]) * root, root.unsqueeze(1) * (right @ Vh[:rank].t()).t()
    missing = rank - kept_A.shape[0]
    if missing > 0:  # a layer smaller than the rank: zeros change nothing
        kept_A = torch.cat([kept_A, kept_A.new_zeros(missing, kept_A.shape[1])])
        kept_B = torch.cat([kept_B, kept_B.new_zeros(kept_B.shape[0], missing)], dim=1)
    return kept_A.float(), kept_B.float(), error


def truncate_all(
    factors: Iterable[tuple[str, tuple[torch.Tensor, torch.Tensor]]], own: int, rank: int, dtype: torch.dtype
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
    """Cut every layer from rank ``own`` to ``rank``, with the errors of `truncate`. InputError: it is not smaller."""
    if not 1 <= rank < own:
        raise InputError(f"--rank: takes a whole number from 1 to {own - 1} (what is cut has rank {own}), got {rank}.")
    cut, errors = {}, {}
    for name, pair in factors:
        A, B, errors[name] = truncate(*pair, rank)
        cut[name] = (A.to(dtype), B.to(dtype))
    return cut, errors


def write_lora(
    adapter: AdapterDeltas,
    out: Path,
    dtype: torch.dtype,
    rank: int | None,
    factors: Pairs | None,
    chat_template: str | None,
    say: Callable[[str], None],
    places: Places = MappingProxyType({}),
) -> dict[str, float] | None:
    """Write a LoRA, exact or cut to ``rank``, and say its errors, rank and size.

    ``factors`` and ``places`` as for `export_lora`. Returns the error of each layer where it is cut.
    """
    errors, kind = None, "DoRA" if adapter.magnitude else "LoRA"
    own = adapter.rank if factors is None else max(len(A) for A, _ in factors.values())
    if rank is not None:
        each = (delta.loras(name) for name, delta in adapter.layers.items())
        whole = factors.items() if factors else itertools.chain.from_iterable(each)
        factors, errors = truncate_all(whole, own, rank, dtype)
        text = truncation_text(errors, own, rank)
    else:
        text = f"{kind} of rank {own}: {rounding_text(dtype)}"
    size = formatting.size(export_lora(adapter, out, dtype, factors, chat_template, places))
    say(text)
    say(f"{size} in {out}: {kind} of rank {rank or own} on {len(adapter.layers)} linears, for stock PEFT")
    return errors


def export_lora(
    adapter: AdapterDeltas,
    out: Path,
    dtype: torch.dtype,
    factors: Pairs | None = None,
    chat_template: str | None = None,
    places: Places = MappingProxyType({}),
) -> int:
    """Write a LoRA for stock PEFT (DoRA, with a magnitude) to ``out`` and return its bytes. Linears may differ in rank.

    Args:
        factors: default: the adapter's own; a LoRA's are copied, with its alpha.
        chat_template: that of its training, where it is not the base's own.
        places: of the adapter's experts (`require_kept_by_peft`).

    InputError: ``out`` is not empty or has no room, a factor does not fit into ``dtype``, or a magnitude is 0.
    """
    is_lora = factors is None and adapter.ours is not None and method_of(adapter.ours).peft_type == "LORA"
    first = {name: f"{name}.0" if delta.experts else name for name, delta in adapter.layers.items()}
    ranks = {n: d.factors.rank if factors is None else len(factors[first[n]][0]) for n, d in adapter.layers.items()}
    specs = []
    for name, delta in adapter.layers.items():
        m, n = delta.shape
        place, width = places.get(name, PeftPlace(name, False)), ranks[name] * max(delta.experts, 1)
        m, n = (n, m) if place.turned else (m, n)
        specs += [
            TensorSpec(f"{PREFIX}{place.module}.lora_A.weight", dtype, (width, n)),
            TensorSpec(f"{PREFIX}{place.module}.lora_B.weight", dtype, (m, width)),
        ]
        if delta.magnitude is not None:  # a rounded one would round whole rows of W
            if rows := int((delta.magnitude == 0).sum()):  # PEFT's DoRA would make these rows NaN
                raise InputError(
                    f"{name}: {rows} of its {m} rows are zeros (a pruned base), and PEFT's DoRA divides by their "
                    "norms. Export with --to merged."
                )
            specs.append(TensorSpec(f"{PREFIX}{name}.lora_magnitude_vector", torch.float32, (m,)))

    def pair(name: str, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
        keys = [f"{name}.{i}" for i in range(delta.experts)] or [name]
        own = [delta.factors.expert(i) for i in range(delta.experts)] or [delta.factors]
        each = [factors[key] for key in keys] if factors else [(f.A, f.B) if is_lora else f.lora() for f in own]
        if not delta.experts:
            return each[0]
        if places[name].turned:
            each = [(B.t(), A.t()) for A, B in each]
        A, B = (torch.stack(parts) for parts in zip(*each, strict=True))
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # PEFT has the experts of B side by side, rank by rank

    def tensors() -> Iterator[torch.Tensor]:
        for name, delta in adapter.layers.items():
            for factor in pair(name, delta):
                rounded = factor.to(dtype)
                if not torch.isfinite(rounded).all():
                    raise InputError(f"{name}: a factor does not fit into {dtype}. Export with --dtype bfloat16.")
                yield rounded
            if delta.magnitude is not None:
                yield delta.magnitude.float()

    # PEFT has one rank for all linears; those of another rank are named in a pattern.
    rank = max(ranks.values())
    others = {name: one for name, one in ranks.items() if one != rank}
    if is_lora and adapter.ours is not None:
        config = lora_config(adapter.ours)
    else:  # PEFT multiplies by alpha / r
        patterns = {"rank_pattern": others, "alpha_pattern": others}
        config = LoraConfig(r=rank, lora_alpha=rank, use_dora=adapter.magnitude, **patterns)
    # what only qvera reads: its base, tokens and chat template, and what the outputs of its head mean
    keys = ["base_fingerprint", "quantization", "double_quant", "pad_token", "eos_token"]
    keys += ["labels", "problem_type"] if adapter.head else []
    facts = {key: value for key in keys if (value := getattr(adapter.config, key, None)) is not None}
    facts |= {} if chat_template is None else {"chat_template": chat_template}
    header = {FACTS: json.dumps(facts)} if facts else {}
    return _write_for_peft(adapter, out, config, specs, tensors(), header, chat_template)


def export_stock_vera(adapter: AdapterDeltas, out: Path, chat_template: str | None = None) -> int:
    """Write PEFT's own VeRA with its projections, and return its bytes. Each layer's scale goes into its d.

    InputError: ``out`` is not empty, or PEFT's VeRA has no place for the adapter's vectors.
    """
    ways = "--to lora (exact) or --to merged" if adapter.is_low_rank or adapter.magnitude else "--to merged"
    seeds = getattr(adapter.config, "seeds", None)
    phases = len(seeds) if isinstance(seeds, tuple) else 0
    has = [f"vectors of {phases} phases, each over a pair of its own"] if phases else []
    has += [f"{adapter.groups} vectors b for each linear (adapter.b_groups)"] if adapter.groups > max(phases, 1) else []
    has += ["a vector a for each linear (adapter.input_scale)"] if adapter.input_scale else []
    has += ["a magnitude for each linear (adapter.magnitude)"] if adapter.magnitude else []
    if adapter.pair is not None and any(delta.experts for delta in adapter.layers.values()):
        has += ["vectors of experts (adapter.experts)"]
    if has:
        raise InputError(
            f"this adapter has {' and '.join(has)}, and PEFT's VeRA has one b and one d. Export it with {ways}."
        )
    if adapter.pair is None or (adapter.ours is not None and method_of(adapter.ours).peft_type != "VERA"):
        raise InputError(f"this adapter's method is {adapter.method}, which PEFT's VeRA is not. Export it with {ways}.")
    tensors = {}
    for name, delta in adapter.layers.items():
        assert delta.factors.vectors is not None
        d, b = delta.factors.vectors
        tensors[f"{PREFIX}{name}.vera_lambda_b"] = b
        tensors[f"{PREFIX}{name}.vera_lambda_d"] = d * delta.factors.scale
    tensors |= {"base_model.vera_A": adapter.pair[0], "base_model.vera_B": adapter.pair[1]}
    specs = [TensorSpec(name, torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()]
    floats = (tensor.float() for tensor in tensors.values())
    config = VeraConfig(r=adapter.rank, save_projection=True)
    return _write_for_peft(adapter, out, config, specs, floats, {}, chat_template)


def in_every_place(adapter: AdapterDeltas, model: PreTrainedModel) -> AdapterDeltas:
    """Copy the ΔW of a module that stands in several places (`share_tied_modules`) to each place, as PEFT has it."""
    layers, config = dict(adapter.layers), copy.copy(adapter.config)
    layers |= {place: adapter.layers[name] for place, name in other_places(adapter.layers, model).items()}
    if len(layers) > len(adapter.layers) and not isinstance(config.target_modules, str):
        config.target_modules = sorted(layers)
    return dataclasses.replace(adapter, config=config, layers=layers)


def require_kept_by_peft(adapter: AdapterDeltas, model: PreTrainedModel) -> Places:
    """Call `require_kept` for the linears and experts of an adapter."""
    turned = {name: delta.transposed if delta.experts else None for name, delta in adapter.layers.items()}
    return require_kept(LoraConfig(r=1, **_targets(adapter), task_type=adapter.config.task_type), turned, model)


def _targets(adapter: AdapterDeltas) -> dict[str, Any]:
    """Return PEFT's ``target_modules``, and its ``target_parameters`` where there are experts."""
    targets, stacks = adapter.config.target_modules, sorted(name for name, d in adapter.layers.items() if d.experts)
    if stacks or any(getattr(adapter.config, limit, None) is not None for limit in LIMITS):
        targets = adapter.layers.keys() - set(stacks)
    found = {"target_modules": targets if isinstance(targets, str) else sorted(targets)}
    return found | ({"target_parameters": stacks} if stacks else {})


def _write_for_peft(
    adapter: AdapterDeltas,
    out: Path,
    config: LoraConfig | VeraConfig,
    specs: list[TensorSpec],
    tensors: Iterator[torch.Tensor],
    header: Mapping[str, str],
    chat_template: str | None,
) -> int:
    """Add to ``config`` and ``specs`` what all kinds have (targets, base, head, header), and write the adapter."""
    own = adapter.config
    common = {
        "fan_in_fan_out": all(delta.transposed and not delta.experts for delta in adapter.layers.values()),
        **_targets(adapter),
        "task_type": own.task_type,
        "modules_to_save": sorted(own.modules_to_save) if adapter.head else None,
        "base_model_name_or_path": own.base_model_name_or_path and portable_name(own.base_model_name_or_path),
        "revision": own.revision,
        "inference_mode": True,
    }
    specs += [TensorSpec(f"{PREFIX}{name}", torch.float32, tuple(t.shape)) for name, t in adapter.head.items()]
    values = itertools.chain(tensors, adapter.head.values())
    return write_adapter(out, config.to_dict() | common, specs, values, {**adapter.header(), **header}, chat_template)


def write_adapter(
    out: Path,
    config: Mapping[str, object],
    specs: list[TensorSpec],
    tensors: Iterator[torch.Tensor],
    header: Mapping[str, str] = MappingProxyType({}),
    chat_template: str | None = None,
) -> int:
    """Write an adapter directory under a temporary name, rename it, and return its bytes.

    ``header`` goes into the safetensors file. InputError: ``out`` holds something, or can't be written.
    """
    require_space(out, sum(spec.size_bytes for spec in specs), "the adapter")
    with new_directory(out) as partial:
        write_shard(partial / ADAPTER_WEIGHTS, specs, tensors, header)
        text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # PEFT's configs have sets
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    return sum(file.stat().st_size for file in out.iterdir())
