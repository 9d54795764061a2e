"""Runs on a tiny model, by one process and by several, and what they left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from tests.conftest import small_llama, small_tokenizer
from tests.training.runs import assert_same_run, losses, vectors

STEPS, CUT = 4, 2
LAYERS = 2
BARE = {"eval_steps": 0, "sample_count": 0, "exact_match_rows": 0}
UNEVEN = {"global_batch_size": 31, "per_device_train_batch_size": 31, "try_longest_batch": False, **BARE}
"""Of 32 rows: 31, then the one that is left, which the second rank has no share of."""
FLOAT16 = {"max_steps": 1, "initial_scale_power": 18, "try_longest_batch": False, **BARE}
"""With a loss scale that overflows at first."""


def name_of(stage: str | None) -> str:
    return stage or "none"


class TinyRuns:
    """A model of two layers, rows, and what the runs left behind."""

    def __init__(self, root: Path, rows: Path, **model: Any) -> None:
        self.root, self.rows, self.model = root, rows, root / "model"
        small_llama(num_hidden_layers=LAYERS, **model).to(torch.bfloat16).save_pretrained(self.model)
        small_tokenizer().save_pretrained(self.model)
        self.tasks: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []

    def recipe(self, stage: str | None = None, dtype: str = "float32", **training: Any) -> dict[str, Any]:
        return {
            "model": {"path": str(self.model), "compute_dtype": dtype},
            "adapter": {"rank": 8, "b_groups": 2, "input_scale": True},  # every kind of vector there is
            "data": {"path": str(self.rows), "eval_fraction": 0.2, "max_length": 64},
            "training": {
                "max_steps": STEPS,
                "global_batch_size": 8,
                "per_device_train_batch_size": 2,  # two passes on each of two ranks
                "per_device_eval_batch_size": 5,
                "learning_rate": 2e-2,
                "save_steps": CUT,
                "eval_steps": CUT,
                "sample_count": 1,
                "sample_max_new_tokens": 2,
                "exact_match_rows": 2,
                "report_to": [],
                "gradient_checkpointing": True,  # by itself it would be off where there is room
                **training,
            },
            "deepspeed": stage,
        }

    def task(self, name: str, recipe: dict[str, Any], **more: Any) -> None:
        """Add a task of `tests.distributed.worker`: a run of this recipe in the directory of its name."""
        self.tasks.append({"name": name, "recipe": recipe, "run_dir": str(self.root / name), **more})

    def cut_and_resumed(self, name: str, recipe: dict[str, Any]) -> None:
        """Add two tasks: a run that a signal stops after `CUT`, and one that goes on from a copy of it."""
        self.task(f"{name}-cut", recipe, stop_after=CUT)
        self.task(f"{name}-resumed", recipe, copy_of=f"{name}-cut", resume=True)

    def alone(self, name: str, recipe: dict[str, Any], resume: bool = False) -> None:
        """A run of this process on its own, without DeepSpeed."""
        train(parse_recipe(recipe, name), self.root / name, resume=resume)

    def same_to_the_bit(self, name: str, other: str) -> None:
        assert_same_run(self.root / name, self.root / other)


def close(one: Path, other: Path, rtol: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=rtol)
    mine, theirs = vectors(one), vectors(other)
    assert mine.keys() == theirs.keys()
    moved = max(float(t.abs().max()) for t in theirs.values())
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=rtol * moved)
