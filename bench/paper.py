"""The VeRA paper's tables (arXiv 2310.11454) by the recipes in recipes/, beside the paper's figures.

    python -m bench.paper run glue-base                     # or glue-large, e2e, vision-base, vision-large; goes on where it stopped
    python -m bench.paper run glue-base --only rte mrpc --seeds 0 1 2
    python -m bench.paper run glue-base --set model.quantization=nf4 --lines mine.jsonl
    python -m bench.paper table                             # what is there, beside the paper's figures, as Markdown

`run` trains each recipe of a table with each seed and writes a line in results/paper.jsonl. It needs the hub, and a GPU for
more than a try. The score of a classification is that of the best epoch, and a table shows the median of the seeds, as in the paper. The
recipes of images score their test split once, after the last epoch. E2E is decoded greedily and scored by sacrebleu and rouge-score, where the paper has a beam of 10 and the challenge's script.
The instruction-tuning recipes (recipes/instruct/) are not in it: MT-Bench needs its questions and GPT-4 as a judge; `qvera eval
--judge` compares such runs with any judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shlex
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import common
from bench.common import RESULTS, ROOT, do_missing, markdown, read_lines
from qvera.config.schema import Recipe, load_recipe
from qvera.utils.files import read_json

LINES = RESULTS / "paper.jsonl"
SEEDS = (0, 1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables.

    Attributes:
        recipe: its file in recipes/, without the suffix.
        trained: numbers that VeRA trains, without the head, as counted from shapes.
        scores: our name of each score → the paper's figure for VeRA, in percent but for losses.
    """

    recipe: str
    trained: int
    scores: Mapping[str, float]


def _glue(size: str, trained: int, figures: Mapping[str, float]) -> dict[str, Row]:
    kinds = {"cola": "matthews", "stsb": "pearson"}
    return {
        task: Row(f"glue/{task}-roberta-{size}", trained, {kinds.get(task, "accuracy"): figure})
        for task, figure in figures.items()
    }


def _vision(size: str, trained: int, figures: Mapping[str, float]) -> dict[str, Row]:
    return {name: Row(f"vision/{name}-vit-{size}", trained, {"accuracy": figure}) for name, figure in figures.items()}


TABLES: dict[str, dict[str, Row]] = {
    "glue-base": _glue(
        "base", 43_008, {"sst2": 94.6, "mrpc": 89.5, "cola": 65.6, "qnli": 91.8, "rte": 78.7, "stsb": 90.7}
    ),
    "glue-large": _glue(
        "large", 61_440, {"sst2": 96.1, "mrpc": 90.9, "cola": 68.0, "qnli": 94.4, "rte": 85.9, "stsb": 91.7}
    ),
    "e2e": {
        "medium": Row("e2e/gpt2-medium", 98_304, {"bleu": 70.1, "rougeL": 71.5}),
        "large": Row("e2e/gpt2-large", 175_104, {"bleu": 70.3, "rougeL": 71.6}),
    },
    "vision-base": _vision("base", 24_576, {"cifar100": 84.8, "food101": 89.0, "flowers102": 99.0, "resisc45": 77.0}),
    "vision-large": _vision("large", 61_440, {"cifar100": 87.5, "food101": 79.2, "flowers102": 99.2, "resisc45": 78.6}),
}
"""Table → row → recipe and figures. The paper counts 165,888 numbers on GPT-2 large, where q and v are adapted apart from k;
here they are one linear, c_attn."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training of a recipe. ``changes`` are those of the command line, KEY=VALUE, quoted as a shell does."""

    recipe: str
    seed: int
    changes: str = ""


def recipe_of(trial: Trial, runs: Path) -> Recipe:
    """The recipe with this trial's seed, which rows, projections, head and dropout follow."""
    seeds = [f"{section}.seed={trial.seed}" for section in ("data", "adapter", "training")]
    digest = [hashlib.sha256(trial.changes.encode()).hexdigest()[:8]] if trial.changes else []
    run = runs / "-".join([*trial.recipe.split("/"), str(trial.seed), *digest])
    changes = [*seeds, f"training.output_dir={run}", *shlex.split(trial.changes)]
    return load_recipe(ROOT / "recipes" / f"{trial.recipe}.yaml", changes)


