"""An adapter trained among others is the one that is trained alone, whatever its neighbours do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.config.schema import Recipe
from tests.training.runs import entries, many_recipe, poison, records, train_alone, train_many, vectors, write_rows

pytestmark = pytest.mark.process

STEP = ("step", "epoch", "learning_rate", "trained_tokens", "input_tokens"), ("loss", "grad_norm")
EVALUATION = ("step", "rows", "trained_tokens"), ("loss", "perplexity")
TRAINING = {
    "max_steps": 12,
    "eval_steps": 3,
    "early_stopping_patience": 1,
    "learning_rate": 0.03,
    "per_device_train_batch_size": 16,
}


def assert_equal(ours: Any, theirs: Any, keys: tuple[tuple[str, ...], ...], rel: float) -> None:
    exact, close = keys
    assert [ours[key] for key in exact] == [theirs[key] for key in exact]
    assert [ours[key] for key in close] == pytest.approx([theirs[key] for key in close], rel=rel)


def assert_as_alone(
    together: Path, name: str, recipe: Recipe, rows: list[dict[str, str]], scratch: Path, rel: float
) -> float:
    """Train ``name`` alone: rows, steps and learning rates are the very same, losses and vectors to rounding.

    AdamW divides each gradient by its own size, so the rounding of a gradient that is nearly 0 becomes that of a whole
    step: the difference of two vectors is compared with the vector's length, not element by element.

    Args:
        rel: allowed for all but the training losses, which have 1e-5.

    Returns:
        The largest difference of a vector, relative to its length.
    """
    entry = entries(together)[name]
    if not entry["eval_rows"]:
        training = recipe.training.replace(eval_steps=0, early_stopping_patience=0, load_best_model_at_end=False)
        recipe = recipe.replace(data=recipe.data.replace(eval_fraction=0.0), training=training)
    result = train_alone(recipe, rows, scratch)["result"]
    for kind, keys in (("train", STEP), ("eval", EVALUATION)):
        for one, other in zip(records(together, kind, name), records(scratch / "run", kind), strict=True):
            assert_equal(one, other, keys, rel)
            assert kind == "eval" or one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert_equal(entry, result, (("steps", "best_step"), ("train_loss_first", "train_loss_last")), 1e-5)
    assert (entry["status"] == "stopped_early") == result["stopped_early"]
    for when in ("eval_before", "eval_after"):
        assert (entry[when] is None) == (result[when] is None)
        if entry[when] is not None:
            assert_equal(entry[when], result[when], (("rows", "trained_tokens"), ("loss", "perplexity")), rel)
    trained, reference = vectors(together, name), vectors(scratch / "run")
    assert trained.keys() == reference.keys()
    length = torch.linalg.vector_norm
    largest = max(float(length(trained[key] - expected) / length(expected)) for key, expected in reference.items())
    assert largest <= rel
    directories = together / "adapters" / entry["directory"], scratch / "run" / "adapter"
    configs = [json.loads((directory / "adapter_config.json").read_text()) for directory in directories]
    assert configs[0] == configs[1]
    return largest


SEVEN = {"one": 1, "noise of 4": 4, "diverges": 30, "eleven": 11, "sixty": 60, "noise of 6": 6, "forty": 40}
HUNDRED = {f"customer {number}": 1 + number * 37 % 60 for number in range(94)} | {
    "least": 1,
    "most": 60,
    "diverges": 31,
}
HUNDRED |= {f"noise {number}": 4 + number for number in range(3)}


@pytest.mark.parametrize(
    ("counts", "compared"),
    [
        pytest.param(SEVEN, ["one", "noise of 6", "forty"], id="seven"),
        pytest.param(
            HUNDRED, [name for name in HUNDRED if name != "diverges"][::9], id="hundred", marks=pytest.mark.slow
        ),
    ],
)
def test_among_others_as_alone(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int], compared: list[str]
) -> None:
    """1 to 60 rows, one that diverges, some that stop early."""
    rows = write_rows(tmp_path / "rows.jsonl", counts)
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", TRAINING, eval_fraction=0.2)
    poison(monkeypatch, "diverges", step=3)
    found = train_many(recipe, tmp_path / "run")
    statuses = Counter(entry["status"] for entry in found.values())
    assert statuses["not_finite"] == 1
    assert statuses["stopped_early"] >= 2 and statuses["done"] >= 2
    assert (found["diverges"]["status"], found["diverges"]["steps"]) == ("not_finite", 2)
    assert not (tmp_path / "run" / "adapters" / "diverges").exists()
    differences = [
        assert_as_alone(tmp_path / "run", name, recipe, rows[name], tmp_path / found[name]["directory"], rel=2e-4)
        for name in compared
    ]
    # at this learning rate AdamW makes some roundings large: of the same adapter alone in passes of 2 rows and of 4 too
    assert sum(one <= 1e-5 for one in differences) >= 0.7 * len(differences)


def test_loras_among_others_as_alone(make_recipe: Any, tmp_path: Path) -> None:
    """B with a rate of its own (LoRA+)."""
    rows = write_rows(tmp_path / "rows.jsonl", {"one": 1, "noise of 6": 6})
    recipe = many_recipe(make_recipe, tmp_path / "rows.jsonl", {**TRAINING, "learning_rate": 2e-3}, eval_fraction=0.2)
    lora = recipe.adapter.replace(method="lora", rank=3, alpha=6.0, loraplus_lr_ratio=4.0)
    recipe = recipe.replace(adapter=lora, training=recipe.training.replace(weight_decay=0.1))
    train_many(recipe, tmp_path / "run")
    for name, own in rows.items():
        assert assert_as_alone(tmp_path / "run", name, recipe, own, tmp_path / f"{name} alone", rel=2e-4) < 1e-4
