"""The merged checkpoint: W + ΔW for every adapted weight, in 16 bits, some rows at a time.

Each file of the base is read once, from start to end, as `qvera.models.safetensors_stream` does it. ``config.json``,
without which nothing takes a directory for a model, is written last. An interrupted export goes on from whole shards.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from qvera.adapters.files.adapter_file import require_tokens
from qvera.adapters.files.save_load import ADAPTER_WEIGHTS
from qvera.config.schema import ExportSection, ModelSection
from qvera.export.base import open_adapter_on_base
from qvera.export.deltas import TokenTable, token_tables
from qvera.export.stream import PackedBaseReader, TrainedBaseReader, one_thread_each
from qvera.models.safetensors_stream import Block, CheckpointReader, in_order, write_index, write_shard
from qvera.models.tokenizer import ADDED_ROWS, ids_of, load_tokenizer
from qvera.utils import accelerator, memory
from qvera.utils.atomic import OutputDirectory, disk_errors, place_files, replace_text, require_space
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import file_sha256
from qvera.utils.paths import CERTIFICATE
from qvera.utils.safetensors_io import (
    TensorSpec,
    grouped_by_bytes,
)
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
    export = _MergedExport(adapter_dir, section, options, chat_template, progress)
    shards = len(export.shards)
    with StopRequests() as export.stop, OutputDirectory.open(out, export.identity(), "export") as work:
        try:
            certificate = export.certificate(work, export.write_shards(work))
            with disk_errors(f"{out}", _KEPT.format(done=shards, total=shards)):
                export.write_small_files(out, certificate)
        except KeyboardInterrupt:
            raise Interrupted(_INTERRUPTED.format(why="Ctrl-C", done=len(work.shards), total=shards, out=out)) from None
        work.complete()
    return certificate


_KEPT = "{done} of {total} shards are finished and kept. Make room and run the same command again; it resumes there."
_INTERRUPTED = "Stopped by {why} with {done} of {total} shards finished in {out}. The same command goes on from there."
_MERGING_BYTES = 2 * 10**9
"""What an accelerator must have free: the pair of a 70B at rank 1024 in fp32 is 230 MB, and blocks are in work."""
Merged = tuple[Block, torch.Tensor, tuple[float, float] | None]
"""Rows in the output's dtype, and the largest and the sum of |ΔW| in them where the weight is adapted."""


