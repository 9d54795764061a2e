"""The merged checkpoint: W + ΔW for every adapted weight, in 16 bits, some rows at a time.

Each file of the base is read once, from start to end: one thread reads and hashes, one a core computes, one writes and
hashes.

Everything is written into the output directory under temporary names; ``config.json``, without which nothing takes a
directory for a model, comes last. A run that was interrupted goes on from the shards that are whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qvera.adapters.save_load import ADAPTER_WEIGHTS, read_adapter, require_base, require_tokens
from qvera.config.schema import ExportSection, ModelSection
from qvera.export.deltas import AdapterDeltas, Delta, TokenTable, read_deltas, token_tables
from qvera.export.stream import TrainedBaseReader, one_thread_each
from qvera.models.hub import base_directory
from qvera.models.loader import pick_compute_dtype, pick_device
from qvera.models.model_config import empty_model, require_own_weights
from qvera.models.tokenizer import ADDED_ROWS, ids_of, load_tokenizer
from qvera.utils import memory
from qvera.utils.atomic import OutputDirectory, disk_errors, place_files, replace_text, require_space
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import file_sha256
from qvera.utils.paths import CERTIFICATE
from qvera.utils.safetensors_io import (
    TensorEntry,
    TensorSpec,
    base_fingerprint,
    checkpoint_tensors,
    file_stamps,
    grouped_by_bytes,
)
from qvera.utils.safetensors_stream import Block, CheckpointReader, in_order, write_index, write_shard
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
        RunFailed: a merged weight would be NaN, Inf, or out of the dtype's range (the message names the tensor); or the
            disk is full. Finished shards are kept, and the same call goes on from them.
        Interrupted: SIGINT or SIGTERM came. The same holds.
    """
    plan = _plan(adapter_dir, section, options)
    tokenizer = plan.tokenizer
    if chat_template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = chat_template
    identity = _identity(plan, adapter_dir)
    with StopRequests() as stop, OutputDirectory.open(out, identity, "export") as work:
        try:
            delta = _ShardWriter(plan, work, stop, progress).write()
            certificate = _certificate(plan, adapter_dir, work, delta)
            with disk_errors(f"{out}", _KEPT.format(done=len(plan.shards), total=len(plan.shards))):
                _write_small_files(plan, out, certificate)
        except KeyboardInterrupt:
            raise Interrupted(_interrupted(work, plan.shards, "Ctrl-C")) from None
        work.complete()
    return certificate


_KEPT = "{done} of {total} shards are finished and kept. Make room and run the same command again; it resumes there."


def _interrupted(work: OutputDirectory, shards: Sized, why: str) -> str:
    return (
        f"Stopped by {why} with {len(work.shards)} of {len(shards)} shards finished in {work.out}. The same command "
        "goes on from there."
    )


@dataclasses.dataclass
class _Plan:
    """What an export writes, known before anything is written."""

    section: ModelSection
    options: ExportSection
    source_dir: Path
    fingerprint: str
    adapter: AdapterDeltas
    model: PreTrainedModel
    """The base without weights."""
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    added_tokens: dict[str, int]
    entries: list[TensorEntry]
    """The base's tensors in the order of its files."""
    stamps: dict[str, list[int]]
    deltas: dict[str, Delta]
    tables: dict[str, TokenTable]
    shards: list[tuple[str, list[TensorSpec]]]
    dtype: torch.dtype
    compute: torch.dtype
    """The dtype that the trained base computes in."""


