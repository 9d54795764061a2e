"""The merged checkpoint: W + ΔW for every adapted weight, in 16 bits, some rows at a time.

Each file of the base is read once, from start to end: one thread reads and hashes, one a core computes, one writes and hashes.

Everything is written into the output directory under temporary names; ``config.json``, without which nothing takes a
directory for a model, comes last. A run that was interrupted goes on from the shards that are whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qvera.adapters.save_load import ADAPTER_WEIGHTS, read_adapter, require_base, require_tokens
from qvera.config.schema import ExportSection, ModelSection
from qvera.export.deltas import AdapterDeltas, Delta, read_deltas
from qvera.export.stream import Block, CheckpointReader, in_order, one_thread_each, stamps
from qvera.models.hub import base_directory
from qvera.models.loader import pick_compute_dtype, pick_device
from qvera.models.model_config import empty_model
from qvera.models.tokenizer import ADDED_ROWS, ids_of, load_tokenizer, read_token_rows
from qvera.utils import memory
from qvera.utils.atomic import OutputDirectory, disk_errors, place_files, replace_text, require_space
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import file_sha256
from qvera.utils.formatting import first_of
from qvera.utils.paths import CERTIFICATE
from qvera.utils.safetensors_io import TensorEntry, TensorSpec, base_fingerprint, checkpoint_tensors, grouped_by_bytes
from qvera.utils.safetensors_stream import write_index, write_shard
from qvera.utils.signals import StopRequests


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
        RunFailed: a merged weight would be NaN, Inf, or out of the dtype's range (the message names the tensor); or the disk
            is full. Finished shards are kept, and the same call goes on from them.
        Interrupted: SIGINT or SIGTERM came. The same holds.
    """
    read_adapter(adapter_dir)  # a broken adapter is found before a base is downloaded
    source_dir = base_directory(section)
    dtype: torch.dtype = getattr(torch, options.dtype)
    entries = checkpoint_tensors(source_dir)
    model_config = AutoConfig.from_pretrained(source_dir, trust_remote_code=section.trust_remote_code)
    if getattr(model_config, "quantization_config", None) is not None:
        raise InputError(
            f"{source_dir}: the base is stored quantized, so there are no 16-bit weights to merge into. Point model.path at the "
            "16-bit checkpoint it was made from."
        )
    model = empty_model(section, source_dir)
    adapter = read_deltas(adapter_dir, model)
    fingerprint = base_fingerprint(source_dir)
    require_base(adapter.config, adapter_dir, section.path, fingerprint)
    _require_shapes(source_dir, entries, model)
    deltas = _deltas(adapter, entries)
    tokenizer = load_tokenizer(section)
    ids = ids_of(tokenizer, section.added_tokens)
    require_tokens(adapter.config, adapter_dir, ids)
    tables = _tables(model, ids, adapter_dir, entries) if ids else {}
    specs = [TensorSpec(e.name, dtype, tables[e.name].shape if e.name in tables else e.shape) for e in entries]
    shards = grouped_by_bytes(([s] for s in specs), lambda spec: spec.size_bytes, options.max_shard_size_bytes)
    compute = pick_compute_dtype(section.compute_dtype, pick_device())
    identity = _identity(adapter_dir, entries, section, options, compute)
    with StopRequests() as stop, OutputDirectory.open(out, identity, "export") as work:
        try:
            layers = _write_shards(
                work, shards, deltas, tables, dtype, options, (section, compute), entries, model, stop, progress
            )
            if chat_template is not None and not tokenizer.chat_template:
                tokenizer.chat_template = chat_template
            certificate = {
                "format": 1,
                "kind": "merged",
                "base": {
                    "path": section.path,
                    "revision": section.revision,
                    "weights": options.base,
                    "fingerprint": fingerprint,
                    "sha256": work.facts["base"],
                },
                "adapter": {
                    "path": str(adapter_dir),
                    "sha256": identity["adapter"],
                    "kind": str(getattr(adapter.config.peft_type, "value", adapter.config.peft_type)),
                    "rank": adapter.A.shape[0],
                    "b_groups": adapter.groups,
                    "input_scale": adapter.input_scale,
                    "seed": getattr(
                        adapter.config, "projection_seed", getattr(adapter.config, "projection_prng_key", None)
                    ),
                },
                "trained_on": {"quantization": section.quantization, "double_quant": section.double_quant},
                "added_tokens": ids,
                "dtype": options.dtype,
                "files": work.shards,
                "delta": layers,
                "versions": memory.versions(),
            }
            with disk_errors(f"{out}", _KEPT.format(done=len(shards), total=len(shards))):
                write_index(out, shards)
                place_files(out, tokenizer.save_pretrained)
                if (source_dir / "generation_config.json").is_file():
                    generation = GenerationConfig.from_pretrained(source_dir)
                    if section.eos_token is not None:
                        generation.eos_token_id = tokenizer.eos_token_id
                    place_files(out, generation.save_pretrained)
                replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
                model_config.dtype = dtype
                for table in tables.values():
                    model_config.get_text_config().vocab_size = table.shape[0]
                if section.eos_token is not None:
                    model_config.eos_token_id = tokenizer.eos_token_id
                if section.pad_token is not None:
                    model_config.pad_token_id = tokenizer.pad_token_id
                model_config.architectures = model_config.architectures or [type(model).__name__]
                place_files(out, model_config.save_pretrained)  # last: with it the directory is a model
        except KeyboardInterrupt:
            raise Interrupted(_interrupted(work, shards, "Ctrl-C")) from None
        work.complete()
    return certificate


