"""A run that answers otherwise than its base, made once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qvera.adapters.save_load import load_adapter, save_adapter
from qvera.models.loader import load_base
from tests.adapters.helpers import perturb


@pytest.fixture(scope="session")
def moved_run(trained_run: Path, make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose vectors are moved far from their start, so that base and adapter answer differently."""
    directory = Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "run"))
    model = load_adapter(load_base(make_recipe().model).model, directory / "adapter")
    perturb(model)
    save_adapter(model, directory / "adapter")
    return directory


@pytest.fixture
def run(moved_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(moved_run, tmp_path / "run"))
