"""Is one product with W + ΔW as good as the low-rank path in 16 bits? Errors against fp32, and what both learn.

    python bench/summed.py [--seeds 0 1] [--steps 68]

Errors: SmolLM2-135M in NF4, four rows of the quickstart's data, vectors moved off their start by 0.003 and 0.05 (a few
steps, and a finished run): last hidden states and the vectors' gradients of each way in bfloat16, against the low-rank
path in fp32 on the same 4-bit weights. Learning: the quickstart's rows, order, steps and rate in bfloat16, for each way
and seed of the projections; loss of its held-out rows. Wants a machine that multiplies bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common import header, perturb, smollm2, write_result
from qvera.adapters.products import fused
from qvera.adapters.save_load import attach, named_vectors
from qvera.cli.quickstart import recipe_path
from qvera.config.schema import Recipe, load_recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import build_datasets
from qvera.models.forward import batch_nll, hidden_states, make_batch
from qvera.models.loader import load_base
from qvera.models.tokenizer import load_tokenizer
from qvera.training.trainer import train

WAYS = {"low rank": lambda *_: False, "W + ΔW": lambda *_: True}
"""Each way wherever a layer can take it, whether or not it pays."""


def outcome(path: str, dtype: str, rows: list[Any], pad_id: int, rank: int, size: float) -> dict[str, Any]:
    model = attach(load_base(ModelSection(path=path, compute_dtype=dtype)).model, AdapterSection(rank=rank), path)  # type: ignore[arg-type]
    perturb(model.train(), size)
    batch = make_batch(model, rows, pad_id)
    hidden = hidden_states(model, batch).detach().float()
    batch_nll(model, batch, 512)[0].backward()
    vectors = named_vectors(model)
    return {"hidden": hidden} | {
        f"gradient of {kind}": torch.cat(
            [p.grad.flatten() for n, p in vectors.items() if p.grad is not None and n.endswith(f"_{kind}")]
        )
        for kind in ("b", "d")
    }


def errors(path: str, recipe: Recipe) -> dict[str, Any]:
    datasets = build_datasets(recipe.data, load_tokenizer(recipe.model))
    found: dict[str, Any] = {}
    for rank in (256, 1024):
        for size in (0.003, 0.05):
            rows = [datasets.train[i] for i in range(4)]
            results = {}
            for name, pays in (("fp32", WAYS["low rank"]), *WAYS.items()):
                fused.pays = pays  # type: ignore[assignment]
                dtype = "float32" if name == "fp32" else "bfloat16"
                results[name] = outcome(path, dtype, rows, datasets.pad_id, rank, size)
            truth = results.pop("fp32")
            case = f"r={rank}, vectors off by {size}"
            found[case] = {
                name: {part: ((r[part] - truth[part]).norm() / truth[part].norm()).item() for part in truth}
                for name, r in results.items()
            }
            print(case, {n: {k: f"{v:.4f}" for k, v in e.items()} for n, e in found[case].items()}, flush=True)
    return found


def learned(recipe: Recipe, pays: Any) -> dict[str, float]:
    fused.pays = pays
    with tempfile.TemporaryDirectory() as folder:
        run = train(recipe, Path(folder) / "run")
    assert run is not None
    found = run.run["result"]
    return {"heldout_loss": found["eval_after"]["loss"], "train_seconds": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=68)
    args = parser.parse_args()
    path = smollm2()
    overrides = ["model.compute_dtype=bfloat16", f"training.max_steps={args.steps}", "training.exact_match_rows=0"]
    overrides += ["training.sample_count=0", "training.report_to=[]", "data.eval_limit=256"]
    recipe = load_recipe(recipe_path(), overrides)
    result: dict[str, Any] = {**header(), "errors_against_fp32": errors(path, recipe), "learning": {}}
    for seed in args.seeds:
        recipe = recipe.replace(adapter=recipe.adapter.replace(seed=seed))
        for name, pays in WAYS.items():
            result["learning"][f"{name}, seed {seed}"] = found = learned(recipe, pays)
            print(name, seed, found, flush=True)
    print(write_result("summed", result))


if __name__ == "__main__":
    main()
