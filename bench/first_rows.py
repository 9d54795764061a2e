"""The table of docs/benchmarks.md on rows of one's own: `qvera init`, `train` and `eval` as they stand, beside TF-IDF with logistic regression.

    python -m bench.first_rows --data ../shared/data/text_classification [--jobs csv pairs] [--sets sst2 trec]
    python -m bench.first_rows --table

Each trial is a directory with a file of rows, in which the three commands run. Jobs: ``csv``, 300 rows of a text and its label,
the label being the answer; ``chat``, the same as conversations with a system prompt that names the labels; ``classifier``, 600
rows and a head; ``pairs``, 48 prompts with the right label as the better answer and another as the worse. All are scored on 200
rows that no command of the training saw: the share of right answers, of pairs the share whose better answer is the likelier.
``--set KEY=VALUE`` is given to `qvera train`, to try other settings than those that `init` writes. SST-2 and TREC are for
choosing; SUBJ and RTE say what the choice is worth. One line a trial in results/first_rows.jsonl; it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from bench.common import RESULTS, do_missing, markdown, read_lines, smollm2, train_records, write_rows
from qvera.config.schema import read_yaml
from qvera.utils.files import read_json

LINES = RESULTS / "first_rows.jsonl"
TEST_ROWS = 200
JOBS = {"csv": 300, "chat": 300, "classifier": 600, "pairs": 48}
"""Job → rows to train on, of which `init` holds some out."""
SETS = {
    "sst2": ("sst2_train.jsonl", "sst2_dev.jsonl", ("sentence",)),
    "trec": ("trec_train.jsonl", "trec_test.jsonl", ("question",)),
    "subj": ("subj_train.jsonl", "subj_test.jsonl", ("sentence",)),
    "rte": ("rte_train.jsonl", "rte_dev.jsonl", ("premise", "hypothesis")),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run. ``changes``: what was set beside what `init` wrote."""

    job: str
    rows_of: str
    seed: int = 0
    changes: str = ""


