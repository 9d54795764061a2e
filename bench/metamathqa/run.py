"""PEFT's MetaMathQA comparison for the methods of `adapter.method`: all linears, each with a swept learning rate.

    python bench/metamathqa/run.py                        # Llama-3.2-3B from the hub, bfloat16 and NF4; goes on where it stopped
    python bench/metamathqa/run.py --quantization nf4 --methods "vera r=256" "lora r=1"
    python bench/metamathqa/run.py --table                # what is there, beside PEFT's figures, as Markdown
    python bench/metamathqa/run.py --write-recipes DIR    # the recipes, for `qvera plan` and `qvera train` by hand

For each method four learning rates around its usual one are tried for 1,000 steps, and the one with the lowest loss on
200 held-out rows of MetaMathQA is trained for PEFT's 5,000 steps of 4 rows. One that diverges is a line without a loss.
`bilora` is left out: it trains on two levels, for small data. Answers to the 1,319 test questions of
GSM8K are greedy, at most 300 tokens long, and read as PEFT reads them (answers.py). PEFT's base is in bfloat16:
``none`` is that on a GPU, ``nf4`` is this project's. A line in results/metamathqa.jsonl is a trial; one that stands there is
not repeated, and one that was cut off goes on from its checkpoint in ``--runs``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import common
from bench.common import RESULTS, do_missing, markdown, read_lines, write_rows
from bench.metamathqa import rows
from bench.metamathqa.answers import accuracy
from bench.metamathqa.published import PUBLISHED
from bench.trials import MORE
from qvera.adapters import methods
from qvera.config.schema import Recipe, parse_recipe
from qvera.config.sections import ModelSection
from qvera.data import Encoder
from qvera.evaluation.generate import generate
from qvera.models.tokenizer import load_tokenizer

MODEL = "meta-llama/Llama-3.2-3B"
NEW_TOKENS = 300
ANSWERS_AT_ONCE = 50
RATES = tuple(10**power for power in (-0.75, -0.25, 0.25, 0.75))
"""What a method's own rate is multiplied with."""

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "vera r=256": ({"rank": 256}, 1e-2),
    "lora r=1": ({"method": "lora", "rank": 1}, 1e-3),
    "two b and an a": (MORE, 1e-2),
    "vera r=1024": ({"rank": 1024}, 1e-2),
    "eight b and an a": ({**MORE, "b_groups": 8}, 1e-2),
    "lora-xs r=64": ({"method": "lora-xs", "rank": 64}, 4e-3),
    "shared-core r=64": ({"method": "shared-core", "rank": 64}, 4e-3),
    "lora r=32": ({"method": "lora", "rank": 32}, 2e-4),
    "lora r=16": ({"method": "lora", "rank": 16}, 2e-4),
    "dvora r=256": ({"rank": 256, "magnitude": True}, 4e-3),
    "lora-sb r=64": ({"method": "lora-sb", "rank": 64}, 1e-4),
    "sara": ({"method": "sara", "rank": 256}, 1e-2),
    "spiel as r=1": ({"method": "spiel", "rank": 1}, 1e-3),
    "lorta r=64": ({"method": "lorta", "rank": 64}, 1e-2),
    "uni-lora 824k": ({"method": "uni-lora", "rank": 4, "theta_length": 824_320}, 2e-4),
}
"""Label → adapter section, and the learning rate in the middle of those that are tried. Most telling first. On
Llama-3.2-3B vera r=256 trains 824,320 numbers, a core of rank 64 802,816, lora r=1 1,519,616, two b and an a 2,312,576,
eight 6,957,440, lora r=16 24,313,856."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training. ``final`` ones are scored on the test rows."""

    method: str
    model: str
    quantization: str
    learning_rate: float
    steps: int
    seed: int = 0
    final: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says: which trials, and where things lie."""

    model: str
    quantizations: tuple[str, ...]
    methods: tuple[str, ...]
    steps: int
    sweep_steps: int
    seeds: tuple[int, ...]
    lines: Path
    runs: Path
    local_rows: tuple[Path, Path] | None

    def trial(self, method: str, quantization: str, rate: float, seed: int | None = None) -> Trial:
        """A final trial of a seed, or one of the sweep without."""
        steps, final = (self.sweep_steps, False) if seed is None else (self.steps, True)
        return Trial(method, self.model, quantization, rate, steps, seed or 0, final)


def rates(method: str) -> list[float]:
    """The learning rates that are tried for a method."""
    return [float(f"{METHODS[method][1] * factor:.2g}") for factor in RATES]


def plan(settings: Settings) -> Iterator[Trial]:
    """All trials. A method's final ones follow from its sweep; further seeds come after all methods had one."""
    for quantization in settings.quantizations:
        for method in settings.methods:
            yield from (settings.trial(method, quantization, rate) for rate in rates(method))
            if (best := best_rate(settings, method, quantization)) is not None:
                yield from (settings.trial(method, quantization, best, seed) for seed in settings.seeds[:1])
    for seed in settings.seeds[1:]:
        for quantization in settings.quantizations:
            for method in settings.methods:
                if (best := best_rate(settings, method, quantization)) is not None:
                    yield settings.trial(method, quantization, best, seed)


