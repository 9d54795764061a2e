"""The merged checkpoint: W + ΔW for every adapted weight, in 16 bits, one tensor at a time.

Everything is written into the output directory under temporary names; ``config.json``, without which nothing takes a
directory for a model, comes last. A run that was interrupted goes on from the shards that are whole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from .. import measure, quantize
from ..errors import InputError, RunFailed
from ..locations import base_directory
from ..model import (
    ADAPTER_WEIGHTS,
    file_sha256,
    load_tokenizer,
    pick_compute_dtype,
    pick_device,
    read_adapter,
)
from ..recipe import ExportSection, ModelSection
from ..shards import TensorEntry, checkpoint_tensors, plan_shards, read_tensor, write_index, write_shard
from .deltas import AdapterDeltas, Delta, read_deltas, skeleton

CERTIFICATE = "qvera_export.json"
_STATE = ".qvera_export_state.json"


def export_merged(
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    options: ExportSection,
    *,
    chat_template: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write the merged checkpoint to ``out`` and return its certificate (also written there as qvera_export.json).

    Args:
        adapter_dir: the trained adapter.
        section: the base it was trained on.
        options: dtype, base (original or dequantized), shard size.
        chat_template: a template for the tokenizer, where it has none of its own.
        progress: called with (tensors done, tensors in all, tensor name).

    Raises:
        InputError: adapter and base do not fit, or ``out`` holds something else.
        RunFailed: a merged weight would be NaN, Inf, or out of the dtype's range; the message names the tensor.
    """
    read_adapter(adapter_dir)  # a broken adapter is found before a base is downloaded
    source = base_directory(section)
    dtype: torch.dtype = getattr(torch, options.dtype)
    entries = checkpoint_tensors(source)
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=section.trust_remote_code)
    if getattr(model_config, "quantization_config", None) is not None:
        raise InputError(
            f"{source}: the base is stored quantized, so there are no 16-bit weights to merge into. Point model.path at the "
            "16-bit checkpoint it was made from."
        )
    model = skeleton(section, source)
    adapter = read_deltas(adapter_dir, model)
    deltas = _deltas(adapter, entries)
    identity = _identity(adapter_dir, source, entries, section, options)
    finished = _open_output(out, identity)
    shards = plan_shards(entries, dtype, options.max_shard_size_bytes)
    layers: dict[str, dict[str, float]] = finished["layers"]
    done = 0
    for name, group in shards:
        target = out / name
        if name in finished["shards"] and target.is_file() and file_sha256(target) == finished["shards"][name]:
            done += len(group)
            continue

        def merged_tensors(group: list[TensorEntry] = group) -> Iterator[torch.Tensor]:
            nonlocal done
            for entry in group:
                yield _merged(entry, deltas.get(entry.name), dtype, section, options, layers)
                done += 1
                if progress is not None:
                    progress(done, len(entries), entry.name)

        finished["shards"][name] = write_shard(target, group, dtype, merged_tensors())
        (out / _STATE).write_text(json.dumps(finished))
    write_index(out, shards, dtype)
    tokenizer = load_tokenizer(section)
    if chat_template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(out)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(out)
    certificate = {
        "format": 1,
        "kind": "merged",
        "base": {
            "path": section.path,
            "revision": section.revision,
            "weights": options.base,
            "sha256": identity["base"],
        },
        "adapter": {
            "path": str(adapter_dir),
            "sha256": identity["adapter"],
            "kind": str(getattr(adapter.config.peft_type, "value", adapter.config.peft_type)),
            "rank": adapter.A.shape[0],
            "seed": getattr(adapter.config, "projection_seed", getattr(adapter.config, "projection_prng_key", None)),
        },
        "trained_on": {"quantization": section.quantization, "double_quant": section.double_quant},
        "dtype": options.dtype,
        "files": finished["shards"],
        "delta": layers,
        "versions": measure.versions(),
    }
    (out / CERTIFICATE).write_text(json.dumps(certificate, indent=1), encoding="utf-8")
    model_config.dtype = dtype
    model_config.architectures = model_config.architectures or [type(model).__name__]
    model_config.save_pretrained(out)
    (out / _STATE).unlink()
    return certificate


