"""Attention over keys and values in blocks by torch's variable-length kernel, and decoding steps as graphs.

The kernel takes a table of each request's blocks, so no keys and values are copied together and no mask is made. torch
2.15 has two that do: cuDNN's on Hopper and data centre Blackwell, with blocks of any power of two, and
FlashAttention 2 on other cards from Ampere on, with blocks of multiples of 256 tokens. They know causal order, and no
windows, soft caps or sinks of this server's models. All of this has run on CPUs and on the tests' fake accelerator, not
on a GPU.
"""

import inspect
import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from qvera.models.attention import kernel_problem, varlen_attention, varlen_kernel
from qvera.utils import accelerator
from qvera.utils.errors import first_line

_logger = logging.getLogger(__name__)


class LayerShape(NamedTuple):
    """The shapes with which a layer calls its attention."""

    heads: int
    key: torch.Size  # [kv heads, size]
    value: torch.Size
    dtype: torch.dtype
    refused: str | None  # a need that torch's kernel does not meet; None: there is none


@dataclass
class BlockTables:
    """The requests of a step, in the order of its tokens; all tensors are int32."""

    table: torch.Tensor  # [requests, blocks]; what is behind a request's own blocks is not read
    used: torch.Tensor  # [requests], keys of each
    ends: torch.Tensor  # [requests + 1], where its queries begin and end; they are the last of its tokens
    ends_k: torch.Tensor  # [requests + 1], where its row of the table begins and ends, in tokens
    longest: int  # most queries of one


def arrays_of(
    tables: Sequence[Sequence[int]],
    used: Sequence[int],
    counts: Sequence[int],
    block_tokens: int,
    unused: int,
    width: int | None = None,
) -> dict[str, np.ndarray]:
    """`BlockTables`' tensors by name; ``unused`` is a block that fills the table up, to a width of a power of two."""
    table = np.full((len(tables), width or power_of_two(max(map(len, tables)))), unused, np.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = blocks
    ends_k = np.arange(len(tables) + 1, dtype=np.int32) * (table.shape[1] * block_tokens)
    ends = np.cumsum([0, *counts], dtype=np.int32)
    return {"table": table, "used": np.array(used, np.int32), "ends": ends, "ends_k": ends_k}


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class PagedKernel:
    """One way to call torch's kernel, with the size of blocks that it takes.

    A cache has blocks of one size, so it keeps the way that it was made for.
    """

    block_tokens: int
    is_flash: bool

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: BlockTables, scale: float | None
    ) -> torch.Tensor:
        """Causal attention of queries [tokens, heads, size] over [blocks, block_tokens, kv heads, size]."""
        kernel = varlen_kernel()
        assert kernel is not None  # `choose_kernel` has tried it
        # The last query of a row sees all of its keys, so rows of one query need no causal order. Without it, heads
        # that share keys read them once.
        window = (-1, 0) if rows.longest > 1 else (-1, -1)
        # FlashAttention wants offsets of keys, and in several parts gives wrong rows (pytorch issue 194167)
        ends_k, splits = (rows.ends_k, 1) if self.is_flash else (None, None)
        return kernel(
            q, keys, values, rows.ends, ends_k, rows.longest, rows.table.shape[1] * self.block_tokens, scale=scale,
            window_size=window, enable_gqa=True, seqused_k=rows.used, block_table=rows.table, num_splits=splits,
        )  # fmt: skip


def attend_in_blocks(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: BlockTables, scale: float
) -> torch.Tensor:
    """Compute what `PagedKernel.attend` does, on a CPU and in plain code."""
    used = rows.used.tolist()
    k, v = (
        torch.cat([x[blocks].flatten(0, 1)[:count] for blocks, count in zip(rows.table.long(), used, strict=True)])
        for x in (keys, values)
    )
    ends_k = torch.tensor([0, *itertools.accumulate(used)], dtype=torch.int32)
    return varlen_attention(q, k, v, rows.ends, ends_k, rows.longest, max(used), scale)


_KERNELS = PagedKernel(16, is_flash=False), PagedKernel(256, is_flash=True)


