"""DeepSpeed's launch settings: what is set once in its process before it is used. The only file that changes another library.

(And, on a CPU under ZeRO-3, how this process's malloc gives memory back.)

Import DeepSpeed through `deepspeed_module` and nowhere else, so that all of it is in place first.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root


def deepspeed_module() -> Any:
    """DeepSpeed, set up for a run: in the process group of `qvera.distributed`, or in one of its own for a process on its own."""
    os.environ.setdefault("LOCAL_RANK", "0")  # zero.Init reads it, and a process on its own may have none
    if not dist.is_initialized():
        # It stays: DeepSpeed keeps the groups that it makes for as long as the process lives, and a second run must find them.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed = _imported()
    if not deepspeed.comm.is_initialized():  # else its configuration counts one process, whatever torch says
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _imported() -> Any:
    import deepspeed

    # it calls torch's collectives by names that torch 2.13 warns about, at every layer
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its progress notes would drown ours
    # A shared-memory all-reduce for CPU inference is compiled (20 s) whenever DeepSpeed meets a process group, and without a
    # compiler that is fatal; training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def return_buffers_at_once() -> None:
    """Let malloc take every buffer of a MB and more from the system by itself, and give it back when it is freed.

    glibc's own threshold rises to 32 MB with the sizes that it sees. Weights that ZeRO-3 gathers on a CPU come from gloo's threads,
    each with a heap of its own, and pile up there: 0.8 GB of a 7B after two steps.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing is known of its habits
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**20)


_M_MMAP_THRESHOLD = -3  # of malloc.h


def nvme_problem() -> str | None:
    """Why DeepSpeed can't keep parameters on NVMe here; None where it can."""
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


_LONGEST_BUILD_SECONDS = 1800  # async_io took 4 minutes of one core, 8 on a busy machine


def abandoned_build(name: str) -> Path | None:
    """The lock of an extension that torch began to compile and whose process is gone: torch waits for it without end.

    torch's lock (``torch.utils.file_baton``) names no process, so one older than any build takes is taken for abandoned.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
        with contextlib.suppress(OSError):  # it is gone by now
            if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_SECONDS:
                return lock
    return None
