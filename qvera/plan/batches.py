"""The longest forward pass of a run: from its rows where they are at hand, else as long as the recipe allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..data import Example, collate_prefix_once, order, steps_per_epoch
from ..recipe import Recipe
from .activations import Batch

_CANDIDATES = 200


def planned_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    training = recipe.training
    per_epoch = steps_per_epoch(rows, training.global_batch_size)
    return training.max_steps if training.max_steps >= 0 else math.ceil(training.num_train_epochs * per_epoch)


def assumed_batch(recipe: Recipe) -> Batch:
    """Every row at ``data.max_length``, none padded, all of it trained but what ``data.max_target_length`` excludes."""
    rows, tokens = recipe.training.per_device_train_batch_size, recipe.data.max_length
    target = min(recipe.data.max_target_length or tokens, tokens)
    trained = rows * (tokens if recipe.data.train_on == "all" else target)
    source = f"data.max_length: {rows} x {tokens:,} tokens"
    return Batch(rows, tokens, trained, False, False, source, tokens)


def longest_rows(recipe: Recipe, rows: Sequence[Example], joinable: bool, steps: int, done: int = 0) -> list[int]:
    """The rows of the forward pass with the most tokens (padding included) among steps ``done`` to ``steps``.

    Args:
        rows: the training rows.
        joinable: rows of a batch may be joined behind their common prefix (`qvera.data.prefix`).
    """
    training, data = recipe.training, recipe.data
    size, per_epoch = training.per_device_train_batch_size, steps_per_epoch(len(rows), training.global_batch_size)
    lengths = np.array([len(e.input_ids) for e in rows])
    candidates: dict[tuple[int, ...], int] = {}
    for epoch in range(done // per_epoch, -(-steps // per_epoch)):
        order_ = order(epoch, len(rows), data.seed, data.shuffle)
        first = max(done - epoch * per_epoch, 0) * training.global_batch_size
        order_ = order_[first : (steps - epoch * per_epoch) * training.global_batch_size]
        # a global batch is a multiple of a forward pass, so these are consecutive pieces of the epoch
        cut = np.arange(0, len(order_), size)
        longest = np.maximum.reduceat(lengths[order_], cut) if len(order_) else np.array([])
        counts = np.diff(np.append(cut, len(order_)))
        for i in np.argsort(-longest * counts, kind="stable")[:_CANDIDATES]:
            candidates[tuple(order_[cut[i] : cut[i] + counts[i]].tolist())] = int(longest[i] * counts[i])
        if data.shuffle is False:
            break
    best, best_tokens = [], -1
    for members, padded in sorted(candidates.items(), key=lambda item: -item[1])[:_CANDIDATES]:
        if padded <= best_tokens:
            break  # joining only makes it less
        tokens = batch_of([rows[i] for i in members], joinable).all_tokens
        if tokens > best_tokens:
            best, best_tokens = list(members), tokens
    return best


def batch_of(examples: Sequence[Example], joinable: bool) -> Batch:
    """These rows as one forward pass."""
    lengths = [len(e.input_ids) for e in examples]
    trained = sum(e.trained_tokens for e in examples)
    if joinable and (joined := collate_prefix_once(examples)) is not None:
        tokens = joined["input_ids"].shape[1]
        source = f"the longest batch of the data: {len(lengths)} rows joined into {tokens:,} tokens"
        return Batch(1, tokens, trained, False, True, source, max(lengths))
    rows, tokens = len(lengths), max(lengths)
    source = f"the longest batch of the data: {rows} x {tokens:,} tokens"
    return Batch(rows, tokens, trained, min(lengths) < tokens, False, source, tokens)
