"""Tokens per second of training with rows padded, grouped by length, and packed, on real instruction data.

    python bench/packing.py ../shared/data/alpaca_en_demo.json [--steps 4] [--rounds 5]

SmolLM2-135M in NF4, r=256 on all linears, gradient checkpointing off, global batches of 16 rows: forward and backward
of the same ``steps`` optimizer steps' rows, interleaved. Padded and grouped take 8 rows a pass, packed as many as fit
1,024 tokens. The rows of the grouped order are others in each step, so its tokens are counted for itself; padding
counts as no token. ``masked``: rows of one sequence are told apart by a dense mask, as CPUs did before
`qvera.models.attention.attend_in_groups`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common import header, interleaved, perturb, smollm2, write_result
from qvera.adapters.save_load import attach
from qvera.config.schema import parse_recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import batches_of, build_datasets
from qvera.models import forward
from qvera.models.attention import CAUSAL, VARLEN
from qvera.models.loader import load_base

MASKED = ", masked"
WAYS = {
    "padded": {"prefix_once": False},
    "common prefix once": {},
    "common prefix once" + MASKED: {},
    "grouped by length": {"prefix_once": False, "group_by_length": True},
    "packed": {"packing": True},
    "packed" + MASKED: {"packing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    base = load_base(ModelSection(path=smollm2()))
    model = attach(base.model, AdapterSection(rank=256), "smollm2")
    perturb(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    cases: dict[str, Any] = {}
    tokens: dict[str, int] = {}
    passes: dict[str, int] = {}
    for name, data in WAYS.items():
        recipe = parse_recipe(
            {
                "model": smollm2(),
                "data": {"path": str(args.data), "max_length": 1024, **data},
                "training": {"global_batch_size": 16, "per_device_train_batch_size": 8},
            },
            name,
        )
        datasets = build_datasets(recipe.data, base.tokenizer)
        batches = batches_of(recipe, datasets.train)
        chosen = [one for step in range(args.steps) for one in batches.passes(batches.rows(step))]
        attention = CAUSAL if name.endswith(MASKED) else VARLEN
        base.model.set_attn_implementation(attention)
        tokens[name] = sum(len(datasets.train[i].input_ids) for one in chosen for i in one)
        passes[name] = len(chosen)
        made = [
            forward.make_batch(
                model, [datasets.train[i] for i in one], datasets.pad_id, recipe.data.prefix_once, recipe.data.packing
            )
            for one in chosen
        ]

        def run(made: list[dict[str, Any]] = made, attention: str = attention) -> None:
            base.model.set_attn_implementation(attention)
            for batch in made:
                nll, count = forward.batch_nll(model, batch, 512)
                (nll / count).backward()
            for parameter in parameters:
                parameter.grad = None

        cases[name] = run
    model.train()
    times = interleaved(cases, args.rounds)
    result: dict[str, Any] = {**header(), "data": args.data.name, "steps": args.steps, "ways": {}}
    padded = tokens["padded"] / times["padded"]["median"]
    for name, taken in times.items():
        speed = tokens[name] / taken["median"]
        result["ways"][name] = {
            "tokens": tokens[name], "passes": passes[name], "tokens_per_second": speed, "over_padded": speed / padded,
            **{f"{k}_seconds": v for k, v in taken.items()},
        }  # fmt: skip
        print(
            f"{name:<28}{tokens[name]:8,} tokens in {passes[name]:3} passes{speed:10.0f} tokens/s{speed / padded:7.2f} "
            f"x padded"
        )
    print(write_result("packing", result))


if __name__ == "__main__":
    main()
