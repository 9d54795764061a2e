"""Trainable parameters on the real shapes, with the base on the meta device. The size of files: methods/test_methods.py."""

from __future__ import annotations

import pytest

from qvera.adapters.save_load import adapter_facts, attach
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
