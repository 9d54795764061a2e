"""A run whose settings are none of the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvera.training.trainer import train


@pytest.fixture(scope="session")
def alpaca_run(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a base in 16 bits, with a template and tokens of its recipe. Read it, never change it."""
    run = tmp_path_factory.mktemp("alpaca") / "run"
    model = {"quantization": "none", "eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}
    data, training = {"template": "alpaca", "max_length": 192}, {"max_steps": 1, "sample_count": 0}
    train(make_recipe(model=model, data=data, training=training), run)
    return run
