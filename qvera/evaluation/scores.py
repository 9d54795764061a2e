"""A model's held-out loss, its answers, and their scores by metrics asked for by name: what `qvera eval` measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qvera.config.schema import TrainingSection
from qvera.data import Example
from qvera.evaluation import evaluate
from qvera.evaluation.metrics import TextMetric, row_scores, scores_of

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Input:
    """A prompt to be answered, and the texts that would be right; none for a prompt without a reference."""

    example: Example
    references: list[str]


@dataclass(frozen=True)
class Judged:
    """What one model makes of the rows.

    Attributes:
        scores: ``loss``, ``perplexity``, ``rows``, ``trained_tokens``, ``seconds`` of the loss. Where answers have references, a
            score for each metric too (``exact_match`` for ``exact``), and their numbers: ``scored_rows``, ``references``.
        answers: one for each input.
        rows: metric name → score, for each input; empty where it has no reference.
    """

    scores: dict[str, Any]
    answers: list[str]
    rows: list[dict[str, float]]


def inputs_of(examples: Sequence[Example], group_prompts: bool = False) -> list[Input]:
    """The rows that have a prompt, as inputs.

    Args:
        group_prompts: rows with the same prompt are one input, answered once and held against the references of all of them, as
            benchmarks with several references want it.
    """
    inputs: list[Input] = []
    place: dict[bytes, int] = {}
    for example in examples:
        if not len(example.prompt_ids):
            continue
        references = [] if example.reference is None else [example.reference]
        key = example.prompt_ids.tobytes()
        if group_prompts and key in place:
            known = inputs[place[key]].references
            known += [reference for reference in references if reference not in known]
            continue
        place[key] = len(inputs)
        inputs.append(Input(example, references))
    return inputs


def judge(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    inputs: Sequence[Input],
    metrics: Sequence[TextMetric],
    settings: TrainingSection,
    *,
    pad_id: int,
    max_new_tokens: int,
    progress: Progress | None = None,
) -> Judged:
    """Held-out loss over ``examples``, and greedy answers to ``inputs`` (which may be empty) with their scores.

    Args:
        settings: says how many rows go at a time.
        progress: gets a sentence now and then.
    """
    say = progress or (lambda _: None)
    with evaluate.scoring(model):
        scores = evaluate.held_out_loss(
            model,
            examples,
            pad_id=pad_id,
            batch_size=settings.per_device_eval_batch_size,
            chunk_tokens=settings.loss_chunk_tokens,
            progress=lambda done: say(f"held-out loss, {done} of {len(examples)} rows"),
        )
        answered = evaluate.answer_rows(
            model,
            tokenizer,
            [each.example for each in inputs],
            max_new_tokens=max_new_tokens,
            batch_size=settings.answer_batch_size,
            progress=lambda done: say(f"answering, {done} of {len(inputs)} prompts"),
        )
    answers = [str(row["answer"]) for row in answered]
    rows = [row_scores(metrics, answer, each.references) for answer, each in zip(answers, inputs, strict=True)]
    judged = [(answer, each.references) for answer, each in zip(answers, inputs, strict=True) if each.references]
    if judged:
        found = scores_of(metrics, [answer for answer, _ in judged], [references for _, references in judged])
        if "exact" in found:
            scores["exact_match"] = found.pop("exact")
        scores |= found
        scores["scored_rows"] = len(judged)
        scores["references"] = sum(len(references) for _, references in judged)
    return Judged(scores, answers, rows)