def _plan(adapter_dir: Path, section: ModelSection, options: ExportSection) -> _Plan:
    """Open base and adapter, and check that they fit.

    Raises:
        InputError: they do not.
    """
    read_adapter(adapter_dir)  # a broken adapter is found before a base is downloaded
    source_dir = base_directory(section)
    dtype: torch.dtype = getattr(torch, options.dtype)
    entries = checkpoint_tensors(source_dir)
    model_config = AutoConfig.from_pretrained(source_dir, trust_remote_code=section.trust_remote_code)
    if getattr(model_config, "quantization_config", None) is not None:
        raise InputError(
            f"{source_dir}: the base is stored quantized, so there are no 16-bit weights to merge into. Point "
            "model.path at the 16-bit checkpoint it was made from."
        )
    model = empty_model(section, source_dir)
    adapter = read_deltas(adapter_dir, model)
    fingerprint = base_fingerprint(source_dir)
    require_base(adapter.config, adapter_dir, section.path, fingerprint)
    require_own_weights(source_dir, entries, model)
    tokenizer = load_tokenizer(section)
    ids = ids_of(tokenizer, section.added_tokens)
    require_tokens(adapter.config, adapter_dir, ids)
    tables = token_tables(model, ids, adapter_dir, entries) if ids else {}
    specs = [TensorSpec(e.name, dtype, tables[e.name].shape if e.name in tables else e.shape) for e in entries]
    shards = grouped_by_bytes(([s] for s in specs), lambda spec: spec.size_bytes, options.max_shard_size_bytes)
    compute = pick_compute_dtype(section.compute_dtype, pick_device())
    deltas = _deltas(adapter, entries)
    return _Plan(
        section, options, source_dir, fingerprint, adapter, model, model_config, tokenizer, ids, entries,
        file_stamps(entries), deltas, tables, shards, dtype, compute,
    )  # fmt: skip


def _certificate(plan: _Plan, adapter_dir: Path, work: OutputDirectory, delta: dict[str, Any]) -> dict[str, Any]:
    section, config = plan.section, plan.adapter.config
    return {
        "format": 1,
        "kind": "merged",
        "base": {
            "path": section.path,
            "revision": section.revision,
            "weights": plan.options.base,
            "fingerprint": plan.fingerprint,
            "sha256": work.facts["base"],
        },
        "adapter": {
            "path": str(adapter_dir),
            "sha256": file_sha256(adapter_dir / ADAPTER_WEIGHTS),
            "kind": str(getattr(config.peft_type, "value", config.peft_type)),
            "rank": plan.adapter.A.shape[0],
            "b_groups": plan.adapter.groups,
            "input_scale": plan.adapter.input_scale,
            "seed": plan.adapter.seed,
        },
        "trained_on": {"quantization": section.quantization, "double_quant": section.double_quant},
        "added_tokens": plan.added_tokens,
        "dtype": plan.options.dtype,
        "files": work.shards,
        "delta": delta,
        "versions": memory.versions(),
    }


