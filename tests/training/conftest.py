"""What several modules of this room train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import small_llama, small_tokenizer


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with more layers than there are buffers."""
    directory = tmp_path_factory.mktemp("models") / "five-layers"
    small_llama(num_hidden_layers=5).to(torch.bfloat16).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory
