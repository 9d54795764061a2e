"""Sizes of the files that a run writes, from their formats (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..recipe import Recipe
from .memory import vector_sizes
from .shapes import Shape

_PEFT_PREFIX = "base_model.model."
_CONFIG_BYTES = 800  # adapter_config.json
_STATE_BYTES = 1_500  # state.json without the recipe and the steps' own results, and manifest.json
_RANDOM_BYTES = 5_056


def safetensors_bytes(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str] | None) -> int:
    """The size of a file with these tensors: (name, dtype as the format writes it, shape, bytes)."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, size in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + at


def adapter_bytes(shape: Shape, recipe: Recipe) -> int:
    """The adapter directory: vectors in fp32 and their config."""
    vectors = _vectors(shape, recipe)
    tensors = [(name, "F32", [n], 4 * n) for name, n in vectors]
    return safetensors_bytes(tensors, {"format": "pt"}) + _CONFIG_BYTES


def checkpoint_bytes(shape: Shape, recipe: Recipe) -> int:
    """One checkpoint directory: vectors, AdamW's state of those that are trained, random state, position, recipe."""
    vectors = _vectors(shape, recipe)
    trained = [(name, n) for name, n in vectors if recipe.adapter.train_d or name.endswith("qvera_b")]
    state: list[tuple[str, str, Sequence[int], int]] = []
    for name, n in trained:
        state += [(f"{name}/{key}", "F32", [n], 4 * n) for key in ("exp_avg", "exp_avg_sq")]
        state.append((f"{name}/step", "F32", [], 4))
    saved = safetensors_bytes([(name, "F32", [n], 4 * n) for name, n in vectors], None)
    random = safetensors_bytes([("cpu", "U8", [_RANDOM_BYTES], _RANDOM_BYTES)], None)
    written = len(json.dumps({"recipe": recipe.to_dict()}, indent=1))
    return saved + safetensors_bytes(state, None) + random + written + _STATE_BYTES


def _vectors(shape: Shape, recipe: Recipe) -> list[tuple[str, int]]:
    sizes = vector_sizes(shape.adapted(recipe.adapter.targets), recipe.adapter.rank)
    return [(f"{_PEFT_PREFIX}{name}", n) for name, n in sizes]
