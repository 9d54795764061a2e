"""RMS norms, gated MLPs and rotary positions of a frozen base: less saved for backward, fewer kernels.

transformers writes norms and gated MLPs as chains of elementwise operations, and autograd saves the input of each. With
frozen weights, backward needs only the norm's input and one factor a token, and the two branches of the MLP
(`kernels.elementwise` has the formulas). On a CPU forward gives the same values as transformers, bit for bit.

**By tiles.** The gated MLP of a checkpointed layer takes some tokens at a time, so that long rows fit: backward has
five tensors that are some 3 times as wide as the stream, for long rows most of a layer's memory. Tokens go through the
MLP independently, so forward keeps only the input; backward runs each tile again with a graph of its own. A
checkpoint's recomputation ends at the MLP's input (`_Keep`), which saves a product of down_proj. In return each tile
dequantizes the weights anew: by arithmetic 5 % of its products' time on a 4090, at 4,096 tokens.

**The rotation** of q and k is a global function of each model's module. A changed class runs the same code of
``forward``, with `_rotate` under that name. Only module objects that compute what Llama's do get a changed class. A
``forward`` set on the object would keep it alive in a cycle, and displace a hook of accelerate.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qvera.distributed.zero import is_sharded
from qvera.kernels import elementwise, once_differentiable
from qvera.kernels.choice import use_kernels

TILED_ABOVE_TOKENS = 4096
"""Tokens of a forward pass, all rows together, above which it goes by tiles. With fewer, tiles save little, and each
tile dequantizes the weights."""
_TILE_TOKENS, _LEAST_TILES, _MULTIPLE = 4096, 4, 64


class _Mixin(nn.Module):
    """Mixed before a transformers module, in a class made for the pair. Unpickling makes that class again."""

    def __reduce__(self) -> tuple[object, ...]:
        ours, theirs = type(self).__bases__
        return _new_instance, (ours, theirs), self.__dict__


@functools.cache
def _mixed(ours: type[_Mixin], theirs: type) -> type:
    """A subclass of both, in which ``ours`` comes first."""
    return type(f"LowMemory{theirs.__name__}", (ours, theirs), {"__module__": __name__})


def _new_instance(ours: type[_Mixin], theirs: type) -> nn.Module:
    return object.__new__(_mixed(ours, theirs))  # type: ignore[arg-type]  # a module class has its own idea of a hash


@functools.cache
def _same_text(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions have the same text: most Llama-like models copy Llama's parts."""
    try:
        return inspect.getsource(one) == inspect.getsource(other)
    except (OSError, TypeError):  # a function without source, such as one that was written in a notebook
        return False


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, module: _RMSNorm) -> torch.Tensor:
        y, factor = elementwise.rms_norm(x, module.weight, module.variance_epsilon)
        ctx.save_for_backward(x, factor)
        ctx.module = module  # type: ignore[attr-defined]  # and not its weight, which ZeRO-3 may release in between
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        return elementwise.rms_norm_backward(g, x, factor, ctx.module.weight), None  # type: ignore[attr-defined]


