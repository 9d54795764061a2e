"""The merged model as a GGUF file, a few rows at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qvera.config.schema import ExportSection, ModelSection
from qvera.exporting.gguf.architecture import GgufArchitecture
from qvera.exporting.gguf.file import TYPES, GgufTensor, new_writer, require_gguf, tensor_type, write_gguf
from qvera.exporting.gguf.modelfile import modelfile
from qvera.exporting.gguf.tokenizer import add_tokenizer, model_name
from qvera.exporting.merging import Merged, Merging
from qvera.utils.atomic import disk_errors, new_directory, require_space
from qvera.utils.errors import Interrupted
from qvera.utils.paths import CERTIFICATE
from qvera.utils.signals import StopRequests


def export_gguf(
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    options: ExportSection,
    dtype: str,
    *,
    chat_template: str | None = None,
    system: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write model-TYPE.gguf, a Modelfile for Ollama and the certificate to ``out``; returns the certificate.

    Args:
        adapter_dir: the trained adapter.
        section: the base it was trained on.
        options: base (original or dequantized); its dtype is not read.
        dtype: a key of `TYPES`; ``q8_0`` is rounded from float32.
        chat_template: the template that was trained with.
        system: the system prompt for the Modelfile.
        progress: called with (tensors done, tensors in all, tensor name).

    Raises:
        InputError: the gguf package is missing; llama.cpp is not known to load this model or its tokenizer; adapter and
            base do not fit; or ``out`` holds something else.
        RunFailed: a merged weight would be NaN, Inf, or out of the type's range; or the disk is full.
        Interrupted: SIGINT or SIGTERM came. Nothing is kept.
    """
    require_gguf()
    options = options.replace(dtype="float32" if dtype == "q8_0" else dtype)
    merging = Merging(adapter_dir, section, options, chat_template)
    config, wanted = merging.config(), TYPES[dtype]
    architecture = GgufArchitecture(config)
    extra = architecture.extra_tensors()
    tensors, skip = [GgufTensor(name, tuple(factors.shape), "F32") for name, factors in extra.items()], set()
    for spec in merging.specs:
        name = architecture.tensor_name(spec.name)
        if name is None:
            skip.add(spec.name)
        else:
            tensors.append(GgufTensor(name, spec.shape, tensor_type(name, spec.shape, wanted)))
    import gguf

    identity = merging.identity()
    facts = {"adapter_sha256": identity["adapter"], "base_fingerprint": merging.base.fingerprint}
    writer = new_writer(architecture.name, model_name(Path(section.path).name, merging.tokenizer), facts)
    writer.add_type(gguf.GGUFType.MODEL)
    architecture.add_settings(writer)
    kind = "ALL_F32" if wanted == "F32" else f"MOSTLY_{wanted}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    add_tokenizer(writer, merging.tokenizer, architecture.config)
    stopped = f"Stopped by {{}} before the GGUF file in {out} was whole. The same command begins again."
    require_space(out, sum(tensor.bytes for tensor in tensors), "the GGUF file")
    with StopRequests() as stop, new_directory(out) as partial:
        file = partial / f"model-{wanted.lower()}.gguf"
        try:
            with (
                merging.merged(skip, {}) as results,
                disk_errors(str(out), "Make room, and run the same command again."),
            ):
                rows = _rows(results, architecture, len(tensors) - len(extra), progress, stop, stopped)
                sha256 = write_gguf(file, writer, tensors, itertools.chain(extra.values(), rows))
                for _ in rows:  # what is left to read is only hashed
                    raise RuntimeError("the file was planned without some of the tensors")
        except KeyboardInterrupt:
            raise Interrupted(stopped.format("Ctrl-C")) from None
        certificate = merging.certificate("gguf", merging.sha256(), {file.name: sha256})
        certificate["dtype"] = dtype
        text = modelfile(file.name, None, merging.tokenizer, system)
        (partial / "Modelfile").write_text(text, encoding="utf-8")
        (partial / CERTIFICATE).write_text(json.dumps(certificate, indent=1), encoding="utf-8")
    return certificate


def _rows(
    results: Iterator[Merged],
    architecture: GgufArchitecture,
    count: int,
    progress: Callable[[int, int, str], None] | None,
    stop: StopRequests,
    stopped: str,
) -> Iterator[torch.Tensor]:
    """The rows alone, in llama.cpp's order; q and k come whole."""
    parts: list[torch.Tensor] = []
    done = 0
    for block, rows, _ in results:
        if stop.asked:
            raise Interrupted(stopped.format(stop.asked))
        name = block.entry.name
        if block.last and progress is not None:
            done += 1
            progress(done, count, name)
        if not architecture.is_paired(name):
            yield architecture.shifted(name, rows)
            continue
        parts.append(rows)
        if block.last:
            yield architecture.paired_rows(name, torch.cat(parts))
            parts = []
