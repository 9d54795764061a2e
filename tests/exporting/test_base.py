"""Weights as the trained base has them, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file

from qvera.config.sections import ModelSection
from qvera.exporting.base import TrainedBaseReader, one_thread_each
from qvera.models import quantization, safetensors_stream
from qvera.utils.safetensors_io import TensorSpec, checkpoint_tensors, file_stamps


@pytest.mark.parametrize(
    ("kind", "double_quant", "shape", "dtype"),
    [
        ("nf4", True, (48, 64), torch.float32),
        ("nf4", False, (40, 200), torch.bfloat16),
        ("fp4", True, (512, 128), torch.bfloat16),
        ("int8", True, (64, 96), torch.float32),
        ("none", True, (40, 200), torch.bfloat16),
        ("nf4", True, (130, 1), torch.float32),  # less than one block per step
    ],
)
def test_rows_equal_the_whole(
    kind: Any, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path, monkeypatch: Any
) -> None:
    section = ModelSection(path="x", quantization=kind, double_quant=double_quant)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)
    expected = quantization.quantized_reader(weight, section)()
    save_file({"0.weight": weight}, tmp_path / "model.safetensors")
    entries = checkpoint_tensors(tmp_path)
    model: Any = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0]))
    model.get_output_embeddings = lambda: None
    monkeypatch.setattr(safetensors_stream, "FILE_BLOCK_ELEMENTS", 3 * 64)
    reader = TrainedBaseReader(entries, file_stamps(entries), {}, section, dtype, model, {"0.weight": "0.weight"})
    parts = list(reader.blocks(()))
    found = torch.cat([reader.as_trained(block, block.rows) for block in parts])
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if shape[1] > 1:
        assert len(parts) > 1
        assert torch.equal(found, weight) == (kind == "none")


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        ((48, 64), "nf4", torch.float32),
        ((7, 32), "fp4", torch.bfloat16),
        ((64, 96), "nf4", torch.float16),
        ((10, 160), "fp4", torch.float32),
        ((7, 44), "nf4", torch.bfloat16),
    ],
)
def test_a_block_across_two_rows_keeps_its_scale(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """Against a table look-up; rows that differ in size, so that another block's scale shows."""
    size = torch.logspace(-2, 0, shape[0]).view(-1, 1)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * size).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    code = bnb.functional.get_4bit_type(kind, device="cpu")
    expected = (code[nibbles.long()] * state.absmax.repeat_interleave(64)[: weight.numel()]).view(shape).to(dtype)
    section = ModelSection(path="x", quantization=kind, double_quant=False)  # type: ignore[arg-type]
    assert torch.equal(quantization.quantized_reader(weight, section)(), expected)

    dense = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    spec = TensorSpec("w", dtype, shape)
    statistics = quantization.serialized_statistics(spec, state.absmax, section)
    statistics = {key.removeprefix("w."): tensor for key, tensor in statistics.items()}
    layer = quantization.prequantized_linear(dense, packed, statistics, dtype, torch.device("cpu"))
    assert torch.equal(quantization.dequantized_weight(layer, dtype), expected)


def test_torchs_threads_come_back() -> None:
    before = torch.get_num_threads()
    with one_thread_each() as workers:
        assert workers >= 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