class _MergedExport:
    """Base and adapter, opened and compared before anything is written; then the writing.

    Raises:
        InputError: they do not fit.
    """

    stop: StopRequests
    reader: CheckpointReader

    def __init__(
        self,
        adapter_dir: Path,
        section: ModelSection,
        options: ExportSection,
        chat_template: str | None,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.adapter_dir, self.section, self.options, self.progress = adapter_dir, section, options, progress
        self.base = open_adapter_on_base(adapter_dir, section)
        self.adapter, self.entries, self.stamps = self.base.adapter, self.base.entries, self.base.stamps
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self._check_stored_quantization()
        self.tokenizer = load_tokenizer(section)
        if chat_template is not None and not self.tokenizer.chat_template:
            self.tokenizer.chat_template = chat_template
        self.added_tokens = ids_of(self.tokenizer, section.added_tokens)
        require_tokens(self.adapter.config, adapter_dir, self.added_tokens)
        self.tables: dict[str, TokenTable] = {}
        if self.added_tokens:
            self.tables = token_tables(self.base.model, self.added_tokens, adapter_dir, self.entries)
        self.device = _merging_device()
        self.deltas = {f"{name}.weight": delta for name, delta in self.adapter.on(self.device).layers.items()}
        specs = [
            TensorSpec(e.name, self.dtype, self.tables[e.name].shape if e.name in self.tables else e.shape)
            for e in self.entries
        ]
        self.shards = grouped_by_bytes(([s] for s in specs), lambda spec: spec.size_bytes, options.max_shard_size_bytes)
        self.layers: dict[str, dict[str, float]] = {}
        """Adapted weight → max and mean |ΔW|."""

    def _check_stored_quantization(self) -> None:
        """Leave the quantization out of the export's config.

        Raises:
            InputError: the original weights are wanted of a base that is stored in 4 bits.
        """
        if getattr(self.base.config, "quantization_config", None) is None:
            return
        if self.options.base == "original":
            raise InputError(
                f"--base original: {self.base.directory} is stored in 4 bits, so the original weights are not there. "
                "Use --base dequantized, or point model.path at the 16-bit checkpoint it was made from."
            )
        del self.base.config.quantization_config

    def identity(self) -> dict[str, Any]:
        """What an export is a function of: an interrupted one is continued only where all of this is equal.

        The base counts as the same by the size, time and inode of its files; their SHA-256 is taken while they are
        merged.
        """
        section, token_rows = self.section, self.adapter_dir / ADDED_ROWS
        return {
            "adapter": file_sha256(self.adapter_dir / ADAPTER_WEIGHTS),
            "tokens": file_sha256(token_rows) if token_rows.is_file() else None,
            "base": [str(self.base.directory.resolve()), self.stamps],
            "options": self.options.to_dict(),
            "device": self.device.type,  # another one may round otherwise
            "quantization": [section.quantization, section.double_quant, str(self.base.compute)],
        }

    def write_shards(self, work: OutputDirectory) -> dict[str, dict[str, float]]:
        """Write the shards that are not finished; returns max and mean |ΔW| by weight, in the order of the files."""
        finished = {name for name, _ in self.shards if work.has(name)}
        skip = {spec.name for name, group in self.shards if name in finished for spec in group}
        self.layers = {name: found for name, found in work.facts.get("layers", {}).items() if name in skip}
        known = work.facts.get("base", {})
        if self.base.packed or self.options.base == "dequantized":
            self.reader = self.base.reader(self.section, known)
        else:
            self.reader = CheckpointReader(self.base.stored, self.stamps, known)
        needed = sum(e.numel for e in self.entries if e.name not in skip) * self.dtype.itemsize
        require_space(work.out, needed, "the rest of the export" if skip else "the export")
        with (
            one_thread_each() as workers,
            contextlib.closing(in_order(self.reader.blocks(skip), self._merge, workers, 3 * workers + 2)) as results,
        ):
            rows = self._merged_rows(results, work, len(skip))
            for name, group in self.shards:
                if name in finished:
                    continue
                kept = _KEPT.format(done=len(work.shards), total=len(self.shards))
                with disk_errors(str(work.out / name), kept):
                    sha256 = write_shard(work.out / name, group, rows)
                    work.facts.update(base=dict(self.reader.sha256), layers=dict(self.layers))
                    work.finished(name, sha256)
            for _ in results:  # what is left to read is only hashed
                raise RuntimeError("the shards were planned without some of the tensors")
        work.facts["base"] = {name: self.reader.sha256[name] for name in self.stamps}
        return {e.name: self.layers[e.name] for e in self.entries if e.name in self.layers}

    def _merged_rows(self, results: Iterator[Merged], work: OutputDirectory, done: int) -> Iterator[torch.Tensor]:
        """The rows alone, in order; a stop request ends them."""
        largest = total = 0.0
        for block, rows, found in results:
            if why := self.stop.asked:
                counts = {"done": len(work.shards), "total": len(self.shards)}
                raise Interrupted(_INTERRUPTED.format(why=why, out=work.out, **counts))
            if found is not None:
                largest, total = max(largest, found[0]), total + found[1]
            if block.last:
                if found is not None:
                    self.layers[block.entry.name] = {"max_abs": largest, "mean_abs": total / block.entry.numel}
                    largest = total = 0.0
                done += 1
                if self.progress is not None:
                    self.progress(done, len(self.entries), block.entry.name)
            yield rows

    def _merge(self, block: Block) -> Merged:
        """W + ΔW in fp32, rounded once to the output's dtype; a tensor that is not adapted is only cast.

        On an accelerator where there is one. The host waits for it twice a block: for the numbers and for the rows.

        Raises:
            RunFailed: the result has NaN or Inf in it.
        """
        name, weight, found = block.entry.name, block.rows, None
        numbers: list[torch.Tensor] = []
        delta = self.deltas.get(name)
        if name in self.tables:
            weight = self.tables[name].put(weight, block.first, block.last)
        if isinstance(self.reader, (TrainedBaseReader, PackedBaseReader)):
            weight = self.reader.as_trained(block, weight)
        if delta is None:
            exact = weight if self.dtype == weight.dtype else weight.to(torch.float32)
        else:
            exact = delta.rows(block.first, len(weight), weight)
            numbers += [*torch.aminmax(exact), exact.abs().sum()]
            exact.add_(weight.to(exact.device))  # in fp32, like weight.float() + ΔW
        result = exact.to(self.dtype).contiguous()
        numbers += torch.aminmax(result)  # both are NaN where one element is
        *of_delta, low, high = torch.stack([number.float() for number in numbers]).tolist()
        if of_delta:
            found = (max(-of_delta[0], of_delta[1]), of_delta[2])
        if not (math.isfinite(low) and math.isfinite(high)):
            raise RunFailed(_not_finite(block, exact, self.dtype, delta is not None))
        return block, result.cpu(), found

    def certificate(self, work: OutputDirectory, delta: dict[str, Any]) -> dict[str, Any]:
        """What was merged onto what."""
        section, config = self.section, self.adapter.config
        trained_on: dict[str, Any] = {"quantization": section.quantization, "double_quant": section.double_quant}
        for weight in self.base.packed.values():  # what is in the file, whatever the recipe says
            trained_on = {"quantization": weight.quant_type, "double_quant": weight.double_quant}
        return {
            "format": 1,
            "kind": "merged",
            "base": {
                "path": section.path,
                "revision": section.revision,
                "weights": self.options.base,
                "stored_in_4_bits": bool(self.base.packed),
                "fingerprint": self.base.fingerprint,
                "sha256": work.facts["base"],
            },
            "adapter": {
                "path": str(self.adapter_dir),
                "sha256": file_sha256(self.adapter_dir / ADAPTER_WEIGHTS),
                "kind": str(getattr(config.peft_type, "value", config.peft_type)),
                "method": self.adapter.method,
                "rank": self.adapter.rank,
                "b_groups": self.adapter.groups,
                "input_scale": self.adapter.input_scale,
                "magnitude": self.adapter.magnitude,
                "seed": self.adapter.seed,
            },
            "trained_on": trained_on,
            "added_tokens": self.added_tokens,
            "dtype": self.options.dtype,
            "files": work.shards,
            "delta": delta,
            "versions": memory.versions(),
        }

    def write_small_files(self, out: Path, certificate: dict[str, Any]) -> None:
        """Index, tokenizer, generation config, certificate, and config.json last: with it the directory is a model."""
        tokenizer, section, config = self.tokenizer, self.section, self.base.config
        write_index(out, self.shards)
        place_files(out, tokenizer.save_pretrained)
        if (self.base.directory / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(self.base.directory)
            if section.eos_token is not None:
                generation.eos_token_id = tokenizer.eos_token_id
            place_files(out, generation.save_pretrained)
        replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
        config.dtype = self.dtype
        for table in self.tables.values():
            config.get_text_config().vocab_size = table.shape[0]
        if section.eos_token is not None:
            config.eos_token_id = tokenizer.eos_token_id
        if section.pad_token is not None:
            config.pad_token_id = tokenizer.pad_token_id
        config.architectures = config.architectures or [type(self.base.model).__name__]
        place_files(out, config.save_pretrained)


def _merging_device() -> torch.device:
    """The accelerator, unless something else has filled it; else the CPU."""
    device = accelerator.current_device()
    return device if memory.available_bytes(device) >= _MERGING_BYTES else torch.device("cpu")


def _not_finite(block: Block, exact: torch.Tensor, dtype: torch.dtype, adapted: bool) -> str:
    name = block.entry.name
    if not torch.isfinite(block.rows.float()).all():
        return f"{name}: the base weight itself has NaN or Inf ({block.entry.file})."
    if not torch.isfinite(exact.float()).all():
        what = "has NaN or Inf" + (" after merging" if adapted else "")
    else:
        what = f"has values up to {exact.abs().max().item():.6g}, beyond {dtype} (largest {torch.finfo(dtype).max:g})"
    return f"{name}: {what}. Export with --dtype bfloat16, or look at this adapter; this shard was not finished."
