"""DeepSpeed's launch settings: what is set once in its process before it is used. The only file that changes another library.

Import DeepSpeed through `deepspeed_module` and nowhere else, so that all of it is in place first.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from typing import Any


def deepspeed_module() -> Any:
    """DeepSpeed, set up for a run whose process group exists already (`qvera.ranks`)."""
    os.environ.setdefault("LOCAL_RANK", "0")  # zero.Init reads it, and a single process may have none
    import deepspeed

    # it calls torch's collectives by names that torch 2.13 warns about, at every layer
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its progress notes would drown ours
    # A shared-memory all-reduce for CPU inference is compiled (20 s) whenever DeepSpeed meets a process group, and without a
    # compiler that is fatal; training does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def nvme_problem() -> str | None:
    """Why DeepSpeed can't keep parameters on NVMe here; None where it can."""
    deepspeed_module()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return "it can't be built here, since libaio is missing"
    compilers = ("c++", "g++", "clang++")
    can_build = shutil.which("ninja") is not None and any(map(shutil.which, compilers))
    if not can_build and not deepspeed_module().ops.__installed_ops__.get("async_io", False):
        return "it has to be built first, and there is no compiler or no ninja"
    return None
