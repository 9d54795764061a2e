"""The gated MLP of a checkpointed layer by tiles of tokens, so that long rows fit.

Backward has five tensors at a time that are some 3 times as wide as the stream: for long rows most of a layer's memory.
Tokens go through the MLP independently, so forward takes some at a time and keeps only the input; backward runs each
tile again with a graph of its own. A checkpoint's recomputation ends at the MLP's input (`_Keep`), which saves a
product of down_proj. In return each tile dequantizes the weights anew: by arithmetic 5 % of its products' time on a
4090, at 4,096 tokens.
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
"""Of a forward pass, all rows together. With fewer, tiles save little, and each dequantizes the weights."""

_TILE_TOKENS, _LEAST_TILES, _MULTIPLE = 4096, 4, 64


def tile_tokens(tokens: int) -> int:
    """Tokens of a tile: at most 4,096, at least four tiles."""
    tiles = max(_LEAST_TILES, -(-tokens // _TILE_TOKENS))
    return -(-tokens // (tiles * _MULTIPLE)) * _MULTIPLE


def can_tile(mlp: nn.Module, x: torch.Tensor) -> bool:
    """Whether tiles pay for x [..., hidden], and give the same numbers.

    Not where the MLP drops elements (a second pass would drop others), not where a layer looks at the gradients of a
    whole pass (``needs_whole_passes``), and not under ZeRO-3, which would gather the weights for each tile.
    """
    if x.numel() // x.shape[-1] <= TILED_ABOVE_TOKENS or torch.compiler.is_compiling():
        return False
    drops = mlp.training and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in mlp.modules())
    watched = any(getattr(m, "needs_whole_passes", False) for m in mlp.modules())
    return not drops and not watched and not any(is_sharded(p) for p in mlp.parameters())


class _Keep(torch.autograd.Function):
    """The identity. It keeps its input for the node behind it.

    It is a node of its own, because autograd keeps a function's tensors when its forward ends. A checkpoint's
    recomputation stops once it has all that forward kept: now before the MLP, not behind it.
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
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype) if enabled else contextlib.nullcontext()


def tiled(mlp: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function(x)`` by tiles of tokens: x [..., hidden] gives the same shape and dtype.

    ``function`` runs ``mlp`` on [tokens, hidden], each token by itself, with and without gradients.
    """
    kept = _Keep.apply(x if x.requires_grad else x.detach().requires_grad_())
    return _Tiled.apply(kept, kept.grad_fn, function, *(p for p in mlp.parameters() if p.requires_grad))
