"""Attention without dense masks: causal order hides padding, and offsets tell rows of one sequence apart.

**Padding.** A batch is padded on the right. In a causal decoder no token sees a later one, so no token of a row sees
the padding behind it, and what the padding computes reaches neither loss nor gradient. Such a batch needs no mask.
Without one, attention takes its fastest kernel: transformers makes no mask [B, 1, T, T], sdpa repeats no grouped keys
and values, and no layer waits for the device to look at the mask.

**Rows in one sequence** (``data.packing``, ``data.prefix_once``) go through variable-length attention where it runs:
`torch.nn.attention.varlen`, in 16 bits on a card that has torch's flash kernel. Elsewhere a dense mask does it.

Both are attention implementations of transformers, registered under names of their own and set in the config of one
model (`choose_implementation`). Accelerators use them. A CPU keeps sdpa, but for the passes of many adapters, whose
joined rows it attends to in groups of like length. Of a batch from `qvera.models.forward.make_batch` an
accelerator never reads a value on the host. They take every other batch as sdpa does, masks included. So far they have
run on a CPU and on the fake accelerator of the tests; on no GPU.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qvera.data.rows import Joined, round_up_length
from qvera.utils import accelerator

CAUSAL = "qvera_causal"
"""sdpa that needs no mask to know that a batch is padded on the right."""
VARLEN = "qvera_varlen"
"""The same, and variable-length attention for rows in one sequence."""
FP32_TOKENS = 128
"""On a CPU, rows of joined sequences that are no longer than this are attended to in fp32: see `attend_in_groups`."""
GROUPS_PER_OCTAVE = 2
"""Rows of like length share a call of sdpa on a CPU: there are so many groups from each power of two to the next."""

_CAUSAL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "olmo2",
    "granite", "stablelm", "cohere", "cohere2", "smollm3", "starcoder2", "opt", "falcon",
)  # fmt: skip
"""Model types whose loss and gradients are the same to the bit without a padding mask in fp32; each is tested."""
JOINABLE_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "olmo2", "granite", "smollm3", "cohere", "starcoder2",
    "gpt_neox", "mixtral", "qwen3_moe",
)  # fmt: skip
"""Model types whose attention takes positions and a mask [1, 1, T, T] as given; each is tested."""


def needs_padding_mask(model: PreTrainedModel) -> bool:
    """Whether right padding has to be masked: for each model that is not known to look at earlier tokens only.

    A model with experts keeps its mask too: the padding's tokens change the order in which an expert adds.
    """
    config = model.config
    two_way = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    own_code = not type(model).__module__.startswith("transformers.")
    return config.model_type not in _CAUSAL_TYPES or bool(two_way) or own_code


def is_joinable(config: PretrainedConfig) -> bool:
    """Whether a model of this config can tell rows of one sequence apart: full attention, of a type that is tested."""
    full_attention = not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", None) is False
    return config.model_type in JOINABLE_TYPES and full_attention


def joining_of(
    config: PretrainedConfig, implementation: str | None, prefix_once: bool, packing: bool, whole_rows: bool = False
) -> Joined | None:
    """How rows are put into one sequence for this attention implementation; None where each stays a row of the batch.

    Args:
        prefix_once: for the sake of a common prefix, where that pays.
        packing: always.
        whole_rows: by offsets or not at all, and without a common prefix.
    """
    if not is_joinable(config) or implementation is None:
        return None
    if implementation.startswith("flash_attention"):
        return Joined.ROWS if packing or whole_rows else None
    if whole_rows:
        return Joined.ROWS if implementation == VARLEN else None
    found = {"sdpa": Joined.MASK, "eager": Joined.MASK, CAUSAL: Joined.MASK, VARLEN: Joined.OFFSETS}
    return found.get(implementation) if packing or prefix_once else None


def implementation_on(
    device: torch.device | None, config: PretrainedConfig, dtype: torch.dtype, whole_rows: bool = False
) -> str:
    """What stands in for sdpa on a device in this compute dtype.

    Args:
        device: None: a card that is not here, which is taken to run what the installed torch offers.
        whole_rows: rows are joined without a common prefix, which a CPU takes offsets for too.
    """
    if not is_joinable(config):
        return "sdpa"
    dropout = getattr(config, "attention_dropout", None)
    if device is not None and not accelerator.is_accelerator(device):
        return VARLEN if whole_rows and not dropout else "sdpa"
    if dtype.itemsize != 2 or dropout or varlen_kernel() is None:
        return CAUSAL
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return VARLEN if device is None or varlen_runs(device, dtype, heads // grouped, head_dim) else CAUSAL


def choose_implementation(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, whole_rows: bool = False
) -> None:
    """Set the implementation of a loaded model that would use sdpa, by what its device runs (`implementation_on`)."""
    name = model.config._attn_implementation
    if name == "sdpa" and (better := implementation_on(device, model.config, dtype, whole_rows)) != "sdpa":
        model.set_attn_implementation(better)


def takes_open_mask(implementation: str | None) -> bool:
    """Whether it knows a mask from `open_mask` without reading it."""
    return implementation in (CAUSAL, VARLEN)


def open_mask(ids: torch.Tensor) -> torch.Tensor:
    """A mask of the shape of ``ids`` [B, T] that hides nothing, and shows it: one element with both strides 0.

    Without any mask transformers reads the positions on the host, to see whether rows are packed.
    """
    return torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)


def varlen_kernel() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, or None: torch before 2.12 lacks it, or its grouped keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


@functools.cache
def varlen_runs(device: torch.device, dtype: torch.dtype, groups: int, head_dim: int) -> bool:
    """Whether the kernel works on this device: it is tried once, on two rows behind a prefix, against the plain way.

    A card before Ampere, a torch built without the kernel, and a head that is too wide raise an error there.
    """
    if device.type != "cpu" and varlen_kernel() is None:
        return False
    lengths_q, lengths_k = [3, 5, 9], [3, 8, 12]
    generator = torch.Generator().manual_seed(0)
    sizes = [(sum(lengths_q), groups), (sum(lengths_k), 1), (sum(lengths_k), 1)]
    drawn = [torch.randn(*size, head_dim, generator=generator) for size in sizes]

    def tried(where: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(where, kind).requires_grad_() for x in drawn)
        ends_q, ends_k = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=where)
            for lengths in (lengths_q, lengths_k)
        )
        with torch.enable_grad():
            out = varlen_attention(q, k, v, ends_q, ends_k, max(lengths_q), max(lengths_k), head_dim**-0.5)
            found = [out.detach(), *torch.autograd.grad(out.sum() + out.square().sum(), (q, k, v))]
        return [x.to("cpu", torch.float32) for x in found]

    try:
        found = tried(device, dtype)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    wanted = tried(torch.device("cpu"), torch.float32)
    return all(torch.allclose(x, y, rtol=0.05, atol=0.05) for x, y in zip(found, wanted, strict=True))


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

    A row's last query sees all of its keys, the one before it all but the last, and so on: a row may have more keys
    than queries, those of a prefix.

    Args:
        query: [Tq, heads, head_dim].
        key, value: [Tk, kv_heads, head_dim]; heads is a multiple of kv_heads.
        ends_q, ends_k: int32 [N + 1], where the rows' queries and keys begin and end.
        longest_q, longest_k: the most queries and keys of a row.
    """
    if query.device.type == "cpu":
        if torch.equal(ends_q, ends_k):
            return attend_in_groups(query, key, value, ends_q, scale)
        return attend_row_by_row(query, key, value, ends_q, ends_k, scale)
    kernel = varlen_kernel()
    assert kernel is not None  # `implementation_on` has asked
    # a window that is open to the left and closed to the right is causal order, aligned at the last query and key
    return kernel(
        query, key, value, ends_q, ends_k, longest_q, longest_k, scale=scale, window_size=(-1, 0), enable_gqa=True
    )


