"""An adapter as a LoRA beside the adapter that was trained: loss and right answers on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.data import build_datasets
from qvera.evaluation.held_out import prompts_of, score_model
from qvera.evaluation.load import Artifact, OpenRun, find_target, open_target
from qvera.evaluation.metrics import text_metrics
from qvera.evaluation.named_adapters import rows_to_compare
from qvera.exporting.compare import rows_text
from qvera.tasks import task_of
from qvera.utils import accelerator

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.config.schema import Recipe
    from qvera.data import Datasets, Rows


def adapter_scores(opened: OpenRun, recipe: Recipe, datasets: Datasets, rows: Rows) -> dict[str, Any]:
    """Held-out loss, and the share of right answers (``exact_match``) where rows have references.

    The rest is `qvera.evaluation.held_out.score_model`'s.
    """
    settings, task = recipe.training, task_of(recipe)
    task.prepare(opened.model, opened.base.tokenizer, datasets, settings)

    def held_out(_: Callable[[str], None] | None = None) -> dict[str, Any]:
        return task.held_out_loss(opened.model, rows, datasets, settings)

    if not task.has_answers:
        scores = held_out()
    else:
        scores, _ = score_model(
            opened.model,
            opened.base.tokenizer,
            held_out,
            prompts_of(rows),
            text_metrics(["exact"]),
            settings,
            max_new_tokens=settings.sample_max_new_tokens,
        )
    kept = ("loss", "rows", "trained_tokens", "exact_match", "scored_rows", "accuracy", "pearson", "rewards/margins")
    return {key: scores[key] for key in kept if key in scores}


def open_lora(lora: Path, run: Path | None) -> OpenRun:
    """A LoRA by stock PEFT, on the base of ``run`` as that was trained on."""
    return open_target(find_target(lora, run))


def compare_lora(
    recipe: Recipe,
    target: Artifact,
    lora: Path,
    limit: int,
    console: Console | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score the adapter of ``target`` and the LoRA that was made of it, on at most ``limit`` rows.

    One model is in memory at a time. ``split`` of the result says which rows they are (`rows_to_compare`).

    Args:
        recipe: of the run.
        target: its adapter.
        lora: the directory of the LoRA.
        limit: how many rows.
        console: for what the data has to say.
        progress: takes what is being done.
    """
    progress(f"Loading {target.path}")
    opened = open_target(target)
    labels = opened.labels if task_of(recipe).exported_class.has_own_head else None
    datasets = build_datasets(recipe.data, opened.base.tokenizer, console, labels=labels)
    rows, split = rows_to_compare(datasets, target.name)
    rows = rows[:limit]
    progress("Scoring the trained adapter")
    trained = adapter_scores(opened, recipe, datasets, rows)
    del opened
    gc.collect()  # a quantized weight and its module hold each other
    accelerator.empty_cache()
    progress("Loading the LoRA on its base")
    opened = open_lora(lora, target.run)
    progress("Scoring the LoRA")
    return {"split": split, "trained": trained, "exported": adapter_scores(opened, recipe, datasets, rows)}


def scores_text(difference: dict[str, Any]) -> str:
    """What `compare_lora` gave in a sentence."""
    trained, exported = difference["trained"], difference["exported"]
    rows = rows_text(trained["rows"], difference)
    text = f"trained vs exported on {rows}: loss {trained['loss']:.4f} vs {exported['loss']:.4f}"
    if "exact_match" in trained:
        text += f", right answers {trained['exact_match']:.1%} vs {exported['exact_match']:.1%}"
    return text