def _merged(
    entry: TensorEntry,
    delta: Delta | None,
    dtype: torch.dtype,
    section: ModelSection,
    options: ExportSection,
    layers: dict[str, dict[str, float]],
) -> torch.Tensor:
    """W + ΔW in fp32, rounded once to ``dtype``; a tensor that is not adapted is only cast."""
    weight = read_tensor(entry)
    if not weight.dtype.is_floating_point:
        raise InputError(f"{entry.file}: {entry.name} is {weight.dtype}, expected a floating-point weight.")
    exact = weight.to(torch.float32)
    if delta is not None:
        if options.base == "dequantized":
            compute = pick_compute_dtype(section.compute_dtype, pick_device())
            exact = quantize.roundtrip(weight.to(compute), section).to(torch.float32)
        change = delta.weight()
        layers[entry.name] = {"max_abs": change.abs().max().item(), "mean_abs": change.abs().mean().item()}
        exact = exact + change
    result = exact.to(dtype)
    if not torch.isfinite(result).all():
        if not torch.isfinite(exact).all():
            what = "has NaN or Inf" + ("" if delta is None else " after merging")
        else:
            what = (
                f"has values up to {exact.abs().max().item():.6g}, beyond {dtype} (largest {torch.finfo(dtype).max:g})"
            )
        if torch.isfinite(weight).all() or delta is not None:
            raise RunFailed(
                f"{entry.name}: {what}. Export with --dtype bfloat16, or look at this adapter; nothing was finished."
            )
        raise RunFailed(f"{entry.name}: the base weight itself has NaN or Inf ({entry.file}).")
    return result


def _deltas(adapter: AdapterDeltas, entries: list[TensorEntry]) -> dict[str, Delta]:
    """Checkpoint tensor name → its ΔW, where the checkpoint has that tensor in that shape."""
    shapes = {e.name: e.shape for e in entries}
    deltas: dict[str, Delta] = {}
    for name, delta in adapter.layers.items():
        key = f"{name}.weight"
        expected = delta.shape[::-1] if delta.transposed else delta.shape
        if shapes.get(key) != expected:
            found = "has no such tensor" if key not in shapes else f"has it as {list(shapes[key])}"
            raise InputError(
                f"{key}: the adapter changes this weight of shape {list(expected)}, but the base checkpoint {found}: it is "
                "another model's adapter."
            )
        deltas[key] = delta
    return deltas


def _identity(
    adapter_dir: Path, source: Path, entries: list[TensorEntry], section: ModelSection, options: ExportSection
) -> dict[str, Any]:
    """What an export is a function of: an interrupted one is continued only where all of this is equal."""
    files = sorted({e.file for e in entries})
    return {
        "adapter": file_sha256(adapter_dir / ADAPTER_WEIGHTS),
        "base": {f.name: file_sha256(f) for f in files},
        "options": dataclasses.asdict(options),
        "quantization": [section.quantization, section.double_quant, section.compute_dtype],
    }


def _open_output(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What of this very export is already in ``out``.

    Raises:
        InputError: ``out`` holds something else.
    """
    fresh: dict[str, Any] = {"identity": identity, "shards": {}, "layers": {}}
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a directory that is new or empty.")
    state = out / _STATE
    if state.is_file():
        try:
            found = json.loads(state.read_text())
        except ValueError:
            found = {}
        if found.get("identity") == identity:
            return found
        raise InputError(f"{out}: holds an unfinished export of something else. Delete it, or name another directory.")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty. Nothing is overwritten; name a directory that is new or empty.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(fresh))
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error}). Name another directory.") from None
    return fresh