def choose_kernel(device: torch.device, layers: Iterable[LayerShape]) -> PagedKernel | None:
    """The first way that works on this accelerator for all layers; None: none does, as a warning says, or it is a CPU.

    Each is tried on steps like those of a server, and compared with `attend_in_blocks` on a CPU.
    """
    if not accelerator.is_accelerator(device):
        return None
    shapes, kernel = dict.fromkeys(layers), varlen_kernel()
    problem = next((f"has no {shape.refused}" for shape in shapes if shape.refused), None)
    if kernel is None or "block_table" not in inspect.signature(kernel).parameters:
        problem = f"takes no blocks in torch {torch.__version__}"
    if problem is None:
        for way in _KERNELS:
            found = [_paged_kernel_problem(way, device, shape) for shape in shapes]
            if not any(found):
                return way
            problem = " or ".join(filter(None, [problem, *dict.fromkeys(filter(None, found))]))
    _logger.warning(
        "torch's variable-length attention %s on %s: each layer of a step of answers copies the keys and values of all "
        "requests, and no step is recorded as a graph.",
        *(problem, device),
    )
    return None


def _paged_kernel_problem(way: PagedKernel, device: torch.device, shape: LayerShape) -> str | None:
    """Say what is wrong with a way in a step of prompts beside answers, or of answers alone; None: nothing is."""
    size, generator = way.block_tokens, torch.Generator().manual_seed(0)
    scale, problem = shape.key[1] ** -0.5, None
    # keys that end within a block, that fill their blocks, and that begin a block with their last one
    for counts, used in (([1, 3, size + 2], [size + 3, 3, 2 * size + 1]), ([1, 1, 1], [1, 3 * size, size + 1])):
        # blocks stand in no order, as in a cache that has been used for a while
        tables = torch.randperm(9, generator=generator).view(3, 3).tolist()
        arrays = arrays_of(tables, used, counts, size, unused=9)
        sizes = (sum(counts), shape.heads, shape.key[1]), (10, size, *shape.key), (10, size, *shape.value)
        drawn = [torch.randn(*each, generator=generator).to(shape.dtype) for each in sizes]

        def run(where: torch.device, kind: torch.dtype, attend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
            rows = BlockTables(**accelerator.tensors_on(where, arrays), longest=max(counts))  # noqa: B023  # called below
            q, keys, values = (x.to(where, kind) for x in drawn)  # noqa: B023
            return [attend(q, keys, values, rows, scale).to("cpu", torch.float32)]

        wanted = run(torch.device("cpu"), torch.float32, attend_in_blocks)
        problem = problem or kernel_problem(lambda: run(device, shape.dtype, way.attend), wanted)
    return problem


@dataclass
class _Repeated:
    """A shape of steps that has come, and its recording once it has come again."""

    held: accelerator.HeldTensors
    replay: Callable[[], None] | None = None
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    is_refused: bool = False  # it can't be recorded


_MOST_STEPS = 64
"""So many shapes of steps are kept; a graph of a 7B takes some 10 MB (computed)."""


class StepGraphs:
    """Steps that launch the same kernels on the same memory: the second is recorded, and is one launch from then on.

    The first one runs as any step does. So what is made once, such as a compiled kernel, is not made in a recording.
    """

    def __init__(self, device: torch.device, run: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> None:
        """``run`` computes a step's logits from its tensors."""
        self._device, self._run = device, run
        self._steps: dict[Hashable, _Repeated] = {}  # the last one that was asked for at the end
        self._layers: Hashable = None
        self._recorder = accelerator.GraphRecorder(device)

    def logits(self, key: Hashable, layers: Hashable, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        """Return the step's logits, which hold until the next step.

        ``key`` is all that its kernels and shapes depend on. Where ``layers`` changes, all recordings are dropped.
        """
        if layers != self._layers:
            self._steps.clear()
            self._layers, self._recorder = layers, accelerator.GraphRecorder(self._device)
        begins = key not in self._steps
        step = _Repeated(accelerator.HeldTensors(self._device, arrays)) if begins else self._steps.pop(key)
        self._steps[key] = step  # at the end, so that the first is the least recently used
        if len(self._steps) > _MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        tensors = step.held.fill(arrays)
        if step.replay is None and not step.is_refused:
            try:
                if begins:
                    # a step that waits for the device can't be recorded, which is found out before it is tried
                    with accelerator.refusing_waits(self._device):
                        return self._run(tensors)
                step.replay, step.logits = self._recorder.record(lambda: self._run(tensors))
            except RuntimeError as error:
                _logger.warning("a step of answers is not recorded as a graph (%s)", first_line(error))
                step.is_refused = True
        if step.replay is None:
            return self._run(tensors)  # from the beginning, if it was refused in the middle
        step.replay()
        return step.logits
