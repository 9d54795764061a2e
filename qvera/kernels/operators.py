"""Our kernels as operators of torch.library, which fake tensors and torch.compile see as one call.

`torch.library.custom_op` does the same in one line. It costs 25 µs of Python a call where this costs 7 (2 cores, torch
2.13), and a layer makes some forty calls; on a fast card the host is what a step waits for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qvera.utils import accelerator

LAUNCHES: dict[str, int] = {}
"""Operator name, such as ``qvera.combined``, → how many kernels it launches."""

_library = torch.library.Library("qvera", "FRAGMENT")


def register(
    name: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    launches: int = 1,
    mutates_args: Sequence[str] = (),
) -> Callable[..., Any]:
    """Make the operator ``qvera::name`` and return what calls it.

    The operator has no derivative: call it inside a `torch.autograd.Function`, or without gradients.

    Args:
        name: of the operator.
        launch: runs the kernel. Its annotations become the operator's schema.
        fake: the same signature; gives empty tensors of the right shape, dtype and device.
        launches: how many kernels ``launch`` starts.
        mutates_args: the arguments that the kernel writes into.
    """

    def launch_on_its_device(*arguments: Any) -> Any:
        # Triton launches on the current device, which for a layer on another card is not that of the tensors
        device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
        with accelerator.in_use(device):
            return launch(*arguments)

    schema = torch.library.infer_schema(launch, mutates_args=mutates_args)
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, launch_on_its_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qvera::{name}", fake, lib=_library)
    LAUNCHES[f"qvera.{name}"] = launches
    return getattr(torch.ops.qvera, name).default
