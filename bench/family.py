"""Every method of `adapter.method` at an equal budget on SmolLM2-135M in NF4: the table of docs/methods/table.md.

    python bench/family.py run ../shared/data       # goes on where it stopped; --only e2e, --only vera for a part
    python bench/family.py table                    # what is there, as Markdown

`run` takes the trials in the order of `plan`: for each method four learning rates around its own (`RATES`), 50 steps of 8
rows on E2E NLG and TREC, chosen by the loss on held-out rows of the training part; then 150 steps with three seeds,
scored on the test sets. Each trial is `qvera train` itself with a recipe; a line in results/family.jsonl has the
recipe's parts, the scores and the header. A trial that stands there is not repeated. Losses and scores do not depend on
what else the machine does; seconds do.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import common
from bench.common import RESULTS, do_missing, load_trained, markdown, read_lines, smollm2
from bench.common import write_rows as _rows
from qvera.adapters import methods
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import build_datasets
from qvera.evaluation import held_out
from qvera.evaluation.metrics import scores_of, text_metrics

LINES = RESULTS / "family.jsonl"
SEEDS = (0, 1, 2)
RATES = tuple(10**power for power in (-0.75, -0.25, 0.25, 0.75))
"""What a method's own rate is multiplied with."""

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora r=16": ({"method": "lora", "rank": 16}, 4e-3),
    "vera": ({"rank": 256}, 0.1),
    "lora r=1": ({"method": "lora", "rank": 1}, 1.6e-2),
    "shared-core": ({"method": "shared-core", "rank": 32}, 2e-2),
    "lora-xs": ({"method": "lora-xs", "rank": 32}, 4e-3),
    "vera, two b and an a": ({"rank": 96, "b_groups": 2, "input_scale": True}, 0.1),
    "dvora": ({"rank": 256, "magnitude": True}, 3e-2),
    "lora-sb": ({"method": "lora-sb", "rank": 32}, 1e-3),
    "spiel": ({"method": "spiel", "rank": 1}, 4e-3),
    "lorta": ({"method": "lorta", "rank": 70}, 1e-2),
    "sara": ({"method": "sara", "rank": 256}, 0.1),
}
"""Label → adapter section with about 0.2 million trained numbers (the recommended preset: 0.48; LoRA r=16: 4.9), and a
learning rate to search around. Most telling first."""

TASKS = {"e2e": ("bleu-lowercase", "E2E, BLEU"), "trec": ("accuracy", "TREC, %")}
"""Task → its score in a line, and its title."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training. ``final`` ones are scored on the test rows."""

    method: str
    task: str
    learning_rate: float
    steps: int
    seed: int = 0
    final: bool = False


def _flat(inputs: Iterable[tuple[str, list[str]]]) -> list[dict[str, str]]:
    """A row for each reference of an input."""
    return [{"prompt": mr, "completion": ref} for mr, refs in inputs for ref in refs]


