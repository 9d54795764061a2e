"""Attention without dense masks: causal order hides padding, and offsets tell rows of one sequence apart.

**Padding** is on the right, so in a causal decoder no token of the row sees it, and no mask is needed. Without one,
sdpa takes its fastest kernel, transformers makes no mask [B, 1, T, T], and no layer waits for the device.

**Rows in one sequence** (``data.packing``, ``data.prefix_once``) go through `torch.nn.attention.varlen` where it runs:
in 16 bits on a card that has torch's flash kernel. A CPU takes rows of like length together (`attend_in_groups`).
Elsewhere a dense mask does it.

Both are registered as transformers' attention implementations (`choose_implementation`). On accelerators they read no
value of a batch on the host. This has run on CPUs and on the tests' fake accelerator, not on a GPU.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qvera.data.rows import Joined, round_up_length
from qvera.kernels import once_differentiable
from qvera.models.structure import causal_model
from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line

_logger = logging.getLogger(__name__)
CAUSAL = "qvera_causal"
"""sdpa that knows that a batch is padded on the right."""
VARLEN = "qvera_varlen"
"""The same, with variable-length attention for rows in one sequence."""
FP32_TOKENS = 128
"""On a CPU, joined rows of up to this length are computed in fp32: see `attend_in_groups`."""
_GROUPS_PER_OCTAVE = 2  # groups of rows of like length, from each power of two to the next

_CAUSAL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "olmo2",
    "granite", "stablelm", "cohere", "cohere2", "smollm3", "starcoder2", "opt", "falcon",
)  # fmt: skip
"""Without a padding mask, loss and gradients of these model types are the same to the bit in fp32; each is tested."""
JOINABLE_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "olmo2", "granite", "smollm3", "cohere", "starcoder2",
    "gpt_neox", "mixtral", "qwen3_moe",
)  # fmt: skip
"""The attention of these model types takes positions and a mask [1, 1, T, T] as given; each is tested."""

_SEES_PADDING_TYPES = ("recurrent_gemma", "minimax", "deepseek_v4")
"""Model types whose answers change with padding on the left. It reaches the convolution of the first and the answer's
tokens of the second, and moves the windows that the third compresses."""


def needs_equal_lengths(model: PreTrainedModel) -> bool:
    """Whether plain transformers gives other answers in a batch that is padded on the left than one by one."""
    return model.config.model_type in _SEES_PADDING_TYPES


def needs_padding_mask(model: PreTrainedModel) -> bool:
    """Whether right padding has to be masked: yes, unless the model is known to look at earlier tokens only."""
    # models with experts are not among the types: the padding's tokens would change the order in which an expert adds
    config = model.config
    two_way = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    own_code = not type(model).__module__.startswith("transformers.")
    return config.model_type not in _CAUSAL_TYPES or bool(two_way) or own_code


def is_joinable(config: PretrainedConfig) -> bool:
    """Whether the model can tell rows of one sequence apart: full attention, of a type that is tested."""
    full_attention = not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", None) is False
    return config.model_type in JOINABLE_TYPES and full_attention


def joining_of(
    config: PretrainedConfig, implementation: str | None, prefix_once: bool, packing: bool, whole_rows: bool = False
) -> Joined | None:
    """Return how this attention implementation puts rows into one sequence. None: each stays a row of the batch.

    ``prefix_once`` joins rows where a common prefix pays, ``packing`` always. ``whole_rows``: by offsets or not at all,
    and without a common prefix.
    """
    if not is_joinable(config) or implementation is None:
        return None
    if implementation.startswith("flash_attention"):
        return Joined.ROWS if packing or whole_rows else None
    if whole_rows:
        return Joined.ROWS if implementation == VARLEN else None
    if not packing and not prefix_once:
        return None
    return {"sdpa": Joined.MASK, "eager": Joined.MASK, CAUSAL: Joined.MASK, VARLEN: Joined.OFFSETS}.get(implementation)


def rows_joined(model: PreTrainedModel, prefix_once: bool, packing: bool, whole_rows: bool = False) -> Joined | None:
    """Return `joining_of` for a loaded model, which may have adapters."""
    config = causal_model(model).config
    return joining_of(config, config._attn_implementation, prefix_once, packing, whole_rows)


def require_packing(model: PreTrainedModel) -> None:
    """Raise InputError where several rows can't stand in one sequence, by a mask or by offsets."""
    if rows_joined(model, prefix_once=False, packing=True) is None:
        config = causal_model(model).config
        raise InputError(
            f"data.packing: rows of one sequence would see each other in this model ({config.model_type}, "
            f"{config._attn_implementation} attention). It takes one of {', '.join(JOINABLE_TYPES)} without "
            "a sliding window, and sdpa, eager or flash attention. Set data.group_by_length instead."
        )


