"""The longest forward pass of a run: of its rows where they are here, else what the recipe allows."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qvera.config.schema import Recipe
from qvera.data import Example, Rows, batches_of, collate_prefix_once, planned_steps
from qvera.data.images import ImageTextProcessor
from qvera.data.rows import Joined, round_up_length
from qvera.models.attention import groups_of
from qvera.training.plan.run import Batch

BatchOf = Callable[[Recipe], Batch]  # the longest batch of a (changed) recipe

_CANDIDATES = 200  # how many of the longest forward passes are looked at closely


def longest_batch(
    rows: Rows | None, joined: Joined | None, rounded: bool, masked: bool, image_tokens: int = 0
) -> BatchOf:
    """The longest batch over these rows, remembered by what it depends on. ``image_tokens``: of each row's image."""
    known: dict[tuple[int, int], Batch] = {}

    def longest(recipe: Recipe) -> Batch:
        if rows is None:
            return assumed_batch(recipe, joined, image_tokens)
        key = recipe.data.max_length, recipe.training.per_device_train_batch_size
        if key not in known:
            cut = rows if int(rows.lengths.max()) <= key[0] else rows.cut(key[0])
            many = recipe.data.has_adapters
            if many:  # how rows meet depends on who leaves when: the longest ones may all meet
                chosen = np.argsort(-cut.lengths, kind="stable")[: pass_rows(recipe)].tolist()
            else:
                chosen = longest_rows(recipe, cut, joined, max(1, planned_steps(recipe, len(cut))))
            examples = [cut[i] for i in chosen]
            batch = batch_of(examples, joined, recipe.data.packing, rounded, masked, whole_rows=many)
            counts = _token_counts(cut.lengths, batch, rounded)
            images = sum(len(example.images) for example in examples)
            known[key] = replace(batch, token_counts=counts, pixels=_pixels(examples), images=images)
        return known[key]

    return longest


def _pixels(examples: Sequence[Example]) -> int:
    images = [image for example in examples for image in example.images]
    if not images or not isinstance(processor := images[0].processor, ImageTextProcessor):
        return 0
    return processor.inputs(images)["pixel_values"].numel()


def assumed_batch(recipe: Recipe, joined: Joined | None = None, image_tokens: int = 0) -> Batch:
    """Every row at ``data.max_length``, none padded, all of it trained but what ``data.max_target_length`` excludes.

    An image is a row of ``image_tokens``; the last one stands for the class.
    """
    data, rows, tokens = recipe.data, pass_rows(recipe), image_tokens or recipe.data.max_length
    if image_tokens:
        source = f"images of the base's size: {rows} x {tokens:,} tokens"
        return Batch(rows, tokens, rows, False, False, source, tokens)
    rows *= 2 if data.format == "preference" else 1  # a pair is two rows
    source, targets = f"data.max_length: {rows} x {tokens:,} tokens", rows
    if data.packing:  # one full sequence; two rows in it, so that attention has to tell them apart
        source, rows, targets = f"data.max_length: packed into {tokens:,} tokens", 1, 2
    trained = all_tokens = rows * tokens
    if data.train_on != "all" and data.max_target_length:
        trained = min(targets * min(data.max_target_length, tokens), trained)
    together = data.packing or (data.has_adapters and joined is not None)
    offsets = together and joined is not Joined.MASK
    groups = ((targets, tokens),) if data.has_adapters and offsets else ()
    sizes = (1, all_tokens) if together else (rows, tokens)
    packed = int(data.packing)
    return Batch(*sizes, trained, False, together, source, tokens, packed, offsets=offsets, groups=groups)


def pass_rows(recipe: Recipe) -> int:
    """The most rows of a forward pass; with many adapters, no more than a step of each in flight."""
    training = recipe.training
    if not recipe.data.has_adapters or training.adapters_at_once == "auto":
        return training.per_device_train_batch_size
    return min(training.per_device_train_batch_size, training.adapters_at_once * training.global_batch_size)


def _token_counts(lengths: np.ndarray, longest: Batch, rounded: bool) -> int:
    """How many token counts the passes may have: padded, as many as rows have lengths.

    Joined rows have any number up to that of the longest pass. Where it matters it is rounded up.
    """
    if not longest.joined:
        different = set(lengths.tolist())
        return len({round_up_length(n) for n in different} if rounded else different)
    counts, tokens = 0, int(lengths.min())
    while tokens <= longest.tokens:
        counts, tokens = counts + 1, round_up_length(tokens) + 1
    return max(1, counts)


def longest_rows(recipe: Recipe, rows: Sequence[Example], joined: Joined | None, steps: int) -> list[int]:
    """The rows of the forward pass with the most tokens (padding included) among the first ``steps`` steps."""
    batches, packing = batches_of(recipe, rows), recipe.data.packing
    candidates: dict[tuple[int, ...], int] = {}
    for stretch in batches.stretches(steps):
        passes = [each for part in stretch for each in batches.cut(part)]
        counts = np.array([len(p) for p in passes], dtype=np.int64)
        chosen = np.concatenate([np.asarray(part, dtype=np.int64) for part in stretch])
        join = np.add if packing else np.maximum
        row_tokens = join.reduceat(batches.lengths[chosen], np.cumsum(counts) - counts)
        sizes = row_tokens * (1 if packing else counts)
        for i in np.argsort(-sizes, kind="stable")[:_CANDIDATES]:
            candidates[tuple(passes[i])] = int(sizes[i])
    best, best_tokens = [], -1
    for members, padded in sorted(candidates.items(), key=lambda item: -item[1])[:_CANDIDATES]:
        if padded <= best_tokens:
            break  # joining only makes it less
        tokens = batch_of([rows[i] for i in members], joined, packing).all_tokens
        if tokens > best_tokens:
            best, best_tokens = list(members), tokens
    return best


def batch_of(
    examples: Sequence[Example],
    joined: Joined | None,
    packing: bool = False,
    rounded: bool = False,
    masked: bool = False,
    whole_rows: bool = False,
) -> Batch:
    """These rows as one forward pass.

    ``joined``: how they may be put into one sequence; with ``packing`` or ``whole_rows`` they are joined even where
    that does not pay. ``masked``: rows of different lengths need a mask.
    """
    lengths = [tokens for e in examples for tokens in e.row_tokens]
    trained, rows, longest = sum(e.trained_tokens for e in examples), len(lengths), max(lengths)
    batch = None if joined is None else collate_prefix_once(examples, packing=packing or whole_rows, joined=joined)
    if batch is None:
        tokens = round_up_length(longest) if rounded else longest
        source = f"the longest batch of the data: {rows} x {tokens:,} tokens"
        return Batch(rows, tokens, trained, masked and min(lengths) < longest, False, source, longest)
    tokens = batch["input_ids"].shape[1]
    tokens = round_up_length(tokens) if rounded else tokens
    source = f"the longest batch of the data: {rows} rows joined into {tokens:,} tokens"
    groups: tuple[tuple[int, int], ...] = ()
    offsets = "cu_seq_lens_q" in batch
    keys = len(batch["key_index"]) if "key_index" in batch else 0
    if offsets and not keys:
        filled = [tokens - sum(lengths)] if tokens > sum(lengths) else []
        groups = tuple(groups_of(tuple(itertools.accumulate(lengths + filled, initial=0)))[2])
    packed = rows if packing else 0
    return Batch(1, tokens, trained, False, True, source, longest, packed, offsets=offsets, keys=keys, groups=groups)
