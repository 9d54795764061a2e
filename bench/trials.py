"""One training run of one adapter, ours or stock PEFT's, on the same 4-bit base: what bench/e2e.py and bench/alpaca.py compare.

All methods see the same rows in the same order for the same steps, with the loop's own batches, loss, AdamW, schedule
and clipping; only the adapter differs. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench import candidates
from qvera.adapters.save_load import attach
from qvera.config.schema import Recipe
from qvera.data import Datasets, batches_of, build_datasets
from qvera.evaluation import held_out
from qvera.models.loader import Base, load_base
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.tasks import task_of
from qvera.training.optim import build_schedule

MORE: dict[str, Any] = {"rank": 96, "b_groups": 2, "input_scale": True}
"""The adapter beyond VeRA that came out best on E2E (recipes/e2e), by the recipe's keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried.

    Attributes:
        method: ``frozen`` (no adapter), ``lora`` or ``vera`` (both stock PEFT), ``qvera``, or one of bench/candidates.py.
        b_rate: a rate of its own for what starts at zero: LoRA's B (LoRA+, arXiv 2402.12354), VeRA's b. None:
        `learning_rate`.
        alpha: LoRA's alpha; None: the rank.
        d_initial, b_groups, input_scale: keys of the recipe's adapter section, for ``qvera``. Candidates on bases take
        b_groups too, and with more than one of them an input scale.
        beta2: AdamW's; None: the recipe's.
        head_rate: that of a classifier's head.
        theta_length: for ``qvera``: not VeRA but Uni-LoRA, with so many numbers.
        seed: of the rows' order, LoRA's A and VeRA's projections.
    """

    method: str
    steps: int = 0
    rank: int = 0
    learning_rate: float = 0.0
    b_rate: float | None = None
    alpha: int | None = None
    d_initial: float | None = None
    b_groups: int = 1
    input_scale: bool = False
    theta_length: int | None = None
    targets: str = "all-linear"
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    beta2: float | None = None
    head_rate: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        shown = {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(type(self)(method=""), k)}
        return " ".join([shown.pop("method"), *(f"{k}={v}" for k, v in shown.items())])

    def is_that_of(self, line: dict[str, Any]) -> bool:
        """Whether a line that was written before, perhaps with fewer fields, is this trial's."""
        return {**dataclasses.asdict(type(self)(method="")), **line["trial"]} == dataclasses.asdict(self)

    def adapt(self, base: Base, recipe: Recipe) -> Any:
        """A fresh adapter of this kind on the base."""
        return adapted(base, self, recipe)

    def rate(self, name: str) -> float:
        """The learning rate of the parameter of that name."""
        return {"b": self.b_rate, "head": self.head_rate}.get(self.kind(name)) or self.learning_rate

    def kind(self, name: str) -> str:
        """Of a trained parameter: ``b`` starts at zero (LoRA's B, VeRA's b), ``others`` of an adapter, or ``head``."""
        if any(part in name for part in ("lora_B", "vera_lambda_b", "qvera_b")):
            return "b"
        parts = ("lora_", "vera_", "qvera_", "lokr_", "miss_", "ia3_")
        is_adapter = self.head_rate is None or any(part in name for part in parts)
        return "others" if is_adapter else "head"

    def after(self, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """What is to be done between two steps."""


def adapted(base: Base, trial: Trial, recipe: Recipe, model_class: ModelClass = CAUSAL_LM) -> Any:
    """A fresh adapter of the trial's kind on the base; a head of the class is trained too."""
    torch.manual_seed(trial.seed)
    targets: Any = trial.targets if trial.targets == "all-linear" else trial.targets.split(",")
    if trial.method == "lora":
        kind: Any = "SEQ_CLS" if model_class.has_own_head else None
        alpha = trial.alpha or trial.rank
        config: Any = LoraConfig(r=trial.rank, lora_alpha=alpha, target_modules=targets, task_type=kind)
    elif trial.method == "vera":
        config = VeraConfig(r=trial.rank, target_modules=targets, d_initial=trial.d_initial or 0.1,
                            projection_prng_key=trial.seed, save_projection=False)  # fmt: skip
    elif trial.method == "qvera":
        section = recipe.adapter.replace(
            rank=trial.rank, targets=targets, seed=trial.seed, d_initial=trial.d_initial or recipe.adapter.d_initial,
            b_groups=trial.b_groups, input_scale=trial.input_scale, theta_length=trial.theta_length,
            method="vera" if trial.theta_length is None else "uni-lora",
        )  # fmt: skip
        return attach(base.model, section, model_class=model_class)
    elif trial.method in (*candidates.OF_PEFT, *candidates.OF_OURS):

        def rows() -> Any:
            return build_datasets(recipe.data, base.tokenizer).train

        return candidates.adapt(
            base.model, trial.method, trial.rank, trial.seed, model_class.has_own_head, rows, trial.b_groups
        )
    else:
        return base.model
    return get_peft_model(base.model, config)


def train(model: Any, trial: Trial, recipe: Recipe, datasets: Datasets) -> dict[str, Any]:
    """Train what needs a gradient; returns each step's loss and gradient norms, counts and seconds."""
    section = recipe.training.replace(lr_scheduler_type=trial.schedule, warmup_ratio=trial.warmup_ratio)
    recipe = recipe.replace(data=recipe.data.replace(seed=trial.seed), training=section)
    task = task_of(recipe)
    task.datasets = datasets
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {"betas": (section.adam_beta1, trial.beta2 or section.adam_beta2), "eps": section.adam_epsilon,
                "weight_decay": section.weight_decay}  # fmt: skip
    groups = [{"params": [p], "lr": trial.rate(name)} for name, p in trained.items()] or [{"params": []}]
    optimizer = torch.optim.AdamW(groups, lr=trial.learning_rate, **settings)  # type: ignore[arg-type]
    schedule = build_schedule(section, optimizer, trial.steps)
    batches = batches_of(recipe, datasets.train)
    model.train()
    norms: dict[str, list[float]] = {kind: [] for kind in ("b", "others", "head")}
    losses, tokens = [], 0
    began, used = time.perf_counter(), time.process_time()
    for step in range(trial.steps):
        rows = batches.rows(step)
        count = task.targets([datasets.train[i] for i in rows])
        total = 0.0
        for micro in batches.passes(rows):
            nll, _ = task.loss(model, [datasets.train[i] for i in micro])
            (nll / count).backward()
            total += float(nll.detach())
        for kind, found in norms.items():
            grads = [p.grad for name, p in trained.items() if p.grad is not None and trial.kind(name) == kind]
            found.append(float(torch.nn.utils.get_total_norm(grads)))
        torch.nn.utils.clip_grad_norm_(trained.values(), section.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trial.after(step, model, optimizer)
        losses.append(total / count)
        tokens += sum(len(datasets.train[i].input_ids) for i in rows)
        print(f"\r{step + 1}/{trial.steps} {total / count:.4f} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    last = losses[-20:]
    return {"losses": losses, "trainable": sum(p.numel() for p in trained.values()), "input_tokens": tokens,
            "head": sum(p.numel() for name, p in trained.items() if trial.kind(name) == "head"),
            "gradient_norms": norms,
            "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used,
            "train_loss_last_20": sum(last) / max(len(last), 1)}  # fmt: skip


def run(trial: Trial, recipe: Recipe, keep: Path | None = None) -> tuple[Any, Base, Datasets, dict[str, Any]]:
    """Load, adapt, train, and take the loss of the held-out rows, where the recipe has some.

    Args:
        keep: a directory for what was trained; a trial that lies there already is read back instead.
    """
    base = load_base(recipe.model)
    datasets = build_datasets(recipe.data, base.tokenizer)
    model = trial.adapt(base, recipe)
    kept = None if keep is None else keep / f"{hashlib.sha256(str(trial).encode()).hexdigest()[:16]}.safetensors"
    if kept is not None and kept.exists():
        found = load_file(kept)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(found.pop(name))
        assert not found
        with safe_open(kept, "pt") as file:
            return model, base, datasets, json.loads(file.metadata()["facts"])
    facts = train(model, trial, recipe, datasets)
    if datasets.eval:
        scores = held_out.held_out_loss(
            model, datasets.eval, pad_id=datasets.pad_id, batch_size=recipe.training.per_device_eval_batch_size,
            chunk_tokens=recipe.training.loss_chunk_tokens,
        )  # fmt: skip
        facts["held_out_loss"] = scores["loss"]
    if kept is not None:
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, kept, {"facts": json.dumps(facts)})
    return model, base, datasets, facts


def add_half(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--half", type=int, choices=[0, 1], help="only every second trial, for two processes side by side"
    )


class Written:
    """A JSON Lines file with one trial a line; what stands in it is not done again."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = {k: header[k] for k in ("command", "date", "commit", "device", "threads", "versions")}
        path.touch()
        self.lines = [json.loads(line) for line in path.read_text().splitlines()]

    def missing(self, trials: Sequence[Trial], half: int | None) -> Iterator[Trial]:
        """Those that do not stand there yet; with ``half`` (`add_half`) every second of ``trials`` alone."""
        for number, trial in enumerate(trials):
            done = any(trial.is_that_of(line) for line in self.lines)
            if not done and half in (None, number % 2):
                yield trial

    def add(self, trial: Trial, facts: dict[str, Any]) -> None:
        facts = {key: value for key, value in facts.items() if key not in ("losses", "gradient_norms")}
        line = {"trial": dataclasses.asdict(trial), **facts, **self.header}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{trial}: {json.dumps(facts)}", flush=True)
