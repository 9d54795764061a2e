"""Trainable parameters and file sizes on the real shapes, with the base on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from qvera.adapters import QveraLinear
from qvera.adapters.save_load import adapter_facts, attach, named_vectors, save_adapter
from qvera.config.sections import AdapterSection
from tests.adapters.helpers import SHAPES, on_meta, trainable

# The table of shared/facts.md; its first two rows are VeRA's 1.6M / 1.4M / 2.4M (arXiv 2310.11454, table 4).
COUNTS = {  # by rank, and LoRA's of rank 64
    "LLaMA-7B": (256, 1_417_216, 159_907_840),
    "LLaMA-13B": (1024, 2_416_640, 250_347_520),
    "Llama-3-8B": (256, 1_433_600, 167_772_160),
    "Llama-3.2-1B": (1024, 491_520, 45_088_768),
    "SmolLM2-135M": (256, 209_280, 19_537_920),
}


@pytest.mark.parametrize("name", SHAPES)
def test_trainable_counts(name: str) -> None:
    rank, count, lora = COUNTS[name]
    layers = SHAPES[name]["num_hidden_layers"]  # all are the same, so a count is that often the one's
    model = attach(on_meta(name, num_hidden_layers=1), AdapterSection(rank=rank))
    facts = adapter_facts(model)
    assert layers * trainable(model) == layers * facts["trainable_parameters"] == count
    assert (facts["adapted_modules"], layers * facts["lora_r64_parameters"]) == (7, lora)


def fill(model: PeftModel) -> None:
    """Real vectors in memory in place of the meta ones: what a trained adapter holds; the base stays on meta."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, QveraLinear):
            for name, vector in layer.vectors("default").items():
                getattr(layer, name)["default"] = nn.Parameter(torch.randn(vector.shape, generator=generator))


@pytest.mark.parametrize(
    ("name", "limit_bytes"),
    [("SmolLM2-135M", 1_000_000), pytest.param("LLaMA-7B", 6_000_000, marks=pytest.mark.slow)],
)
def test_adapter_files_are_small(name: str, limit_bytes: int, tmp_path: Path) -> None:
    model = attach(on_meta(name), AdapterSection(rank=256), base_name="some/base")
    fill(model)
    size = save_adapter(model, tmp_path / "adapter")
    written = sum(f.stat().st_size for f in (tmp_path / "adapter").rglob("*") if f.is_file())
    assert 4 * COUNTS[name][1] < size == written < limit_bytes
    assert sum(v.numel() for v in named_vectors(model).values()) == COUNTS[name][1]
