"""`qvera doctor`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qvera.utils import formatting
from qvera.utils.cores import measure
from qvera.utils.errors import EXIT_DONE, EXIT_FAILED, first_line
from qvera.utils.files import cache_root, existing_parent, versions

if TYPE_CHECKING:
    import torch

LOW_DISK_BYTES = 2_000_000_000
"""A checkpoint and the 4-bit copy of a small model; less free space is reported."""


class Finding(NamedTuple):
    """One line of the report. ``stops``: a run on this machine would fail. ``fix``: what to do, if anything."""

    what: str
    found: str
    stops: bool = False
    fix: str = ""


def doctor() -> int:
    """Check what this machine has and what would stop a run.

    Exit code 0: a run can start. 1: something would stop it; the lines that begin with ! say what to do.

    Example:
        qvera doctor
    """
    findings = list(examine())
    for finding in findings:
        print(f"{'!' if finding.stops else ' '} {finding.what:<18}{finding.found}")
        if finding.fix:
            print(f"{'':<20}→ {finding.fix}")
    stops = [finding.what for finding in findings if finding.stops]
    print(f"\nA run would fail: {', '.join(stops)}." if stops else "\nA run can start on this machine.")
    return EXIT_FAILED if stops else EXIT_DONE


def examine() -> Iterator[Finding]:
    """Look at cores, versions, device, kernels, compiler, disk and cache."""
    cores = measure()
    threads = formatting.counted(cores.free_threads, "thread")
    fix = f"A run started now takes {threads}; OMP_NUM_THREADS sets another number." if cores.are_shared else ""
    yield Finding("cores", str(cores), fix=fix)
    try:
        import torch
    except (ImportError, OSError) as error:  # such as a build for a newer libc, or for another CUDA
        fix = "Reinstall it; a build for this machine: https://pytorch.org/get-started/locally/"
        yield Finding("torch", f"can't be imported: {first_line(error)}", True, fix)
        return

    from qvera.models.loader import pick_compute_dtype
    from qvera.utils import accelerator
    from qvera.utils.memory import available_bytes, device_name

    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in versions().items()))
    device = accelerator.current_device()
    yield Finding("device", device_name(device), fix=accelerator.unusable_card() or "")
    yield Finding("free memory", formatting.size(available_bytes(device)))
    if accelerator.has_own_memory(device):
        ram = formatting.size(available_bytes(torch.device("cpu")))
        yield Finding("free RAM", f"{ram}, for layers of a base larger than the device (model.stream)")
    dtype = str(pick_compute_dtype("auto", device)).removeprefix("torch.")
    slow = dtype == "float32"
    yield Finding("compute dtype", dtype + (" (this CPU has no fast 16-bit instructions)" if slow else ""))
    yield four_bit_kernels(device)
    if accelerator.is_accelerator(device):
        from qvera.kernels.choice import triton_problem

        problem = triton_problem()
        yield Finding("triton kernels", "work" if problem is None else "can't be built", fix=problem or "")
    # DeepSpeed compiles its CPU optimizer and NVMe reader on first use
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found and shutil.which("ninja"):
        yield Finding("C++ compiler", f"{found}, with ninja")
    else:
        fix = "Only for ZeRO offload to NVMe. Debian and Ubuntu: apt install g++ ninja-build"
        yield Finding("C++ compiler", "no ninja" if found else "none", fix=fix)
    yield free_disk("disk here", Path.cwd(), False, "training.output_dir")
    yield free_disk("cache", cache_root(), True, "the environment variable QVERA_CACHE")


def four_bit_kernels(device: torch.device) -> Finding:
    """Quantize a small matrix to NF4 on the device and back."""
    import torch

    try:
        from qvera.models.quantization import bnb as bitsandbytes

        weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        error = (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max().item()
        reason = "" if error < 0.2 else "wrong values"
    except Exception as broken:  # whatever a broken build raises: that is what is looked for
        reason = str(broken).partition("\n")[0]
    if reason:
        fix = "Reinstall: pip install --force-reinstall bitsandbytes, or try another version of it."
        return Finding("4-bit kernels", f"fail ({reason})", True, fix)
    return Finding("4-bit kernels", "work")


def free_disk(what: str, directory: Path, stops: bool, setting: str) -> Finding:
    """Free space where a run would write. ``stops``: it must be writable; ``setting`` moves it elsewhere."""
    existing = existing_parent(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding(what, f"{directory} can't be written", stops, f"Set {setting} to a directory that can be.")
    free = shutil.disk_usage(existing).free
    fix = f"Little room: set {setting} to another disk." if free < LOW_DISK_BYTES else ""
    return Finding(what, f"{formatting.size(free)} free in {directory}", fix=fix)