def implementation_on(device: torch.device | None, config: PretrainedConfig, dtype: torch.dtype) -> str:
    """Return the attention implementation that replaces sdpa on a device; ``sdpa``: nothing replaces it.

    ``device`` None stands for a card that is not here, and that runs all that the installed torch has.
    """
    if not is_joinable(config):
        return "sdpa"
    if getattr(config, "attention_dropout", None):
        return CAUSAL
    if device is not None and not accelerator.is_accelerator(device):
        return VARLEN  # `attend_in_groups`
    if dtype.itemsize != 2 or varlen_kernel() is None:
        return CAUSAL
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return VARLEN if device is None or varlen_runs(device, dtype, heads // grouped, head_dim) else CAUSAL


def choose_implementation(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the sdpa of a loaded model by what its device runs (`implementation_on`)."""
    name = model.config._attn_implementation
    if name == "sdpa" and (better := implementation_on(device, model.config, dtype)) != "sdpa":
        model.set_attn_implementation(better)


def compilable(implementation: str | None, device: torch.device) -> str | None:
    """Return what stands in for an attention implementation in compiled layers: a CPU finds groups on the host."""
    return CAUSAL if implementation == VARLEN and not accelerator.is_accelerator(device) else implementation


def open_mask(implementation: str | None, ids: torch.Tensor) -> torch.Tensor | None:
    """A mask [B, T] that hides nothing, known without reading it. None: this implementation would have to read it."""
    # both strides are 0, by which `_mask` knows it; without any mask transformers reads the positions on the host, to
    # see whether rows are packed
    mask = torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)
    return mask if implementation in (CAUSAL, VARLEN) else None


def varlen_kernel() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, or None: torch before 2.12 lacks it, or its grouped keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


_TRIAL_ERROR = 0.02
"""Relative error, by norm, of a kernel in 16 bits that is right; one that sees a wrong key is off by 0.1 and more."""


def kernel_problem(run: Callable[[], list[torch.Tensor]], wanted: list[torch.Tensor]) -> str | None:
    """Say what is wrong with a kernel; None: nothing. ``run`` gives its tensors, ``wanted`` the right ones.

    All are fp32 on the CPU.
    """
    try:
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(run(), wanted, strict=True)]
    except (RuntimeError, NotImplementedError, ValueError) as error:  # an old card, or too wide a head
        return f"fails ({first_line(error)})"
    wrong = [error for error in errors if not error <= _TRIAL_ERROR]  # NaN is wrong too
    return f"is off by {max(wrong):.1%}" if wrong else None


@functools.cache
def varlen_runs(device: torch.device, dtype: torch.dtype, groups: int, head_dim: int) -> bool:
    """Whether the kernel works on this device: tried once, on two rows behind a prefix, and compared with a CPU.

    Where it does not, a warning says so once.
    """
    lengths = [3, 5, 9], [3, 8, 12]  # of queries and of keys: the second and third row have a prefix of 3
    ends = [torch.tensor([0, *itertools.accumulate(each)], dtype=torch.int32) for each in lengths]
    generator = torch.Generator().manual_seed(0)
    sizes = [(sum(lengths[0]), groups), (sum(lengths[1]), 1), (sum(lengths[1]), 1)]
    # rounded, so that the reference has the same inputs: rounding them changes more than a kernel may
    drawn = [torch.randn(*size, head_dim, generator=generator).to(dtype) for size in sizes]

    def tried(where: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(where, kind).requires_grad_() for x in drawn]
        with torch.enable_grad():
            q, k, v, ends_q, ends_k = *inputs, *(end.to(where) for end in ends)
            out = varlen_attention(q, k, v, ends_q, ends_k, max(lengths[0]), max(lengths[1]), head_dim**-0.5)
            # gradients too: a kernel may be right forward and wrong backward
            found = [out.detach(), *torch.autograd.grad(out.sum() + out.square().sum(), inputs)]
        return [x.to("cpu", torch.float32) for x in found]

    problem = kernel_problem(lambda: tried(device, dtype), tried(torch.device("cpu"), torch.float32))
    if problem is not None:
        _logger.warning(
            "torch's variable-length attention %s on %s in %s with %d x %d: rows of one sequence get a dense mask, and "
            "passes of many adapters are padded.",
            *(problem, device, str(dtype).removeprefix("torch."), groups, head_dim),
        )
    return problem is None


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of N rows that stand one behind the other, [Tq, heads, head_dim].

    A row may have more keys than queries, those of a prefix: its last query sees all of its keys, the one before it all
    but the last, and so on. ``key`` and ``value`` are [Tk, kv_heads, head_dim], and heads is a multiple of kv_heads.
    ``ends_q`` and ``ends_k``, int32 [N + 1], are where the rows begin and end.
    """
    if query.device.type != "cpu":
        kernel = varlen_kernel()
        assert kernel is not None  # `implementation_on` has asked
        # a window that is open to the left and closed to the right is causal order, aligned at the last query and key
        return kernel(
            query, key, value, ends_q, ends_k, longest_q, longest_k, scale=scale, window_size=(-1, 0), enable_gqa=True
        )
    return attend_in_groups(query, key, value, ends_q, ends_k, scale)


def attend_in_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute `varlen_attention` on a CPU: one sdpa for rows of like length behind as many keys of a prefix."""
    groups, of_q, of_k, back = groups_of(tuple(ends_q.tolist()), tuple(ends_k.tolist()))
    q_sizes = [each.rows * each.length for each in groups]
    k_sizes = [each.rows * (each.prefix + each.length) for each in groups]
    padded_q = query.index_select(0, of_q).split(q_sizes)
    padded_k, padded_v = (x.index_select(0, of_k).split(k_sizes) for x in (key, value))
    outputs = []
    for group, *parts in zip(groups, padded_q, padded_k, padded_v, strict=True):
        # torch's kernel takes twice as long for a short row in 16 bits, and keeps less of it
        wide = torch.float32 if group.is_short and query.dtype.itemsize == 2 else query.dtype
        q, k, v = (x.view(group.rows, -1, *x.shape[1:]).transpose(1, 2).to(wide) for x in parts)
        mask = _behind_prefix(group.prefix, group.length, wide) if group.prefix else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).to(query.dtype))
    return torch.cat(outputs).index_select(0, back)


@functools.lru_cache(maxsize=8)  # one for all layers
@torch.inference_mode(False)  # what an evaluation makes, a training pass may keep for backward
def _behind_prefix(prefix: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive mask [length, prefix + length]: causal order of rows behind a prefix."""
    return torch.full((length, prefix + length), -torch.inf, dtype=dtype).triu(prefix + 1)


class Group(NamedTuple):
    """Rows that a CPU attends to together."""

    rows: int
    length: int  # queries of each row, padding included
    prefix: int  # keys before them
    is_short: bool  # at most `FP32_TOKENS` keys


@functools.lru_cache(maxsize=2)  # all layers of a pass have the same rows
@torch.inference_mode(False)
def groups_of(
    ends_q: tuple[int, ...], ends_k: tuple[int, ...]
) -> tuple[list[Group], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad rows that stand one behind the other, in groups of like length.

    Returns the groups; the token at each place of their queries, and of their keys, int64 [Σ rows · length]; and the
    place of each token's query, int64 [T].
    """
    # keys of the prefix and length rounded up → begin and end of the queries, and the first key, of each such row
    rows_of: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for (begin, end), (first_key, last_key) in zip(itertools.pairwise(ends_q), itertools.pairwise(ends_k), strict=True):
        prefix = last_key - first_key - (end - begin)
        longest = round_up_length(end - begin, _GROUPS_PER_OCTAVE)
        rows_of.setdefault((prefix, longest), []).append((begin, end, first_key))
    groups, of_q, of_k, placed = [], [], [], 0
    back = torch.empty(ends_q[-1], dtype=torch.int64)
    for (prefix, longest), rows in rows_of.items():
        # rounded up, as the lengths of whole batches are: torch keeps kernels for each new length (bench/log.md)
        length = round_up_length(max(end - begin for begin, end, _ in rows))
        columns = torch.arange(length)
        for begin, end, first_key in rows:
            # filled up with its own last token, which causal order hides: a row that is not finite stays alone
            of_q.append(torch.clamp(begin + columns, max=end - 1))
            own = first_key + prefix
            of_k += [torch.arange(first_key, own), torch.clamp(own + columns, max=own + end - begin - 1)]
            back[begin:end] = placed + columns[: end - begin]
            placed += length
        groups.append(Group(len(rows), length, prefix, prefix + longest <= FP32_TOKENS))
    return groups, torch.cat(of_q), torch.cat(of_k), back


class _KeysOfRows(torch.autograd.Function):
    """Keys or values [T, heads, head_dim] → those of each row, each behind a copy of the prefix's [K, ...].

    Backward adds the gradients of the prefix's copies in a fixed order. An ``index_select`` of autograd would add by
    atomic operations in 16 bits.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, index: torch.Tensor, order: torch.Tensor, prefix: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.sizes = prefix, len(x)  # type: ignore[attr-defined]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors  # type: ignore[attr-defined]
        prefix, tokens = ctx.sizes  # type: ignore[attr-defined]
        own = tokens - prefix
        ordered = g.index_select(0, order)
        copies, rest = ordered.split([len(order) - own, own])
        return torch.cat([copies.view(-1, prefix, *g.shape[1:]).sum(0), rest]), None, None, None


def _lacks_grouped_kernel(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether sdpa would take its mathematical form, which makes [heads, T, T] in fp32."""
    if key.shape[1] == query.shape[1] or not accelerator.is_accelerator(query.device):
        return False
    # of the fast kernels only flash attention knows groups, and it takes 16 bits and a card from Ampere on
    return query.dtype.itemsize != 2 or not accelerator.multiplies_bfloat16(query.device)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    key_index: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
    prefix_length: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """[1, heads, T, head_dim] → [1, T, heads, head_dim]; sdpa without ``cu_seq_lens_q`` (see `qvera.data.rows`)."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        if attention_mask is None and _lacks_grouped_kernel(query, key):
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            is_causal = query.shape[2] > 1 and getattr(module, "is_causal", True)
            out = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=is_causal, scale=scaling
            )
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if prefix_length:
        k, v = (_KeysOfRows.apply(x, key_index, key_order, prefix_length) for x in (k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = varlen_attention(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale)
    return out.unsqueeze(0), None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **others: Any) -> torch.Tensor | None:
    """Make a layer's mask for transformers: None for an `open_mask`, else the mask that sdpa gets."""
    # `open_mask` alone has strides of 0 only, so nothing on the device has to be read
    if attention_mask is not None and not any(attention_mask.stride()):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **others)


for _name in (CAUSAL, VARLEN):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
