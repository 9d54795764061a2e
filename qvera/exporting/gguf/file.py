"""GGUF files larger than memory: header and settings by the gguf package, then the tensors' rows as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from qvera import __version__
from qvera.utils.atomic import flush
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}
"""`--dtype` → GGUF's name of the type."""


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file: its name, its shape as PyTorch has it, and GGUF's name of its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return torch.Size(self.shape).numel() // block * size


def tensor_type(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type of a tensor in a file of type ``wanted``, as llama.cpp's converter chooses it.

    Norms and biases stay F32. Rows that are no whole number of a quantized type's blocks are F16.
    """
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted


def require_gguf() -> None:
    """Raises InputError where the gguf package is not installed."""
    if find_spec("gguf") is None:
        raise InputError("--to gguf: needs the gguf package: pip install 'qvera[gguf]'.")


def new_writer(architecture: str, name: str, facts: dict[str, str]) -> GGUFWriter:
    """A writer with the settings that every file has; ``facts`` are written under ``qvera.``."""
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in {"version": __version__, **facts}.items():
        writer.add_string(f"qvera.{key}", value)
    return writer


def write_gguf(path: Path, writer: GGUFWriter, tensors: list[GgufTensor], blocks: Iterator[torch.Tensor]) -> str:
    """Write the file; returns its SHA-256.

    Args:
        path: of the file.
        writer: has the settings.
        tensors: in the order in which they are written.
        blocks: their rows, all of the first, then all of the second; a block has rows of one tensor.
    """
    import gguf

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, torch.empty(0).numpy().dtype, tensor.bytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    digest = hashlib.sha256(path.read_bytes())
    with open(path, "ab") as handle:

        def write(data: bytes | memoryview) -> None:
            handle.write(data)
            digest.update(data)

        write(bytes(-handle.tell() % writer.data_alignment))
        for tensor in tensors:
            kind, written = gguf.GGMLQuantizationType[tensor.type], 0
            while written < tensor.bytes:
                data = gguf.quants.quantize(next(blocks).float().contiguous().numpy(), kind)
                write(memoryview(data).cast("B"))
                written += data.nbytes
            if written != tensor.bytes:
                raise RuntimeError(f"{tensor.name}: {written} bytes came, and {tensor.bytes} were planned")
            write(bytes(-written % writer.data_alignment))
    flush(path)
    return digest.hexdigest()
