"""Run the frozen linear layers of a base model, forward and backward, whatever their weights are stored in.

The autograd function keeps the *module* for backward and reads its weight again there. So ZeRO-3 can release a gathered
layer, pages of a mapped file can be dropped, and one layer is dequantized at a time. On a CPU large weights are
dequantized in blocks of 8 MB: the system would clear a whole one (90 MB in a 7B) for every product, which takes six
times as long as dequantizing (bench/log.md).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx

from qvera.distributed.zero import is_sharded
from qvera.kernels import once_differentiable
from qvera.models import quantization
from qvera.models.quantization import Linear4bit, Linear8bit
from qvera.utils import accelerator, memory

BLOCK_WEIGHTS = 2**22
"""8 MB in 16 bits. glibc gives anything above 32 MB back to the system when it is freed."""

_MAX_SUMMED_ELEMENTS = 3 * 2**20
"""The largest [T, n] for which g W is computed by blocks. Each block adds to all of it, which costs more above this
size than allocating the whole weight."""


class WeightBlocks:
    """The weight [m, n] of a linear layer in ``dtype``, as blocks of rows of at most ``elements`` weights.

    There are several blocks only for a dense weight of another dtype, and for a 4-bit weight on a CPU that is iterated
    once. Each is cast or dequantized when it is its turn. Any other weight is one block, made at once: a dense one that
    has the dtype, int8, a 4-bit one that is ``reused``, on an accelerator, or whose scales do not end with its rows.
    """

    def __init__(self, module: nn.Linear, dtype: torch.dtype, elements: int, reused: bool = False) -> None:
        self.rows = module.out_features
        self._module, self._dtype = module, dtype
        self._dense = not isinstance(module, (Linear4bit, Linear8bit))
        on_cpu = isinstance(module, Linear4bit) and not reused and module.weight.device.type == "cpu"
        on_cpu = on_cpu and quantization.resident_weight(module, dtype) is None
        in_blocks = (on_cpu and quantization.ends_with_rows(module)) or (self._dense and module.weight.dtype != dtype)
        self._step = max(1, elements // module.in_features) if in_blocks else self.rows
        self._whole = quantization.dequantized_weight(module, dtype) if self._step >= self.rows else None

    def __len__(self) -> int:
        return -(-self.rows // self._step)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self._whole is not None:
            yield slice(0, self.rows), self._whole
        elif self._dense:
            for start in range(0, self.rows, self._step):
                rows = slice(start, min(start + self._step, self.rows))
                yield rows, self._module.weight[rows].to(self._dtype)
        else:
            yield from quantization.dequantized_rows(self._module, self._dtype, self._step)


def _whole_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = F.linear(x, weight, bias)
    # for three dimensions and a bias torch returns a view, which nobody may change in place; this is the same memory
    return y if bias is None else torch.ops.aten._unsafe_view(y, y.shape)


def blocked_linear(x: torch.Tensor, blocks: WeightBlocks, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + bias: x [..., n] gives [..., m] in x's dtype, no view: it may be changed in place."""
    if len(blocks) == 1:
        return _whole_linear(x, next(iter(blocks))[1], bias)
    y = x.new_empty(*x.shape[:-1], blocks.rows)
    inputs, outputs = x.reshape(-1, x.shape[-1]), y.view(-1, blocks.rows)
    for rows, weight in blocks:
        torch.mm(inputs, weight.t(), out=outputs[:, rows])
    return y if bias is None else y.add_(bias)


def blocked_input_grad(g: torch.Tensor, blocks: WeightBlocks, out: torch.Tensor) -> None:
    """Write g W, the gradient of x Wᵀ in x, to ``out``: g [T, m] gives [T, n], summed in fp32 at least."""
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
    """Whether g W is computed by blocks. Not in compiled code, which has one path for all numbers of tokens."""
    return not torch.compiler.is_compiling() and tokens * in_features <= _MAX_SUMMED_ELEMENTS


