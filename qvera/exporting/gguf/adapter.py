"""An adapter as a LoRA in a GGUF file, for llama.cpp and Ollama beside a GGUF file of its base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig

from qvera.config.schema import ModelSection
from qvera.exporting.deltas import AdapterDeltas
from qvera.exporting.gguf.architecture import GgufArchitecture
from qvera.exporting.gguf.file import TYPES, GgufTensor, new_writer, require_gguf, tensor_type, write_gguf
from qvera.exporting.gguf.modelfile import modelfile
from qvera.models.hub import base_directory
from qvera.models.tokenizer import load_tokenizer
from qvera.utils import memory
from qvera.utils.atomic import disk_errors, new_directory
from qvera.utils.errors import InputError
from qvera.utils.paths import CERTIFICATE


def export_gguf_lora(
    adapter: AdapterDeltas,
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    dtype: str,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    *,
    chat_template: str | None = None,
    system: str | None = None,
) -> int:
    """Write adapter-TYPE.gguf, a Modelfile for Ollama and a certificate to ``out``; returns the bytes of the first.

    llama.cpp adds alpha / r B A. Alpha is the largest rank; the B of a layer of smaller rank is scaled to it.

    Args:
        adapter: the factors of ΔW.
        adapter_dir: where it is.
        section: its base.
        out: a new or empty directory.
        dtype: a key of `TYPES`.
        factors: A [r, n] and B [m, r] by layer, by default the adapter's own.
        chat_template: the template that was trained with.
        system: the system prompt for the Modelfile.

    Raises:
        InputError: the gguf package is missing; llama.cpp is not known to load this model, or its LoRA has no place for
            this adapter; or ``out`` holds something.
        RunFailed: the disk is full.
    """
    require_gguf()
    if adapter.magnitude:
        raise InputError(
            f"{adapter_dir}: was trained with adapter.magnitude, and llama.cpp's LoRA has no magnitude. Use --to gguf, "
            "which merges it."
        )
    architecture = GgufArchitecture(AutoConfig.from_pretrained(base_directory(section)))
    wanted = TYPES[dtype]
    ranks = {n: d.factors.rank if factors is None else len(factors[n][0]) for n, d in adapter.layers.items()}
    alpha = max(ranks.values())
    tensors = []
    for layer, delta in adapter.layers.items():
        name, (m, n), rank = architecture.tensor_name(f"{layer}.weight"), delta.shape, ranks[layer]
        for suffix, shape in ((".lora_a", (rank, n)), (".lora_b", (m, rank))):
            tensors.append(GgufTensor(f"{name}{suffix}", shape, tensor_type(f"{name}{suffix}", shape, wanted)))

    def values() -> Iterator[torch.Tensor]:
        for layer, delta in adapter.layers.items():
            A, B = (part.float() for part in (delta.lora() if factors is None else factors[layer]))
            B = B * (ranks[layer] / alpha)
            if architecture.is_paired(f"{layer}.weight"):
                B = architecture.paired_rows(f"{layer}.weight", B)
            for part in (A, B):
                if wanted == "F16" and part.abs().max() > torch.finfo(torch.float16).max:
                    raise InputError(f"{layer}: a factor does not fit into float16. Export with --dtype bfloat16.")
                yield part

    import gguf

    facts = {} if adapter.sha256 is None else {"adapter_sha256": adapter.sha256}
    writer = new_writer(architecture.name, Path(section.path).name, facts)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    tokenizer = load_tokenizer(section)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with new_directory(out) as partial:
        file = partial / f"adapter-{wanted.lower()}.gguf"
        with disk_errors(str(out), "Make room, and run the same command again."):
            certificate = {
                "format": 1,
                "kind": "gguf-lora",
                "base": {"path": section.path, "revision": section.revision},
                "adapter": adapter.facts(adapter_dir),
                "rank": alpha,
                "dtype": dtype,
                "files": {file.name: write_gguf(file, writer, tensors, values())},
                "versions": memory.versions(),
            }
            text = modelfile(None, file.name, tokenizer, system, base=Path(section.path).name)
            (partial / "Modelfile").write_text(text, encoding="utf-8")
            (partial / CERTIFICATE).write_text(json.dumps(certificate, indent=1), encoding="utf-8")
    return (out / file.name).stat().st_size
