"""What the literature offers where plain VeRA falls short of LoRA, each as a plain module, on the rows of the two sweeps.

    python bench/variants.py e2e ../shared/data/e2e
    python bench/variants.py alpaca ../shared/data/alpaca_en_demo.json
    python bench/variants.py inputs ../shared/data/e2e    # how many directions the inputs of the linears really have

Held-out loss after 50 steps of 8 rows, linear decay, seed 0; rows, their order and the loop are those of bench/e2e.py
and bench/alpaca.py. Attention is eager (faster on a CPU), so the third digit may differ: plain VeRA is 1.3836 here and
1.3819 there. Lines go to results/variants-TASK.jsonl; a trial that stands there is not repeated. What earned its place
is in qvera/adapters (``adapter.b_groups``, ``adapter.input_scale``); this is where the rest can be run again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import alpaca, e2e
from bench.common import RESULTS, header
from bench.trials import Trial, Written, add_half, run
from bench.variant import Variant, see_inputs
from qvera.config.schema import Recipe
from qvera.models.loader import Base, load_base


def ours(**keys: Any) -> Variant:
    return Variant(**{"method": "variant", "steps": 50, "rank": 256, "schedule": "linear", **keys})


E2E: list[Trial] = [
    ours(learning_rate=0.1),
    ours(learning_rate=0.1, groups=2),
    ours(learning_rate=0.1, input_norm=1.0),
    ours(learning_rate=0.1, input_norm=0.5),
    ours(learning_rate=0.1, input_scale=True),
    ours(learning_rate=0.1, magnitude="ia3", magnitude_rate=0.1),
    ours(learning_rate=0.1, groups=4),
    Trial(method="lora", rank=1, learning_rate=4e-3, schedule="linear", steps=50),
    ours(learning_rate=0.1, redraw=25),
    ours(learning_rate=0.1, beta2=0.99),
    ours(learning_rate=0.1, magnitude="ia3", magnitude_rate=0.03),
    ours(learning_rate=0.1, magnitude="ia3", magnitude_rate=0.3),
    ours(learning_rate=0.1, magnitude="ia3", magnitude_rate=0.1, input_scale=True, rank=128),
    ours(learning_rate=0.1, magnitude="ia3", magnitude_rate=0.1, groups=2, rank=96),
    ours(learning_rate=0.1, magnitude="dora", magnitude_rate=0.1),
    ours(learning_rate=0.1, groups=3, rank=96),
    ours(learning_rate=0.1, groups=2, input_scale=True, rank=96),
    ours(learning_rate=0.07, groups=3, rank=96),
    ours(learning_rate=0.15, groups=3, rank=96),
    ours(learning_rate=0.15, groups=2, input_scale=True, rank=96),
    ours(learning_rate=0.1, per_layer="weight"),
    Trial(method="lora", rank=1, learning_rate=1.6e-2, schedule="linear", steps=50),
    ours(learning_rate=0.1, by_spectrum=True),
]
ALPACA: list[Trial] = [
    ours(learning_rate=0.03),
    ours(learning_rate=0.03, groups=2, input_scale=True, rank=96),
]
"""The others on these rows are in bench/alpaca.py."""


def directions(base: Base, recipe: Recipe) -> None:
    """Print how many directions the inputs of the linears have: the participation ratio (Σ λ)² / Σ λ² of x xᵀ over 16 rows."""
    inputs: dict[str, list[torch.Tensor]] = {}
    roles = ("q_proj", "o_proj", "gate_proj", "down_proj")  # k and v read what q does, up what gate does
    see_inputs(base, recipe, lambda name, x: inputs.setdefault(name, []).append(x), roles)
    print("role        n     of x      of x - mean   of x / RMS   largest RMS / median   (median over the layers)")
    for role in roles:
        found = []
        for name, parts in inputs.items():
            if name.endswith(role):
                x = torch.cat(parts)
                rms = x.square().mean(0).sqrt()
                sets = (x, x - x.mean(0), x / rms.clamp_min(1e-9))
                squares = [(part.t() @ part).double() for part in sets]
                found.append([(s.trace() ** 2 / s.square().sum()).item() for s in squares])
                found[-1].append((rms.max() / rms.median()).item())
        middle = torch.tensor(found).median(0).values.tolist()
        print(f"{role:10}  {x.shape[1]:4}  {middle[0]:6.1f}  {middle[1]:12.1f}  {middle[2]:12.1f}  {middle[3]:12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["e2e", "alpaca", "inputs"])
    parser.add_argument("data", type=Path)
    add_half(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        recipe = (alpaca if args.task == "alpaca" else e2e).recipe_of(args.data, Path(directory))
        recipe = recipe.replace(model=recipe.model.replace(attn_implementation="eager"))
        if args.task == "inputs":
            directions(load_base(recipe.model), recipe)
            return
        written = Written(RESULTS / f"variants-{args.task}.jsonl", header())
        for trial in written.missing(E2E if args.task == "e2e" else ALPACA, args.half):
            written.add(trial, run(trial, recipe)[-1])


if __name__ == "__main__":
    main()
