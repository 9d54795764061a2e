"""Held-out loss, perplexity, answers and text metrics: what `qvera eval` measures."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qvera.config.sections import TrainingSection
from qvera.data import Example, lengths_of, microbatches
from qvera.distributed.group import ALONE, Group
from qvera.distributed.zero import any_sharded
from qvera.evaluation.generate import generate, generating
from qvera.evaluation.metrics import TextMetric, exact_match, scores_of
from qvera.models import forward, linear
from qvera.models.structure import causal_model, rope_limit
from qvera.utils.memory import each_in_halves

Found = TypeVar("Found")


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Inside the block, loss and answers use dense weights W + ΔW (`generating`) in fp32.

    In 16 bits the sum would round a small ΔW away, so there W and ΔW stay separate.
    """
    exact = linear.embedding_dtype(causal_model(model).get_input_embeddings()) == torch.float32
    with generating(model) if exact else contextlib.nullcontext():
        yield


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int,
    chunk_tokens: int,
    progress: Callable[[int], None] | None = None,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Score ``examples``: ``loss`` (nats a target), ``perplexity``, ``rows``, ``trained_tokens``, ``seconds``."""
    started = time.perf_counter()

    def loss_of(rows: list[int]) -> tuple[torch.Tensor, int]:
        return forward.batch_nll(model, forward.make_batch(model, [examples[i] for i in rows], pad_id), chunk_tokens)

    advice = "Lower data.max_length or training.loss_chunk_tokens."
    found = over_held_out(model, examples, loss_of, batch_size, advice, progress, group)
    losses, tokens = [nll for _, (nll, _) in found], sum(count for _, (_, count) in found)
    # read once at the end, so that no batch waits for the device
    total, counted = group.sum([sum(torch.stack(losses).tolist()) if losses else 0.0, tokens])
    return loss_scores(total, int(counted), len(examples), time.perf_counter() - started)


@torch.no_grad()
def over_held_out(
    model: nn.Module,
    examples: Sequence[Example],
    compute: Callable[[list[int]], Found],
    batch_size: int,
    advice: str,
    progress: Callable[[int], None] | None = None,
    group: Group = ALONE,
) -> list[tuple[list[int], Found]]:
    """Run ``compute`` on batches of rows of similar length, in evaluation mode; it takes a batch's row numbers.

    All ranks of ``group`` must call this, because they share the batches. Where memory runs out, batches are halved,
    but not under ZeRO-3, where it raises OutOfMemory. ``advice`` ends the error message where a single row does not
    fit.

    Returns the row numbers and the result of each of this rank's batches.
    """
    was_training = model.training
    model.eval()
    found: list[tuple[list[int], Found]] = []
    done = 0
    try:
        lengths = lengths_of(examples)
        by_length = np.argsort(lengths, kind="stable")
        # no row changes the rotary embeddings of another
        long = lengths[by_length] > rope_limit(causal_model(model).config)
        batches = [batch for side in (~long, long) for batch in microbatches(by_length[side].tolist(), batch_size)]
        mine = batches[group.rank :: group.world_size]
        # a rank with fewer batches repeats one where the others need its share of the weights
        together = any_sharded(model)
        idle = -(-len(batches) // group.world_size) - len(mine) if together else 0
        device = next(model.parameters()).device
        if together:
            advice = f"Lower training.per_device_eval_batch_size. {advice}"
        all_batches = mine + batches[:1] * idle
        for rows, result in each_in_halves(all_batches, compute, device, "held-out rows", advice, together):
            # The repeated batch of an idle rank is rank 0's, and counts there.
            if rows is batches[0] and group.rank:
                continue
            found.append((rows, result))
            done += len(rows)
            if progress is not None:
                progress(done)
    finally:
        model.train(was_training)
    return found


def loss_scores(total: float, tokens: int, rows: int, seconds: float) -> dict[str, Any]:
    """Make the scores that `held_out_loss` returns; ``total`` is the summed negative log likelihood."""
    loss = total / tokens if tokens else math.nan
    return {
        "loss": loss,
        # exp overflows beyond 709.
        "perplexity": math.exp(min(loss, 700.0)) if tokens else math.nan,
        "rows": rows,
        "trained_tokens": tokens,
        "seconds": seconds,
    }


def _answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **settings: Any
) -> list[str]:
    """Answer prompts, without the `_opening` of each."""
    images = [example.images for example in examples]
    answers = generate(model, tokenizer, [e.prompt_ids.tolist() for e in examples], images=images, **settings)
    return [answer.removeprefix(_opening(tokenizer, e)) for e, answer in zip(examples, answers, strict=True)]


def _opening(tokenizer: PreTrainedTokenizerBase, row: Example) -> str:
    """What the row's template writes before the reference, and the model has to: Qwen3's empty think block."""
    reference = row.reference or ""
    if not reference.strip():
        return ""
    start = len(row.prompt_ids)
    written = tokenizer.decode(row.input_ids[start:][row.trained[start:]].tolist(), skip_special_tokens=True).rstrip()
    # with its own first space, which a completion's answer keeps, and as templates that strip it write it
    contents = reference.rstrip(), reference.strip()
    return next((written.removesuffix(each) for each in contents if written.endswith(each)), "")


def answer_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answer those ``examples`` that have a prompt, greedily.

    Returns rows of ``source``, ``prompt``, ``reference``, ``answer``, ``exact`` (None without a reference).
    """
    rows = [e for e in examples if len(e.prompt_ids)]
    answers = _answers(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    return [
        {
            "source": e.source,
            "prompt": e.prompt_text,
            "reference": e.reference,
            "answer": answer,
            "exact": None if e.reference is None else exact_match(answer, e.reference),
        }
        for e, answer in zip(rows, answers, strict=True)
    ]


def longer_references(rows: Iterable[Example], max_new_tokens: int, key: str) -> str | None:
    """Say how many references are longer than an answer may be, so that none can match; None: there are none."""
    # behind the prompt stand the reference and the token that ends its turn
    lengths = [int(row.trained[len(row.prompt_ids) :].sum()) - 1 for row in rows if row.reference is not None]
    if max(lengths, default=0) <= max_new_tokens:
        return None
    longer = sum(length > max_new_tokens for length in lengths)
    return (
        f"{longer:,} of {len(lengths):,} references are longer than the {max_new_tokens} tokens of an answer, so they "
        f"can't match. Raise {key} to {max(lengths) + 1}."
    )


class EvalPrompt(NamedTuple):
    """A prompt and its right answers, if any are known."""

    example: Example
    references: list[str]


def prompts_of(examples: Sequence[Example], group_prompts: bool = False) -> list[EvalPrompt]:
    """Select the rows that have a prompt; with ``group_prompts``, rows with the same prompt become one."""
    prompts: dict[object, EvalPrompt] = {}
    for row, example in enumerate(examples):
        if len(example.prompt_ids):
            same = example.prompt_ids.tobytes(), *(image.read_bytes() for image in example.images)
            key = same if group_prompts else row
            references = prompts.setdefault(key, EvalPrompt(example, [])).references
            if example.reference is not None and example.reference not in references:
                references.append(example.reference)
    return list(prompts.values())


def score_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Callable[[], dict[str, Any]],
    prompts: Sequence[EvalPrompt],
    metrics: Sequence[TextMetric],
    settings: TrainingSection,
    *,
    max_new_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score held-out rows, and answer ``prompts`` (which may be empty) greedily and score the answers.

    Args:
        held_out: computes the loss (`qvera.tasks.Task.held_out_loss`).
        progress: takes the number of answers.

    Returns:
        The scores of ``held_out``. Where answers have references, also each metric (``exact`` as ``exact_match``),
        ``scored_rows``, and the number of ``references``.
        A row for each prompt: ``source``, ``prompt``, ``references``, ``answer``, and ``scores`` by metric.
    """
    with scoring(model):
        scores = held_out()
        examples = [prompt.example for prompt in prompts]
        size = settings.answer_batch_size
        answers = _answers(
            model, tokenizer, examples, max_new_tokens=max_new_tokens, batch_size=size, progress=progress
        )
    rows: list[dict[str, Any]] = [
        {
            "source": example.source,
            "prompt": example.prompt_text,
            "references": references,
            "answer": answer,
            "scores": {metric.name: metric.of_one(answer, references) for metric in metrics} if references else {},
        }
        for (example, references), answer in zip(prompts, answers, strict=True)
    ]
    scored = [row for row in rows if row["references"]]
    if scored:
        found = scores_of(metrics, [row["answer"] for row in scored], [row["references"] for row in scored])
        scores |= {"exact_match" if name == "exact" else name: score for name, score in found.items()}
        scores |= {"scored_rows": len(scored), "references": sum(len(row["references"]) for row in scored)}
    return scores, rows
