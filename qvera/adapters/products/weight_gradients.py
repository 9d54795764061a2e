"""The gradients of frozen weights, for a start that is made from them (LoRA-SB, arXiv 2411.19557).

The weights stay frozen, and may be quantized: the gradient of W [m, n] is gᵀ x, from the linear's input x [T, n] and
the gradient g [T, m] of its output. It is added up linear by linear, for the linears that are asked for and no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qvera.adapters.adapted_forward import layer_shape
from qvera.adapters.products.functional import AutogradContext


class _AddUp(torch.autograd.Function):
    """y as it is; in backward, gᵀ x is added to a matrix. x is saved as autograd saves it, so checkpoints drop it."""

    @staticmethod
    def forward(ctx: AutogradContext, y: torch.Tensor, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.total = total  # type: ignore[attr-defined]
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), total = ctx.saved_tensors, ctx.total  # type: ignore[attr-defined]
        total.addmm_(g.reshape(-1, g.shape[-1]).t().to(total.dtype), x.reshape(-1, x.shape[-1]).to(total.dtype))
        return g, None, None


@contextlib.contextmanager
def collected(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Within the block, each backward pass through ``model`` adds to the gradients of these linears' weights.

    Yields:
        Name → gradient [out_features, in_features], fp32 or wider, on the linear's device; zero at first.
    """
    gradients: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if isinstance(embedding, nn.Module):  # nothing before the linears needs a gradient by itself
            hook = embedding.register_forward_hook(lambda _module, _inputs, y: _with_gradient(y))
            stack.callback(hook.remove)
        for name, linear in linears.items():
            shape = layer_shape(linear)
            assert shape is not None
            n, m = shape
            weight = linear.weight
            assert isinstance(weight, torch.Tensor)
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            total = gradients[name] = torch.zeros(m, n, dtype=wide, device=weight.device)

            def add(
                _: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor, total: torch.Tensor = total
            ) -> torch.Tensor | None:
                return _AddUp.apply(y, inputs[0].detach(), total) if y.requires_grad else None

            stack.callback(linear.register_forward_hook(add).remove)
        yield gradients


def _with_gradient(y: torch.Tensor) -> torch.Tensor:
    return y if y.requires_grad or not torch.is_grad_enabled() else y.detach().requires_grad_()


def sign_step(gradient: torch.Tensor, size: float) -> torch.Tensor:
    """What the first step of a sign-based optimizer (Adam's is one) does to a weight: −size · sign(gradient)."""
    return gradient.sign().mul_(-size)
