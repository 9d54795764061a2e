"""Whether an operation runs as plain torch code or as a kernel of ours."""

import functools
import os
import warnings

import torch

from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line

SWITCH = "QVERA_KERNELS"
"""The environment variable: ``off`` for plain torch code everywhere, ``on`` for kernels on every accelerator without
asking triton for one (the tests' fake accelerator), ``auto`` (as when unset) for kernels where triton can run them."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_kernels(*tensors: torch.Tensor) -> bool:
    """Whether an operation on these tensors takes its kernel: on an accelerator, and in 16 or 32 bits.

    Raises:
        InputError: QVERA_KERNELS is set to anything but auto, on or off.
    """
    device_type = tensors[0].device.type
    if not accelerator.is_accelerator(device_type):
        return False
    return all(tensor.dtype in _DTYPES for tensor in tensors) and _switched_on(device_type)


@torch.compiler.assume_constant_result  # the environment is nothing to trace
def _switched_on(device_type: str) -> bool:
    return _allowed(os.environ.get(SWITCH, "auto"), device_type)


@functools.cache
def _allowed(switch: str, device_type: str) -> bool:
    if switch not in ("auto", "on", "off"):
        raise InputError(f"{SWITCH}: is {switch!r}; it takes auto, on or off. Unset it for auto.")
    return switch == "on" or (switch == "auto" and _triton_runs_on(device_type))


def _triton_runs_on(device_type: str) -> bool:
    try:
        from torch.utils._triton import has_triton
    except ImportError:  # it is torch's own helper, and may move
        return False
    if accelerator.current_device().type != device_type or not has_triton():
        return False
    if (problem := triton_problem()) is not None:
        warnings.warn(f"Kernels are off: {problem} Slower, with the same results.", stacklevel=2)
    return problem is None


def triton_problem() -> str | None:
    """Why triton can't launch a kernel on this machine, with what to do; None where it can.

    It compiles a launcher in C first, which takes a compiler and Python's headers.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever a compiler that is not there raises
        return f"triton can't build its launcher ({first_line(error)}). Debian and Ubuntu: apt install gcc python3-dev."
    return None
