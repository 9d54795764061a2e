"""Kernels for accelerators, each beside plain torch code that computes the same; `choice.use_kernels` decides.

`triton_kernels` is imported at an operator's first call, so a CPU never imports triton.
No kernel has run on a card yet. Tests run them in Triton's interpreter and compile them for sm_80, sm_89 and sm_90.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward function that can't be differentiated itself: a second derivative raises RuntimeError."""
    guarded = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        # gradients are on here where a graph of the backward pass is asked for
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return run
