"""Ten adapters of the tiny model, and what each of them answers alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.serve.helpers import Alone, write_adapters

NAMES = [f"a{i}" for i in range(10)]


@pytest.fixture(scope="session")
def adapters_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of ten adapters. Read it, never change it."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapters(root, tiny_model_dir, {name: i for i, name in enumerate(NAMES)})
    return root


@pytest.fixture(scope="session")
def alone(tiny_model_dir: Path) -> Any:
    """``alone(adapter directory)`` answers as that adapter does by itself; None: the base."""
    return lru_cache(maxsize=None)(lambda adapter: Alone(tiny_model_dir, adapter))
