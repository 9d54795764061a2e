"""Where a run would take place: device, dtype, and how much memory there is."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qvera.config.schema import ModelSection
from qvera.models.loader import pick_compute_dtype
from qvera.utils import memory
from qvera.utils.errors import InputError

CUDA_CONTEXT_BYTES = 500_000_000
"""Device memory of a CUDA context with the kernels of torch and bitsandbytes.

An assumption where none can be measured.
"""

_UNITS = {"": 1e9, "GB": 1e9, "MB": 1e6, "GIB": 2.0**30, "MIB": 2.0**20}


@dataclass(frozen=True)
class Machine:
    """Where the run takes place, and how much memory there is.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        dtype: the compute dtype.
        mapped_base: the 4-bit base, embeddings and head lie in a mapped file (16-bit where not quantized): pages that
            can be dropped and shared.
        available_bytes: device memory, or the RAM that is free for this process and everything it holds already.
        runtime_bytes: held before the model is loaded (interpreter, libraries, rows), measured; on a GPU the host's
            share is none of the device's business, and this is 0.
        context_bytes: the CUDA context.
        kernel_bytes: what each new shape of a product leaves behind (`qvera.data.padding`), measured.
    """

    name: str
    device_type: str
    dtype: torch.dtype
    mapped_base: bool
    available_bytes: int
    runtime_bytes: int = 0
    context_bytes: int = 0
    kernel_bytes: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of one element in the compute dtype."""
        return self.dtype.itemsize


def parse_size(text: str) -> int:
    """``24GB`` → 24,000,000,000 bytes; a bare number is GB. Decimal, so a card of that name has a little more.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else ""
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise InputError(f"--gpu: takes a size such as 24GB, 24GiB or 24, got {text!r}.")
    return int(float(found[1]) * _UNITS[unit])


def gpu_machine(section: ModelSection, size_bytes: int) -> Machine:
    """A GPU of that size that need not be here: 16-bit compute, an assumed CUDA context."""
    dtype = torch.bfloat16 if section.compute_dtype == "auto" else getattr(torch, section.compute_dtype)
    name = f"a GPU with {size_bytes / 1e9:g} GB"
    return Machine(name, "cuda", dtype, False, size_bytes, 0, CUDA_CONTEXT_BYTES)


def this_machine(section: ModelSection, device: torch.device) -> Machine:
    """The machine that this process runs on, with what the process holds right now."""
    dtype = pick_compute_dtype(section.compute_dtype, device)
    name = memory.device_name(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = max(total - free - torch.cuda.memory_reserved(device), CUDA_CONTEXT_BYTES)
        return Machine(name, "cuda", dtype, False, total, 0, context)
    runtime = memory.private_bytes()
    mapped = section.quantization in ("nf4", "fp4")  # `qvera.models.mmap`; unusual checkpoints are held instead
    kernel = memory.kernel_bytes(dtype)
    return Machine(name, "cpu", dtype, mapped, memory.available_bytes(device) + runtime, runtime, 0, kernel)
