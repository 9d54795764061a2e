"""What a recipe may not have beside ``training.objective``: keys that a loss on preferences lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvera.config.schema.recipe import Recipe


def preference_contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield keys that have no counterpart in the loss of the recipe's objective, and are not ignored in silence."""
    data, training, adapter = recipe.data, recipe.training, recipe.adapter
    objective = training.objective
    name = f"training.objective: {objective}"
    if data.too_long not in ("cut-end", "drop"):
        yield "data.too_long", f"{data.too_long} would part an answer from its prompt; with {name} use cut-end or drop."
    if data.train_on != "assistant":
        yield "data.train_on", f"{name} compares the last answers of its rows; remove the key."
    for key in ("max_source_length", "max_target_length"):
        if getattr(data, key) is not None:
            yield f"data.{key}", f"is not built for {name}; set data.max_length."
    if data.packing:
        yield "data.packing", f"is not built for {name}, whose rows stand in a padded batch; remove one of the two."
    for key, source in data.sources("data.label_names"):
        if source.label_names:
            yield key, f"has no meaning for {name}; remove it."
    for key in ("label_smoothing", "torch_compile"):
        if getattr(training, key):
            yield f"training.{key}", f"is not built for {name}; remove one of the two."
    if training.loss_chunk_tokens != type(training).model_fields["loss_chunk_tokens"].default:
        yield "training.loss_chunk_tokens", f"{name} computes its loss in TRL, which has its own chunks; remove it."
    if training.gradient_checkpointing == "offload":
        yield "training.gradient_checkpointing", f"offload is not built for {name}; use true."
    if objective != "dpo" and training.on_oom == "halve":
        yield "training.on_oom", f"halve changes the loss of {name}, which depends on the rows of a pass; use save."
    if adapter.dropout:
        yield "adapter.dropout", f"TRL's losses are computed without dropout ({name}); set it to 0."
    if adapter.init_from is not None and objective != "orpo":
        yield (
            "adapter.init_from",
            f"the reference of {name} is the base without an adapter. Export that adapter (`qvera export --to merged`) "
            "and set model.path to the result.",
        )
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if objective == "kto" and getattr(training, key) < 2:
            yield f"training.{key}", f"{name} pairs each prompt with another row's answer; set 2 or more."
