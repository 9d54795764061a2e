"""The frozen linear: one function that runs a frozen base layer, forward and backward, for the whole project.

It keeps the *module* for backward and reads the weight again there, not a view of it. That lets ZeRO-3 release a
gathered layer after forward, keeps a memory-mapped file evictable, and dequantizes one layer at a time. It also never
lets bitsandbytes repack a weight in place, which an evaluation pass of stock `Linear4bit` does on CPUs with
AVX512-BF16 and which silently ruins every later gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qvera.distributed.zero_params import is_sharded
from qvera.models import quantization
from qvera.utils import memory

BLOCK_WEIGHTS = 2**22
"""Weights made at a time: 8 MB in 16 bits. glibc gives anything above 32 MB back to the system when it is freed."""

_SUMMED_NUMBERS = 3 * 2**20
"""g W by blocks adds up [T, n] once a block. With more numbers than this it costs more than a whole weight's fresh pages."""


class WeightBlocks:
    """The weight [m, n] of a linear layer in ``dtype``, in blocks of rows made when asked for.

    Args:
        elements: weights in a block, at most.
        kept: blocks are asked for more than once, so a quantized weight is one block, dequantized once.

    A weight that is held in that dtype already is one block, and so is a quantized one on anything but a CPU.
    """

    def __init__(self, module: Any, dtype: torch.dtype, elements: int, kept: bool = False) -> None:
        self.rows: int = module.out_features
        self._module, self._dtype = module, dtype
        self._whole: torch.Tensor | None = None
        self._step = max(1, elements // module.in_features)
        four_bit = isinstance(module, quantization.Linear4bit)
        blocked = four_bit and not kept and module.weight.device.type == "cpu" and quantization.ends_with_rows(module)
        self._stored = not four_bit and not isinstance(module, quantization.Linear8bit)
        if not (blocked or (self._stored and module.weight.dtype != dtype)):
            self._step = self.rows
            self._whole = quantization.dequantized_weight(module, dtype)

    def __len__(self) -> int:
        return -(-self.rows // self._step)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._whole is not None or self._step >= self.rows:
            if self._whole is None:  # made once, held as long as this object
                self._whole = quantization.dequantized_weight(self._module, self._dtype)
            yield slice(0, self.rows), self._whole
        elif self._stored:
            for start in range(0, self.rows, self._step):
                rows = slice(start, min(start + self._step, self.rows))
                yield rows, self._module.weight[rows].to(self._dtype)
        else:
            yield from quantization.dequantized_rows(self._module, self._dtype, self._step)


def blocked_linear(x: torch.Tensor, blocks: WeightBlocks, bias: torch.Tensor | None) -> torch.Tensor:
    """X Wᵀ + bias: x [..., n] gives [..., m] in x's dtype."""
    if len(blocks) == 1:
        return F.linear(x, next(iter(blocks))[1], bias)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(flat.shape[0], blocks.rows)
    for rows, weight in blocks:
        torch.mm(flat, weight.t(), out=y[:, rows])
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


def blocked_input_grad(g: torch.Tensor, blocks: WeightBlocks, out: torch.Tensor) -> None:
    """G W: g [T, m] gives [T, n] in ``out``, added up in fp32 at least."""
    if len(blocks) == 1:
        torch.mm(g.to(out.dtype), next(iter(blocks))[1], out=out)
        return
    if out.dtype.itemsize >= 4:
        out.zero_()
        for rows, weight in blocks:
            out.addmm_(g[:, rows].to(out.dtype), weight)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for rows, weight in blocks:
        total += g[:, rows].to(out.dtype) @ weight
    out.copy_(total)


def backward_by_blocks(tokens: int, in_features: int) -> bool:
    """Whether g W is made by blocks."""
    return tokens * in_features <= _SUMMED_NUMBERS


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any) -> torch.Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return blocked_linear(x, WeightBlocks(module, x.dtype, BLOCK_WEIGHTS), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens, n = g.numel() // g.shape[-1], ctx.module.in_features
        if not backward_by_blocks(tokens, n):
            return g @ quantization.dequantized_weight(ctx.module, g.dtype), None
        grad = g.new_empty(tokens, n)
        blocked_input_grad(g.reshape(tokens, -1), WeightBlocks(ctx.module, g.dtype, BLOCK_WEIGHTS), out=grad)
        return grad.view(*g.shape[:-1], n), None


def frozen_linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Y = x Wᵀ + bias with W [m, n] frozen and quantized: [..., n] gives [..., m], in x's dtype, differentiable in x.

    The product is taken in the layer's compute dtype (`compute_dtype`).
    """
    dtype = compute_dtype(module, x)
    inner = x.to(dtype)
    if not (torch.is_grad_enabled() and x.requires_grad) and isinstance(module, quantization.Linear4bit):
        y = quantization.fused_matmul(inner, module, getattr(module, "_inference_pack", None))
        if y is not None:
            return (y if module.bias is None else y + module.bias.to(y.dtype)).to(x.dtype)
    return _FrozenLinear.apply(inner, module).to(x.dtype)


def compute_dtype(module: Any, x: torch.Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies: autocast's if on, a 4-bit layer's own, else that of its input."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if isinstance(module, quantization.Linear4bit) and module.compute_dtype is not None:
        return module.compute_dtype
    return x.dtype


class _Frozen:
    """Mixed into bitsandbytes' layers: our forward, and a guard on dtype casts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(self, x)  # type: ignore[arg-type]  # always mixed into a Module

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Packed bytes may be stored as bfloat16 or float16. `model.to(torch.float16)` would convert those "numbers" and
        # destroy the weights without a word; a cast applies to the compute side only, the bytes just move.
        weight = self.weight  # type: ignore[attr-defined]

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is not weight:
                return fn(tensor)
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(guarded, recurse)  # type: ignore[misc]


class FrozenLinear4bit(_Frozen, quantization.Linear4bit):
    """`bitsandbytes.nn.Linear4bit` run by `frozen_linear`."""


class FrozenLinear8bit(_Frozen, quantization.Linear8bit):
    """`bitsandbytes.nn.Linear8bitLt` run by `frozen_linear`: weights in int8, products in the compute dtype."""


class FrozenLinear(_Frozen, torch.nn.Linear):
    """A dense linear stored in another dtype (16 bits, in a mapped file) than it computes in: cast for each product."""

    _held_weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self._held_weight
        if held is not None and held.dtype == x.dtype and not torch.is_grad_enabled():
            return F.linear(x, held, None if self.bias is None else self.bias.to(x.dtype))
        return frozen_linear(self, x)


def freeze_dense(module: torch.nn.Linear) -> None:
    """Make this linear a `FrozenLinear`."""
    module.__class__ = FrozenLinear


class FrozenEmbedding(torch.nn.Embedding):
    """An embedding whose table is stored in another dtype than its output has."""

    output_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.output_dtype)


def embed_in(module: torch.nn.Embedding, dtype: torch.dtype) -> None:
    """Make this embedding give ``dtype`` (a `FrozenEmbedding`)."""
    module.__class__ = FrozenEmbedding
    module.output_dtype = dtype  # type: ignore[assignment]


def embedding_dtype(module: Any) -> torch.dtype:
    """The dtype of what an embedding gives, which is that of a model's activations."""
    return getattr(module, "output_dtype", module.weight.dtype)


def freeze_linears(model: torch.nn.Module) -> int:
    """Make every bitsandbytes linear of this model run through `frozen_linear`; returns how many there are.

    Changes these module objects only (their class), not bitsandbytes. Doing it twice is harmless.
    """
    count = 0
    for module in model.modules():
        for stock, ours in ((quantization.Linear4bit, FrozenLinear4bit), (quantization.Linear8bit, FrozenLinear8bit)):
            if isinstance(module, stock):
                if type(module) is stock:
                    module.__class__ = ours
                count += 1
    return count


def _contiguous(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The head reads the last position of each row, a strided tensor [rows, 1, n]. Over a weight that needs no gradient
    `torch.matmul` makes a batched product of that and copies the weight once for each row: 0.8 s of 16 answers of SmolLM2.
    """
    return (args[0].contiguous(), *args[1:])


@contextlib.contextmanager
def inference_layout(model: torch.nn.Module, skip: Collection[torch.nn.Module] = ()) -> Iterator[None]:
    """For the time of the block, 4-bit layers (but those in ``skip``) hold a second copy of their weight, as packed for the
    fused CPU kernel, and the output head one in its compute dtype where it is stored in another.

    Generation then runs at bitsandbytes' speed while the training weights stay as they are. Costs the packed weights'
    size again until the block ends; does nothing where there is no such kernel (CUDA has its own, on the plain layout).
    """
    packed = []
    skipped = set(map(id, skip))
    inner: Any = model
    head: Any = inner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    holds = isinstance(head, FrozenLinear) and head._held_weight is None and head.weight.device.type == "cpu"
    holds = holds and not is_sharded(head.weight)
    hook = head.register_forward_pre_hook(_contiguous) if isinstance(head, torch.nn.Module) else None
    try:
        if holds:
            head._held_weight = head.weight.to(embedding_dtype(inner.get_input_embeddings()))
        chosen = [m for m in model.modules() if isinstance(m, FrozenLinear4bit) and id(m) not in skipped]
        chosen = [m for m in chosen if not is_sharded(m.weight)]
        # the kernel computes in bfloat16, and the copies are private memory where the weights may be a mapped file
        size_bytes = sum(quantization.storage_bytes(module) for module in chosen)
        fits = size_bytes <= memory.available_bytes(torch.device("cpu")) // 4
        for module in chosen if fits else ():
            if module.compute_dtype != torch.bfloat16:
                continue
            pack = None if hasattr(module, "_inference_pack") else quantization.inference_pack(module)
            if pack is not None:
                module._inference_pack = pack  # type: ignore[assignment]
                packed.append(module)
        yield
    finally:
        if hook is not None:
            hook.remove()
        if holds:
            head._held_weight = None
        for module in packed:
            del module._inference_pack
