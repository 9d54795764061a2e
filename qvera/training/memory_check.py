"""One pass of the longest batch before the first step, so that a run too large fails at once; planned and measured."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from qvera.adapters.projection import SharedProjection
from qvera.config.schema import Recipe
from qvera.data import Datasets
from qvera.evaluation import evaluate
from qvera.models.loader import takes_prefix_once
from qvera.training.engine import trained_vectors
from qvera.training.plan import Plan, longest_rows
from qvera.training.plan.show import change_lines
from qvera.utils import memory
from qvera.utils.errors import InputError
from qvera.utils.formatting import size

if TYPE_CHECKING:
    from torch import nn

_SHOWN_ROWS = 4
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


def run_longest_batch(model: nn.Module, recipe: Recipe, datasets: Datasets, plan: Plan | None, steps: int) -> None:
    """Forward and backward over the longest batch of the run's ``steps``, without a trace.

    The gradients are computed and dropped, so that neither the vectors nor DeepSpeed's buckets hold them, and random
    state and mode are restored: a run gives the same bits without it. Under ZeRO-3 all ranks call this together, once
    the engine's hooks gather the weights; each of them takes the same batch.

    Raises:
        InputError: memory ran out; names the rows and what would make them fit.
    """
    joinable = recipe.data.prefix_once and takes_prefix_once(model)
    members = longest_rows(recipe, datasets.train, joinable, steps)
    examples = [datasets.train[i] for i in members]
    device = next(model.parameters()).device
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            data = recipe.data
            batch = evaluate.make_batch(model, examples, datasets.pad_id, data.prefix_once, data.packing)
            nll, trained = evaluate.batch_nll(model, batch, recipe.training.loss_chunk_tokens)
            vectors = list(trained_vectors(model).values())
            torch.autograd.grad(nll / trained, vectors, allow_unused=True)
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        tokens = max(len(e.input_ids) for e in examples)
        shown = ", ".join(e.source for e in examples[:_SHOWN_ROWS]) + (", ..." if len(examples) > _SHOWN_ROWS else "")
        raise InputError(
            f"{recipe.data.path}: the longest batch of this run ({len(examples)} rows, the longest of {tokens:,} "
            f"tokens: {shown}) does not fit into memory. {_advice(recipe, plan)}"
        ) from None
    finally:
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, SharedProjection):
                module.inputs.forget()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _advice(recipe: Recipe, plan: Plan | None) -> str:
    if plan is not None and plan.changes:
        return "\n".join(change_lines(plan))
    planned = ""
    if plan is not None:  # by the plan it fits
        planned = f"The plan came to {size(plan.memory.total_bytes)}, so other processes hold memory too. "
    checkpointing = "" if recipe.training.gradient_checkpointing else "Set training.gradient_checkpointing=true. "
    return f"{planned}{checkpointing}Lower training.per_device_train_batch_size or data.max_length."


def measured(plan: dict[str, Any], watch: memory.PeakWatch) -> dict[str, Any]:
    """The measured side of run.json's ``plan``: peak, mapped pages, and the plan's error relative to them.

    On a CPU private memory is sampled and the weights' mapped pages are read at the end; on CUDA it is what torch
    allocated, to be compared with the plan less the CUDA context.
    """
    on_gpu = watch.device.type == "cuda"
    parts = plan["memory"]["moments"][plan["memory"]["peak_moment"]]
    context = sum(part["bytes"] for part in parts if part["kind"] == "runtime") if on_gpu else 0
    private, mapped = watch.peak_bytes, 0 if on_gpu else memory.mapped_weights_bytes()
    predicted, total = plan["memory"]["total_bytes"] - context, private + mapped
    return {
        "private_bytes": private,
        "mapped_bytes": mapped,
        "total_bytes": total,
        "predicted_bytes": predicted,
        "relative_error": predicted / total - 1 if total else None,
    }
