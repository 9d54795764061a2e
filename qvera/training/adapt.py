"""After training on many tasks: a few steps on each task that was held out, and what they gain."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from qvera.adapters.files.save_load import rate_factors
from qvera.adapters.hooks import SCHEDULES, TrainingHook
from qvera.adapters.methods import method_of
from qvera.data import Batches, Rows, lengths_of
from qvera.data.sampler import random_order
from qvera.evaluation import held_out
from qvera.training.engine import trained_vectors
from qvera.training.optim import build_optimizer
from qvera.utils.errors import NotFinite

if TYPE_CHECKING:
    from qvera.training.session import TrainingSession


def adapt_to_held_out_tasks(session: TrainingSession) -> list[dict[str, Any]]:
    """Adapt to each held-out task from the trained vectors, which the model has again afterwards.

    A task's rows are divided by ``data.seed`` into support rows, on which ``training.adapt_steps`` steps are taken
    with a fresh optimizer and a constant rate, and query rows, which are only scored. All ranks call this together.

    Returns:
        For each task ``task``, ``support_rows``, ``query_rows``, and of the query rows ``loss_before`` (the trained
        vectors as they are) and ``loss_after``, which is None where a loss on the way was not finite.

    Raises:
        OutOfMemory: as `TrainingSession.train_step`.
    """
    return [_adapted(session, name, rows) for name, rows in session.datasets.held_out_tasks.items()]


def _adapted(session: TrainingSession, name: str, rows: Rows) -> dict[str, Any]:
    recipe, vectors = session.recipe, trained_vectors(session.model)
    training, data = recipe.training, recipe.data
    support, query = split_rows(rows, training.adapt_rows, data.seed)
    query = query[: data.eval_limit]
    rate = training.adapt_learning_rate or training.learning_rate
    trained = {name: vector.detach().clone() for name, vector in vectors.items()}
    size = min(training.global_batch_size, len(support))
    pass_rows = min(training.per_device_train_batch_size, session.batches.pass_rows)
    pack_tokens = session.batches.pack_tokens
    batches = Batches(lengths_of(support), size, pass_rows, pack_tokens=pack_tokens, seed=data.seed)
    adapting = recipe.replace(training=training.replace(learning_rate=rate))
    own = method_of(recipe.adapter).optimizer(session.model, adapting)
    optimizer = own or build_optimizer(adapting.training, vectors, rate_factors(session.model, recipe))
    datasets = dataclasses.replace(session.datasets, train=support, eval=query)
    inner = session.branch(datasets, batches, optimizer, LambdaLR(optimizer, lambda _: 1.0))
    after: float | None = None
    try:
        before = _query_loss(inner)
        session.model.train()
        while inner.state.step < training.adapt_steps:
            inner.train_step()
        after = _query_loss(inner)
    except NotFinite as error:  # the run itself is whole, and its adapter is written
        session.warn(f"Held-out task {name}: {error} It has no loss afterwards. Lower training.adapt_learning_rate.")
    finally:
        inner.engine.undo()  # a step whose loss was not finite leaves its gradients
        with torch.no_grad():
            for key, vector in vectors.items():
                vector.copy_(trained[key])
    if after is not None:
        steps = training.adapt_steps
        session.console.print(f"Held-out task {name}: loss {before:.4f}, after {steps} steps {after:.4f}")
    sizes = {"support_rows": len(support), "query_rows": len(query)}
    return {"task": name, **sizes, "loss_before": before, "loss_after": after}


def split_rows(rows: Rows, support_rows: int, seed: int) -> tuple[Rows, Rows]:
    """Support and query rows of a task, drawn by ``seed``: at most half of the rows are support rows."""
    drawn = random_order(len(rows), seed, -1)
    count = max(1, min(support_rows, len(rows) // 2))
    return rows.take(np.sort(drawn[:count])), rows.take(np.sort(drawn[count:]))


def _query_loss(session: TrainingSession) -> float:
    with held_out.scoring(session.model):
        return session.held_out_loss()["loss"]


class AdaptHook(TrainingHook):
    """`adapt_to_held_out_tasks` at the end of a run."""

    def finish(self, training: TrainingSession) -> dict[str, Any]:
        """See `TrainingHook.finish`."""
        found = adapt_to_held_out_tasks(training)
        return {"adaptation": found} if found else {}


SCHEDULES["adapt"] = lambda training: AdaptHook() if training.recipe.training.adapt_steps else None
