"""The merged checkpoint: W + ΔW for every adapted weight, in 16 bits, some rows at a time.

Each file of the base is read once, from start to end, as `qvera.models.safetensors_stream` does it. ``config.json``,
without which nothing takes a directory for a model, is written last. An interrupted export goes on from whole shards.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from qvera.config.schema import ExportSection, ModelSection
from qvera.exporting.merging import Merged, Merging
from qvera.models.safetensors_stream import write_index, write_shard
from qvera.utils.atomic import OutputDirectory, disk_errors, place_files, replace_text, require_space
from qvera.utils.errors import Interrupted
from qvera.utils.paths import CERTIFICATE
from qvera.utils.safetensors_io import grouped_by_bytes
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
        chat_template: the template that was trained with, for the tokenizer.
        progress: called with (tensors done, tensors in all, tensor name).

    Raises:
        InputError: adapter and base do not fit, or ``out`` holds something else.
        RunFailed: a merged weight would be NaN, Inf, or out of the dtype's range (the message names the tensor); or the
            disk is full. Finished shards are kept, and the same call goes on from them.
        Interrupted: SIGINT or SIGTERM came. The same holds.
    """
    export = _MergedExport(Merging(adapter_dir, section, options, chat_template), progress)
    shards = len(export.shards)
    with StopRequests() as export.stop, OutputDirectory.open(out, export.merging.identity(), "export") as work:
        try:
            export.write_shards(work)
            certificate = export.merging.certificate("merged", work.facts["base"], work.shards)
            with disk_errors(f"{out}", _KEPT.format(done=shards, total=shards)):
                export.write_small_files(out, certificate)
        except KeyboardInterrupt:
            raise Interrupted(_INTERRUPTED.format(why="Ctrl-C", done=len(work.shards), total=shards, out=out)) from None
        work.complete()
    return certificate


_KEPT = "{done} of {total} shards are finished and kept. Make room and run the same command again; it resumes there."
_INTERRUPTED = "Stopped by {why} with {done} of {total} shards finished in {out}. The same command goes on from there."


class _MergedExport:
    """The writing of what ``merging`` gives, in shards."""

    stop: StopRequests

    def __init__(self, merging: Merging, progress: Callable[[int, int, str], None] | None) -> None:
        self.merging, self.progress = merging, progress
        limit = merging.options.max_shard_size_bytes
        self.shards = grouped_by_bytes(([s] for s in merging.specs), lambda spec: spec.size_bytes, limit)

    def write_shards(self, work: OutputDirectory) -> None:
        """Write the shards that are not finished."""
        merging = self.merging
        finished = {name for name, _ in self.shards if work.has(name)}
        skip = {spec.name for name, group in self.shards if name in finished for spec in group}
        merging.layers = {name: found for name, found in work.facts.get("layers", {}).items() if name in skip}
        needed = sum(e.numel for e in merging.entries if e.name not in skip) * merging.dtype.itemsize
        require_space(work.out, needed, "the rest of the export" if skip else "the export")
        header = merging.adapter.header(merging.section.path) | {"base_fingerprint": merging.base.fingerprint}
        with merging.merged(skip, work.facts.get("base", {})) as results:
            head = (tensor for name, tensor in merging.head.items() if name not in skip)
            rows = itertools.chain(self._rows(results, work, len(skip)), head)
            for name, group in self.shards:
                if name in finished:
                    continue
                kept = _KEPT.format(done=len(work.shards), total=len(self.shards))
                with disk_errors(str(work.out / name), kept):
                    sha256 = write_shard(work.out / name, group, rows, header)
                    work.facts.update(base=dict(merging.reader.sha256), layers=dict(merging.layers))
                    work.finished(name, sha256)
            for _ in results:  # what is left to read is only hashed
                raise RuntimeError("the shards were planned without some of the tensors")
        work.facts["base"] = merging.sha256()

    def _rows(self, results: Iterator[Merged], work: OutputDirectory, done: int) -> Iterator[torch.Tensor]:
        """The rows alone, in order; a stop request ends them."""
        for block, rows, _ in results:
            if why := self.stop.asked:
                counts = {"done": len(work.shards), "total": len(self.shards)}
                raise Interrupted(_INTERRUPTED.format(why=why, out=work.out, **counts))
            if block.last:
                done += 1
                if self.progress is not None:
                    self.progress(done, len(self.merging.entries), block.entry.name)
            yield rows

    def write_small_files(self, out: Path, certificate: dict[str, Any]) -> None:
        """Index, tokenizer, generation config, certificate, and config.json last: with it the directory is a model."""
        tokenizer, base = self.merging.tokenizer, self.merging.base.directory
        write_index(out, self.shards)
        place_files(out, tokenizer.save_pretrained)
        if (base / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(base)
            if self.merging.section.eos_token is not None:
                generation.eos_token_id = tokenizer.eos_token_id
            place_files(out, generation.save_pretrained)
        replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
        place_files(out, self.merging.config().save_pretrained)
