"""Sizes of the files that a run writes, from their formats (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

from qvera.config.schema import AdapterSection, Recipe
from qvera.training.plan.memory import trained_shapes, vector_shapes
from qvera.training.plan.shapes import Linear, Shape

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
    return safetensors_bytes(_fp32(_prefixed(vector_shapes, shape, recipe)), {"format": "pt"}) + _CONFIG_BYTES


def checkpoint_bytes(shape: Shape, recipe: Recipe) -> int:
    """One checkpoint directory: vectors, AdamW's state of those that are trained, random state, position, recipe."""
    state: dict[str, tuple[int, ...]] = {}
    for name, size in _prefixed(trained_shapes, shape, recipe).items():
        state |= {f"{name}/exp_avg": size, f"{name}/exp_avg_sq": size, f"{name}/step": ()}
    saved = safetensors_bytes(_fp32(_prefixed(vector_shapes, shape, recipe)), None)
    random = safetensors_bytes([("cpu", "U8", [_RANDOM_BYTES], _RANDOM_BYTES)], None)
    written = len(json.dumps({"recipe": recipe.to_dict()}, indent=1))
    return saved + safetensors_bytes(_fp32(state), None) + random + written + _STATE_BYTES


def _fp32(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str, Sequence[int], int]]:
    return [(name, "F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()]


def _prefixed(
    which: Callable[[tuple[Linear, ...], AdapterSection], dict[str, tuple[int, ...]]], shape: Shape, recipe: Recipe
) -> dict[str, tuple[int, ...]]:
    found = which(shape.adapted(recipe.adapter.targets), recipe.adapter)
    return {f"{_PEFT_PREFIX}{name}": size for name, size in found.items()}