_KEPT = "{done} of {total} shards are finished and kept; make room and run the same command again, and it goes on from there."


def _interrupted(work: OutputDirectory, shards: list[Any], why: str) -> str:
    return (
        f"Stopped by {why} with {len(work.shards)} of {len(shards)} shards finished in {work.out}. The same command goes on from "
        "there."
    )


def _write_shards(
    work: OutputDirectory,
    shards: list[tuple[str, list[TensorSpec]]],
    deltas: dict[str, Delta],
    tables: dict[str, Table],
    dtype: torch.dtype,
    options: ExportSection,
    trained_on: tuple[ModelSection, torch.dtype],
    entries: list[TensorEntry],
    model: torch.nn.Module,
    stop: StopRequests,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, dict[str, float]]:
    """Write the shards that are not finished yet; returns max and mean |ΔW| by weight, in the order of the files."""
    finished = {name for name, _ in shards if work.has(name)}
    skip = {e.name for name, group in shards if name in finished for e in group}
    needed = sum(math.prod(e.shape) for e in entries if e.name not in skip) * dtype.itemsize
    require_space(work.out, needed, "the rest of the export" if skip else "the export")
    dequantized = options.base == "dequantized"
    reader = CheckpointReader(
        entries,
        work.facts.get("base", {}),
        trained_on if dequantized else None,
        *(_quantized_weights(model) if dequantized else ((), ())),
    )
    layers: dict[str, dict[str, float]] = {k: v for k, v in work.facts.get("layers", {}).items() if k in skip}
    done, largest, total = len(skip), 0.0, 0.0

    def merged_rows(results: Iterator[Merged]) -> Iterator[torch.Tensor]:
        nonlocal done, largest, total
        for block, result, found in results:
            if stop.asked:
                raise Interrupted(_interrupted(work, shards, stop.asked))
            if found is not None:
                largest, total = max(largest, found[0]), total + found[1]
            if block.last:
                if found is not None:
                    layers[block.entry.name] = {"max_abs": largest, "mean_abs": total / math.prod(block.entry.shape)}
                    largest = total = 0.0
                done += 1
                if progress is not None:
                    progress(done, len(entries), block.entry.name)
            yield result

    merge = functools.partial(
        _merge, deltas=deltas, tables=tables, dtype=dtype, compute=trained_on[1] if dequantized else None
    )
    with one_thread_each() as workers:
        results = in_order(reader.blocks(skip), merge, workers, 3 * workers + 2)
        with contextlib.closing(results):
            taken = merged_rows(results)
            for name, group in shards:
                if name in finished:
                    continue
                kept = _KEPT.format(done=len(work.shards), total=len(shards))
                with disk_errors(str(work.out / name), kept):
                    sha256 = write_shard(work.out / name, group, taken)
                    work.facts.update(base=dict(reader.sha256), layers=dict(layers))
                    work.finished(name, sha256)
            for _ in results:  # what is left to read is only hashed
                raise RuntimeError("the shards were planned without some of the tensors")
    order = [e.name for e in entries if e.name in layers]
    work.facts.update(base={f.name: reader.sha256[f.name] for f in reader.files}, layers={n: layers[n] for n in order})
    return work.facts["layers"]


Merged = tuple[Block, torch.Tensor, tuple[float, float] | None]
"""Rows in the output's dtype, and the largest and the sum of |ΔW| in them where the weight is adapted."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Embedding or head, with rows for the tokens that the recipe added: id → row; ``shape`` is what is written."""

    rows: dict[int, torch.Tensor]
    shape: tuple[int, ...]

    def put(self, block: Block, weight: torch.Tensor) -> torch.Tensor:
        """The block's rows with those of added tokens in their places, and at the table's end the ones that it grows by."""
        stop = self.shape[0] if block.last else block.first + len(weight)
        out = weight.new_zeros(stop - block.first, *weight.shape[1:])
        out[: len(weight)] = weight
        for place, row in self.rows.items():
            if block.first <= place < stop:
                out[place - block.first] = row.to(out.dtype)
        return out


