"""GGUF files for llama.cpp and Ollama: a merged model, or an adapter as a LoRA.

They may be larger than memory: the gguf package writes header and settings, and rows follow as they come.

`modelfile` is Ollama's: GGUF files, the chat template, and where an answer ends. Format: github.com/ollama/ollama,
docs/modelfile.md. Its templates are Go's text/template; ``.Messages`` has all turns. Those in modelfile_templates/ have
EOS and BOS for tokens, and no first BOS, which llama.cpp adds. An answer that is the last turn is left open, because
Ollama lets the model continue it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoConfig

from qvera import __version__
from qvera.config.sections import ExportSection, ModelSection
from qvera.data.chat_template import NAMED_TEMPLATES, OWN, ChatTemplate, Message, TemplateError
from qvera.exporting.deltas import AdapterDeltas
from qvera.exporting.gguf_metadata import GgufArchitecture, add_tokenizer, model_name
from qvera.exporting.lora import truncate_all
from qvera.exporting.merged import Merging
from qvera.models.hub import base_directory
from qvera.models.safetensors_stream import Block
from qvera.models.tokenizer import load_tokenizer
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.files import CERTIFICATE, disk_errors, flush, new_directory, require_space
from qvera.utils.signals import StopRequests

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase


STOP_TEXTS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|eot_id|>"),
    "zephyr": ("EOS",),
    "llama-2": ("EOS",),
    "mistral": ("EOS",),
    "alpaca": ("EOS", "### Instruction:"),
    "plain": ("EOS",),
}
"""Maps each of `NAMED_TEMPLATES` to the texts that end an answer."""


def modelfile(
    model: str | None,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    *,
    base: str | None = None,
) -> str:
    """The text of a Modelfile. ``model`` and ``adapter`` are GGUF files.

    Without ``model`` the file has a placeholder, and a comment asks for the GGUF file of ``base``.
    """
    lines = []
    if model is None:
        lines += [f"# The GGUF file of the base, {base}: put its path here.", "FROM ./base.gguf"]
    else:
        lines.append(f"FROM ./{model}")
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    name, default = known_template(tokenizer)
    if name is None:
        lines += [
            "# TEMPLATE: none is known here for this model's chat template. Ollama compares the one in the GGUF file",
            "# with those that it knows; `ollama show --modelfile NAME` shows what it took.",
        ]
        stop = [tokenizer.eos_token] if tokenizer.eos_token else []
    else:
        texts = {"EOS": tokenizer.eos_token or "", "BOS": tokenizer.bos_token or ""}
        file = Path(__file__).parent / "modelfile_templates" / f"{name}.gotmpl"
        text = file.read_text(encoding="utf-8").removesuffix("\n")
        for marker, value in texts.items():
            text = text.replace(marker, value)
        lines.append(f'TEMPLATE """{text}"""')
        stop = [text for marker in STOP_TEXTS[name] if (text := texts.get(marker, marker))]
        stop += [texts["EOS"]] if texts["EOS"] and texts["EOS"] not in stop else []
    lines += [f'PARAMETER stop "{text}"' for text in stop]
    system = system or default
    if system is not None and '"""' in system:
        lines.append('# SYSTEM: left out, because the system prompt has """ in it, which a Modelfile can\'t hold.')
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def known_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str | None]:
    """Find the one of `NAMED_TEMPLATES` that equals the tokenizer's own, and the own one's default system prompt."""
    if not tokenizer.chat_template:
        return "plain", None
    user, answer = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    turns: list[Message] = [user, answer, {"role": "user", "content": "three"}]
    system: Message = {"role": "system", "content": "SYSTEM-PROMPT"}
    own = ChatTemplate(OWN, tokenizer.get_chat_template(), tokenizer)
    for name, source in NAMED_TEMPLATES.items():
        named = ChatTemplate(name, source, tokenizer)
        try:
            if own.render([system, *turns], prompt=True) != named.render([system, *turns], prompt=True):
                continue
            # Without a system turn some templates write a default prompt, so what stands in its place is compared.
            bare = own.render(turns, prompt=True)
            if bare == named.render(turns, prompt=True):
                return name, None
            before, _, after = named.render([system, *turns], prompt=True).partition("SYSTEM-PROMPT")
            if bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after):
                return name, bare[len(before) : len(bare) - len(after)]
        except TemplateError:
            continue
    return None, None


TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}  # `--dtype` → GGUF's name of the type


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file: its name, PyTorch's shape, and GGUF's name of its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], wanted: str) -> GgufTensor:
        """Describe a tensor in a file of type ``wanted``. Its own type is chosen as by llama.cpp's converter."""
        if len(shape) < 2 or name.endswith("_norm.weight"):
            return cls(name, shape, "F32")
        return cls(name, shape, "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted)

    @property
    def bytes(self) -> int:
        """The size of the tensor in the file."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return torch.Size(self.shape).numel() // block * size


def _require_gguf() -> None:
    if find_spec("gguf") is None:
        raise InputError("--to gguf: needs the gguf package: pip install 'qvera[gguf]'.")


def _new_writer(architecture: str, name: str, facts: dict[str, str]) -> GGUFWriter:
    """Make a writer with the settings that every file has; ``facts`` are written under ``qvera.``."""
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {"version": __version__, **facts}.items():
        writer.add_string(f"qvera.{key}", value)
    return writer


def _write_gguf(path: Path, writer: GGUFWriter, tensors: list[GgufTensor], blocks: Iterator[torch.Tensor]) -> str:
    """Write the file and return its SHA-256. ``blocks`` are rows of ``tensors`` in order, each of one tensor.

    RunFailed: a tensor of F16, which q8_0 has too, has values beyond it.
    """
    import gguf

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, torch.empty(0).numpy().dtype, tensor.bytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    # The header is small. What follows is hashed as it is written, so the file is not read again.
    digest = hashlib.sha256(path.read_bytes())
    with open(path, "ab") as handle:

        def write(data: bytes | memoryview) -> None:
            handle.write(data)
            digest.update(data)

        write(bytes(-handle.tell() % writer.data_alignment))
        for tensor in tensors:
            kind, written = gguf.GGMLQuantizationType[tensor.type], 0
            while written < tensor.bytes:
                rows = next(blocks).float().contiguous()
                if tensor.type == "F16" and rows.abs().max() > torch.finfo(torch.float16).max:
                    raise RunFailed(f"{tensor.name}: has values beyond float16. Export with --dtype bfloat16.")
                data = gguf.quants.quantize(rows.numpy(), kind)
                write(memoryview(data).cast("B"))
                written += data.nbytes
            if written != tensor.bytes:
                raise RuntimeError(f"{tensor.name}: {written} bytes came, and {tensor.bytes} were planned")
            write(bytes(-written % writer.data_alignment))
    flush(path)
    return digest.hexdigest()


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

    ``dtype`` is a key of `TYPES`; ``q8_0`` is rounded from float32. Of ``options``, the dtype is not read.

    Raises:
        InputError: the gguf package is missing, llama.cpp can't load the model, adapter and base do not fit, or ``out``
            is not empty.
        RunFailed: a merged weight is NaN, Inf, or out of the type's range, or the disk is full.
        Interrupted: SIGINT or SIGTERM came. Nothing is kept.
    """
    _require_gguf()
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
            tensors.append(GgufTensor.of(name, spec.shape, wanted))
    import gguf

    facts = {"adapter_sha256": str(merging.adapter.sha256), "base_fingerprint": merging.base.fingerprint}
    writer = _new_writer(architecture.name, model_name(Path(section.path).name, merging.tokenizer), facts)
    writer.add_type(gguf.GGUFType.MODEL)
    architecture.add_settings(writer)
    kind = "ALL_F32" if wanted == "F32" else f"MOSTLY_{wanted}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    add_tokenizer(writer, merging.tokenizer, architecture.config)
    stopped = f"Stopped by {{}} before the GGUF file in {out} was whole. The same command begins again."

    def check() -> None:
        if stop.asked:
            raise Interrupted(stopped.format(stop.asked))

    def rows_of(results: Iterator[tuple[Block, torch.Tensor]]) -> Iterator[torch.Tensor]:
        """Yield rows in llama.cpp's order; q and k come whole."""
        parts: list[torch.Tensor] = []
        for block, rows in results:
            name = block.entry.name
            if architecture.is_paired(name):
                parts.append(rows)
                if block.last:
                    yield architecture.paired_rows(name, torch.cat(parts))
                    parts = []
            else:
                adds_one = architecture.family.adds_one and name.endswith("norm.weight")
                yield rows.float() + 1 if adds_one else rows

    require_space(out, sum(tensor.bytes for tensor in tensors), "the GGUF file")
    with StopRequests() as stop, new_directory(out) as partial:
        file = partial / f"model-{wanted.lower()}.gguf"
        try:
            with (
                merging.merged(skip, {}, check, progress) as results,
                disk_errors(str(out), "Make room, and run the same command again."),
            ):
                rows = rows_of(results)
                sha256 = _write_gguf(file, writer, tensors, itertools.chain(extra.values(), rows))
                for _ in rows:  # the rest of the files is only read for its hash
                    raise RuntimeError("the file was planned without some of the tensors")
        except KeyboardInterrupt:
            raise Interrupted(stopped.format("Ctrl-C")) from None
        certificate = merging.certificate("gguf", {file.name: sha256})
        certificate["dtype"] = dtype
        text = modelfile(file.name, None, merging.tokenizer, system)
        _write_beside(partial, text, certificate)
    return certificate


def _write_beside(directory: Path, modelfile: str, certificate: dict[str, Any]) -> None:
    (directory / "Modelfile").write_text(modelfile, encoding="utf-8")
    (directory / CERTIFICATE).write_text(json.dumps(certificate, indent=1), encoding="utf-8")


def export_gguf_lora(
    adapter: AdapterDeltas,
    adapter_dir: Path,
    section: ModelSection,
    out: Path,
    dtype: str,
    rank: int | None = None,
    *,
    chat_template: str | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Write adapter-TYPE.gguf, a Modelfile for Ollama and the certificate to ``out``; returns the certificate.

    llama.cpp adds alpha / r B A. Alpha is the largest rank, and B of a layer of smaller rank is scaled to it.
    ``rank``: cut every layer to it, with the errors in the certificate; by default all is written.

    InputError and RunFailed: as `export_gguf`, and for a magnitude, which llama.cpp's LoRA does not have.
    """
    _require_gguf()
    if adapter.magnitude:
        raise InputError(
            f"{adapter_dir}: was trained with adapter.magnitude, and llama.cpp's LoRA has no magnitude. Use --to gguf, "
            "which merges it."
        )
    architecture = GgufArchitecture(AutoConfig.from_pretrained(base_directory(section)))
    wanted, cut, errors = TYPES[dtype], None, None
    names = {layer: architecture.tensor_name(f"{layer}.weight") for layer in adapter.layers}
    if rank is not None:
        whole = ((layer, delta.lora()) for layer, delta in adapter.layers.items())
        cut, errors = truncate_all(whole, adapter.rank, rank, torch.float32)
    ranks = {layer: rank or delta.factors.rank for layer, delta in adapter.layers.items()}
    alpha = max(ranks.values())
    tensors = []
    for layer, delta in adapter.layers.items():
        m, n = delta.shape
        for suffix, shape in ((".lora_a", (ranks[layer], n)), (".lora_b", (m, ranks[layer]))):
            tensors.append(GgufTensor.of(f"{names[layer]}{suffix}", shape, wanted))

    def values() -> Iterator[torch.Tensor]:
        for layer, delta in adapter.layers.items():
            A, B = (part.float() for part in (delta.lora() if cut is None else cut[layer]))
            # llama.cpp divides alpha by each layer's own rank: the factor is 1 for the largest, and is undone for
            # smaller ones.
            B = B * (ranks[layer] / alpha)
            if architecture.is_paired(f"{layer}.weight"):
                B = architecture.paired_rows(f"{layer}.weight", B)
            yield from (A, B)

    import gguf

    facts = {} if adapter.sha256 is None else {"adapter_sha256": adapter.sha256}
    writer = _new_writer(architecture.name, Path(section.path).name, facts)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    tokenizer = load_tokenizer(section)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with new_directory(out) as partial:
        file = partial / f"adapter-{wanted.lower()}.gguf"
        with disk_errors(str(out), "Make room, and run the same command again."):
            files = {file.name: _write_gguf(file, writer, tensors, values())}
            about = {"rank": alpha, "dtype": dtype, "files": files, "relative_errors": errors}
            certificate = adapter.certificate("gguf-lora", section, adapter_dir, **about)
            text = modelfile(None, file.name, tokenizer, system, base=Path(section.path).name)
            _write_beside(partial, text, certificate)
    return certificate
