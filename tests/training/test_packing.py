"""Packing changes how a run is computed, not what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.data import batches_of, build_datasets
from qvera.models.attention import require_packing
from qvera.models.tokenizer import load_tokenizer
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.conftest import small_llama
from tests.training.runs import losses, vectors

pytestmark = pytest.mark.process


def test_a_packed_run_gives_the_numbers_of_a_padded_one(make_recipe: Any, tmp_path: Path) -> None:
    for name, packing in (("padded", False), ("packed", True)):
        train(make_recipe(data={"packing": packing, "prefix_once": False}), tmp_path / name)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)
    padded = vectors(tmp_path / "padded")
    for name, vector in vectors(tmp_path / "packed").items():
        torch.testing.assert_close(vector, padded[name], rtol=1e-3, atol=1e-5)


def test_a_packed_run_takes_fewer_passes_than_rows_and_each_is_within_max_length(make_recipe: Any) -> None:
    recipe = make_recipe(data={"packing": True})
    rows = build_datasets(recipe.data, load_tokenizer(recipe.model)).train
    batches = batches_of(recipe, rows)
    passes = batches.passes(batches.rows(0))
    assert 1 < len(passes) < 8
    assert max(sum(len(rows[i].input_ids) for i in one) for one in passes) <= recipe.data.max_length


def test_packing_is_refused_where_rows_would_see_each_other() -> None:
    model = small_llama()
    require_packing(model)
    model.config.model_type = "gpt2"
    with pytest.raises(InputError, match=r"data\.packing: rows of one sequence would see each other .*\(gpt2, "):
        require_packing(model)