def _tables(
    model: PreTrainedModel, ids: dict[str, int], adapter_dir: Path, entries: list[TensorEntry]
) -> dict[str, Table]:
    """Name of embedding and head in the checkpoint → its `Table`."""
    rows = read_token_rows(adapter_dir)
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    shapes = {e.name: e.shape for e in entries}
    tables = {}
    for name, module in model.named_modules():
        for end, found in ends.items():
            shape = shapes.get(f"{name}.weight")
            if module is found and shape is not None:  # a tied head is in few files
                new = rows.get(end, rows["embedding"])
                if tuple(new.shape) != (len(ids), *shape[1:]):
                    raise InputError(
                        f"{adapter_dir / ADDED_ROWS}: holds rows of shape {list(new.shape)}, expected {[len(ids), *shape[1:]]} for "
                        f"{name}.weight. It is another model's."
                    )
                placed = dict(zip(ids.values(), new, strict=True))
                tables[f"{name}.weight"] = Table(placed, (max(shape[0], *(i + 1 for i in placed)), *shape[1:]))
    return tables


def _merge(
    block: Block,
    deltas: dict[str, Delta],
    tables: dict[str, Table],
    dtype: torch.dtype,
    compute: torch.dtype | None,
) -> Merged:
    """W + ΔW in fp32, rounded once to ``dtype``; a tensor that is not adapted is only cast.

    Raises:
        RunFailed: the result has NaN or Inf in it.
    """
    delta, weight, found = deltas.get(block.entry.name), block.rows, None
    if block.entry.name in tables:
        weight = tables[block.entry.name].put(block, weight)
    fake = block.fake_quantization
    if compute is not None and (fake is None or block.transposed or not fake.reads_original):
        weight = weight.to(compute)
    if fake is not None:
        weight = fake.rows(weight.t().contiguous(), 0).t() if block.transposed else fake.rows(weight, block.first)
    if delta is None:
        exact = weight if dtype == weight.dtype else weight.to(torch.float32)
    else:
        exact = delta.rows(block.first, len(weight))
        low, high = torch.aminmax(exact)
        found = (max(-low.item(), high.item()), exact.abs().sum().item())
        exact.add_(weight)  # in fp32, like weight.float() + ΔW
    result = exact.to(dtype).contiguous()
    low, high = torch.aminmax(result)  # both are NaN where one element is
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise RunFailed(_not_finite(block, exact, dtype, delta is not None))
    return block, result, found


def _not_finite(block: Block, exact: torch.Tensor, dtype: torch.dtype, adapted: bool) -> str:
    name = block.entry.name
    if not torch.isfinite(block.rows.float()).all():
        return f"{name}: the base weight itself has NaN or Inf ({block.entry.file})."
    if not torch.isfinite(exact.float()).all():
        what = "has NaN or Inf" + (" after merging" if adapted else "")
    else:
        what = f"has values up to {exact.abs().max().item():.6g}, beyond {dtype} (largest {torch.finfo(dtype).max:g})"
    return f"{name}: {what}. Export with --dtype bfloat16, or look at this adapter; this shard was not finished."


def _quantized_weights(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Names of the weights that a quantized load quantizes (every linear but the head), and which of them are Conv1D's."""
    head = model.get_output_embeddings()
    found = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and module is not head
    }
    return set(found), {name for name, transposed in found.items() if transposed}


def _require_shapes(directory: Path, entries: list[TensorEntry], model: PreTrainedModel) -> None:
    """Compare the checkpoint with its own config.

    Raises:
        InputError: a weight has another shape, or is missing.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {e.name: e for e in entries}
    for name, entry in found.items():
        if expected.get(name, entry.shape) != entry.shape:
            raise InputError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, and by {directory / 'config.json'} it has "
                f"{list(expected[name])}. These are not the weights of this config: fetch both again."
            )
    tied = model.all_tied_weights_keys
    missing = sorted(expected.keys() - found.keys() - {*tied, *tied.values()})
    if missing and found.keys() <= expected.keys():  # with names of another scheme, nothing can be said
        raise InputError(
            f"{directory}: has no {first_of(missing)}, which its config.json asks for: a shard is missing. "
            "Fetch the checkpoint again."
        )


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
    adapter_dir: Path,
    entries: list[TensorEntry],
    section: ModelSection,
    options: ExportSection,
    compute: torch.dtype,
) -> dict[str, Any]:
    """What an export is a function of: an interrupted one is continued only where all of this is equal.

    The base counts as the same by the path, size, time and inode of its files; their SHA-256 is taken while they are merged.
    """
    return {
        "adapter": file_sha256(adapter_dir / ADAPTER_WEIGHTS),
        "tokens": file_sha256(adapter_dir / ADDED_ROWS) if (adapter_dir / ADDED_ROWS).is_file() else None,
        "base": stamps(entries),
        "options": options.to_dict(),
        "quantization": [section.quantization, section.double_quant, str(compute)],
    }
