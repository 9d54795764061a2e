"""Every method of `adapter.method` at an equal budget on SmolLM2-135M in NF4: the table of docs/methods/table.md.

    python bench/family.py run ../shared/data       # goes on where it stopped; --only e2e, --only vera for a part
    python bench/family.py table                    # what is there, as Markdown

`run` takes the trials in the order of `plan`: for each method four learning rates around its own (`RATES`), 50 steps of 8
rows on E2E NLG and TREC, chosen by the loss on held-out rows of the training part; then 150 steps with three seeds on
the same two, scored on the test sets; then RTE and Alpaca for both LoRAs and the four best others, with one seed of
the methods in `FIRST` before anything else. Each trial is
`qvera train` itself with a recipe; a line in results/family.jsonl has the recipe's parts, the scores and the header.
A trial that stands there is not repeated. Losses and scores do not depend on what else the machine does; seconds do.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
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

FIRST = ("lora r=16", "vera", "vera, two b and an a", "lora r=1")
"""They have a line on all four tasks before any other method: the yardsticks, VeRA, and the preset that is in question."""
TASKS = ("e2e", "trec", "rte", "alpaca")
COLUMNS = {
    "e2e": ("bleu-lowercase", "E2E, BLEU", 1),
    "trec": ("accuracy", "TREC, %", 1),
    "rte": ("accuracy", "RTE, %", 1),
    "alpaca": ("loss", "Alpaca, loss (less is better)", 3),
}
"""Task → its score in a line, its title, and the digits that are shown."""

E2E_SCORES = {
    "bleu-lowercase": ("BLEU", 1),
    "rougeL": ("ROUGE-L", 100),
    "chrf": ("chrF", 1),
    "ter": ("TER (less is better)", 1),
}
"""Score of a line on E2E → its title, and what it is multiplied with."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training. ``final`` ones are scored on the test rows."""

    method: str
    task: str
    learning_rate: float
    steps: int
    seed: int = 0
    final: bool = False


