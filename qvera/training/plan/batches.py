"""The longest forward pass of a run: from its rows where they are at hand, else as long as the recipe allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from qvera.config.schema import Recipe
from qvera.data import Batches, Example, batches_of, collate_prefix_once, steps_per_epoch
from qvera.data.padding import next_length
from qvera.training.plan.activations import Batch

_CANDIDATES = 200


def planned_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    training = recipe.training
    per_epoch = steps_per_epoch(rows, training.global_batch_size)
    return training.max_steps if training.max_steps >= 0 else math.ceil(training.num_train_epochs * per_epoch)


def assumed_batch(recipe: Recipe) -> Batch:
    """Every row at ``data.max_length``, none padded, all of it trained but what ``data.max_target_length`` excludes."""
    rows, tokens = recipe.training.per_device_train_batch_size, recipe.data.max_length
    if recipe.data.packing:  # one full sequence; two rows in it, so that attention has a mask of its own
        target = min(2 * recipe.data.max_target_length if recipe.data.max_target_length else tokens, tokens)
        trained = tokens if recipe.data.train_on == "all" else target
        return Batch(1, tokens, trained, False, True, f"data.max_length: packed into {tokens:,} tokens", tokens, 1)
    target = min(recipe.data.max_target_length or tokens, tokens)
    trained = rows * (tokens if recipe.data.train_on == "all" else target)
    source = f"data.max_length: {rows} x {tokens:,} tokens"
    return Batch(rows, tokens, trained, False, False, source, tokens)


def longest_rows(recipe: Recipe, rows: Sequence[Example], joinable: bool, steps: int, done: int = 0) -> list[int]:
    """The rows of the forward pass with the most tokens (padding included) among steps ``done`` to ``steps``.

    Args:
        rows: the training rows.
        joinable: rows of a batch may be joined behind their common prefix (`qvera.data.prefix_collate`).
    """
    candidates: dict[tuple[int, ...], int] = {}
    for passes, row_tokens in _epochs(recipe, rows, steps, done):
        sizes = row_tokens * np.array([1 if recipe.data.packing else len(p) for p in passes], dtype=np.int64)
        for i in np.argsort(-sizes, kind="stable")[:_CANDIDATES]:
            candidates[tuple(passes[i])] = int(sizes[i])
    best, best_tokens = [], -1
    for members, padded in sorted(candidates.items(), key=lambda item: -item[1])[:_CANDIDATES]:
        if padded <= best_tokens:
            break  # joining only makes it less
        tokens = batch_of([rows[i] for i in members], joinable, recipe.data.packing).all_tokens
        if tokens > best_tokens:
            best, best_tokens = list(members), tokens
    return best


def token_counts(recipe: Recipe, rows: Sequence[Example], steps: int, repeating: bool) -> int:
    """How many different numbers of tokens the forward passes of so many steps have; rows that are joined are taken as padded ones.

    Args:
        repeating: their lengths are rounded up (`qvera.data.padding`).
    """
    found: set[tuple[int, int]] = set()
    for passes, row_tokens in _epochs(recipe, rows, steps):
        tokens = [next_length(int(n)) for n in row_tokens] if repeating else row_tokens.tolist()
        found |= set(zip((1 if recipe.data.packing else len(p) for p in passes), tokens, strict=True))
    return max(1, len(found))


def _epochs(
    recipe: Recipe, rows: Sequence[Example], steps: int, done: int = 0
) -> Iterator[tuple[list[list[int]], np.ndarray]]:
    """The forward passes of steps ``done`` to ``steps``, epoch by epoch, and the tokens of a row in each (of all, if packed)."""
    data, batches = recipe.data, batches_of(recipe, rows)
    per_epoch = batches.per_epoch
    for epoch in range(done // per_epoch, -(-steps // per_epoch)):
        first = max(done - epoch * per_epoch, 0) * batches.global_batch_size
        chosen = batches.epoch_order(epoch)[first : (steps - epoch * per_epoch) * batches.global_batch_size]
        # a global batch is a multiple of a forward pass, so these are consecutive pieces of the epoch
        passes = _packed(batches, chosen) if data.packing else batches.cut(chosen.tolist())
        counts = np.array([len(p) for p in passes], dtype=np.int64)
        starts = np.cumsum(counts) - counts  # the passes are consecutive, and none is empty
        longest = np.add if data.packing else np.maximum
        yield passes, longest.reduceat(batches.lengths[chosen], starts) if len(counts) else counts
        if data.shuffle is False:
            break


def _packed(batches: Batches, chosen: np.ndarray) -> list[list[int]]:
    """The packed passes of consecutive global batches on one rank; no pass has rows of two of them."""
    size = batches.global_batch_size
    return [one for start in range(0, len(chosen), size) for one in batches.cut(chosen[start : start + size].tolist())]


def batch_of(examples: Sequence[Example], joinable: bool, packing: bool = False, repeating: bool = False) -> Batch:
    """These rows as one forward pass, ``repeating`` as in `token_counts`."""
    lengths = [len(e.input_ids) for e in examples]
    trained = sum(e.trained_tokens for e in examples)
    if (joinable or packing) and (joined := collate_prefix_once(examples, packing=packing)) is not None:
        joined_tokens = joined["input_ids"].shape[1]
        tokens = next_length(joined_tokens) if repeating else joined_tokens
        source = f"the longest batch of the data: {len(lengths)} rows joined into {tokens:,} tokens"
        return Batch(1, tokens, trained, False, True, source, max(lengths), len(lengths) if packing else 0)
    rows, longest = len(lengths), max(lengths)
    tokens = next_length(longest) if repeating else longest
    source = f"the longest batch of the data: {rows} x {tokens:,} tokens"
    return Batch(rows, tokens, trained, min(lengths) < longest, False, source, longest)
