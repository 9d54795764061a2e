"""Weights as the trained base has them, row by row."""

from __future__ import annotations

import itertools
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file

from qvera.config.schema import ModelSection
from qvera.exporting.base import TrainedBaseReader, one_thread_each
from qvera.models import quantization, safetensors_stream
from qvera.utils.safetensors_io import checkpoint_tensors, file_stamps

# every kind with and without double quantization; shapes and dtypes in turn
SETTINGS = list(itertools.product(["nf4", "fp4", "int8", "none"], [True, False]))
SHAPES = [(48, 64), (64, 96), (40, 200), (512, 128)]


@pytest.mark.parametrize(
    ("kind", "double_quant", "shape", "dtype"),
    [
        *((*setting, SHAPES[i % 4], torch.float32) for i, setting in enumerate(SETTINGS)),
        *((*setting, SHAPES[(i + 1) % 4], torch.bfloat16) for i, setting in enumerate(SETTINGS)),
        ("nf4", True, (130, 1), torch.float32),  # less than one block per step
    ],
)
def test_rows_equal_the_whole(
    kind: str,
    double_quant: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = ModelSection(path="x", quantization=kind, double_quant=double_quant)  # type: ignore[arg-type]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)
    expected = quantization.quantized_reader(weight, section)()
    save_file({"0.weight": weight}, tmp_path / "model.safetensors")
    entries = checkpoint_tensors(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0]))
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    monkeypatch.setattr(safetensors_stream, "BLOCK_ELEMENTS", 3 * 64)
    reader = TrainedBaseReader(entries, file_stamps(entries), {}, section, dtype, model)  # type: ignore[arg-type]
    parts = list(reader.blocks(()))
    found = torch.cat([reader.as_trained(block, block.rows) for block in parts])
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if shape[1] > 1:
        assert len(parts) > 1
        assert torch.equal(found, weight) == (kind == "none")


ACROSS_ROWS = [(48, 64), (8, 32), (7, 32), (64, 96), (10, 160), (7, 44)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [(s, kind, DTYPES[(i + j) % 3]) for i, s in enumerate(ACROSS_ROWS) for j, kind in enumerate(["nf4", "fp4"])],
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
    statistics = {k.removeprefix("w."): v for k, v in quantization.serialized_state("w", state, section).items()}
    layer = quantization.prequantized_linear(dense, packed, statistics, dtype, torch.device("cpu"))
    assert torch.equal(quantization.dequantized_weight(layer, dtype), expected)


def test_torchs_threads_come_back() -> None:
    before = torch.get_num_threads()
    with one_thread_each() as workers:
        assert workers >= 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
