"""Scikit-learn's digits: a small ViT that was trained on 0 to 4 learns 5 to 9, by VeRA, by LoRA, whole, and by its head.

    pip install 'qvera[vision]'
    python bench/digits.py          # writes bench/results/digits.jsonl, a line for each run; a few CPU minutes
    python bench/digits.py --table  # shows it

The images are 8 x 8 pixels, 16 patches. Each seed draws the rows of training, validation and test, and trains its own
base from scratch by plain torch on the training rows of 0 to 4. VeRA and LoRA are `qvera train` on its 4-bit copy;
training the whole model, and its head alone, are plain torch in fp32. The rate of each is the best of four on seed 0's
validation rows, and its test rows are scored with that rate. Rows, steps, schedule and optimizer are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bench.common import RESULTS, best_rate, do_missing, mean_and_range, read_lines
from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from qvera.utils.files import read_json

FILE = RESULTS / "digits.jsonl"
SEEDS = (0, 1, 2)
RATES = {
    "head": (1e-2, 3e-2, 1e-1, 3e-1),
    "vera": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
}
"""Of the head alone, of the adapter's tensors, of all weights."""
ADAPTERS: dict[str, dict[str, Any]] = {"vera": {"rank": 64}, "lora": {"method": "lora", "rank": 16}}
HEAD_RATE = 1e-2
"""Of the head beside an adapter."""
STEPS, BATCH, WARMUP = 300, 32, 0.1
BASE_STEPS, BASE_RATE = 600, 1e-3
SIZE = 8


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run; ``split`` is what it is scored on: ``validation`` for a rate, ``test`` for the result."""

    method: str
    learning_rate: float
    seed: int
    split: str


def plan() -> Iterator[Trial]:
    """All rates on seed 0's validation rows, then the best one on every seed's test rows."""
    for method, rates in RATES.items():
        yield from (Trial(method, rate, 0, "validation") for rate in rates)
        tried = [line for line in read_lines(FILE) if (line["method"], line["split"]) == (method, "validation")]
        best = best_rate(tried, len(rates))
        if best is not None:
            yield from (Trial(method, best, seed, "test") for seed in SEEDS)


@dataclasses.dataclass(frozen=True)
class Split:
    """Pixels fp32 [n, 8, 8] from 0 to 1, and classes int64 [n]."""

    pixels: np.ndarray
    labels: np.ndarray

    def write(self, directory: Path) -> str:
        """The images as files, a folder for each class."""
        for number, (image, label) in enumerate(zip(self.pixels, self.labels, strict=True)):
            (directory / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(image * 255).astype(np.uint8)).save(directory / str(label) / f"{number:04}.png")
        return str(directory)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As the image processor makes them: RGB, bytes, scaled to -1 .. 1; classes from 0."""
        values = torch.from_numpy(np.round(self.pixels * 255).astype(np.float32) / 255 * 2 - 1)
        return values[:, None].repeat(1, 3, 1, 1), torch.from_numpy(self.labels % 5)


def splits(seed: int, first: int) -> dict[str, Split]:
    """Training (60 %), validation and test rows of the classes ``first`` to ``first`` + 4."""
    digits = load_digits()
    rows = np.flatnonzero((digits.target >= first) & (digits.target < first + 5))
    rows = np.random.default_rng(seed).permutation(rows)
    cuts = [round(len(rows) * share) for share in (0.6, 0.8)]
    parts = zip(("train", "validation", "test"), np.split(rows, cuts), strict=True)
    return {
        name: Split((digits.images[part] / 16).astype(np.float32), digits.target[part].astype(np.int64))
        for name, part in parts
    }


