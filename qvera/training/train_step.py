"""One optimizer step: what the training loop and the learning-rate range test do over and over."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from qvera.config.schema import Recipe
from qvera.data import Batches, Datasets
from qvera.distributed.group import Group
from qvera.evaluation import evaluate
from qvera.training.rank_checks import not_finite
from qvera.training.run_dir import Progressed
from qvera.utils import memory


def train_step(
    model: Any,
    engine: Any,
    datasets: Datasets,
    batches: Batches,
    recipe: Recipe,
    done: Progressed,
    watch: memory.PeakWatch,
    group: Group,
) -> dict[str, Any]:
    """Accumulate the gradient of the mean loss over the global batch's trained tokens, clip, step.

    Returns:
        The record for metrics.jsonl. ``loss`` is that of the vectors before this step, ``learning_rate`` the one it was taken with.

    Raises:
        RunFailed: the loss or the gradient is not finite; no step was taken.
    """
    training, data = recipe.training, recipe.data
    began = time.perf_counter()
    rows = batches.rows(done.step)
    trained = sum(datasets.train[i].trained_tokens for i in rows)
    passes = batches.passes(rows, group.rank, group.world_size)
    nlls, inputs = [], 0
    for number, micro in enumerate(passes, start=1):
        examples = [datasets.train[i] for i in micro or rows[:1]]  # without rows of its own it keeps the others company
        batch = evaluate.make_batch(model, examples, datasets.pad_id, data.prefix_once, data.packing)
        nll, _ = evaluate.batch_nll(model, batch, training.loss_chunk_tokens, engine.decoder)
        # divided by the tokens of the whole global batch, so that neither accumulation nor ranks change the mean
        engine.backward(nll / trained if micro else nll * 0.0, last=number == len(passes))
        if micro:
            nlls.append(nll.detach())
            inputs += sum(len(e.input_ids) for e in examples)
    losses = torch.stack(nlls).tolist() if nlls else []
    total, inputs_of_all = group.sum([sum(losses), inputs])
    norm, rate = engine.step() if math.isfinite(total) else (math.nan, 0.0)
    if not math.isfinite(norm):
        raise not_finite(done.step + 1, losses, norm, rows, passes, datasets, group)
    done.step += 1
    seconds = time.perf_counter() - began
    loss = total / trained
    done.train_loss_first = loss if done.train_loss_first is None else done.train_loss_first
    done.train_loss_last = loss
    done.train_seconds += seconds
    done.input_tokens += int(inputs_of_all)
    return {
        "kind": "train",
        "step": done.step,
        "epoch": round(done.step / batches.per_epoch, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "trained_tokens": trained,
        "input_tokens": int(inputs_of_all),
        "step_seconds": seconds,
        "tokens_per_second": inputs_of_all / seconds,
        "memory_bytes": memory.memory_bytes(watch.device),
        "peak_bytes": watch.peak_bytes,
    }