def best_rate(settings: Settings, method: str, quantization: str) -> float | None:
    """The rate with the lowest held-out loss, where all were tried on this base."""
    sweep = {dataclasses.astuple(settings.trial(method, quantization, rate)) for rate in rates(method)}
    names = [field.name for field in dataclasses.fields(Trial)]
    tried = (line for line in read_lines(settings.lines) if tuple(line[name] for name in names) in sweep)
    return common.best_rate(tried, len(sweep))


def recipe_of(trial: Trial, data: Mapping[str, Any], run: Path) -> Recipe:
    """The recipe of a trial: PEFT's default_training_params.json in our keys.

    Only the weight decay differs, 0 in place of 0.1: at PEFT's rate of 1e-4 that takes 2.5 % of a LoRA in 5,000 steps,
    at VeRA's rates it would take all of d.
    """
    training = {
        "output_dir": str(run), "max_steps": trial.steps, "global_batch_size": rows.BATCH_ROWS,
        "per_device_train_batch_size": rows.BATCH_ROWS, "per_device_eval_batch_size": 8, "max_grad_norm": 1.0,
        "learning_rate": trial.learning_rate, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "seed": trial.seed,
        "save_steps": 500, "save_total_limit": 1, "sample_count": 0, "report_to": [],
    }  # fmt: skip
    tree = {
        "model": {"path": trial.model, "quantization": trial.quantization},
        "data": dict(data),
        "adapter": {**METHODS[trial.method][0], "seed": trial.seed},
        "training": training,
    }
    return parse_recipe(tree, "bench/metamathqa/run.py")


def model_runs(settings: Settings) -> Path:
    """The directory of everything that belongs to one base: its tokenizer sorts the rows."""
    digest = hashlib.sha256(settings.model.encode()).hexdigest()[:8]  # two bases may have one name
    return settings.runs / f"{Path(settings.model).name}-{digest}"


def prepared(settings: Settings) -> dict[str, Any]:
    """The data section of all trials; the rows are written anew, from the hub or ``--local-rows``.

    A sweep trains the first of them, so that all trials have the same held-out rows.
    """
    train, test = rows.hub_rows() if settings.local_rows is None else map(rows.file_rows, settings.local_rows)
    steps = max(settings.steps, settings.sweep_steps)
    tokenizer = load_tokenizer(ModelSection(path=settings.model))
    return rows.prepare(model_runs(settings) / f"rows-{steps}", train, test, tokenizer, steps)


def score(recipe: Recipe, run: Path) -> float:
    """GSM8K's accuracy in percent with the adapter of a finished run; the answers are kept in its answers.jsonl."""
    base, model = common.load_trained(recipe)
    encoder, questions = Encoder(base.tokenizer), rows.questions(Path(recipe.data.path).parent)
    answers = generate(
        model, base.tokenizer, [encoder.encode_prompt(row.prompt) for row in questions],
        max_new_tokens=NEW_TOKENS, batch_size=ANSWERS_AT_ONCE,
    )  # fmt: skip
    texts = [row.prompt + answer for row, answer in zip(questions, answers, strict=True)]
    shown = ({"text": text, "solution": row.solution} for text, row in zip(texts, questions, strict=True))
    write_rows(run / "answers.jsonl", shown)
    return accuracy(texts, [row.solution for row in questions])