class _GatedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, c)
        return elementwise.swiglu(a, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return elementwise.swiglu_backward(g, *ctx.saved_tensors)  # type: ignore[attr-defined]


class _RMSNorm(_Mixin):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return elementwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
        if self.weight.requires_grad:  # somebody trains norms
            return super().forward(hidden_states)  # type: ignore[misc]  # the transformers class behind this one
        return _RMSNormFunction.apply(hidden_states, self)


class _GatedMLP(_Mixin):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    by_tiles: bool = False  # set in checkpointed layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_tiles and torch.is_grad_enabled() and self.training and can_tile(self, x):
            return tiled(self, self._whole, x)
        return self._whole(x)

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        gated = _GatedFunction.apply if torch.is_grad_enabled() else elementwise.swiglu
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class _Mixer(_Mixin):
    """A Mamba mixer that never trains: it calls its projections, where a fused kernel would read dense weights."""

    def train(self, mode: bool = True) -> _Mixer:
        super().train(mode)
        # by this flag transformers chooses the fused kernel
        self.training = False
        return self


def call_projections(model: nn.Module) -> None:
    """Let Mamba mixers call their projections in training too, so that these may be in 4 bits and adapted."""
    for module in model.modules():
        theirs: Any = type(module)
        is_mixer = hasattr(module, "A_log") and not isinstance(module, _Mixer)
        if is_mixer and "out_proj.weight" in inspect.getsource(theirs.forward):
            module.__class__ = _mixed(_Mixer, theirs)
            module.train(module.training)


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
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
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
            # the tile once more, with a graph that ends at the tile's input and is dropped after its gradients
            part = flat[rows].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(*ctx.autocast) if ctx.autocast[2] else contextlib.nullcontext():
                y = ctx.function(part)
            found = torch.autograd.grad(y, [part, *ctx.vectors], g[rows], allow_unused=True)
            grad[rows] = found[0]
            for i, one in enumerate(found[1:]):
                if one is not None:
                    # tiles are added up in fp32: in 16 bits each sum would be rounded
                    wide = one.to(torch.promote_types(one.dtype, torch.float32))
                    totals[i] = wide if (total := totals[i]) is None else total.add_(wide)
        of_vectors = [t if t is None else t.to(v.dtype) for t, v in zip(totals, ctx.vectors, strict=True)]
        return grad.view(x.shape), None, None, *of_vectors


def _tiles(tokens: int) -> list[slice]:
    step = tile_tokens(tokens)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def tiled(mlp: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function(x)`` by tiles of tokens: x [..., hidden] gives the same shape and dtype.

    ``function`` runs ``mlp`` on [tokens, hidden], each token by itself, with and without gradients.
    """
    # where x needs no gradient, a copy that does: else there would be no node to keep it
    kept = _Keep.apply(x if x.requires_grad else x.detach().requires_grad_())
    # an adapter may share tensors among linears, which are then no part of the MLP
    shared = (own for module in mlp.modules() for own in getattr(module, "qvera_shared", {}).values())
    vectors = dict.fromkeys(p for part in (mlp, *shared) for p in part.parameters() if p.requires_grad)
    return _Tiled.apply(kept, kept.grad_fn, function, *vectors)


def tile_mlps(model: nn.Module) -> None:
    """Let the gated MLPs of recomputed layers go by tiles if there are many tokens."""
    for module in model.modules():
        if isinstance(module, _GatedMLP):
            module.by_tiles = True


def reduce_saved_activations(model: nn.Module) -> int:
    """Let norms and gated MLPs like Llama's save less for backward; returns their number. A second call is harmless."""
    count = 0
    for module in model.modules():
        theirs: Any = type(module)
        if _same_text(theirs.forward, LlamaRMSNorm.forward):
            module.__class__ = _mixed(_RMSNorm, theirs)
        elif _same_text(theirs.forward, LlamaMLP.forward) and isinstance(module.act_fn, type(ACT2FN["silu"])):
            module.__class__ = _mixed(_GatedMLP, theirs)
        count += isinstance(module, (_RMSNorm, _GatedMLP))
    return count


class _RotaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return elementwise.rope(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g_q: torch.Tensor, g_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]
        return *elementwise.rope(g_q, g_k, cos, sin, backward=True), None, None


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [B, H, T, D] and k [B, K, T, D] by cos and sin [B or 1, T, D], as Llama's ``apply_rotary_pos_emb``."""
    if args or kwargs or cos.requires_grad or not use_kernels(q, k, cos, sin):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs)
    return (_RotaryFunction.apply if torch.is_grad_enabled() else elementwise.rope)(q, k, cos, sin)


def _rotating(function: FunctionType) -> FunctionType:
    """Copy a function, or the one that it decorates, with `_rotate` in place of its module's rotation."""
    scope, closure, inner = function.__globals__, function.__closure__, getattr(function, "__wrapped__", None)
    if inner is None:
        # a copy of the module's globals in which this one name is ours
        scope = {**scope, "apply_rotary_pos_emb": _rotate}
        scope.pop("__name__", None)  # else torch.compile looks the names up in the module that this is no longer
    else:
        changed = _rotating(inner)
        closure = tuple(CellType(changed) if cell.cell_contents is inner else cell for cell in closure or ())
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    del made.__dict__["__wrapped__"]
    if inner is not None:
        made.__dict__["__wrapped__"] = changed
    return made


class _Attention(_Mixin):
    def __init_subclass__(cls) -> None:
        theirs: Any = cls.__bases__[1]
        cls.forward = _rotating(theirs.forward)  # type: ignore[method-assign]


def fuse_rotation(model: nn.Module) -> int:
    """Let attention layers that rotate as Llama's do it by `kernels.elementwise.rope`; returns how many there are.

    A second call is harmless.
    """
    count = 0
    for module in model.modules():
        theirs: Any = type(module)
        if not isinstance(module, _Attention) and _rotates_as_llama(theirs.forward):
            module.__class__ = _mixed(_Attention, theirs)
        count += isinstance(module, _Attention)
    return count


def _rotates_as_llama(forward: Callable[..., Any]) -> bool:
    innermost = inspect.unwrap(forward)
    if not isinstance(innermost, FunctionType) or "apply_rotary_pos_emb" not in innermost.__code__.co_names:
        return False
    theirs = _function_of(innermost.__globals__.get("apply_rotary_pos_emb"))
    return (
        isinstance(theirs, FunctionType)
        and _same_text(theirs, _function_of(modeling_llama.apply_rotary_pos_emb))
        and _same_text(theirs.__globals__.get("rotate_half"), modeling_llama.rotate_half)
    )


def _function_of(rotation: Any) -> Any:
    """Return a rotation's own function. With the package ``kernels``, transformers' decorator makes it a module."""
    if isinstance(rotation, nn.Module):
        return inspect.getclosurevars(type(rotation).forward).nonlocals.get("func")
    return rotation
