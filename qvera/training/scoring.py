"""Held-out loss and answers before, during and after a run, by all its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from qvera.config.schema import Recipe
from qvera.data import Datasets, Example
from qvera.distributed.group import Group
from qvera.distributed.zero_params import any_sharded
from qvera.evaluation import evaluate
from qvera.models.loader import Base
from qvera.training.logging import Progress
from qvera.training.run_dir import Progressed


def evaluate_between(
    model: Any, datasets: Datasets, recipe: Recipe, done: Progressed, bar: Progress, group: Group
) -> dict[str, Any]:
    """Held-out loss in the middle of a run, compared with the best so far; the record for the log."""
    result = _held_out(model, datasets, recipe, group)
    bar.note(f"step {done.step}: held-out loss {result['loss']:.4f}, perplexity {result['perplexity']:.3f}")
    if done.best_loss is None or result["loss"] < done.best_loss:
        done.best_loss, done.best_step, done.evaluations_without_gain = result["loss"], done.step, 0
    else:
        done.evaluations_without_gain += 1
        patience = recipe.training.early_stopping_patience
        if patience and done.evaluations_without_gain >= patience:
            done.stopped_early = True
            bar.note(f"stopping: {patience} evaluations without a lower held-out loss (best: step {done.best_step})")
    return {"kind": "eval", "step": done.step, **result}


def _held_out(model: Any, datasets: Datasets, recipe: Recipe, group: Group) -> dict[str, Any]:
    result = evaluate.held_out_loss(
        model,
        datasets.eval,
        pad_id=datasets.pad_id,
        batch_size=recipe.training.per_device_eval_batch_size,
        chunk_tokens=recipe.training.loss_chunk_tokens,
        group=group,
    )
    return group.share(result)  # all go on from the very same numbers


def score(
    model: Any, base: Base, datasets: Datasets, recipe: Recipe, console: Console, label: str, group: Group
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Held-out loss and, where the recipe asks for it, exact match of greedy answers; and the answers to show as samples.

    The ranks share the held-out rows. Rank 0 alone answers prompts, unless ZeRO-3 has spread the weights: then all walk
    through the layers together and rank 0's answers count.
    """
    training = recipe.training
    answers: list[dict[str, Any]] = []
    with console.status(f"{label}: held-out loss") as status, evaluate.scoring(model):
        result = _held_out(model, datasets, recipe, group)
        judged, shown = _to_answer(datasets.eval, training.exact_match_rows, training.sample_count)
        numbers = list(dict.fromkeys(judged + shown))  # each is answered once
        rows = [datasets.eval[i] for i in numbers]
        if group.first or any_sharded(model):
            answers = evaluate.answer_rows(
                model,
                base.tokenizer,
                rows,
                max_new_tokens=training.sample_max_new_tokens,
                batch_size=training.answer_batch_size,
                progress=lambda done: status.update(f"{label}: {done} of {len(rows)} answers"),
            )
        answers = group.share(answers)
    by_row = dict(zip(numbers, answers, strict=True))
    if judged:
        result["exact_match"] = sum(bool(by_row[i]["exact"]) for i in judged) / len(judged)
        result["exact_match_rows"] = len(judged)
    text = f"{label}: held-out loss {result['loss']:.4f}"
    if judged:
        text += f", exact match {result['exact_match']:.1%} of {result['exact_match_rows']} rows"
    console.print(text)
    return result, [by_row[i] for i in shown]


def _to_answer(rows: Sequence[Example], judged: int, shown: int) -> tuple[list[int], list[int]]:
    """The first rows with a reference to be judged by, and the first ones with a prompt to be shown; by their numbers."""
    to_judge: list[int] = []
    to_show: list[int] = []
    for number, row in enumerate(rows):
        if len(to_judge) >= judged and len(to_show) >= shown:
            break
        if len(row.prompt_ids) and len(to_show) < shown:
            to_show.append(number)
        if len(row.prompt_ids) and row.reference is not None and len(to_judge) < judged:
            to_judge.append(number)
    return to_judge, to_show