def do(trial: Trial, settings: Settings) -> dict[str, Any]:
    """Train and score one trial, in a directory of its own that a second call goes on with."""
    name = "-".join(f"{value}" for value in dataclasses.astuple(trial) if value != trial.model)
    run = model_runs(settings) / name.replace(" ", "_")
    recipe = recipe_of(trial, prepared(settings), run)
    facts = common.train_facts(recipe, run)
    return {
        "adapter": METHODS[trial.method][0],
        **facts,
        "scores": {"gsm8k": score(recipe, run)} if trial.final and not common.diverged(facts) else None,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The finals beside PEFT's figures, best first."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["final"]:
            found.setdefault((line["method"], line["model"], line["quantization"]), []).append(line)
    ours = []
    for (method, model, quantization), seeds in found.items():
        scores = [line["scores"]["gsm8k"] for line in seeds if line["scores"]]
        shown = common.mean_and_range(scores, 1, len(seeds) - len(scores))
        base = f"{Path(model).name}, {'unquantized' if quantization == 'none' else quantization}"
        source = f"{seeds[0]['device']}, {seeds[0]['steps']:,} steps, {seeds[0]['commit']}"
        mean = statistics.mean(scores) if scores else -math.inf
        cells = [method, base, f"{seeds[0]['trained']:,}", f"{seeds[0]['learning_rate']:g}", shown]
        ours.append((mean, [*cells, f"{seeds[0]['peak_bytes'] / 1e9:.1f}", f"{seeds[0]['seconds']:,.0f}", source]))
    theirs = [
        (one.accuracy, [one.label, "Llama-3.2-3B, bfloat16", f"{one.trained:,}", f"{one.learning_rate:g}",
                        f"{one.accuracy:.1f}", "", "", one.source])
        for one in PUBLISHED
    ]  # fmt: skip
    cells_of = [cells for _, cells in sorted([*ours, *theirs], key=lambda row: -row[0])]
    titles = ["method", "base", "trained", "rate", "GSM8K, %", "peak, GB", "seconds", "source"]
    return markdown(titles, cells_of)


def write_recipes(settings: Settings, to: Path) -> None:
    """A recipe for each method with its usual rate, and the rows."""
    to.mkdir(parents=True, exist_ok=True)
    data = prepared(settings)
    for quantization in settings.quantizations:
        for method in settings.methods:
            trial = settings.trial(method, quantization, METHODS[method][1], settings.seeds[0])
            name = f"{method}-{quantization}".replace(" ", "_")
            recipe = recipe_of(trial, data, model_runs(settings) / name)
            (to / f"{name}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def known_methods() -> tuple[str, ...]:
    """Labels of the methods that this version has."""
    return tuple(name for name, (adapter, _) in METHODS.items() if adapter.get("method", "vera") in methods.names())


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a directory or hub id")
    parser.add_argument(
        "--quantization", nargs="+", default=["none", "nf4"], help="of the base: none (bfloat16 on a GPU), nf4, ..."
    )
    parser.add_argument("--methods", nargs="+", choices=known_methods(), default=known_methods(), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--sweep-steps", type=int, default=1000, help="steps of each trial of the learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="PEFT has one")
    parser.add_argument("--trials", type=int, help="stop after as many")
    parser.add_argument("--local-rows", nargs=2, type=Path, metavar=("METAMATHQA", "GSM8K_TEST"),
                        help="JSON Lines files in place of the hub's data sets")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/metamathqa"), help="for rows, checkpoints and answers")
    parser.add_argument("--out", type=Path, default=RESULTS / "metamathqa.jsonl", help="the lines")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write-recipes", type=Path, metavar="DIR")
    args = parser.parse_args(arguments)
    settings = Settings(
        model=args.model, quantizations=tuple(args.quantization), methods=tuple(args.methods), steps=args.steps,
        sweep_steps=args.sweep_steps, seeds=tuple(args.seeds), lines=args.out, runs=args.runs,
        local_rows=None if args.local_rows is None else tuple(args.local_rows),
    )  # fmt: skip
    if args.write_recipes is not None:
        write_recipes(settings, args.write_recipes)
        return
    if not args.table:
        do_missing(args.out, Trial, lambda: plan(settings), functools.partial(do, settings=settings), args.trials)
    print(table(read_lines(args.out)))


if __name__ == "__main__":
    main()
