"""The gated MLP of a checkpointed layer by tiles of tokens, so that long rows fit.

The inside of an MLP is some 3 times as wide as the stream, and backward has five such tensors at a time: for long rows
they are most of a layer's memory. Each token goes through the MLP by itself, so forward takes some tokens at a time and
keeps only the input; backward takes each tile through the MLP again with a graph of its own. The gradients of vectors
are added up over the tiles in fp32.

That costs about as much as an untiled layer that is recomputed. Inside a checkpoint nothing after the MLP's input has
to be recomputed, so recomputation ends there (`_Keep`), and the product of down_proj is taken once less. In return each
tile dequantizes the weights anew: by arithmetic 5 % of its products' time on a 4090, at 4,096 tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qvera.distributed.zero_params import is_sharded

TILED_ABOVE_TOKENS = 4096
"""Of a forward pass, all rows together. With fewer, tiles would save little, and each would dequantize the weights for
few tokens."""

_TILE_TOKENS, _LEAST_TILES, _MULTIPLE = 4096, 4, 64


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile where there are so many in all: at most 4,096, at least four tiles."""
    tiles = max(_LEAST_TILES, -(-tokens // _TILE_TOKENS))
    return -(-tokens // (tiles * _MULTIPLE)) * _MULTIPLE


def can_tile(mlp: nn.Module, x: torch.Tensor) -> bool:
    """Whether tiles pay for x [..., hidden], and give the same numbers.

    Not where the MLP drops elements (a tile's second pass would drop others), not where a layer looks at the gradients
    of a whole pass (``needs_whole_passes``), and not under ZeRO-3, which would gather the weights for each tile.
    """
    if x.numel() // x.shape[-1] <= TILED_ABOVE_TOKENS or torch.compiler.is_compiling():
        return False
    drops = mlp.training and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in mlp.modules())
    watched = any(getattr(m, "needs_whole_passes", False) for m in mlp.modules())
    return not drops and not watched and not any(is_sharded(p) for p in mlp.parameters())


class _Keep(torch.autograd.Function):
    """The identity, which keeps its input for the node behind it.

    A node of its own, because autograd takes what a function keeps only when its forward ends. A checkpoint's
    recomputation stops once it has all that forward kept, which is then before the MLP and not behind it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, keeper: Any, function: Callable[[torch.Tensor], torch.Tensor], *vectors: torch.Tensor
    ) -> torch.Tensor:
        ctx.keeper, ctx.function, ctx.vectors = keeper, function, vectors
        ctx.autocast = _autocast_of(x.device.type)
        flat, out = x.reshape(-1, x.shape[-1]), torch.empty_like(x)
        flat_out = out.view(-1, x.shape[-1])
        for rows in _tiles(len(flat)):
            flat_out[rows] = function(flat[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.keeper.saved_tensors
        flat, g = x.detach().reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
        grad = torch.empty_like(flat)
        totals: list[torch.Tensor | None] = [None] * len(ctx.vectors)
        for rows in _tiles(len(flat)):
            part = flat[rows].detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast():
                y = ctx.function(part)
            found = torch.autograd.grad(y, [part, *ctx.vectors], g[rows], allow_unused=True)
            grad[rows] = found[0]
            for i, one in enumerate(found[1:]):
                if one is not None:
                    wide = one.to(torch.promote_types(one.dtype, torch.float32))
                    totals[i] = wide if (total := totals[i]) is None else total.add_(wide)
        of_vectors = [t if t is None else t.to(v.dtype) for t, v in zip(totals, ctx.vectors, strict=True)]
        return grad.view(x.shape), None, None, *of_vectors


def _tiles(tokens: int) -> list[slice]:
    step = tile_tokens(tokens)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _autocast_of(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context with the autocast of now, for backward."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype) if enabled else contextlib.nullcontext()


def tiled(mlp: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function(x)`` by tiles of tokens: x [..., hidden] gives the same shape and dtype.

    Args:
        mlp: the module that ``function`` runs; its trained parameters get their gradients.
        function: takes each token by itself; called with [tokens, hidden], with and without gradients.
    """
    kept = _Keep.apply(x if x.requires_grad else x.detach().requires_grad_())
    return _Tiled.apply(kept, kept.grad_fn, function, *(p for p in mlp.parameters() if p.requires_grad))
