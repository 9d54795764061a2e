"""The base as the adapter was trained on it, some rows at a time: quantized and dequantized again, or stored in 4 bits.

4-bit blocks are 64 consecutive elements of the flattened weight. With double quantization the blocks' absolute maxima
are quantized themselves, around their mean over the whole weight (QLoRA, arXiv 2305.14314, section 3.2): so the maxima
of the whole weight come first, then rows.
"""

import contextlib
import os
from collections.abc import Collection, Iterator

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qvera.config.schema import ModelSection
from qvera.models import quantization
from qvera.models.nf4 import BLOCK
from qvera.models.safetensors_stream import Block, CheckpointReader, read_bytes, rows_per_block
from qvera.models.stored_weights import PackedWeight
from qvera.utils.safetensors_io import TensorEntry


def absolute_maxima(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each block of 64 elements, fp32; the last block may be short."""
    flat = rows.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    found = flat[:whole].view(-1, BLOCK).abs().amax(dim=1).float()
    if whole < flat.numel():
        found = torch.cat([found, flat[whole:].abs().amax().float().view(1)])
    return found


class TrainedBaseReader(CheckpointReader):
    """Reads a checkpoint, and gives its rows as the base of the run had them: quantized as in ``section``.

    ``compute`` is the dtype it computed in, ``model`` the base without weights; the rest is `CheckpointReader`'s.
    """

    def __init__(
        self,
        entries: list[TensorEntry],
        stamps: dict[str, list[int]],
        known: dict[str, str],
        section: ModelSection,
        compute: torch.dtype,
        model: PreTrainedModel,
    ) -> None:
        super().__init__(entries, stamps, known)
        self.section, self.compute = section, compute
        self.four_bit = section.quantization in ("nf4", "fp4")
        head = model.get_output_embeddings()
        self.transposed = {
            f"{name}.weight": isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and module is not head
        }
        """The weights that were quantized, and whether one is a Conv1D's [in, out], quantized as [out, in]."""

    def blocks_of(self, descriptor: int, entry: TensorEntry) -> Iterator[Block]:
        """The blocks of a tensor, with the absolute maxima of the whole where it was quantized to 4 bits.

        A Conv1D comes in one block.
        """
        transposed, absmax = self.transposed.get(entry.name), None
        if transposed is not None and self.four_bit:
            parts = (block.rows for block in self.read(descriptor, entry, whole=transposed))
            # a Conv1D is quantized while loading, from weights in the compute dtype
            absmax = torch.cat(
                [absolute_maxima(rows.to(self.compute).t().contiguous() if transposed else rows) for rows in parts]
            )
            if self.section.double_quant:
                absmax = quantization.double_quantized_absmax(absmax)
        for block in self.read(descriptor, entry, whole=bool(transposed)):
            yield block._replace(absmax=absmax)

    def as_trained(self, block: Block, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` of a block as the trained base had them, in its compute dtype."""
        transposed = self.transposed.get(block.entry.name)
        if transposed:
            return self._dequantized(block, rows.to(self.compute).t().contiguous()).t()
        if transposed is None or not self.four_bit:
            rows = rows.to(self.compute)
        return rows if transposed is None else self._dequantized(block, rows)

    def _dequantized(self, block: Block, weight: torch.Tensor) -> torch.Tensor:
        if block.absmax is None:
            return quantization.quantize_dequantize(weight, self.section)
        at = block.first * weight.shape[1] // BLOCK
        absmax = block.absmax[at : at + -(-weight.numel() // BLOCK)]
        return quantization.quantize_dequantize_blocks(weight, absmax, self.section.quantization, self.compute)


class PackedBaseReader(CheckpointReader):
    """Reads a checkpoint that is stored in 4 bits, and gives its rows dequantized, as training used them.

    ``packed`` are its `packed_weights`, ``compute`` is the dtype the run computed in; the rest is `CheckpointReader`'s.
    The blocks of a packed weight hold bytes, and count the rows of the weight that it stands for.
    """

    def __init__(
        self,
        entries: list[TensorEntry],
        stamps: dict[str, list[int]],
        known: dict[str, str],
        packed: dict[str, PackedWeight],
        compute: torch.dtype,
    ) -> None:
        super().__init__(entries, stamps, known)
        self.packed, self.compute = packed, compute
        self.statistics = {entry.name for weight in packed.values() for entry in weight.statistics.values()}

    def blocks(self, skip: Collection[str]) -> Iterator[Block]:
        """The tensors without statistics; these are only hashed, like those in ``skip``."""
        return super().blocks(self.statistics.union(skip))

    def blocks_of(self, descriptor: int, entry: TensorEntry) -> Iterator[Block]:
        """The blocks of a tensor; those of a packed weight with the scales of the whole."""
        weight = self.packed.get(entry.name)
        if weight is None:
            yield from self.read(descriptor, entry)
            return
        absmax, (m, n) = weight.absmax(), weight.dense.shape
        step = rows_per_block(n, weight.blocksize)
        for first in range(0, m, step):
            start, stop = first * n // 2, min(first + step, m) * n // 2
            data = read_bytes(descriptor, entry, start, stop - start)
            yield Block(weight.dense, first, data, first + step >= m, absmax)

    def as_trained(self, block: Block, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` of a block as training used them, in its compute dtype."""
        if block.absmax is None:
            return rows.to(self.compute)
        return self.packed[block.entry.name].dequantized(rows, block.absmax, block.first, self.compute)


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Torch computes with one thread for each thread that calls it; gives how many should (the cores of this process).

    Independent blocks on every core keep them busier than one block split between them, and the results then do not
    depend on how many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
    finally:
        torch.set_num_threads(before)
