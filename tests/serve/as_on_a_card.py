"""Doubles of what a card has and a CPU lacks: torch's paged attention, and graphs that launch recorded kernels again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.attention.varlen import AuxRequest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvera.serve import batches, paged
from qvera.utils import accelerator


@torch.library.custom_op("qvera_tests::attend_in_blocks", mutates_args=())  # one kernel, whatever it computes inside
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, used: torch.Tensor,
    table: torch.Tensor, scale: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    out = query.new_empty(*query.shape[:2], value.shape[3])
    group, size = query.shape[1] // key.shape[2], key.shape[1]
    for row, count in enumerate(map(int, used)):
        begin, end = int(ends[row]), int(ends[row + 1])
        places = torch.arange(count)
        blocks = table[row].long()[places // size]
        k, v = (x[blocks, places % size].double().repeat_interleave(group, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), k) * scale
        if causal:  # the last query is that of the last key
            later = places > torch.arange(count - (end - begin), count).unsqueeze(1)
            scores = scores.masked_fill(later, float("-inf"))
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
    return out


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[3])


def varlen_attn_of(card: str, wrong: str = "") -> Callable[..., Any]:
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.15, with its signature and what its kernels on a card demand."""

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor | None,
        max_q: int,
        max_k: int,
        *,
        return_aux: AuxRequest | None = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        num_splits: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert return_aux is None and seqused_k is not None and block_table is not None
        takes_cudnn = card == "Hopper" and num_splits is None
        if not takes_cudnn:  # FlashAttention 2
            if key.shape[1] % 256:
                raise RuntimeError("Paged KV cache block size must be divisible by 256")
            assert cu_seq_k is not None and cu_seq_k.dtype == torch.int32 and len(cu_seq_k) == len(cu_seq_q)
            assert num_splits == 1  # more are wrong, and none leaves it to the kernel
            if key.shape[2:] != value.shape[2:]:
                raise RuntimeError("v must have shape (num_blocks, page_block_size, num_heads_k, head_size)")
        assert key.shape[1].bit_count() == 1 and window_size in ((-1, -1), (-1, 0))
        assert -(-max_k // key.shape[1]) == block_table.shape[1]
        assert query.shape[1] == key.shape[2] or enable_gqa
        for tensor, length in (
            (cu_seq_q, len(cu_seq_q)),
            (seqused_k, len(cu_seq_q) - 1),
            (block_table, len(seqused_k)),
        ):
            assert tensor.dtype == torch.int32 and len(tensor) == length and tensor.is_contiguous()
        used, table, causal = seqused_k, block_table, window_size == (-1, 0)
        if wrong == "a row lacks its last key":
            used = used - torch.tensor([0, 0, 1], dtype=torch.int32)
        if wrong == "two rows have each other's blocks":
            table = table[torch.tensor([1, 0, 2])]
        if wrong == "no order":
            causal = False
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _attend(query, key, value, cu_seq_q, used, table, scale, causal)

    return varlen_attn


class Graphs:
    """Records kernels with the memory that they read and write, and runs them again, as a CUDA graph does."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        """Of the output of each recording."""
        self.replays = 0

    def record(self, _: object, run: Callable[[], Any]) -> Any:
        """`qvera.utils.accelerator.GraphRecorder.record`."""
        mine, tolist = threading.get_ident(), torch.Tensor.tolist

        def refuse(tensor: torch.Tensor) -> Any:
            return _refuse() if threading.get_ident() == mine else tolist(tensor)

        with mock.patch.object(torch.Tensor, "tolist", refuse), _Recording() as recording:
            output = run()
        self.shapes.append(tuple(output.shape))

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, made in recording.calls:
                for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not in place
                        old.copy_(new)

        output.fill_(float("nan"))  # nothing has run yet
        return replay, output


def _refuse() -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            _refuse()
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


def choose_kernel(device: torch.device, layers: Any) -> paged.PagedKernel | None:
    """The real choice, for a CPU that is taken for a card."""
    with mock.patch.multiple(accelerator, is_accelerator=lambda _: True, has_own_memory=lambda _: False):
        return paged.choose_kernel(device, layers)


def put_on_a_card(monkeypatch: pytest.MonkeyPatch, card: str, wrong: str = "", graphs: bool = True) -> Graphs:
    """Let engines run as on a card, one with cuDNN's paged attention ("Hopper") or without ("Ada")."""
    found = Graphs()
    kernel = varlen_attn_of(card, wrong)
    monkeypatch.setattr(paged, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(batches, "choose_kernel", choose_kernel)
    monkeypatch.setattr(accelerator, "records_graphs", lambda _: graphs)
    monkeypatch.setattr(accelerator.GraphRecorder, "record", lambda *asked: found.record(*asked))
    return found