def attend_row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The plain way to compute `varlen_attention`: sdpa for each row."""
    parts = []
    cut_q, cut_k = ends_q.tolist(), ends_k.tolist()
    for row in range(len(cut_q) - 1):
        q = query[cut_q[row] : cut_q[row + 1]].transpose(0, 1)
        k, v = (x[cut_k[row] : cut_k[row + 1]].transpose(0, 1) for x in (key, value))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True))
    return torch.cat(parts, 1).transpose(0, 1)


def attend_in_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, scale: float
) -> torch.Tensor:
    """`varlen_attention` of rows that have as many keys as queries, on a CPU: one sdpa for rows of like length.

    What fills a row up is its own last token, which causal order hides. So a row that is not finite stays alone.
    """
    there, back, sizes = groups_of(tuple(ends.tolist()))
    padded = [x.index_select(0, there).split([rows * length for rows, length in sizes]) for x in (query, key, value)]
    outputs = []
    for (rows, length), *parts in zip(sizes, *padded, strict=True):
        # torch's kernel takes twice as long for a short row in 16 bits, and keeps less of it
        wide = query.dtype if query.dtype.itemsize > 2 or length > FP32_TOKENS else torch.float32
        q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2).to(wide) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1).to(query.dtype))
    return torch.cat(outputs).index_select(0, back)


@functools.lru_cache(maxsize=2)  # of the pass that is computed: its layers have the same rows
def groups_of(ends: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """How rows that stand one behind the other are padded in groups of like length.

    Returns:
        The token that each place of the groups takes, int64 [Σ rows · length]; the place of each token, int64 [T]; and
        of each group its rows and their length.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for begin, end in itertools.pairwise(ends):
        groups.setdefault(round_up_length(end - begin, GROUPS_PER_OCTAVE), []).append((begin, end))
    taken, sizes, placed = [], [], 0
    back = torch.empty(ends[-1], dtype=torch.int64)
    for rows in groups.values():
        # of few lengths, as those of whole batches are
        length = round_up_length(max(end - begin for begin, end in rows))
        columns = torch.arange(length)
        for begin, end in rows:
            taken.append(torch.clamp(begin + columns, max=end - 1))
            back[begin:end] = placed + columns[: end - begin]
            placed += length
        sizes.append((len(rows), length))
    return torch.cat(taken), back, sizes


class _KeysOfRows(torch.autograd.Function):
    """Keys or values of the tokens [T, heads, head_dim] → those of each row, the prefix in front of its own [K, ...].

    Backward sorts the gradients of the prefix's copies together and adds them, in a fixed order. An ``index_select``
    of autograd's would add by atomic operations in 16 bits.
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
    """Whether sdpa would take grouped keys by its mathematical form, which makes [heads, T, T] in fp32.

    Of its fast kernels only flash attention knows groups, and that takes 16 bits and a card from Ampere on.
    """
    if key.shape[1] == query.shape[1] or not accelerator.is_accelerator(query.device):
        return False
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
    """An attention function of transformers: [1, heads, T, head_dim] → [1, T, heads, head_dim] where rows have offsets.

    The names from ``cu_seq_lens_q`` on are those of `qvera.data.rows`. Without them it is sdpa.
    """
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
    """A mask function of transformers: None for an `open_mask`, else sdpa's."""
    if attention_mask is not None and not any(attention_mask.stride()):
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **others)


for _name in (CAUSAL, VARLEN):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
