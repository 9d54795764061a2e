"""The merged model in 4 bits: merged in 16 bits beside the output, quantized from there, and compared with that.

What training added lies partly between two of a 4-bit type's values, and rounding loses that part. So the error is
measured: of each weight here, of the answers as for every merged export.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qvera.adapters.files.adapter_file import read_config
from qvera.config.schema import ExportSection, ModelSection
from qvera.export.merged import export_merged
from qvera.export.stream import PackedBaseReader
from qvera.models.hub import base_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.model_config import empty_model
from qvera.models.packed_weights import packed_weights, without_statistics
from qvera.models.quantize_checkpoint import quantize_checkpoint, read_source
from qvera.models.safetensors_stream import CheckpointReader
from qvera.utils import accelerator
from qvera.utils.atomic import replace_text, require_new_or_unfinished
from qvera.utils.errors import InputError, Interrupted
from qvera.utils.files import file_sha256, read_json, try_read_json
from qvera.utils.paths import ADAPTER_WEIGHTS, CERTIFICATE
from qvera.utils.safetensors_io import TensorEntry, checkpoint_tensors, file_stamps
from qvera.utils.signals import StopRequests


def export_quantized(
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    options: ExportSection,
    quantization: str,
    *,
    chat_template: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the merged model to ``out`` in bitsandbytes' 4-bit format; returns its certificate (also written there).

    The merge in ``options.dtype`` lies in .OUT.merged until it is quantized. Both steps go on from finished shards.

    Args:
        adapter_dir: the trained adapter.
        section: the base it was trained on; its double_quant and quant_storage hold for the output.
        out: a new or empty directory, or this export unfinished.
        options: dtype of the merge and of what is not quantized, base, shard size.
        quantization: nf4 or fp4.
        chat_template: the template that was trained with.
        progress: takes what is being done.

    Raises:
        InputError, RunFailed, Interrupted: as `export_merged` and `quantize_checkpoint`.
    """
    require_new_or_unfinished(out, "quantize")  # before anything is merged
    model_class = getattr(read_config(adapter_dir), "model_class", CAUSAL_LM)
    _require_quantizable(section.replace(quantization=quantization), model_class)
    merged = out.absolute().with_name(f".{out.name}.merged")
    certificate = _finished_merge(merged, adapter_dir, section, options)
    if certificate is None:
        certificate = export_merged(
            adapter_dir,
            section,
            merged,
            options,
            chat_template=chat_template,
            progress=lambda done, total, name: progress(f"Merging: {done} of {total} tensors ({name})"),
        )
    target = ModelSection(
        path=str(merged),
        quantization=quantization,  # type: ignore[arg-type]
        double_quant=section.double_quant,
        quant_storage=section.quant_storage,
        trust_remote_code=section.trust_remote_code,
    )
    with StopRequests() as stop:

        def report(stage: str, done: int, total: int, what: str) -> None:
            progress(f"{stage.capitalize()}: {done / max(total, 1):.0%} ({what})")
            if stop.asked:
                raise Interrupted(f"{stop.asked}: stopped. The same command goes on from the finished shards.")

        record = quantize_checkpoint(
            target, read_source(target, merged, model_class), out, device=accelerator.current_device(), progress=report
        )
    progress("Measuring the error of each weight")
    certificate |= {
        "files": {name: file["sha256"] for name, file in record["files"].items()},
        "quantized": {
            "quantization": quantization,
            "double_quant": section.double_quant,
            "relative_errors": weight_errors(merged, out, target, model_class),
        },
    }
    replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
    shutil.rmtree(merged)
    return certificate


def _require_quantizable(section: ModelSection, model_class: ModelClass) -> None:
    """Raises InputError for a base whose merge could not be quantized; one that is in 4 bits already can be."""
    directory = base_directory(section)
    if read_json(directory / "config.json", "the config of a model").get("quantization_config") is None:
        if read_source(section, directory, model_class).quantized:
            return
        raise InputError(f"--quantize: {directory} has no linear of a class that bitsandbytes quantizes. Leave it out.")


def _finished_merge(
    merged: Path, adapter_dir: Path, section: ModelSection, options: ExportSection
) -> dict[str, Any] | None:
    """The certificate of a merge that an interrupted call finished; None where it is to be made or gone on with."""
    found = try_read_json(merged / CERTIFICATE) if (merged / "config.json").is_file() else None
    if found is None or any(merged.glob(".qvera_export*")):
        return None
    same = (
        found["adapter"]["sha256"] == file_sha256(adapter_dir / ADAPTER_WEIGHTS)
        and found["base"]["path"] == section.path
        and (found["base"]["weights"], found["dtype"]) == (options.base, options.dtype)
    )
    if not same:
        raise InputError(f"{merged}: holds the merge of another export that was interrupted. Delete it and try again.")
    return found


@torch.no_grad()
def weight_errors(
    dense: Path, quantized: Path, section: ModelSection, model_class: ModelClass = CAUSAL_LM
) -> dict[str, float]:
    """Name of each 4-bit weight → ‖Q(W) - W‖ / ‖W‖ (Frobenius), W being that of the checkpoint ``dense``.

    One weight of ``dense`` is in memory at a time.
    """
    model = empty_model(section, base_directory(section.replace(path=str(quantized))), model_class)
    stored = checkpoint_tensors(quantized)
    packed = packed_weights(stored, model)
    reader = PackedBaseReader(stored, file_stamps(stored), {}, packed, torch.float32)
    entries = {entry.name: entry for entry in checkpoint_tensors(dense)}
    source = CheckpointReader(list(entries.values()), file_stamps(list(entries.values())), {})
    errors = {}
    for entry in without_statistics(stored, packed):
        if entry.name in packed:
            errors[entry.name] = _error(reader, source, entry, entries[entry.name])
    return errors


def _error(reader: PackedBaseReader, source: CheckpointReader, entry: TensorEntry, original: TensorEntry) -> float:
    wrong = size = 0.0
    weight = torch.empty(original.shape, dtype=torch.float32)
    with open(original.file, "rb", buffering=0) as handle:
        for block in source.blocks_of(handle.fileno(), original):
            weight[block.first : block.first + len(block.rows)] = block.rows
    with open(entry.file, "rb", buffering=0) as handle:
        for block in reader.blocks_of(handle.fileno(), entry):
            rows = reader.as_trained(block, block.rows)
            exact = weight[block.first : block.first + len(rows)]
            wrong += (rows - exact).double().square().sum().item()
            size += exact.double().square().sum().item()
    return float((wrong / size) ** 0.5) if size else 0.0


def errors_text(quantized: dict[str, Any]) -> str:
    """The errors in a sentence."""
    errors: dict[str, float] = quantized["relative_errors"]
    ordered = sorted(errors, key=errors.__getitem__)
    middle, largest = ordered[len(ordered) // 2], ordered[-1]
    return (
        f"{quantized['quantization']}: relative error of W + ΔW (Frobenius) {errors[middle]:.2g} in the median weight, "
        f"at most {errors[largest]:.2g} ({largest})"
    )
