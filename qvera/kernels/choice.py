"""Chooses between plain torch code and a kernel, and registers kernels as operators of torch.

`torch.library.custom_op` would be shorter, but costs 25 µs of Python a call and this 7 (2 cores, torch 2.13). A layer
makes some forty calls, and a fast card waits for the host.
"""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line

SWITCH = "QVERA_KERNELS"
"""Environment variable: ``auto`` (default) for kernels where triton can run them, ``off`` for plain code everywhere,
``on`` for kernels on every accelerator without asking triton (the tests' fake accelerator)."""

switch = os.environ.get(SWITCH, "auto")
"""Read once: a layer asks some fifty times, and each look into the environment takes 2 µs."""

_library = torch.library.Library("qvera", "FRAGMENT")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_kernels(*tensors: torch.Tensor) -> bool:
    """Whether an operation on these tensors runs as a kernel: on an accelerator, in 16 or 32 bits.

    Raises:
        InputError: QVERA_KERNELS has an unknown value.
    """
    device_type = tensors[0].device.type
    if not accelerator.is_accelerator(device_type):
        return False
    for tensor in tensors:  # a generator would take longer than the rest
        if tensor.dtype not in _DTYPES:
            return False
    return _switched_on(device_type)


@torch.compiler.assume_constant_result  # nothing to trace
def _switched_on(device_type: str) -> bool:
    return _allowed(switch, device_type)


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
    """Why triton can't launch kernels here, and what to do; None if it can."""
    # it compiles a launcher in C first, which needs a compiler and Python's headers
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever a compiler that is not there raises
        return f"triton can't build its launcher ({first_line(error)}). Debian and Ubuntu: apt install gcc python3-dev."
    return None


@functools.cache
def _kernels() -> Any:
    from qvera.kernels import triton_kernels  # which imports triton

    return triton_kernels


def register_operator(
    name: str, empty: Callable[..., Any], launch: Callable[..., Any] | None = None, mutates: str = ""
) -> Callable[..., Any]:
    """Register the operator ``qvera::name`` and return the function that calls it.

    It has no derivative: call it inside a `torch.autograd.Function`, or without gradients, with positional arguments.

    Args:
        name: of the operator.
        empty: returns empty tensors of the results' shapes, dtypes and device. Its annotations become the schema. The
            first argument is a tensor.
        launch: takes the same arguments and the empty results, which it fills. Default: ``launch_NAME`` of
            `triton_kernels`.
        mutates: the one argument that the operator writes to, if any; then ``empty`` may return None.
    """
    launcher = f"launch_{name}"

    def on_its_device(*arguments: Any) -> Any:
        # Triton launches on the current device, which for a layer on another card is not that of the tensors
        with accelerator.in_use(arguments[0].device):
            if launch is not None:
                return launch(*arguments)
            results = empty(*arguments)
            outputs = results if isinstance(results, tuple) else () if results is None else (results,)
            getattr(_kernels(), launcher)(*arguments, *outputs)
            return results

    schema = torch.library.infer_schema(empty, mutates_args=(mutates,) if mutates else ())
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_its_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qvera::{name}", empty, lib=_library)
    operator = getattr(torch.ops.qvera, name).default

    def call(*arguments: Any) -> Any:
        # torch's dispatcher takes twice as long as the rest, and only those who trace or count operators need it
        traced = torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack()
        return (operator if traced else on_its_device)(*arguments)

    return call