def prepare(task: str, data: Path, to: Path) -> dict[str, Any]:
    """Write a task's rows to ``to``: the data section of a recipe, and ``test``, the rows that score.

    A tenth of the training rows (of E2E: of its inputs, two texts each) is held out to choose with.
    """
    shuffle = random.Random(f"qvera family {task}")
    if task == "e2e":
        inputs: dict[str, list[str]] = {}
        test: dict[str, list[str]] = {}
        for name, found in (("devset.csv", inputs), ("testset_w_refs.csv", test)):
            with (data / "e2e" / name).open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    found.setdefault(row["mr"], []).append(row["ref"])
        held = set(shuffle.sample(sorted(inputs), len(inputs) // 10))
        return {
            "path": _rows(to / "train.jsonl", _flat((m, r) for m, r in inputs.items() if m not in held)),
            "eval_path": _rows(to / "held.jsonl", _flat((m, r[:2]) for m, r in inputs.items() if m in held)),
            "test": _rows(to / "test.jsonl", _flat((m, r[:1]) for m, r in test.items())),
            "references": list(test.values()),
            "system": "Say what the list says in one or two sentences.",
            "max_length": 256,
        }
    directory = data / "text_classification"
    rows, test_rows = (
        [
            {"prompt": row["question"], "completion": row["label"]}
            for row in read_lines(directory / f"trec_{part}.jsonl")
        ]
        for part in ("train", "test")
    )
    shuffle.shuffle(rows)
    cut = min(250, len(rows) // 10)
    return {
        "path": _rows(to / "train.jsonl", rows[cut:]),
        "eval_path": _rows(to / "held.jsonl", rows[:cut]),
        "test": _rows(to / "test.jsonl", test_rows),
        "system": "Answer with the label alone.",
        "max_length": 256,
    }


def recipe_of(trial: Trial, data: dict[str, Any], run: Path) -> Recipe:
    keys = {key: value for key, value in data.items() if key not in ("test", "references")}
    adapter = {**METHODS[trial.method][0], "seed": trial.seed}
    training = {
        "output_dir": str(run), "max_steps": trial.steps, "global_batch_size": 8, "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16, "learning_rate": trial.learning_rate, "seed": trial.seed, "sample_count": 0,
        "gradient_checkpointing": False, "save_steps": 1000, "report_to": [],
    }  # fmt: skip
    model = {"path": smollm2(), "compute_dtype": "bfloat16"}  # auto would be another one on another CPU
    tree = {"model": model, "data": {**keys, "seed": trial.seed}, "adapter": adapter, "training": training}
    return parse_recipe(tree, "bench/family.py")


def scores(trial: Trial, recipe: Recipe, data: dict[str, Any]) -> dict[str, float]:
    """What the trained adapter scores on the test rows."""
    base, model = load_trained(recipe)
    rows = build_datasets(recipe.data.replace(eval_path=data["test"]), base.tokenizer)
    tokens = 80 if trial.task == "e2e" else 8
    answers = held_out.answer_rows(model, base.tokenizer, rows.eval, max_new_tokens=tokens, batch_size=42)
    if trial.task != "e2e":
        return {"accuracy": 100 * statistics.mean(bool(row["exact"]) for row in answers)}
    said = [" ".join(row["answer"].split()) for row in answers]
    return scores_of(text_metrics(["bleu-lowercase", "rougeL", "chrf", "ter"]), said, data["references"])


def lines() -> list[dict[str, Any]]:
    return read_lines(LINES)


def best_rate(method: str, task: str) -> float | None:
    """The rate with the lowest held-out loss, where all four were tried."""
    tried = (x for x in lines() if (x["method"], x["task"], x["final"]) == (method, task, False))
    return common.best_rate(tried, len(RATES))


def plan() -> Iterator[Trial]:
    """All trials. A final one follows from the rates tried before it; further seeds come after all methods had one."""
    known = [name for name, (adapter, _) in METHODS.items() if adapter.get("method", "vera") in methods.names()]
    each = [(task, method) for task in TASKS for method in known]
    for task, method in each:
        for factor in RATES:
            yield Trial(method, task, float(f"{METHODS[method][1] * factor:.2g}"), 50)
        yield from _finals(method, task, SEEDS[0])
    for seed in SEEDS[1:]:
        for task, method in each:
            yield from _finals(method, task, seed)


def _finals(method: str, task: str, seed: int) -> Iterator[Trial]:
    """The final trial of a method whose rates were tried."""
    if (rate := best_rate(method, task)) is not None:
        yield Trial(method, task, rate, 150, seed, True)


def final_scores(task: str, score: str) -> dict[str, list[float]]:
    """Method → the score of each seed whose trial did not diverge."""
    found: dict[str, list[float]] = {}
    for line in lines():
        if line["task"] == task and line["final"] and line["scores"]:
            found.setdefault(line["method"], []).append(line["scores"][score])
    return found


def do(trial: Trial, data_dir: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory)
        data = prepare(trial.task, data_dir, to)
        recipe = recipe_of(trial, data, to / "run")
        facts = common.train_facts(recipe, to / "run")
        return {
            "adapter": METHODS[trial.method][0],
            **facts,
            "scores": scores(trial, recipe, data) if trial.final and not common.diverged(facts) else None,
        }


def finals() -> dict[str, dict[str, Any]]:
    """Method → a line of a final trial: the last one, of those that did not diverge where there is one."""
    return {line["method"]: line for line in sorted(lines(), key=lambda x: bool(x["scores"])) if line["final"]}


def table() -> str:
    """The finals as Markdown: mean over the seeds, lowest and highest; loss, CPU seconds and memory of those on E2E.

    CPU seconds are those of the fastest seed, since other work on the machine adds to them.
    """
    found = {task: final_scores(task, score) for task, (score, _) in TASKS.items()}
    rows = []
    for method, line in sorted(finals().items(), key=lambda item: int(item[1]["trained"])):
        cells = [method, f"{line['trained']:,}", f"{line['file_bytes'] / 1000:,.0f}" if line["file_bytes"] else ""]
        for task in TASKS:
            ended = [x for x in lines() if (x["method"], x["task"], x["final"]) == (method, task, True)]
            cells.append(common.mean_and_range(found[task].get(method, []), 1, sum(map(common.diverged, ended))))
        costs = [x for x in lines() if (x["method"], x["task"], x["final"]) == (method, "e2e", True)]
        losses = [x["held_out_loss"] for x in costs if not common.diverged(x)]
        cells.append(common.mean_and_range(losses, 3, len(costs) - len(losses)))
        seconds, peaks = ([x[key] for x in costs if x.get(key)] for key in ("cpu_seconds", "peak_bytes"))
        cells.append(f"{min(seconds):.0f}" if seconds else "")
        cells.append(f"{statistics.median(peaks) / 10**9:.2f}" if peaks else "")
        rows.append(cells)
    labels = [label for _, label in TASKS.values()]
    return markdown(
        ["method", "trained", "file, kB", *labels, "E2E, held-out loss", "E2E run, CPU s", "memory, GB"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("data", type=Path, nargs="?", help="directory with e2e and text_classification")
    parser.add_argument("--only", nargs="*", default=[], help="tasks, methods, or both: these methods on these tasks")
    parser.add_argument("--trials", type=int, help="stop after as many")
    args = parser.parse_args()
    if args.what == "table":
        print(table())
        return
    if args.data is None:
        parser.error("data: name the directory with the rows")
    if unknown := [name for name in args.only if name not in TASKS and name not in METHODS]:
        parser.error(f"--only {unknown[0]}: is no task ({', '.join(TASKS)}) and no method ({', '.join(METHODS)})")
    tasks, named = ([name for name in args.only if name in known] for known in (TASKS, METHODS))

    def chosen() -> Iterator[Trial]:
        return (t for t in plan() if t.task in (tasks or TASKS) and t.method in (named or METHODS))

    do_missing(LINES, Trial, chosen, functools.partial(do, data_dir=args.data), args.trials)


if __name__ == "__main__":
    main()