def read_set(data: Path, name: str, seed: int, train_rows: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows with a ``text`` and a ``label``: to train on, drawn by the seed, and to score with, always the same."""
    train_file, test_file, columns = SETS[name]

    def rows_of(file: str, count: int, chosen_by: int) -> list[dict[str, str]]:
        lines = read_lines(data / file)
        picked = random.Random(chosen_by).sample(lines, count)
        return [{"text": " | ".join(row[column] for column in columns), "label": row["label"]} for row in picked]

    return rows_of(train_file, train_rows, seed), rows_of(test_file, TEST_ROWS, 0)


def write_job(job: str, rows: Sequence[dict[str, str]], labels: Sequence[str], seed: int, to: Path) -> str:
    """Write rows in the form of the job. Returns the file's path."""
    if job in ("csv", "classifier"):
        with to.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
        return str(to.with_suffix(".csv"))
    if job == "chat":
        system = {"role": "system", "content": f"Answer with one of these words: {', '.join(labels)}."}
        turns = lambda row: [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]  # noqa: E731
        return write_rows(to.with_suffix(".jsonl"), ({"messages": [system, *turns(row)]} for row in rows))
    chooser = random.Random(seed)
    worse = [chooser.choice([label for label in labels if label != row["label"]]) for row in rows]
    pairs = zip(rows, worse, strict=True)
    return write_rows(
        to.with_suffix(".jsonl"),
        ({"prompt": row["text"], "chosen": row["label"], "rejected": other} for row, other in pairs),
    )


def tf_idf(train: Sequence[dict[str, str]], test: Sequence[dict[str, str]]) -> float:
    """The share of test rows that logistic regression over TF-IDF labels right."""
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    classifier.fit([row["text"] for row in train], [row["label"] for row in train])
    return float(classifier.score([row["text"] for row in test], [row["label"] for row in test]))


def command(directory: Path, *arguments: str) -> float:
    """Run qvera in the directory. Returns its CPU seconds."""
    began = psutil.Process().cpu_times()
    done = subprocess.run([sys.executable, "-m", "qvera", *arguments], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"qvera {' '.join(arguments)}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    ended = psutil.Process().cpu_times()
    return ended.children_user + ended.children_system - began.children_user - began.children_system


SCORE = {"csv": "exact_match", "chat": "exact_match", "classifier": "accuracy", "pairs": "rewards/accuracies"}
"""Job → the score of `qvera eval` that is compared."""


def do(trial: Trial, base: str, data: Path) -> dict[str, Any]:
    train, test = read_set(data, trial.rows_of, trial.seed, JOBS[trial.job])
    labels = sorted({row["label"] for row in train})
    options = {
        "csv": ["--prompt-column", "text", "--answer-column", "label"],
        "classifier": ["--task", "sequence-classification"],
        "pairs": ["--objective", "dpo"],
    }.get(trial.job, [])
    changes = [part for change in trial.changes.split() for part in ("--set", change)]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        rows = write_job(trial.job, train, labels, trial.seed, directory / "rows")
        held_back = write_job(trial.job, test, labels, trial.seed, directory / "test")
        command(directory, "init", "my.yaml", "--model", base, "--data", rows, *options)
        seeds = ["--set", f"training.seed={trial.seed}", "--set", f"data.seed={trial.seed}"]
        used = command(directory, "train", "my.yaml", *seeds, "--set", f"adapter.seed={trial.seed}", *changes)
        answers = ["--with-base", "--max-new-tokens", "12"] if trial.job in ("csv", "chat") else []
        used_to_score = command(directory, "eval", "runs/my", "--data", held_back, *answers, "--json", "eval.json")
        evaluated = json.loads((directory / "eval.json").read_text())
        run = read_json(directory / "runs" / "my" / "run.json", "a run's record")
        steps = len(train_records(directory / "runs" / "my"))
        recipe: Any = read_yaml((directory / "my.yaml").read_text(), "my.yaml")[0]
    return {
        "recipe": {"adapter": recipe["adapter"], "training": recipe["training"]},
        "steps": steps,
        "trained": run["adapter"]["trainable_parameters"],
        "scores": {
            "trained": evaluated["scores"][SCORE[trial.job]],
            "base": (evaluated["base_scores"] or {}).get("exact_match"),
        },
        "tf_idf": None if trial.job == "pairs" else tf_idf(train, test),
        "train_cpu_seconds": used,
        "eval_cpu_seconds": used_to_score,
    }


def plan(args: argparse.Namespace) -> Iterator[Trial]:
    """Seed by seed, so that a table that is cut off has all jobs."""
    for seed in range(args.seeds):
        for job in args.jobs:
            for rows_of in args.sets:
                yield Trial(job, rows_of, seed, " ".join(args.set))


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each job, set and change, with the mean of the seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["job"], line["rows_of"], line["changes"]), []).append(line)

    def shown(values: list[float | None]) -> str:
        known = [100 * value for value in values if value is not None]
        return f"{statistics.mean(known):.1f} ({' '.join(f'{value:.0f}' for value in known)})" if known else ""

    rows = []
    for (job, rows_of, changes), found in sorted(groups.items()):
        columns = [shown([line["scores"][model] for line in found]) for model in ("trained", "base")]
        cost = f"{statistics.mean(line['train_cpu_seconds'] for line in found):.0f}"
        rows.append(
            [job, rows_of, changes or "as init writes it", *columns, shown([line["tf_idf"] for line in found]), cost]
        )
    titles = ("job", "rows", "recipe", "trained, %", "base, %", "TF-IDF, %", "CPU s of training")
    return markdown(titles, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the directory with the sets")
    parser.add_argument("--base", help="a checkpoint (default: the quickstart's)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--trials", type=int, help="stop after as many")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        base = args.base or smollm2()
        do_missing(LINES, Trial, lambda: plan(args), lambda trial: do(trial, base, args.data.resolve()), args.trials)
    print(table(read_lines(LINES)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
