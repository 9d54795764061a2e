"""A loop that is ready for its first step, and the gradients of one."""

from __future__ import annotations

from pathlib import Path

import torch

from qvera.adapters.save_load import named_vectors
from qvera.config.schema import Recipe
from qvera.data import Datasets, build_datasets
from qvera.distributed.group import Group
from qvera.evaluation.load import OpenRun
from qvera.training.loop import AloneLoop
from qvera.training.session import TrainingSession


def loop_of(recipe: Recipe, run_dir: Path) -> AloneLoop:
    """A loop that is ready for its first step, adapter vectors not zero."""
    session = TrainingSession(recipe, run_dir, Group())
    session.load_data()
    session.load_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, vector in named_vectors(session.model).items():
            if "qvera" in name:
                vector.add_(torch.randn(vector.shape, generator=generator) * 0.1)
    session.model.train()
    return AloneLoop(session)


def rows_of(opened: OpenRun) -> Datasets:
    """The rows of its recipe, with the labels of its model."""
    assert opened.target.recipe is not None
    return build_datasets(opened.target.recipe.data, opened.base.tokenizer, labels=opened.labels)


def gradients(loop: AloneLoop, rows: list[int], passes: int = 1) -> dict[str, torch.Tensor]:
    """Of the mean loss over the rows, in so many passes."""
    for part in torch.tensor(rows).chunk(passes):
        loss, _ = loop.nll([loop.datasets.train[i] for i in part.tolist()])
        (loss / len(rows)).backward()
    return {name: vector.grad.clone() for name, vector in named_vectors(loop.model).items()}