def frozen_product(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ + bias in x's dtype, a new tensor, without a derivative. A trained bias is left out."""
    bias = None if module.bias is None or module.bias.requires_grad else module.bias.to(x.dtype)
    # the shortest way to what `blocked_linear` would do with its one block: here the host's time counts
    if accelerator.is_accelerator(x.device.type) and isinstance(module, Linear4bit):
        return _whole_linear(x, quantization.dequantized_weight(module, x.dtype), bias)
    return blocked_linear(x, WeightBlocks(module, x.dtype, BLOCK_WEIGHTS), bias)


def frozen_input_grad(module: nn.Linear, g: torch.Tensor) -> torch.Tensor:
    """Return g W, the gradient of `frozen_product` in x: g [..., m] gives [..., n] in g's dtype, a new tensor."""
    tokens, n = g.numel() // g.shape[-1], module.in_features
    whole = accelerator.is_accelerator(g.device.type) and isinstance(module, Linear4bit)
    if whole or not backward_by_blocks(tokens, n):
        return g @ quantization.dequantized_weight(module, g.dtype)
    grad = g.new_empty(*g.shape[:-1], n)
    blocks = WeightBlocks(module, g.dtype, BLOCK_WEIGHTS)
    blocked_input_grad(g.reshape(tokens, g.shape[-1]), blocks, out=grad.view(tokens, n))
    return grad


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, module: nn.Linear) -> torch.Tensor:
        ctx.module = module  # type: ignore[attr-defined]
        return frozen_product(module, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return frozen_input_grad(ctx.module, g), None  # type: ignore[attr-defined]


def frozen_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """y = x Wᵀ + bias with W [m, n] frozen: [..., n] gives [..., m], in x's dtype, differentiable in x.

    The product is taken in `compute_dtype`. A trained bias or dense weight (PEFT's ``bias``, ``modules_to_save``) gets
    its gradient.
    """
    inner, bias = x.to(compute_dtype(module, x)), module.bias
    if module.weight.requires_grad and not isinstance(module, (Linear4bit, Linear8bit)):
        weight = module.weight.to(inner.dtype)
        return F.linear(inner, weight, None if bias is None else bias.to(inner.dtype)).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad) and isinstance(module, Linear4bit):
        y = quantization.fused_matmul(inner, module, getattr(module, "_inference_pack", None))
        if y is not None:
            return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
    y = _FrozenLinearFunction.apply(inner, module)
    return (y + bias.to(y.dtype) if bias is not None and bias.requires_grad else y).to(x.dtype)


