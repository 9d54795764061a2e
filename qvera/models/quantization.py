"""bitsandbytes' formats: how to ask for a quantized load, how to read a quantized weight, and how to make one.

`bitsandbytes.nn.Linear4bit` holds NF4 or FP4 with optional double quantization (QLoRA, arXiv 2305.14314, sections 3.1
and 3.2), and `bitsandbytes.nn.Linear8bitLt` int8 with one scale a row (LLM.int8(), arXiv 2208.07339).

`pack_four_bit` quantizes on a CPU, bit-equal to bitsandbytes and faster (bench/quantize.py).

The arithmetic is that of bitsandbytes' CPU `quantize_4bit` (QLoRA, arXiv 2305.14314, section 3; bitsandbytes
`backends/default/ops.py`), in the same order and in fp32. For a block of 64 weights

    a = max |w|        s = w · (1 / max(a, 1e-38))        rank = number of thresholds below s

with thresholds halfway between neighbouring values of the code; a last block of fewer than 64 divides by a instead. It
is faster by chunks that stay in the cache, maxima taken over the bits, and thresholds counted in vector instructions.
numpy's loops stay on the calling thread, so that a caller can spread blocks over threads.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from qvera.config.sections import ModelSection
from qvera.distributed.zero import whole_numel
from qvera.kernels import dequantize
from qvera.models.structure import left_whole
from qvera.utils.safetensors_io import TensorSpec

_logger = logging.getLogger("bitsandbytes")
_level = _logger.level
_logger.setLevel(logging.ERROR)  # on some CPUs it logs advice on an optional package
import bitsandbytes as bnb  # noqa: E402

_logger.setLevel(_level)

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn import Linear8bitLt as Linear8bit
    from transformers import PreTrainedModel

    from qvera.models.experts import ExpertStack
else:
    Linear4bit = bnb.nn.Linear4bit
    Linear8bit = bnb.nn.Linear8bitLt

bnb_functional = bnb.functional


def kept_dense(model: PreTrainedModel, heads: Sequence[str]) -> list[str]:
    """Patterns of the linears that are not quantized: heads, and `left_whole`."""
    found, output = left_whole(model), model.get_output_embeddings()
    heads = heads or [name for name, module in model.named_modules() if module is output]
    return [*heads, *(f"{re.escape(name)}$" for name in sorted(found))]


def quantization_config(
    section: ModelSection, compute_dtype: torch.dtype, dense: list[str]
) -> BitsAndBytesConfig | None:
    """transformers' settings for a quantized load, or None. ``dense``: `kept_dense`."""
    if section.quantization == "none":
        return None
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=dense or None)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=dense or None,
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantization,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=getattr(torch, section.quant_storage),
    )