def best_epoch(run: Path, score: str) -> float:
    """The highest value of a score over all evaluations of a run, in percent; its last one where there are no others."""
    scores = [record for record in read_lines(run / "metrics.jsonl") if record["kind"] == "eval"]
    scores.append(read_json(run / "run.json", "a run's record")["result"]["eval_after"])
    return 100 * max(each[score] for each in scores if each.get(score) is not None)


def e2e_scores(recipe: Recipe, names: list[str]) -> dict[str, float]:
    """Scores of greedy answers to the inputs of the test split, each with all its references, in percent."""
    from qvera.data import build_datasets
    from qvera.evaluation.generate import generate
    from qvera.evaluation.held_out import prompts_of
    from qvera.evaluation.metrics import scores_of, text_metrics

    base, model = common.load_trained(recipe)
    rows = build_datasets(recipe.data.replace(eval_split="test", eval_limit=None), base.tokenizer)
    prompts = prompts_of(rows.eval, group_prompts=True)
    answers = generate(
        model, base.tokenizer, [one.example.prompt_ids.tolist() for one in prompts],
        max_new_tokens=recipe.training.sample_max_new_tokens, batch_size=recipe.training.answer_batch_size,
    )  # fmt: skip
    said = [" ".join(answer.split()) for answer in answers]
    found = scores_of(text_metrics(names), said, [one.references for one in prompts])
    return {name: value if name == "bleu" else 100 * value for name, value in found.items()}


def do(trial: Trial, row: Row, runs: Path) -> dict[str, Any]:
    """Train one recipe, or go on with it, and score it."""
    recipe = recipe_of(trial, runs)
    run = Path(str(recipe.training.output_dir))
    facts = common.train_facts(recipe, run)
    scores = None
    if not common.diverged(facts):
        by_epoch = recipe.task != "causal-lm"
        names = list(row.scores)
        scores = {name: best_epoch(run, name) for name in names} if by_epoch else e2e_scores(recipe, names)
    return {**facts, "scores": scores}


def table(name: str, lines: list[dict[str, Any]]) -> str:
    """One of the paper's tables as Markdown: the median over the seeds, lowest and highest, and the paper's figure."""
    rows = []
    for label, row in TABLES[name].items():
        changes = dict.fromkeys(line["changes"] for line in lines if line["recipe"] == row.recipe)
        for change in changes:
            found = [line for line in lines if (line["recipe"], line["changes"]) == (row.recipe, change)]
            for score, figure in row.scores.items():
                values = [line["scores"][score] for line in found if line["scores"]]
                ours = f"{statistics.median(values):.1f}" if values else "diverged"
                if len(values) > 1:
                    ours += f" ({min(values):.1f} to {max(values):.1f}, {len(values)} seeds)"
                if values and len(values) < len(found):
                    ours += f", {len(found) - len(values)} diverged"
                seconds = statistics.median(line["seconds"] for line in found)
                rows.append(
                    [
                        f"{label}, {score}",
                        change,
                        ours,
                        f"{figure:.1f}",
                        f"{found[0]['trained']:,}",
                        f"{seconds:,.0f}",
                        found[0]["device"],
                    ]
                )
    return markdown(["", "changed", "qvera", "paper", "trained, without head", "seconds", "device"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("name", nargs="?", choices=sorted(TABLES), help="which table; `table` shows all by default")
    parser.add_argument("--only", nargs="*", help="rows of the table")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipes"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs") / "paper", help="directory of the runs")
    parser.add_argument("--lines", type=Path, default=LINES, help="file of the lines")
    args = parser.parse_args()
    if args.what == "table":
        for name in [args.name] if args.name else TABLES:
            print(f"\n{name}\n\n{table(name, read_lines(args.lines))}")
        return
    if args.name is None:
        parser.error(f"name: which table; one of {', '.join(TABLES)}")
    rows = TABLES[args.name]
    if unknown := [name for name in args.only or [] if name not in rows]:
        parser.error(f"--only {unknown[0]}: {args.name} has {', '.join(rows)}")
    of_recipe = {row.recipe: row for name, row in rows.items() if not args.only or name in args.only}

    def plan() -> Iterator[Trial]:
        return (Trial(recipe, seed, shlex.join(args.changes)) for seed in args.seeds for recipe in of_recipe)

    def do_one(trial: Trial) -> dict[str, Any]:
        return do(trial, of_recipe[trial.recipe], args.runs)

    do_missing(args.lines, Trial, plan, do_one)


if __name__ == "__main__":
    main()