def compute_dtype(module: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies: autocast's if on, a 4-bit layer's own, else its input's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if isinstance(module, Linear4bit) and module.compute_dtype is not None:
        return module.compute_dtype
    return x.dtype


class FrozenPacked:
    """Mixed into a module whose weight may be packed: a guard against casts of its bytes."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Packed bytes may be stored as bfloat16 or float16. `model.to(torch.float16)` would convert them as if they
        # were weights and destroy them silently. A cast changes how the layer computes; packed bytes only move.
        weight = cast(nn.Linear, self).weight

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is not weight:
                return fn(tensor)
            # an empty tensor shows what ``fn`` does: a cast, a move, or both
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if probe.device != tensor.device and getattr(weight, "streamed", None) is not None:
                raise RuntimeError(
                    f"this base is streamed to {tensor.device} (model.stream) and can't be moved to {probe.device}"
                )
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(guarded, recurse)  # type: ignore[misc]


class _FrozenForward(FrozenPacked):
    """Mixed into a linear class: the forward of `frozen_linear`."""

    _inference_weight: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `frozen_linear`, within `inference_layout` with a copy of the weight in the compute dtype, if any."""
        module, copy = cast(nn.Linear, self), self._inference_weight
        if copy is None or copy.dtype != compute_dtype(module, x) or torch.is_grad_enabled():
            return frozen_linear(module, x)
        bias = None if module.bias is None else module.bias.to(copy.dtype)
        return F.linear(x.to(copy.dtype), copy, bias).to(x.dtype)


class FrozenLinear4bit(_FrozenForward, Linear4bit):
    """`bitsandbytes.nn.Linear4bit` run by `frozen_linear`."""

    def held_dtype(self) -> torch.dtype:
        """The dtype of a dense copy."""
        return self.compute_dtype

    def __reduce_ex__(self, protocol: Any) -> Any:
        if quantization.is_streamed(self):  # a copy would read what another layer left in the buffer
            raise RuntimeError("this base is streamed (model.stream), and can't be copied or pickled; load it again")
        return super().__reduce_ex__(protocol)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # the device may hold another layer's bytes now
        if (streamed := getattr(self.weight, "streamed", None)) is not None:
            destination[f"{prefix}weight"] = streamed.packed
            for key, tensor in streamed.state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = tensor


class FrozenLinear8bit(_FrozenForward, Linear8bit):
    """`bitsandbytes.nn.Linear8bitLt` run by `frozen_linear`. Products are in the compute dtype."""


class FrozenLinear(_FrozenForward, nn.Linear):
    """A dense linear stored in another dtype than it computes in (a mapped file). It is cast for each product."""

    compute_dtype: torch.dtype | None = None
    """That of the model's other layers: adapters hold their tensors in it."""


class FrozenEmbedding(nn.Embedding):
    """An embedding that gives another dtype than its table is stored in."""

    output_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of ``input`` [...], as [..., hidden] in `output_dtype`."""
        return super().forward(input).to(self.output_dtype)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make embeddings and dense linears that are stored in another dtype give and take ``dtype``."""
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight.dtype != dtype:
            module.__class__ = FrozenEmbedding
            cast(FrozenEmbedding, module).output_dtype = dtype
        elif type(module) is nn.Linear and module.weight.dtype != dtype:
            module.__class__ = FrozenLinear
            cast(FrozenLinear, module).compute_dtype = dtype


def embedding_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that an embedding returns, which is that of a model's activations."""
    if isinstance(module, FrozenEmbedding):
        return module.output_dtype
    weight = getattr(module, "weight", None)  # a buffer under ZeRO-3, where the head is tied to it
    return (next(module.parameters()) if weight is None else weight).dtype


def freeze_linears(model: nn.Module) -> None:
    """Make every bitsandbytes linear of this model run through `frozen_linear`, by the class of these objects."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FrozenLinear4bit
        elif type(module) is Linear8bit:
            module.__class__ = FrozenLinear8bit


@contextlib.contextmanager
def inference_layout(
    model: nn.Module, skip: Collection[nn.Module] = (), dense: Collection[FrozenLinear4bit] = ()
) -> Iterator[None]:
    """Within the block, generation runs at bitsandbytes' speed. The training weights stay as they are.

    4-bit layers in ``dense`` get a second copy of their weight in the compute dtype; others that are not in ``skip``
    one that is packed for the fused CPU kernel, if there is one. An output head that is stored in another dtype gets a
    copy in its compute dtype.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    with contextlib.ExitStack() as stack:
        if isinstance(output, nn.Module):
            # The head reads the last position of each row, a strided tensor [rows, 1, n]. Where the weight needs no
            # gradient, `torch.matmul` makes a batched product of that and copies the weight once for each row.
            hook = output.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
            stack.callback(hook.remove)
        is_held = isinstance(output, FrozenLinear) and output._inference_weight is not None
        if isinstance(output, FrozenLinear) and not is_held and output.weight.is_cpu and not is_sharded(output.weight):
            dtype = embedding_dtype(model.get_input_embeddings())  # type: ignore[operator]
            output._inference_weight = output.weight.to(dtype)
            stack.callback(setattr, output, "_inference_weight", None)
        for layer in dense:
            layer._inference_weight = quantization.dequantized_weight(layer, layer.held_dtype())
            stack.callback(setattr, layer, "_inference_weight", None)
        skipped = set(map(id, [*skip, *dense]))
        layers = [m for m in model.modules() if isinstance(m, FrozenLinear4bit) and id(m) not in skipped]
        layers = [m for m in layers if not is_sharded(m.weight)]
        # copies take memory of this process, while the weights may be a mapped file, which takes none
        has_room = sum(map(quantization.storage_bytes, layers)) <= memory.available_bytes(torch.device("cpu")) // 4
        for layer in layers if has_room else ():
            # bfloat16 is all that the kernel computes in
            if layer.compute_dtype == torch.bfloat16 and not hasattr(layer, "_inference_pack"):
                layer._inference_pack = quantization.inference_pack(layer)
                stack.callback(delattr, layer, "_inference_pack")
        yield