def four_bit_linears(model: PreTrainedModel, section: ModelSection, dense: list[str]) -> set[str]:
    """Names of the modules that transformers makes 4-bit in this model (on the meta device; it is changed in place)."""
    quantizer = AutoHfQuantizer.from_config(quantization_config(section, torch.bfloat16, dense), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


STATE_KEY = "quant_state.bitsandbytes__"
NESTED_BLOCK = 256
"""Scales that share one scale, with double quantization."""
_FLOAT_CHARACTERS = 24
"""Characters of the longest float in JSON: -1.2345678901234567e-123."""


def serialized_layout(weight: TensorSpec, section: ModelSection) -> list[TensorSpec]:
    """The tensors that bitsandbytes stores for a 4-bit weight [m, n]: the packed one first, then its statistics.

    Wide dtypes come first. The JSON at the end is padded with blanks, so its length does not depend on its numbers, and
    the next weight starts at a multiple of 64 bytes if this one did. A stack of experts [E, m, n] has each expert's
    bytes and scales one after the other, and in its JSON a ``nested_offset`` for each of them.
    """
    name, storage = weight.name, getattr(torch, section.quant_storage)
    experts = expert_count(weight.shape)
    blocks = -(-weight.numel // experts // 64)
    scales = TensorSpec(f"{name}.absmax", torch.uint8 if section.double_quant else torch.float32, (experts * blocks,))
    layout = [TensorSpec(name, storage, (-(-weight.numel // 2) // storage.itemsize, 1))]
    code = TensorSpec(f"{name}.quant_map", torch.float32, (16,))
    dtype = str(weight.dtype).removeprefix("torch.")
    state: dict[str, object] = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": weight.shape}
    if section.double_quant:
        nested = TensorSpec(f"{name}.nested_absmax", torch.float32, (experts * -(-blocks // NESTED_BLOCK),))
        layout += [nested, TensorSpec(f"{name}.nested_quant_map", torch.float32, (256,)), code, scales]
        offset = [0.0] * experts if len(weight.shape) == 3 else 0.0
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    else:
        layout += [scales, code]
    # room for any offsets, which are not known yet; fp4 is as long a word as nf4
    length = len(json.dumps(state)) + _FLOAT_CHARACTERS * experts
    length += -(sum(spec.size_bytes for spec in layout) + length) % 64
    return [*layout, TensorSpec(f"{name}.{STATE_KEY}{section.quantization}", torch.uint8, (length,))]


def expert_count(shape: Sequence[int]) -> int:
    """Return how many matrices a weight of this shape holds. Each is quantized by itself."""
    return shape[0] if len(shape) == 3 else 1


def serialized_statistics(weight: TensorSpec, absmax: torch.Tensor, section: ModelSection) -> dict[str, torch.Tensor]:
    """The tensors of `serialized_layout` but the first, from the absmax fp32 [blocks] of a whole weight."""
    code, states, name = bnb_functional.get_4bit_type(section.quantization, device=absmax.device), [], weight.name
    for scales in absmax.view(expert_count(weight.shape), -1):
        state = bnb_functional.QuantState(scales, weight.shape[-2:], code, 64, section.quantization, weight.dtype)
        if section.double_quant:
            # as bitsandbytes does it, but each expert has an offset of its own
            state.nested = True
            state.absmax, state.state2, state.offset = _double_quantized(scales)
        states.append(state)
    each = [state.as_dict(packed=True) for state in states]
    tensors = {f"{name}.{key}": tensor for key, tensor in each[0].items()}
    packed = serialized_layout(weight, section)[-1]
    text = tensors[packed.name].numpy().tobytes()
    if len(weight.shape) == 3:
        for key in ("absmax", "nested_absmax"):
            if key in each[0]:
                tensors[f"{name}.{key}"] = torch.cat([one[key] for one in each])
        whole = json.loads(text) | {"shape": weight.shape}
        if section.double_quant:
            whole["nested_offset"] = [state.offset.item() for state in states]
        text = json.dumps(whole).encode()
    tensors[packed.name] = torch.frombuffer(bytearray(text.ljust(packed.numel)), dtype=torch.uint8)
    return tensors


def _double_quantized(absmax: torch.Tensor) -> tuple[torch.Tensor, QuantState, torch.Tensor]:
    offset = absmax.mean()
    return *bnb_functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK), offset


def dequantized_weight(module: nn.Linear, dtype: torch.dtype, exact: bool = False) -> torch.Tensor:
    """The weight [out_features, in_features] of a linear in ``dtype``, dequantized if needed.

    A dense weight that has this dtype is not copied, nor is a `resident_weight`. With ``exact`` a 4-bit weight comes
    from fp32, else from the layer's compute dtype. A 4-bit weight without its state, or repacked by
    another library, raises RuntimeError.
    """
    if isinstance(module, Linear4bit):
        if not exact and (resident := resident_weight(module, dtype)) is not None:
            return resident
        weight = bring(module)
        state = getattr(weight, "quant_state", None) or _require_state(module)
        if exact:
            state = copy.copy(state)
            state.dtype = torch.float32
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameter takes 2 µs of Python for an answer
            packed = weight.data
        return dequantized_packed(packed, state).to(dtype)
    if isinstance(module, Linear8bit):
        return dequantized_int8(*int8_rows(module), dtype)
    return module.weight.to(dtype)


def hold_resident(model: nn.Module) -> None:
    """Keep the dequantized weight of each 4-bit linear in its compute dtype, if that has 16 bits."""
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.compute_dtype is not None and module.compute_dtype.itemsize == 2:
            weight = dequantized_weight(module, module.compute_dtype)
            # with what it was made of: a merge replaces that
            module.__dict__["_resident"] = _require_state(module), weight


def resident_weight(module: nn.Linear, dtype: torch.dtype) -> torch.Tensor | None:
    """The copy of `hold_resident` [m, n], not to be changed in place; None where there is none in this dtype."""
    state, weight = module.__dict__.get("_resident", (None, None))
    if weight is None or weight.dtype != dtype or state is not _state(cast(Linear4bit, module)):
        return None
    return weight


def is_streamed(module: nn.Linear) -> bool:
    """Whether each use brings this linear's bytes to the device (`qvera.models.stream`)."""
    return getattr(module.weight, "streamed", None) is not None


def bring(module: nn.Linear | ExpertStack) -> Any:
    """The weight of a linear; a streamed one's bytes are brought to its device first (`qvera.models.stream`)."""
    weight = module.weight
    if (streamed := getattr(weight, "streamed", None)) is not None:
        streamed.stream.use(streamed.layer)
    return weight


def stored_tensors(module: Linear4bit | ExpertStack) -> list[torch.Tensor]:
    """Return the tensors whose size grows with a 4-bit weight: packed weight, its scales, and the scales of those."""
    if not isinstance(module, Linear4bit):
        return module.stored_tensors
    state = _require_state(module)
    return [module.weight.data, state.absmax, *([state.state2.absmax] if state.nested else [])]


def replace_tensors(module: Linear4bit | ExpertStack, tensors: list[torch.Tensor], device: torch.device) -> None:
    """Replace the `stored_tensors`. The few constants go to ``device``."""
    if not isinstance(module, Linear4bit):
        module.replace_tensors(tensors, device)
        return
    before, state = module.weight, copy.copy(_require_state(module))
    packed, state.absmax = tensors[:2]
    state.code = state.code.to(device)
    if state.nested:
        state.state2, state.offset = copy.copy(state.state2), state.offset.to(device)
        state.state2.absmax, state.state2.code = tensors[2], state.state2.code.to(device)
    if isinstance(before, bnb.nn.Params4bit):
        weight = torch.Tensor._make_subclass(type(before), packed, False)
    else:  # a tensor that bitsandbytes can't wrap, such as a fake one
        weight = nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "module"):
        setattr(weight, name, getattr(before, name, None))
    weight.quant_state = module.quant_state = state
    module.weight = weight


def _state(module: Linear4bit) -> QuantState | None:
    """bitsandbytes keeps the state twice: ZeRO-3 can part the weight from its own."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _require_state(module: Linear4bit) -> QuantState:
    state = _state(module)
    if state is None:
        raise RuntimeError("a 4-bit layer has no quantization state: its weight was never quantized")
    return state


def dequantized_int8(rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 rows [m, n] and their absolute maxima [m] → [m, n] in ``dtype``, rounded once from fp32."""
    # a kernel that converts on its way reads 1 byte and writes 2, not 19 by way of fp32
    weight = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    return torch.mul(rows, (scales.to(torch.float32) / 127.0).unsqueeze(1), out=weight)


def dequantized_packed(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """A 4-bit weight in its state's dtype, whatever its width.

    bitsandbytes' AVX-512 kernel (0.50.0 and 0.50.2) assumes n // 64 blocks in a row of n: wrong scales where n is a
    multiple of 32 but not of 64. There it gets the weight in rows of one block, or as one row if the last block is
    short.
    """
    shape = state.shape
    if (weight := dequantize.dequantize_4bit(packed, state)) is not None:
        return weight
    if getattr(state, "packing_format_for_cpu", False):
        raise RuntimeError(
            "this 4-bit weight was repacked by a bitsandbytes evaluation pass before qvera got it; such a weight "
            "has no correct gradient. Load the base model again and attach the adapter before running it"
        )
    if packed.device.type == "cpu" and shape[-1] % state.blocksize:
        count, state = math.prod(shape), copy.copy(state)
        width = count if count % state.blocksize else state.blocksize
        state.shape = torch.Size((count // width, width))
    return bnb_functional.dequantize_4bit(packed.view(-1, 1), state).view(shape)


def dequantized_rows(
    module: nn.Linear, dtype: torch.dtype, rows: int, exact: bool = False
) -> Iterator[tuple[slice, torch.Tensor]]:
    """`dequantized_weight` of a 4-bit layer, ``rows`` rows at a time, where its `ends_with_rows`."""
    bring(module)
    weight, (m, n) = module.weight, (module.out_features, module.in_features)
    state = copy.copy(_require_state(module))
    if exact:
        state.dtype = torch.float32
    # the scales of the whole weight at once: they are small, and blocks of 256 of them need not end with rows
    scales = state.absmax
    if state.nested:
        scales = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.state2 = False, None
    packed, each = weight.data.view(torch.uint8).view(-1), n // state.blocksize
    for start in range(0, m, rows):
        end = min(start + rows, m)
        state.absmax, state.shape = scales[start * each : end * each], torch.Size((end - start, n))
        part = packed[start * n // 2 : end * n // 2].view(-1, 1)
        yield slice(start, end), bnb_functional.dequantize_4bit(part, state).to(dtype)


def ends_with_rows(module: nn.Linear) -> bool:
    """Whether a 4-bit layer is as bitsandbytes stores it, and its blocks of scales end where its rows do."""
    state = _state(module)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return False
    return module.in_features % state.blocksize == 0


def int8_rows(module: Linear8bit) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows int8 [m, n] and the absolute maximum of each row [m]. A forward pass moves them into the state."""
    state = module.state
    return (module.weight.data, module.weight.SCB) if state.CB is None else (state.CB, state.SCB)


def storage_bytes(module: Linear4bit | Linear8bit | ExpertStack) -> int:
    """Bytes of a quantized weight as stored, scales included."""
    scales = int8_rows(module)[1:] if isinstance(module, Linear8bit) else stored_tensors(module)[1:]
    return whole_numel(module.weight) * module.weight.element_size() + sum(tensor.nbytes for tensor in scales)


class FourBitFacts(NamedTuple):
    """A loaded 4-bit layer's quantization, read from the live module."""

    quant_type: str
    double_quant: bool
    storage_dtype: torch.dtype
    compute_dtype: torch.dtype | None
    blocksize: int


def four_bit_facts(module: Linear4bit) -> FourBitFacts:
    """Read a Linear4bit's quantization from its live tensors."""
    state, stored = _require_state(module), module.weight.dtype
    return FourBitFacts(state.quant_type, bool(state.nested), stored, module.compute_dtype, state.blocksize)


def prequantized_linear(
    dense: nn.Linear,
    packed: torch.Tensor,
    statistics: dict[str, torch.Tensor],
    compute_dtype: torch.dtype,
    device: torch.device,
) -> Linear4bit:
    """A `Linear4bit` in place of ``dense`` (on the meta device), around a weight that is quantized already.

    ``statistics`` are the tensors of `serialized_layout` but the first. On a CPU nothing is copied.
    """
    bias = dense.bias is not None
    layer = Linear4bit(
        dense.in_features, dense.out_features, bias, compute_dtype, quant_storage=packed.dtype, device="meta"
    )
    weight = bnb.nn.Params4bit.from_prequantized(packed, statistics, requires_grad=False, device=device, module=layer)
    weight.quant_state.dtype = compute_dtype  # what it dequantizes to; the file says what it was quantized from
    layer.weight = weight
    if bias:
        layer.bias = dense.bias
    return layer


def requantized(module: nn.Linear, weight: torch.Tensor) -> nn.Parameter:
    """``weight`` [m, n] quantized as ``module`` is, as a new parameter on its device."""
    if isinstance(module, Linear4bit):
        facts, device = four_bit_facts(module), module.weight.device
        source = weight.to(device=device, dtype=facts.compute_dtype or torch.float32)
        settings = {
            "blocksize": facts.blocksize,
            "compress_statistics": facts.double_quant,
            "quant_type": facts.quant_type,
            "quant_storage": facts.storage_dtype,
        }
        packed, state = bnb_functional.quantize_4bit(source, **settings)
        return bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, module=module, bnb_quantized=True, **settings
        )
    rows, scales, _ = bnb_functional.int8_vectorwise_quant(weight.to(device=module.weight.device, dtype=torch.float16))
    return bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)


def inference_pack(module: nn.Linear) -> tuple[torch.Tensor, QuantState] | None:
    """A copy of a 4-bit weight for bitsandbytes' AVX512-BF16 kernel. None: CPU or shape do not allow it."""
    pack = getattr(bnb_functional, "_convert_weight_packed_for_cpu", None)
    available = getattr(bnb_functional, "has_avx512bf16", None)
    if pack is None or available is None or module.weight.device.type != "cpu" or not available():
        return None
    bring(module)
    state = _require_state(module)
    rows, columns = state.shape
    if rows % 32 or columns % state.blocksize:
        return None
    # a copy: bitsandbytes itself would repack the weight in place, and its gradients would be wrong afterwards
    return pack(module.weight.data, copy.copy(state))


def fused_matmul(
    x: torch.Tensor, module: nn.Linear, pack: tuple[torch.Tensor, QuantState] | None
) -> torch.Tensor | None:
    """x Wᵀ [..., m] by bitsandbytes' fused 4-bit kernels, without gradients; None where there is no faster one."""
    if pack is not None:
        return bnb_functional.gemv_4bit(x, pack[0], state=pack[1])
    if x.device.type != "cpu":
        bring(module)
        return bnb.matmul_4bit(x, module.weight.t(), quant_state=_state(module))
    return None


def quantized_reader(
    weight: torch.Tensor, section: ModelSection, dtype: torch.dtype | None = None
) -> Callable[[], torch.Tensor]:
    """Quantize a weight [m, n] as the recipe says. Each call of the result dequantizes it to ``dtype`` (its own)."""
    dtype = dtype or weight.dtype
    if section.quantization == "none":
        return lambda: weight.to(dtype)
    if section.quantization == "int8":
        rows, scales, _ = bnb_functional.int8_vectorwise_quant(weight.to(torch.float16))
        return lambda: dequantized_int8(rows, scales, dtype)
    packed, state = bnb_functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=section.double_quant, quant_type=section.quantization
    )
    state.dtype = dtype
    return lambda: dequantized_packed(packed, state)


def double_quantized_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """A whole weight's absmax, fp32 [blocks], double quantized and dequantized again."""
    packed, state, offset = _double_quantized(absmax)
    return bnb_functional.dequantize_blockwise(packed, state) + offset


def quantize_dequantize_blocks(
    weight: torch.Tensor, absmax: torch.Tensor, quant_type: str, dtype: torch.dtype
) -> torch.Tensor:
    """Whole blocks of 64 elements, quantized with one given ``absmax`` for each, and dequantized to ``dtype``."""
    packed, state = bnb_functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type=quant_type)
    state.absmax, state.dtype = absmax.contiguous(), dtype
    return dequantized_packed(packed, state)


BLOCK = 64
"""Weights that share one scale."""
PACK_CHUNK = 2048 * BLOCK
"""Weights worked on at a time: 512 KiB in fp32, what a core's second-level cache holds."""
_SMALLEST = np.float32(1e-38)


class _Code(NamedTuple):
    thresholds: np.ndarray
    """fp32 [15], ascending."""
    lowest: np.uint8
    """The nibble of a value below all thresholds."""
    steps: np.ndarray
    """uint8 [15]: what each threshold passed adds to the nibble, modulo 256; all 1 for NF4, whose nibbles are ranks."""


@functools.cache
def _code(quant_type: str) -> _Code:
    values = bnb_functional.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(values)  # as bitsandbytes does it, ties (FP4 has two zeros) included
    nibbles = order.numpy().astype(np.uint8)
    return _Code(((values[order[:-1]] + values[order[1:]]) / 2).numpy(), nibbles[0], np.diff(nibbles))


class _Scratch:
    def __init__(self, size: int, bits: np.dtype) -> None:
        self.scaled = np.empty(size, np.float32)
        self.above = np.empty(size, np.bool_)
        self.nibble = np.empty(size, np.uint8)
        self.one, self.other = np.empty(size // 2, np.uint16), np.empty(size // 2, np.uint16)
        self.maxima = np.empty(size, bits), np.empty(size, bits)


def _widen(bits: np.ndarray, dtype: torch.dtype, out: np.ndarray) -> None:
    """Write values that are given by their bits to ``out`` as fp32."""
    if dtype is torch.bfloat16:
        wide = out.view(np.uint32)
        wide[...] = bits.view(np.uint16)
        np.left_shift(wide, 16, out=wide)
    elif dtype is torch.float16:
        out[...] = bits.view(np.float16)
    else:
        out[...] = bits.view(np.float32)


def _block_maxima(bits: np.ndarray, dtype: torch.dtype, scratch: _Scratch, absmax: np.ndarray) -> None:
    """Write max |w| of each block of 64 to ``absmax``, fp32.

    The bits are compared: without their sign, floating-point numbers are ordered as their bits are (NaN above Inf).
    """
    size = bits.size
    held, next_ = (buffer[:size] for buffer in scratch.maxima)
    np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=held)
    for step in (1, 2, 4, 8, 16, 32):  # afterwards element i is the maximum of the 64 from i on
        size -= step
        np.maximum(held[:size], held[step : size + step], out=next_[:size])
        held, next_ = next_, held
    _widen(np.ascontiguousarray(held[: size + 63 : BLOCK]), dtype, absmax)


def _pack(scaled: np.ndarray, code: _Code, scratch: _Scratch, packed: np.ndarray) -> None:
    """An even number of scaled weights → two nibbles a byte, the first one high."""
    size = scaled.size
    nibble, above = scratch.nibble[:size], scratch.above[:size]
    ones = above.view(np.uint8)
    nibble[...] = code.lowest
    for threshold, step in zip(code.thresholds, code.steps, strict=True):
        np.greater(scaled, threshold, out=above)
        if step != 1:
            np.multiply(ones, step, out=ones)
        np.add(nibble, ones, out=nibble)
    # two neighbouring nibbles are one little-endian number: the low byte, shifted up, joins the high one
    pairs, one, other = nibble.view("<u2"), scratch.one[: size // 2], scratch.other[: size // 2]
    np.left_shift(pairs, 4, out=one)
    np.right_shift(pairs, 8, out=other)
    np.bitwise_or(one, other, out=one)
    np.copyto(packed, one, casting="unsafe")


def pack_four_bit(weights: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a contiguous CPU tensor of n weights (bf16, fp16 or fp32) as one flat row, on this thread.

    A tensor can come in parts, each but the last of a multiple of 64 weights. Returns packed nibbles uint8 [⌈n/2⌉] and
    absmax fp32 [⌈n/64⌉], which is NaN or Inf for a block that has one.
    """
    dtype, code = weights.dtype, _code(quant_type)
    bits = weights.detach().reshape(-1).view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    packed, absmax = np.empty(-(-bits.size // 2), np.uint8), np.empty(-(-bits.size // BLOCK), np.float32)
    whole = bits.size - bits.size % BLOCK
    scratch = _Scratch(min(whole, PACK_CHUNK), bits.dtype)
    with np.errstate(all="ignore"):  # NaN and Inf are the caller's to find, in absmax
        for start in range(0, whole, PACK_CHUNK):
            part = bits[start : min(start + PACK_CHUNK, whole)]
            scales, scaled = absmax[start // BLOCK :][: part.size // BLOCK], scratch.scaled[: part.size]
            _block_maxima(part, dtype, scratch, scales)
            _widen(part, dtype, scaled)
            rows, factor = scaled.reshape(-1, BLOCK), np.float32(1.0) / np.maximum(scales, _SMALLEST)
            np.multiply(rows, factor[:, None], out=rows)
            _pack(scaled, code, scratch, packed[start // 2 :][: part.size // 2])
        # bitsandbytes divides a short last block by its maximum; it may have an odd number of weights
        if rest := bits.size - whole:
            scaled = np.zeros(rest + rest % 2, np.float32)
            values = scaled[:rest]
            _widen(bits[whole:], dtype, values)
            absmax[-1] = np.maximum(np.abs(values).max(), _SMALLEST)
            np.divide(values, absmax[-1], out=values)
            _pack(scaled, code, _Scratch(scaled.size, bits.dtype), packed[whole // 2 :])
    return torch.from_numpy(packed), torch.from_numpy(absmax)
