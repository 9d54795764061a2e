"""The quickstart's task on all 256 held-out rows: untrained, VeRA (a finished quickstart run), PEFT LoRA r=16, a regex.

    qvera quickstart                                    # first: leaves runs/quickstart
    python bench/quickstart.py [--run runs/quickstart] [--lora-rates 1e-3 5e-4] [--rows 256]

LoRA is stock PEFT on every linear of the same 4-bit base, trained on the same rows in the same order for the same steps
with the same loss; each learning rate is tried and all are shown. The run's rows were generated with seed 0; nothing
was tuned on their templates (see bench/quickstart_words.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import header, write_result
from bench.quickstart_rows import generate as task_rows
from bench.quickstart_rows import message_of
from bench.quickstart_score import regex_baseline, score
from bench.trials import Trial, adapted, train
from qvera.config.schema import Recipe
from qvera.data import build_datasets
from qvera.evaluation import held_out
from qvera.evaluation.load import open_run
from qvera.models.loader import load_base


def scored(model: Any, tokenizer: Any, rows: Sequence[Any], tokens: int) -> dict[str, Any]:
    began = time.perf_counter()
    answers = held_out.answer_rows(model, tokenizer, rows, max_new_tokens=tokens)
    found = score([a["answer"] for a in answers], [a["reference"] for a in answers])
    return {"exact_match": found.exact_match, "rows": found.rows, "parsed": found.parsed, "fields": found.fields,
            "seconds": time.perf_counter() - began}  # fmt: skip


def train_lora(recipe: Recipe, datasets: Any, rate: float) -> Any:
    """Stock PEFT LoRA r=16 in the run's order, with its batch, schedule, clipping and loss."""
    section = recipe.training
    trial = Trial(
        method="lora", rank=16, learning_rate=rate, steps=section.max_steps, schedule=section.lr_scheduler_type,
        warmup_ratio=section.warmup_ratio, seed=recipe.data.seed,
    )  # fmt: skip
    model = adapted(load_base(recipe.model), trial, recipe)
    train(model, trial, recipe, datasets)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--lora-rates", type=float, nargs="*", default=[1e-3, 5e-4])
    args = parser.parse_args()
    opened = open_run(args.run)
    recipe = opened.target.recipe
    assert recipe is not None
    recipe = recipe.replace(data=recipe.data.replace(eval_limit=args.rows))
    datasets = build_datasets(recipe.data, opened.base.tokenizer)
    tokens, rows = recipe.training.sample_max_new_tokens, datasets.eval
    result: dict[str, Any] = {**header(), "steps": recipe.training.max_steps, "scores": {}}

    def record(name: str, found: dict[str, Any]) -> None:
        result["scores"][name] = found
        print(f"{name:<28}{found['exact_match']:7.1%} of {found['rows']} rows")

    heldout = task_rows("heldout", len(rows))
    answers = [json.dumps(regex_baseline(message_of(row["prompt"]))) for row in heldout]
    regex = score(answers, [row["completion"] for row in heldout])
    record("regex", {"exact_match": regex.exact_match, "rows": regex.rows, "fields": regex.fields})
    record("VeRA r=256", scored(opened.model, opened.base.tokenizer, rows, tokens))
    with opened.model.disable_adapter():
        record("untrained", scored(opened.model, opened.base.tokenizer, rows, tokens))
    trained = json.loads((args.run / "run.json").read_text())
    result["scores"]["VeRA r=256"]["trained_numbers"] = trained["adapter"]["trainable_parameters"]
    for rate in args.lora_rates:
        began = time.perf_counter()
        model = train_lora(recipe, datasets, rate)
        seconds = time.perf_counter() - began
        found = scored(model, opened.base.tokenizer, rows, tokens)
        found["trained_numbers"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found["train_seconds"] = seconds
        record(f"PEFT LoRA r=16, lr {rate:g}", found)
    print(write_result("quickstart", result))


if __name__ == "__main__":
    main()
