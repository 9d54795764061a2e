"""Rows and pictures with a class each that a tiny model learns, and recipes over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qvera.config.schema import Recipe, parse_recipe
from tests.tasks.images import save_vit, write_folders

WORDS = {"colour": ["red", "blue", "green"], "fruit": ["plum", "apple", "fig"], "pet": ["cat", "dog", "hen"]}


def _maker(task: str, model: Path, data: dict[str, Any]) -> Any:
    """A small recipe; keyword sections override."""

    def make(**sections: Any) -> Recipe:
        tree: dict[str, Any] = {
            "task": task,
            "model": {"path": str(model), "compute_dtype": "float32"},
            "adapter": {"rank": 8},
            "data": {"eval_fraction": 0.2, **data},
            "training": {
                "max_steps": 4, "global_batch_size": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
                "save_steps": 2, "report_to": [],
            },
        }  # fmt: skip
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
        return parse_recipe(tree, "test recipe")

    return make


@pytest.fixture(scope="session")
def labelled_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of three classes, of different lengths."""
    path, chooser = tmp_path_factory.mktemp("labelled") / "rows.jsonl", random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(60):
            label = chooser.choice(sorted(WORDS))
            text = f"say {chooser.choice(WORDS[label])} {'again ' * (number % 4)}{chooser.randint(0, 99)}"
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def classify(tiny_model_dir: Path, labelled_rows: Path) -> Any:
    """``classify(training={..})``: a recipe that classifies texts."""
    return _maker("sequence-classification", tiny_model_dir, {"path": str(labelled_rows), "max_length": 64})


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of three colours."""
    return write_folders(tmp_path_factory.mktemp("pictures") / "rows")


@pytest.fixture(scope="session")
def see(vit: Path, pictures: Path) -> Any:
    """``see(training={..})``: a recipe that classifies pictures."""
    return _maker("image-classification", vit, {"path": str(pictures), "augment": "crop-flip"})
