"""Runs on a tiny model, by one process and by several, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from tests.conftest import small_llama, small_tokenizer

STEPS, CUT = 6, 4
LAYERS = 2


def name_of(stage: str | None) -> str:
    return stage or "none"


class TinyRuns:
    """A model of four layers, rows, and what the runs left behind."""

    def __init__(self, root: Path, rows: Path, **model: Any) -> None:
        self.root, self.rows = root, rows
        self.model = root / "model"
        small_llama(num_hidden_layers=LAYERS, **model).to(torch.bfloat16).save_pretrained(self.model)
        small_tokenizer().save_pretrained(self.model)
        self.found: list[dict[str, Any]] = []

    def recipe(self, stage: str | None = None, **training: Any) -> dict[str, Any]:
        return {
            "model": {"path": str(self.model), "compute_dtype": "float32"},
            "adapter": {"rank": 8, "b_groups": 2, "input_scale": True},  # every kind of vector there is
            "data": {"path": str(self.rows), "eval_fraction": 0.2, "max_length": 64},
            "training": {
                "max_steps": STEPS,
                "global_batch_size": 8,
                "per_device_train_batch_size": 2,  # two passes on each of two ranks
                "per_device_eval_batch_size": 5,
                "learning_rate": 2e-2,
                "save_steps": 3,
                "eval_steps": 4,
                "sample_count": 2,
                "sample_max_new_tokens": 3,
                "exact_match_rows": 2,
                "report_to": [],
                "gradient_checkpointing": True,  # by itself it would be off where there is room
                **training,
            },
            "deepspeed": stage,
        }

    def float16(self, stage: str | None = None) -> dict[str, Any]:
        """In float16, with a loss scale that overflows at first."""
        recipe = self.recipe(stage, **FLOAT16)
        recipe["model"]["compute_dtype"] = "float16"
        return recipe

    def task(self, name: str, stage: str | None, more: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
        """A task of `tests.distributed.worker`: a run of this recipe in the directory of its name, or of another one's."""
        run_dir = self.root / (more or {}).get("of", name)
        return {"name": name, "recipe": self.recipe(stage, **training), "run_dir": str(run_dir), **(more or {})}

    def alone(self, name: str, resume: bool = False, **training: Any) -> Path:
        """A run of this process on its own, without DeepSpeed."""
        train(parse_recipe(self.recipe(**training), name), self.root / name, resume=resume)
        return self.root / name


BARE = {"eval_steps": 0, "sample_count": 0, "exact_match_rows": 0}
UNEVEN = {"global_batch_size": 7, "per_device_train_batch_size": 7, **BARE}
FLOAT16 = {"max_steps": 3, "initial_scale_power": 19, **BARE}
ONE_ROW = {"global_batch_size": 1, "per_device_train_batch_size": 1, **BARE}


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == kind]


def vectors(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def close(one: Path, other: Path, rtol: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=rtol)
    mine, theirs = vectors(one), vectors(other)
    assert mine.keys() == theirs.keys()
    moved = max(float(t.abs().max()) for t in theirs.values())
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=rtol * moved)
