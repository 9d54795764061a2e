"""Instruction following on SmolLM2-135M in NF4: held-out loss of ours against stock PEFT LoRA r=16 and r=64, same tokens.

    python bench/alpaca.py ../shared/data/alpaca_en_demo.json

The rows are dealt out by seed: 100 to choose the learning rate with, 100 that score what was chosen, the rest to train
on. Each LoRA got two rates with the cosine and the better one with a linear decay, plain VeRA two rates with the
cosine, two b and an a four rates with the linear decay. Lines go to results/alpaca.jsonl; a trial that stands there is
not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from bench.common import RESULTS, header, smollm2
from bench.trials import MORE, Trial, Written, add_half, run
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import build_datasets
from qvera.evaluation import held_out

STEPS = 50  # of 8 rows


def ours(rate: float) -> Trial:
    """With the vectors that were best on E2E (bench/e2e.py)."""
    return Trial(method="qvera", **MORE, learning_rate=rate, schedule="linear", steps=STEPS)


TRIALS = [
    *(Trial(method="lora", rank=16, learning_rate=rate, steps=STEPS) for rate in (2e-3, 4e-3)),
    *(Trial(method="lora", rank=64, learning_rate=rate, steps=STEPS) for rate in (1e-3, 2e-3)),
    *(Trial(method="qvera", rank=256, learning_rate=rate, steps=STEPS) for rate in (3e-2, 0.1)),
    Trial(method="lora", rank=16, learning_rate=2e-3, schedule="linear", steps=STEPS),
    ours(3e-2),
    Trial(method="lora", rank=64, learning_rate=1e-3, schedule="linear", steps=STEPS),
    ours(2e-2),
    ours(5e-2),
    ours(7e-2),
]
"""The first six with the cosine; a linear decay is better for both kinds of LoRA."""


def recipe_of(data: Path, to: Path, scored: int = 100) -> Recipe:
    """The recipe, with the rows dealt out: those to choose with are the held-out ones; those that score lie in ``to``."""
    rows = json.loads(data.read_text())
    random.Random("qvera alpaca").shuffle(rows)
    parts = {"develop": rows[:100], "score": rows[100 : 100 + scored], "train": rows[100 + scored :]}
    for name, part in parts.items():
        (to / f"{name}.json").write_text(json.dumps(part))
    return parse_recipe(
        {
            "model": smollm2(),
            "data": {"path": str(to / "train.json"), "eval_path": str(to / "develop.json"), "max_length": 512},
            "training": {"global_batch_size": 8, "gradient_checkpointing": False},
        },
        "bench/alpaca.py",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    add_half(parser)
    args = parser.parse_args()
    written = Written(RESULTS / "alpaca.jsonl", header())
    with tempfile.TemporaryDirectory() as directory:
        recipe = recipe_of(args.rows, Path(directory))
        for trial in written.missing([Trial(method="frozen"), *TRIALS], args.half):
            model, base, _, facts = run(trial, recipe)
            rows = recipe.data.replace(eval_path=str(Path(directory) / "score.json"))
            scored = build_datasets(rows, base.tokenizer)
            found = held_out.held_out_loss(model, scored.eval, pad_id=scored.pad_id, batch_size=4, chunk_tokens=512)
            written.add(trial, {**facts, "score_loss": found["loss"], "score_rows": found["rows"]})


if __name__ == "__main__":
    main()
