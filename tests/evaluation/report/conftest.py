"""A run directory as the trainer leaves it, made up: the numbers have the shape of a real quickstart run."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvera.config.schema import parse_recipe
from qvera.evaluation.report.read import inputs_sha256

ADAPTER = b"the vectors"
"""The adapter file of a run that `evaluation` is of, as far as anything here reads it."""


def train_rows(steps: int = 96) -> list[dict[str, Any]]:
    """Rows of kind "train": a loss that falls from about 2.3 to about 0.05 with noise, warm-up then cosine."""
    noise = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        rate = 8e-3 * min(1.0, step / 10) * (0.5 + 0.5 * math.cos(math.pi * max(0, step - 10) / max(1, steps - 10)))
        loss = 0.05 + 2.25 * math.exp(-step / 14)
        seconds = 1.9 * noise.lognormvariate(0, 0.07)
        row = {"kind": "train", "step": step, "epoch": step / 48, "loss": loss * noise.lognormvariate(0, 0.18)}
        norm = (0.15 + 0.9 * math.exp(-step / 20)) * noise.lognormvariate(0, 0.3)
        row |= {"learning_rate": rate, "grad_norm": norm, "trained_tokens": 812, "input_tokens": 3200}
        row |= {"step_seconds": seconds, "tokens_per_second": 3200 / seconds}
        row |= {"memory_bytes": int(930e6 + 40e6 * noise.random()), "peak_bytes": int(1.12e9 + min(step, 30) * 2e6)}
        rows.append(row)
    return rows


def eval_rows(losses: dict[int, float]) -> list[dict[str, Any]]:
    """Rows of kind "eval", one for each step of ``losses``."""
    return [
        {"kind": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss), "rows": 40, "trained_tokens": 2030}
        | {"seconds": 4.2}
        for step, loss in losses.items()
    ]


def run_info() -> dict[str, Any]:
    """run.json of a finished run."""
    info: dict[str, Any] = json.loads(Path(__file__).with_name("run.json").read_text(encoding="utf-8"))
    return info


def adapter_entry(name: str, directory: str | None, **changes: Any) -> dict[str, Any]:
    """What run.json says of an adapter that was trained."""
    score = {"perplexity": 3.0, "rows": 3, "trained_tokens": 12}
    facts: dict[str, Any] = {"name": name, "directory": directory, "status": "done", "rows": 7, "eval_rows": 3}
    facts |= {"steps": 6, "best_step": 4, "train_loss_first": 2.5, "train_loss_last": 1.25, "flags": []}
    facts |= {"eval_before": {"loss": 2.4, **score}, "eval_after": {"loss": 1.5, **score}}
    return facts | changes


def many_info() -> dict[str, Any]:
    """run.json of a run that trained four adapters: one done, one that got worse, one that diverged, one without rows."""
    worse = {"eval_after": {"loss": 2.6}, "flags": ["got worse", "too few rows"], "rows": 2}
    lost = {"status": "not_finite", "eval_after": None, "reason": "step 3: the loss is NaN."}
    entries = [
        adapter_entry("Anna's Bakery", "Anna=27s=20Bakery", rows=1240),
        adapter_entry("ben <b>", "ben", status="stopped_early", **worse),
        adapter_entry("chloe", "chloe", **lost),
        adapter_entry("dan", None, status="no_rows", rows=0, eval_rows=0, steps=0, eval_before=None, eval_after=None)
        | {"train_loss_first": None, "train_loss_last": None, "best_step": None},
    ]
    info = run_info()
    del info["samples"]
    result = {"rounds": 40, "steps": 1234, "seconds": 120.0, "tokens_per_second": 812.0, "peak_bytes": 1.1e9}
    return info | {"adapters": entries, "result": result}


def many_rows() -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run of many adapters: steps and evaluations of two, and rounds."""
    rows: list[dict[str, Any]] = []
    for number in range(1, 13):
        for place, name in enumerate(("Anna's Bakery", "chloe")):
            loss = math.nan if name == "chloe" and number == 12 else 2.5 / number + place
            rows.append({"kind": "train", "adapter": name, "round": number, "step": number, "loss": loss})
            rows[-1] |= {"learning_rate": 0.01 / number, "grad_norm": 1.0 + place}
        rows.append({"kind": "round", "round": number, "adapters": 2, "rows": 8, "step_seconds": 0.5})
        rows[-1] |= {"loss": 2.5 / number, "tokens_per_second": 800.0, "memory_bytes": 9e8, "peak_bytes": 1.0e9}
    evaluated = {"kind": "eval", "adapter": "Anna's Bakery", "round": 6, "step": 6, "loss": 1.4, "rows": 3}
    return [*rows, evaluated, {"kind": "round", "round": 3, "rank": 1, "adapters": 90}]


