"""Many adapters trained together against one after the other: SmolLM2-135M in NF4, one process, base kept loaded.

They are VeRA of rank 256, or with ``--lora`` LoRA of that rank.

    python bench/many.py [--adapters 64] [--rows 100] [--rounds 6] [--lora 8] [--result many]

Three pairs, interleaved, each in the state that `qvera train` brings a run into:

- ``short steps``: an adapter's step has 4 rows. Together, a pass has 32 rows of 8 adapters (`ManyTrainer.take_turn`).
  Alone, an adapter takes its steps one after the other (`AloneLoop.train_step`). What loading the next adapter
  takes is not counted, which favours those alone.
- ``full batches``: a step has 32 rows, so a pass is full with one adapter. Together, a round has one adapter.

``adapters_per_hour`` is 3600 / (seconds of an adapter's step · steps of one epoch over its rows). ``ratio`` is together
over alone. User CPU seconds are given beside wall-clock seconds: other processes change them less. ``bank_bytes`` is
what the bank and its optimizer hold for each trained number and adapter in flight.
"""

from __future__ import annotations

import argparse
import csv
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.common import header, smollm2, write_result
from qvera.config.schema import Recipe, parse_recipe
from qvera.distributed.group import ALONE
from qvera.training.alone import Trainer
from qvera.training.many import ManyTrainer
from qvera.training.session import TrainingSession

THINGS = "chair table lamp door window bottle book train boat garden ladder kettle".split()
LOOKS = "red blue green small large old new quiet bright heavy".split()
LINKS = ("stands near", "was found behind", "is cheaper than", "looks like", "belongs to")


def write_rows(path: Path, adapters: int, rows: int) -> None:
    """A CSV of short sentences; an adapter's are about its own two things."""
    chooser = random.Random("qvera many")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "text"])
        for number in range(adapters):
            own = chooser.sample(THINGS, 2)
            for _ in range(rows):
                sentences = (
                    f"The {chooser.choice(LOOKS)} {own[0]} {chooser.choice(LINKS)} the {chooser.choice(LOOKS)} {own[1]}."
                    for _ in range(chooser.randint(1, 4))
                )
                writer.writerow([f"customer {number}", " ".join(sentences)])


def recipe_of(path: Path, to: Path, step_rows: int, pass_rows: int, many: bool, lora: int | None) -> Recipe:
    return parse_recipe(
        {
            "model": smollm2(),
            "data": {"path": str(path), **({"adapter_column": "customer"} if many else {})},
            "adapter": {"rank": 256} if lora is None else {"method": "lora", "rank": lora},
            "training": {
                "output_dir": str(to), "global_batch_size": step_rows, "per_device_train_batch_size": pass_rows,
                "num_train_epochs": 100, "learning_rate": 4e-3 if lora is None else 2e-4, "save_steps": 10**6, "report_to": [], "try_longest_batch": False,
                "sample_count": 0, "gradient_checkpointing": False,
            },
        },
        "bench/many.py",
    )  # fmt: skip


class Side:
    """One way of training; ``take`` takes a round or as many steps as a round has, and counts the adapters' steps."""

    def __init__(self, session: ManyTrainer | Trainer, take: Callable[[], int]) -> None:
        self.session, self.take = session, take
        self.wall: list[float] = []
        self.user: list[float] = []

    def run(self, count: bool) -> None:
        began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
        steps = self.take()
        if count:
            self.wall.append((time.perf_counter() - began) / steps)
            self.user.append((resource.getrusage(resource.RUSAGE_SELF).ru_utime - used) / steps)


def opened(kind: type[Trainer] | type[ManyTrainer], recipe: Recipe, to: Path) -> Any:
    trainer = kind(TrainingSession(recipe, to, ALONE, Console(quiet=True)))
    trainer.load_data()
    trainer.session.load_model()
    trainer.setup()
    trainer.session.model.train()
    return trainer


def measure(rows: Path, to: Path, step_rows: int, rounds: int, rows_each: int, lora: int | None) -> dict[str, Any]:
    one_adapter = to / "one.csv"
    lines = rows.read_text(encoding="utf-8").splitlines()
    one_adapter.write_text("\n".join(lines[: rows_each + 1]) + "\n", encoding="utf-8")
    many = opened(ManyTrainer, recipe_of(rows, to / "together", step_rows, 32, True, lora), to / "together")
    alone = opened(Trainer, recipe_of(one_adapter, to / "alone", step_rows, step_rows, False, lora), to / "alone")
    bank = many.loop.bank
    in_flight = bank.slots

    def together() -> int:
        before = sum(run.state.step for run in many.runs)
        many.take_turn()
        return sum(run.state.step for run in many.runs) - before

    def one_after_the_other() -> int:
        for _ in range(in_flight):
            alone.loop.train_step()
        return in_flight

    class _Silent:
        def move(self, *_: object) -> None: ...

    many.progress = _Silent()
    sides = {"together": Side(many, together), "alone": Side(alone, one_after_the_other)}
    for number in range(rounds + 1):
        for side in sides.values():
            side.run(count=number > 0)
        print(f"round {number} of {rounds}", flush=True)
    numbers = bank.trained_numbers
    bank_bytes = 4 * (bank.vectors.numel() + bank.gradients.numel() + 2 * many.loop.adamw.first.numel())
    steps = -(-rows_each // step_rows)
    found: dict[str, Any] = {
        "step_rows": step_rows,
        "adapters_in_flight": in_flight,
        "bank_bytes_per_number_and_adapter": bank_bytes / numbers / in_flight,
        "plan_bytes": {n: None if (p := s.session.session.plan) is None else p.needed_bytes for n, s in sides.items()},
    }
    for unit in ("wall", "user"):
        seconds = {name: getattr(side, unit) for name, side in sides.items()}
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        found[f"{unit}_seconds_of_a_step"] = seconds
        found[f"{unit}_adapters_per_hour"] = {name: 3600 / (s * steps) for name, s in medians.items()}
        found[f"{unit}_ratio"] = medians["alone"] / medians["together"]
    for side in sides.values():
        side.session.session.resources.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--lora", type=int, help="LoRA of this rank")
    parser.add_argument("--result", default="many")
    args = parser.parse_args()
    document: dict[str, Any] = {**header(), "adapters": args.adapters, "rows": args.rows, "lora": args.lora}
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.csv"
        write_rows(rows, args.adapters, args.rows)
        for name, step_rows in (("short steps", 4), ("full batches", 32)):
            to = Path(directory) / name.replace(" ", "-")
            to.mkdir()
            document[name] = measure(rows, to, step_rows, args.rounds, args.rows, args.lora)
            print(name, {k: round(v, 3) for k, v in document[name].items() if k.endswith("ratio")}, flush=True)
    print(write_result(args.result, document))


if __name__ == "__main__":
    main()