def _write_small_files(plan: _Plan, out: Path, certificate: dict[str, Any]) -> None:
    """Index, tokenizer, generation config, certificate, and config.json last: with it the directory is a model."""
    tokenizer, section, config = plan.tokenizer, plan.section, plan.model_config
    write_index(out, plan.shards)
    place_files(out, tokenizer.save_pretrained)
    if (plan.source_dir / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(plan.source_dir)
        if section.eos_token is not None:
            generation.eos_token_id = tokenizer.eos_token_id
        place_files(out, generation.save_pretrained)
    replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
    config.dtype = plan.dtype
    for table in plan.tables.values():
        config.get_text_config().vocab_size = table.shape[0]
    if section.eos_token is not None:
        config.eos_token_id = tokenizer.eos_token_id
    if section.pad_token is not None:
        config.pad_token_id = tokenizer.pad_token_id
    config.architectures = config.architectures or [type(plan.model).__name__]
    place_files(out, config.save_pretrained)


Merged = tuple[Block, torch.Tensor, tuple[float, float] | None]
"""Rows in the output's dtype, and the largest and the sum of |ΔW| in them where the weight is adapted."""


class _ShardWriter:
    """Writes the shards that are not finished yet, and measures |ΔW| on the way."""

    def __init__(
        self,
        plan: _Plan,
        work: OutputDirectory,
        stop: StopRequests,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.plan, self.work, self.stop, self.progress = plan, work, stop, progress
        self.finished = {name for name, _ in plan.shards if work.has(name)}
        self.skip = {e.name for name, group in plan.shards if name in self.finished for e in group}
        self.delta: dict[str, dict[str, float]] = {
            name: found for name, found in work.facts.get("layers", {}).items() if name in self.skip
        }
        files = plan.entries, plan.stamps, work.facts.get("base", {})
        self.reader = (
            TrainedBaseReader(*files, plan.section, plan.compute, plan.model)
            if plan.options.base == "dequantized"
            else CheckpointReader(*files)
        )

    def write(self) -> dict[str, dict[str, float]]:
        """Write the shards; returns max and mean |ΔW| by weight, in the order of the files."""
        plan, work = self.plan, self.work
        needed = sum(math.prod(e.shape) for e in plan.entries if e.name not in self.skip) * plan.dtype.itemsize
        require_space(work.out, needed, "the rest of the export" if self.skip else "the export")
        with one_thread_each() as workers:
            results = in_order(self.reader.blocks(self.skip), self._merge, workers, 3 * workers + 2)
            with contextlib.closing(results):
                rows = self._merged_rows(results)
                for name, group in plan.shards:
                    if name in self.finished:
                        continue
                    kept = _KEPT.format(done=len(work.shards), total=len(plan.shards))
                    with disk_errors(str(work.out / name), kept):
                        sha256 = write_shard(work.out / name, group, rows)
                        work.facts.update(base=dict(self.reader.sha256), layers=dict(self.delta))
                        work.finished(name, sha256)
                for _ in results:  # what is left to read is only hashed
                    raise RuntimeError("the shards were planned without some of the tensors")
        work.facts["base"] = {name: self.reader.sha256[name] for name in plan.stamps}
        return {e.name: self.delta[e.name] for e in plan.entries if e.name in self.delta}

    def _merged_rows(self, results: Iterator[Merged]) -> Iterator[torch.Tensor]:
        """The rows alone, in order; a stop request ends them."""
        done, largest, total = len(self.skip), 0.0, 0.0
        for block, rows, found in results:
            if self.stop.asked:
                raise Interrupted(_interrupted(self.work, self.plan.shards, self.stop.asked))
            if found is not None:
                largest, total = max(largest, found[0]), total + found[1]
            if block.last:
                if found is not None:
                    mean = total / math.prod(block.entry.shape)
                    self.delta[block.entry.name] = {"max_abs": largest, "mean_abs": mean}
                    largest = total = 0.0
                done += 1
                if self.progress is not None:
                    self.progress(done, len(self.plan.entries), block.entry.name)
            yield rows

    def _merge(self, block: Block) -> Merged:
        """W + ΔW in fp32, rounded once to the output's dtype; a tensor that is not adapted is only cast.

        Raises:
            RunFailed: the result has NaN or Inf in it.
        """
        plan, name = self.plan, block.entry.name
        delta, weight, found = plan.deltas.get(name), block.rows, None
        if name in plan.tables:
            weight = plan.tables[name].put(weight, block.first, block.last)
        if isinstance(self.reader, TrainedBaseReader):
            weight = self.reader.as_trained(block, weight)
        if delta is None:
            exact = weight if plan.dtype == weight.dtype else weight.to(torch.float32)
        else:
            exact = delta.rows(block.first, len(weight))
            low, high = torch.aminmax(exact)
            found = (max(-low.item(), high.item()), exact.abs().sum().item())
            exact.add_(weight)  # in fp32, like weight.float() + ΔW
        result = exact.to(plan.dtype).contiguous()
        low, high = torch.aminmax(result)  # both are NaN where one element is
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise RunFailed(_not_finite(block, exact, plan.dtype, delta is not None))
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
                f"{key}: the adapter changes this weight of shape {list(expected)}, but the base checkpoint {found}: "
                "it is another model's adapter."
            )
        deltas[key] = delta
    return deltas


def _identity(plan: _Plan, adapter_dir: Path) -> dict[str, Any]:
    """What an export is a function of: an interrupted one is continued only where all of this is equal.

    The base counts as the same by the path, size, time and inode of its files; their SHA-256 is taken while they are
    merged.
    """
    section, token_rows = plan.section, adapter_dir / ADDED_ROWS
    return {
        "adapter": file_sha256(adapter_dir / ADAPTER_WEIGHTS),
        "tokens": file_sha256(token_rows) if token_rows.is_file() else None,
        "base": plan.stamps,
        "options": plan.options.to_dict(),
        "quantization": [section.quantization, section.double_quant, str(plan.compute)],
    }