def plan(private_bytes: float) -> dict[str, Any]:
    """The plan of run.json, whose measured side was read at another moment than the result."""
    parts = [{"kind": "runtime", "bytes": 6e8}, {"kind": "base", "bytes": 2e8}, {"kind": "checkpoints", "bytes": 5e8}]
    measured = {"private_bytes": private_bytes, "mapped_bytes": 1e8, "total_bytes": private_bytes + 1e8}
    return {
        "memory": {"moments": {"backward": parts, "loss": parts[:2], "odd": 3}},
        "measured": measured | {"predicted_bytes": 1.3e9, "relative_error": 0.5},
        "batch": {"source": "the longest batch"},
    }


def evaluation() -> dict[str, Any]:
    """What `qvera eval --json` writes, of three rows: one won, one with two references, one without any."""
    tree: dict[str, Any] = json.loads(Path(__file__).with_name("evaluation.json").read_text(encoding="utf-8"))
    hashes = {"adapter_sha256": hashlib.sha256(ADAPTER).hexdigest(), "inputs_sha256": inputs_sha256(tree["answers"])}
    return tree | {"subject": tree["subject"] | hashes}


RECIPE: dict[str, Any] = {
    "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "adapter": {"rank": 256},
    "data": {"path": "data/repairs.jsonl", "eval_path": "data/repairs_heldout.jsonl"},
    "training": {"learning_rate": 8e-3, "num_train_epochs": 2.0, "eval_steps": 20, "max_steps": 96},
}

Build = Callable[..., Path]


@pytest.fixture
def build_run(tmp_path: Path) -> Build:
    """Write a run directory and return its path: ``build_run(info=..., train=..., evals=..., tail=...)``.

    ``info`` and ``recipe`` set to None leave that file out; ``train`` and ``evals`` both None leave metrics.jsonl out;
    ``tail`` is appended to metrics.jsonl as it is.
    """

    def build(
        info: dict[str, Any] | str | None = "finished",
        train: list[dict[str, Any]] | str | None = "finished",
        evals: list[dict[str, Any]] | str | None = "finished",
        recipe: dict[str, Any] | None = RECIPE,
        tail: str = "",
        name: str = "quickstart",
    ) -> Path:
        root = tmp_path / name
        root.mkdir()
        if recipe is not None:
            (root / "recipe.yaml").write_text(parse_recipe(recipe, "recipe").to_yaml(), encoding="utf-8")
        tree = run_info() if info == "finished" else info
        if tree is not None:
            (root / "run.json").write_text(json.dumps(tree), encoding="utf-8")
        rows = train_rows() if train == "finished" else train
        scores = eval_rows({20: 0.61, 40: 0.173, 60: 0.088, 80: 0.0712, 96: 0.0735}) if evals == "finished" else evals
        if rows is not None or scores is not None or tail:
            lines = [json.dumps(row) + "\n" for row in [*(rows or []), *(scores or [])]]
            (root / "metrics.jsonl").write_text("".join(lines) + tail, encoding="utf-8")
        return root

    return build


def analysis(layers: int = 30) -> dict[str, Any]:
    """What `qvera analyze --json` prints, of a model with as many layers; the later ones have more intruders."""
    linears = []
    for layer in range(layers):
        for number, role in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
            intruders = list(range(max(0, (layer + number) // 5 - 3)))[:10]
            norm = 0.5 + 0.03 * layer * (number + 1)
            name = f"model.layers.{layer}.{'mlp' if number > 3 else 'self_attn'}.{role}"
            facts = {"name": name, "role": role, "layer": layer, "shape": [576, 576], "rank": 16, "weight_norm": 25.0}
            facts |= {"delta_norm": norm, "relative_norm": norm / 25, "effective_rank": 14.0 - number}
            facts |= {"singular_values": [12.0 - 0.4 * i for i in range(10)], "intruders": intruders}
            facts |= {"cosines": [0.2 + 0.01 * i if i in intruders else 0.98 for i in range(10)]}
            linears.append(facts | {"exact": [i % 2 == 0 for i in range(10)]})
    subject = {"path": "runs/orders", "method": "lora", "rank": 16, "adapter_sha256": "0" * 64}
    return {
        "subject": subject | {"base": "SmolLM2-135M-Instruct", "quantization": "nf4"},
        "top_k": 10,
        "epsilon": 0.5,
        "linears": linears,
        "reduced": {"keep": 0.75, "path": "reduced", "rank": 24, "bytes": 30_000_000},
        "losses": [
            {"text": "other.txt", "rows": 64, "base": 2.9, "adapter": 3.214, "reduced": 3.01},
            {"text": "held-out rows of the run", "rows": 48, "base": 1.65, "adapter": 0.0321, "reduced": 0.0334},
        ],
        "versions": {},
    }