@functools.cache
def base(seed: int) -> Path:
    """A ViT trained from scratch on 0 to 4."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
        patch_size=2, num_labels=5, id2label={number: str(number) for number in range(5)},
    )  # fmt: skip
    model, rows = ViTForImageClassification(config), splits(seed, 0)
    fit(model, list(model.parameters()), rows["train"], BASE_RATE, BASE_STEPS, seed)
    print(f"base of seed {seed}: {score(model, rows['test'])} on digits 0 to 4")
    directory = Path(tempfile.mkdtemp(prefix="digits-")) / "base"
    model.save_pretrained(directory)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(directory)
    return directory


def fit(model: Any, trained: list[torch.nn.Parameter], rows: Split, rate: float, steps: int, seed: int) -> None:
    """Plain torch: AdamW without decay, a linear warmup and decay, as the recipe of the adapters has them."""
    pixels, labels = rows.tensors()
    generator = torch.Generator().manual_seed(seed)
    optimizer, warmup = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), max(1, math.ceil(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if not len(order):
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(model(pixel_values=pixels[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def score(model: Any, rows: Split) -> dict[str, float]:
    pixels, labels = rows.tensors()
    logits = model.eval()(pixel_values=pixels).logits
    accuracy = (logits.argmax(1) == labels).double().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(accuracy)}


def do(trial: Trial) -> dict[str, Any]:
    """Train and score one trial."""
    rows = splits(trial.seed, 5)
    found = by_qvera(trial, rows) if trial.method in ADAPTERS else by_torch(trial, rows)
    about = {"steps": STEPS, "batch_rows": BATCH, "train_rows": len(rows["train"].labels)}
    scores = {"accuracy": found.pop("accuracy")}
    return {"held_out_loss": found.pop("loss"), "scores": scores, **found, **about}


def by_qvera(trial: Trial, rows: dict[str, Split]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        tree = {
            "task": "image-classification",
            "model": {"path": str(base(trial.seed)), "compute_dtype": "float32"},
            "adapter": {**ADAPTERS[trial.method], "seed": trial.seed},
            "data": {
                "path": rows["train"].write(place / "train"),
                "eval_path": rows[trial.split].write(place / "held-out"),
                "seed": trial.seed,
            },
            "training": {
                "max_steps": STEPS, "global_batch_size": BATCH, "per_device_train_batch_size": BATCH,
                "per_device_eval_batch_size": 200, "learning_rate": trial.learning_rate,
                "head_learning_rate": HEAD_RATE, "warmup_ratio": WARMUP, "save_steps": STEPS, "seed": trial.seed,
                "report_to": [],
            },
        }  # fmt: skip
        train(parse_recipe(tree, "digits"), place / "run")
        run = read_json(place / "run" / "run.json", "a run")
    after, adapter = run["result"]["eval_after"], run["adapter"]
    counts = {"parameters": adapter["trainable_parameters"], "head_parameters": adapter["head_parameters"]}
    return {"loss": after["loss"], "accuracy": after["accuracy"], **counts, "file_bytes": adapter["file_bytes"]}


def by_torch(trial: Trial, rows: dict[str, Split]) -> dict[str, Any]:
    torch.manual_seed(trial.seed)
    model = ViTForImageClassification.from_pretrained(base(trial.seed))
    model.classifier.reset_parameters()  # a new head, as the adapters get
    trained = list(model.parameters() if trial.method == "full" else model.classifier.parameters())
    fit(model, trained, rows["train"], trial.learning_rate, STEPS, trial.seed)
    head = sum(p.numel() for p in model.classifier.parameters())
    counts = {"parameters": sum(p.numel() for p in trained) - head, "head_parameters": head, "file_bytes": None}
    return {**score(model, rows[trial.split]), **counts}


def table() -> str:
    """The test scores as a Markdown table."""
    lines = [
        "| trained | parameters, without the head | rate | accuracy on 5 to 9, three seeds | loss |",
        "|---|---|---|---|---|",
    ]
    for method in RATES:
        found = [line for line in read_lines(FILE) if (line["method"], line["split"]) == (method, "test")]
        if found:
            accuracy = mean_and_range([100 * line["scores"]["accuracy"] for line in found], 1)
            loss = statistics.mean(line["held_out_loss"] for line in found)
            rate = found[0]["learning_rate"]
            lines.append(f"| {method} | {found[0]['parameters']:,} | {rate:g} | {accuracy} | {loss:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="show the table of what was run")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        do_missing(FILE, Trial, plan, do)
    print(table())
