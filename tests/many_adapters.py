"""A run directory as a run of many adapters leaves it, made up: real adapters on the tiny model, and a run.json of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from qvera.adapters.save_load import attach, save_adapter
from qvera.config.schema import Recipe
from qvera.config.sections import AdapterSection
from qvera.models.loader import load_base
from qvera.utils.adapter_names import directory_names
from tests.adapters.helpers import perturb
from tests.evaluation.report.conftest import adapter_entry

NAMES = ("anna", "Anna", "Ben & Söhne", "../chloe", "dan")


def write_customers(path: Path, names: Sequence[str] = NAMES, each: int = 10) -> Path:
    """A CSV in which every customer has ``each`` rows of its own."""
    lines = ["customer,prompt,completion"]
    lines += [
        f"{name},say {number} {word},{word} {word}"
        for word in ("red", "blue")
        for name in names
        for number in range(each // 2)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_run(run_dir: Path, recipe: Recipe, names: Sequence[str] = NAMES) -> Path:
    """The directory of a finished run with an adapter for each name; all differ."""
    directories = directory_names(names)
    base = load_base(recipe.model)
    section = AdapterSection(rank=recipe.adapter.rank)
    model = attach(base.model, section, recipe.model.path, base.facts.get("fingerprint"))
    for number, name in enumerate(names):
        perturb(model, seed=number)
        save_adapter(model, run_dir / "adapters" / directories[name])
    (run_dir / "adapters" / ".half.partial-1").mkdir()  # of a save that was cut off
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    lost = adapter_entry("nan", "nan", status="not_finite", eval_after=None, reason="the loss of step 3 is not finite")
    run = {
        "status": "done",
        "data": {"template": "tokenizer"},
        "result": {"rounds": 9, "steps": 30, "seconds": 60.0},
        "adapters": [*(adapter_entry(name, directories[name]) for name in names), lost],
    }
    (run_dir / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return run_dir
