"""Import DeepSpeed, and set up what it needs in this process. Every other module gets it from `deepspeed_module`.

This is the only module that changes settings of another library: DeepSpeed's log level and one of its switches, and how
malloc returns memory on a CPU under ZeRO-3. None of them has an option that could be passed instead.
"""

import contextlib
import ctypes
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LONGEST_BUILD_SECONDS = 1800  # async_io took 4 minutes of one core, 8 on a busy machine


def deepspeed_module() -> ModuleType:
    """Return DeepSpeed, set up in the process group of this run. A process on its own gets a group of one."""
    os.environ.setdefault("LOCAL_RANK", "0")  # zero.Init reads it, and a process on its own may have none
    if not dist.is_initialized():
        # It stays: DeepSpeed keeps its groups for as long as the process lives, and a second run must find them.
        dist.init_process_group(accelerator.collective_backend(), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed = _imported()
    if not deepspeed.comm.is_initialized():  # else its configuration counts one process, whatever torch says
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def require_deepspeed(word: str) -> None:
    """Import DeepSpeed before anything is loaded for it.

    ``word`` is the recipe's ``deepspeed`` key.

    Raises:
        InputError: it is not installed, or it can't be imported here.
    """
    try:
        _imported()
    except Exception as error:  # it probes compilers and CUDA when it is imported, and what fails there is up to them
        advice = (
            "Install it with `pip install deepspeed`"
            if isinstance(error, ModuleNotFoundError)
            else (
                "DeepSpeed before 0.19.5 needs CUDA's compiler nvcc where there is a GPU: install a newer one, or set "
                "CUDA_HOME to a CUDA toolkit"
            )
        )
        raise InputError(
            f"deepspeed: {word} needs DeepSpeed, which can't be imported: {first_line(error)} {advice}, or leave the "
            "key out: without it several processes share the gradients only."
        ) from None


def _imported() -> ModuleType:
    import deepspeed

    # it calls torch's collectives by names that torch 2.13 warns about, at every layer
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its progress notes would drown ours
    # A shared-memory all-reduce for CPU inference is compiled (20 s) whenever DeepSpeed meets a process group, and
    # without a compiler that is fatal; training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def return_buffers_at_once() -> None:
    """Let malloc take every buffer of 1 MB or more directly from the system, and return it when it is freed.

    glibc's own threshold rises to 32 MB with the sizes that it sees. Weights that ZeRO-3 gathers on a CPU come from
    gloo's threads, each with a heap of its own, and pile up there: 0.8 GB of a 7B after two steps.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**20)


def nvme_problem() -> str | None:
    """Return why DeepSpeed can't keep parameters on NVMe here; None if it can."""
    deepspeed = _imported()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return "it can't be built here, since libaio is missing"
    compilers = ("c++", "g++", "clang++")
    can_build = shutil.which("ninja") is not None and any(map(shutil.which, compilers))
    if not can_build and not deepspeed.ops.__installed_ops__.get("async_io", False):
        return "it has to be built first, and there is no compiler or no ninja"
    lock = abandoned_build("async_io")
    if lock is not None:
        return f"a build of it was killed and left {lock}, for which every later one would wait; remove that file"
    return None


def abandoned_build(name: str) -> Path | None:
    """Return the lock of an extension whose build was killed: torch waits for it without end.

    torch's lock names no process, so one that is older than any build takes counts as abandoned.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
        with contextlib.suppress(OSError):  # it has been removed meanwhile
            if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_SECONDS:
                return lock
    return None
