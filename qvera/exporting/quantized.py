"""Merge in 16 bits beside the output, quantize that to 4 bits, and measure the error of each weight.

ΔW lies partly between two values of a 4-bit type, and rounding loses that part.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from qvera.adapters.files.adapter_file import read_config
from qvera.config.schema import ExportSection, ModelSection
from qvera.exporting.base import PackedBaseReader, read_trained_weight
from qvera.exporting.merged import export_merged
from qvera.models.conversion import as_stacks, fused_tensors
from qvera.models.hub import base_directory
from qvera.models.model_class import CAUSAL_LM, ModelClass, empty_model
from qvera.models.quantize_checkpoint import quantize_checkpoint, read_source
from qvera.models.quantized_record import problem_of, read_record
from qvera.models.safetensors_stream import read_tensor
from qvera.models.stored_weights import packed_weights, without_statistics
from qvera.utils import accelerator
from qvera.utils.atomic import replace_text, require_new_or_unfinished
from qvera.utils.cache_dir import StageProgress
from qvera.utils.errors import InputError, Interrupted
from qvera.utils.files import file_sha256, read_json, try_read_json
from qvera.utils.paths import ADAPTER_WEIGHTS, CERTIFICATE
from qvera.utils.safetensors_io import base_fingerprint, checkpoint_tensors, file_stamps
from qvera.utils.signals import StopRequests


def export_quantized(
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    options: ExportSection,
    quantization: str,
    *,
    chat_template: str | None = None,
    progress: StageProgress = lambda *_: None,
) -> dict[str, Any]:
    """Write the merged model to ``out`` in bitsandbytes' 4-bit format, and return its certificate (also written there).

    The merge is in .OUT.merged until the errors are measured. The same call continues an interrupted one.

    Args:
        section: the base; its double_quant and quant_storage also hold for the output.
        options: dtype of the merge and of what is not quantized, base, shard size.
        quantization: nf4 or fp4.

    InputError, RunFailed, Interrupted: as `export_merged` and `quantize_checkpoint`.
    """
    model_class = getattr(read_config(adapter_dir), "model_class", CAUSAL_LM)
    base, place = base_directory(section), out.absolute()
    is_dense = read_json(base / "config.json", "the config of a model").get("quantization_config") is None
    if is_dense and not read_source(section.replace(quantization=quantization), base, model_class).quantized:
        raise InputError(f"--quantize: {base} has no linear of a class that bitsandbytes quantizes. Leave it out.")
    merged = place.with_name(f".{place.name}.merged")
    target = ModelSection(
        path=str(merged),
        quantization=quantization,  # type: ignore[arg-type]
        double_quant=section.double_quant,
        quant_storage=section.quant_storage,
        trust_remote_code=section.trust_remote_code,
    )
    certificate, record = _finished_merge(merged, adapter_dir, section, options), None
    if certificate is not None:  # a quantized copy that is whole, but was not measured
        record = read_record(out)
        if record is not None and not (out / CERTIFICATE).exists() and not any(out.glob(".qvera_quantize*")):
            source = read_source(target, merged, model_class)
            identity = source.identity({Path(name): digest for name, digest in certificate["files"].items()})
            record = record if record["identity"] == identity and problem_of(out) is None else None
        else:
            record = None
    if record is None:
        require_new_or_unfinished(out, "quantize")  # before anything is merged
    if certificate is None:
        certificate = export_merged(
            adapter_dir,
            section,
            merged,
            options,
            chat_template=chat_template,
            progress=functools.partial(progress, "merging"),
        )
    with StopRequests() as stop:

        def report(stage: str, done: int, total: int, what: str) -> None:
            progress(stage, done, total, what)
            if stop.asked:
                raise Interrupted(f"{stop.asked}: stopped. The same command goes on from there.")

        if record is None:
            source = read_source(target, merged, model_class)
            record = quantize_checkpoint(target, source, out, device=accelerator.current_device(), progress=report)
        errors = _weight_errors(merged, out, target, model_class, report)
    certificate |= {
        "files": {name: file["sha256"] for name, file in record["files"].items()},
        "quantized": {
            "quantization": quantization,
            "double_quant": section.double_quant,
            "relative_errors": errors,
        },
    }
    replace_text(out / CERTIFICATE, json.dumps(certificate, indent=1))
    shutil.rmtree(merged)
    return certificate


def _finished_merge(
    merged: Path, adapter_dir: Path, section: ModelSection, options: ExportSection
) -> dict[str, Any] | None:
    """The certificate of a merge that an interrupted call finished; else None."""
    found = try_read_json(merged / CERTIFICATE) if (merged / "config.json").is_file() else None
    if found is None or any(merged.glob(".qvera_export*")):
        return None
    same = (
        found["adapter"]["sha256"] == file_sha256(adapter_dir / ADAPTER_WEIGHTS)
        and found["base"]["path"] == section.path
        and found["base"]["fingerprint"] == base_fingerprint(base_directory(section))
        and (found["base"]["weights"], found["dtype"]) == (options.base, options.dtype)
    )
    if not same:
        raise InputError(f"{merged}: holds the merge of another export that was interrupted. Delete it and try again.")
    return found


@torch.no_grad()
def _weight_errors(
    dense: Path, quantized: Path, section: ModelSection, model_class: ModelClass, progress: StageProgress
) -> dict[str, float]:
    """Name of each 4-bit weight → ‖Q(W) - W‖ / ‖W‖ (Frobenius), with W from ``dense``.

    One weight of ``dense`` is in memory at a time. ``progress`` may raise, to stop.
    """
    model = empty_model(section, base_directory(section.replace(path=str(quantized))), model_class)
    stored, originals = checkpoint_tensors(quantized), as_stacks(checkpoint_tensors(dense), model)
    packed = packed_weights(stored, model)
    reader = PackedBaseReader(stored, file_stamps(stored), {}, packed, torch.float32)
    source = PackedBaseReader(originals, file_stamps(originals), {}, {}, torch.float32)
    entries, fused = {entry.name: entry for entry in originals}, fused_tensors(originals, model)
    errors: dict[str, float] = {}
    for entry in without_statistics(stored, packed):
        if entry.name not in packed:
            continue
        progress("measuring", len(errors), len(packed), entry.name)
        if entry.name in entries:
            weight = read_trained_weight(source, entries[entry.name])
        else:  # experts that are single in the files
            tensor = fused[entry.name]
            parts = [tensor.part(i, lambda e, at: read_tensor(e, source.stamps, at)) for i in range(entry.shape[0])]
            weight = torch.stack(parts).float()
        wrong = size = 0.0
        with open(entry.file, "rb", buffering=0) as handle:
            for block in reader.blocks_of(handle.fileno(), entry):
                rows = reader.as_trained(block, block.rows)
                exact = weight[block.first : block.first + len(rows)]
                wrong += (rows - exact).double().square().sum().item()
                size += exact.double().square().sum().item()
        errors[entry.name] = float((wrong / size) ** 0.5) if size else 0.0
    return errors