def _labelled(file: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a classification as a prompt of these columns and the label as its completion."""
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def prompt(row: dict[str, str]) -> str:
        return row[columns[0]] if len(columns) == 1 else "\n".join(f"{c}: {row[c]}" for c in columns)

    return [{"prompt": prompt(row), "completion": row["label"]} for row in found]


def _flat(inputs: Iterable[tuple[str, list[str]]]) -> list[dict[str, str]]:
    """A row for each reference of an input."""
    return [{"prompt": mr, "completion": ref} for mr, refs in inputs for ref in refs]


def prepare(task: str, data: Path, to: Path) -> dict[str, Any]:
    """Write a task's rows to ``to``: the data section of a recipe, and ``test``, the rows that score.

    A tenth of the training rows (of E2E: of its inputs, two texts each; of Alpaca: 100 rows) is held out to choose with.
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
    if task == "alpaca":
        dealt = json.loads((data / "alpaca_en_demo.json").read_text())
        shuffle.shuffle(dealt)
        parts = {"held": dealt[:100], "test": dealt[100:200], "train": dealt[200:]}
        files = {name: to / f"{name}.json" for name in parts}
        for name, part in parts.items():
            files[name].write_text(json.dumps(part))
        return {
            "path": str(files["train"]),
            "eval_path": str(files["held"]),
            "test": str(files["test"]),
            "max_length": 512,
            "group_by_length": True,  # else half of all tokens would be padding
        }
    columns = ("question",) if task == "trec" else ("premise", "hypothesis")
    directory = data / "text_classification"
    rows = _labelled(directory / f"{task}_train.jsonl", *columns)
    test_rows = _labelled(directory / ("trec_test.jsonl" if task == "trec" else "rte_dev.jsonl"), *columns)
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
    if trial.task == "alpaca":
        found = held_out.held_out_loss(model, rows.eval, pad_id=rows.pad_id, batch_size=4, chunk_tokens=512)
        return {"loss": found["loss"]}
    tokens = 80 if trial.task == "e2e" else 8
    answers = held_out.answer_rows(model, base.tokenizer, rows.eval, max_new_tokens=tokens, batch_size=42)
    if trial.task != "e2e":
        return {"accuracy": 100 * statistics.mean(bool(row["exact"]) for row in answers)}
    said = [" ".join(row["answer"].split()) for row in answers]
    return scores_of(text_metrics(["bleu-lowercase", "rougeL", "chrf", "ter"]), said, data["references"])


def lines() -> list[dict[str, Any]]:
    return read_lines(LINES)


def best_rate(method: str, task: str) -> float | None:
    """The rate with the lowest held-out loss, where all four were tried. RTE takes TREC's, Alpaca that of E2E."""
    task = {"rte": "trec", "alpaca": "e2e"}.get(task, task)
    tried = (x for x in lines() if (x["method"], x["task"], x["final"]) == (method, task, False))
    return common.best_rate(tried, len(RATES))


def plan() -> Iterator[Trial]:
    """All trials, the most telling first. A final one follows from the rates tried before it."""
    known = [name for name, (adapter, _) in METHODS.items() if adapter.get("method", "vera") in methods.names()]
    others = [name for name in known if name not in FIRST]
    for chosen in (FIRST, others):
        for task in TASKS[:2]:
            for method in chosen:
                for factor in RATES:
                    yield Trial(method, task, float(f"{METHODS[method][1] * factor:.2g}"), 50)
                yield from _finals([method], task, SEEDS[0])
        if chosen == FIRST:
            for task in TASKS[2:]:
                yield from _finals(FIRST, task, SEEDS[0])
    for seed in SEEDS[1:]:
        for task in TASKS[:2]:
            yield from _finals([*FIRST, *others], task, seed)
    for seed in SEEDS:
        for task in TASKS[2:]:
            yield from _finals([m for m in known if m.startswith("lora r=")] + best_four(known), task, seed)


def _finals(chosen: Iterable[str], task: str, seed: int) -> Iterator[Trial]:
    """A final trial for each of these methods whose rates were tried."""
    for method in chosen:
        if (rate := best_rate(method, task)) is not None:
            yield Trial(method, task, rate, 150, seed, True)


def best_four(known: list[str]) -> list[str]:
    """Those with the lowest mean of their ranks on E2E and TREC, the LoRAs apart."""
    ranks: dict[str, list[int]] = {}
    for task, score in (("e2e", "bleu-lowercase"), ("trec", "accuracy")):
        found = final_scores(task, score)
        ordered = sorted((m for m in found if not m.startswith("lora r=")), key=lambda m: -statistics.mean(found[m]))
        for place, method in enumerate(ordered):
            ranks.setdefault(method, []).append(place)
    whole = {m: statistics.mean(r) for m, r in ranks.items() if len(r) == 2 and m in known}
    return sorted(whole, key=lambda m: whole[m])[:4]


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
    found = {task: final_scores(task, score) for task, (score, _, _) in COLUMNS.items()}
    rows = []
    for method, line in sorted(finals().items(), key=lambda item: int(item[1]["trained"])):
        cells = [method, f"{line['trained']:,}", f"{line['file_bytes'] / 1000:,.0f}" if line["file_bytes"] else ""]
        for task, (_, _, digits) in COLUMNS.items():
            ended = [x for x in lines() if (x["method"], x["task"], x["final"]) == (method, task, True)]
            cells.append(common.mean_and_range(found[task].get(method, []), digits, sum(map(common.diverged, ended))))
        costs = [x for x in lines() if (x["method"], x["task"], x["final"]) == (method, "e2e", True)]
        losses = [x["held_out_loss"] for x in costs if not common.diverged(x)]
        cells.append(common.mean_and_range(losses, 3, len(costs) - len(losses)))
        seconds, peaks = ([x[key] for x in costs if x.get(key)] for key in ("cpu_seconds", "peak_bytes"))
        cells.append(f"{min(seconds):.0f}" if seconds else "")
        cells.append(f"{statistics.median(peaks) / 10**9:.2f}" if peaks else "")
        rows.append(cells)
    labels = [label for _, label, _ in COLUMNS.values()]
    return markdown(
        ["method", "trained", "file, kB", *labels, "E2E, held-out loss", "E2E run, CPU s", "memory, GB"], rows
    )


def e2e_table() -> str:
    """Every score of the texts of E2E as Markdown: mean over the seeds, lowest and highest."""
    rows = []
    for method, line in sorted(finals().items(), key=lambda item: int(item[1]["trained"])):
        cells = [method, f"{line['trained']:,}"]
        for score, (_, factor) in E2E_SCORES.items():
            found = final_scores("e2e", score).get(method, [])
            cells.append(common.mean_and_range([factor * value for value in found], 1))
        rows.append(cells)
    return markdown(["method", "trained", *(title for title, _ in E2E_SCORES.values())], rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument(
        "data", type=Path, nargs="?", help="directory with e2e, text_classification and alpaca_en_demo.json"
    )
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
