"""What of a model memory and time depend on: the shapes of its linears and its config, read without its weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.adapted_forward import layer_shape
from qvera.adapters.methods import LinearSpec
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.model_config import head_size
from qvera.models.processor import image_sides, image_tokens
from qvera.models.structure import beside_the_layers, expert_weights
from qvera.utils.errors import InputError

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_SKIPPED_BY_CONFIG = ("llm_int8_skip_modules", "modules_to_not_convert")


@dataclass(frozen=True)
class Linear:
    """One linear of the base: its full name, in_features n, out_features m, and the decoder layer that it is in."""

    name: str
    n: int
    m: int
    layer: int | None
    quantizable: bool  # a quantized load converts it (every linear but the head, and those with a forward of their own)
    is_target: bool = True  # ``all-linear`` means it (`beside_the_layers`)

    @property
    def role(self) -> str:
        """The last part of the name, such as ``q_proj``."""
        return self.name.rpartition(".")[2]

    @property
    def spec(self) -> LinearSpec:
        """The linear as an adapter's method sees it."""
        return LinearSpec(self.name, self.n, self.m)


@dataclass(frozen=True)
class Shape:
    """What of a model memory and time depend on. Counts are numbers, not bytes."""

    model_type: str
    hidden: int
    ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    longest_tokens: int
    tied: bool  # the head is the input embedding
    head_norms: bool  # q and k are normalized per head (Qwen3)
    linears: tuple[Linear, ...]
    dense_numbers: int  # embeddings, frozen head, norms, biases: all but quantizable weights; a tied head counts once
    expert_numbers: int  # of those, weights that hold all experts of a layer in one tensor (`expert_weights`)
    attention: str  # the implementation that the model picks by itself
    head: tuple[tuple[str, tuple[int, ...]], ...] = ()  # name and shape of each tensor of a head that is trained whole
    image_tokens: int = 0  # of an image, for a model that takes them
    image_numbers: int = 0  # pixel values of an image
    grown_rows: int = 0  # that model.added_tokens need; embedding and head are then private copies, not mapped

    @property
    def head_numbers(self) -> int:
        """How many parameters a head has that is trained whole."""
        return sum(math.prod(shape) for _, shape in self.head)

    @property
    def parameters(self) -> int:
        """How many parameters the base model has."""
        return self.dense_numbers + sum(x.n * x.m for x in self.linears if x.quantizable)

    def adapted(self, targets: str | list[str]) -> tuple[Linear, ...]:
        """The linears that a recipe's ``adapter.targets`` name; ``all-linear`` is every one but heads and routers.

        Raises:
            InputError: a name matches no linear.
        """
        if isinstance(targets, str):
            return tuple(x for x in self.linears if x.is_target)
        found = {t: [x for x in self.linears if x.name == t or x.name.endswith(f".{t}")] for t in targets}
        missing = sorted(t for t, hits in found.items() if not hits)
        if missing:
            known = ", ".join(sorted({x.role for x in self.linears}))
            raise InputError(
                f"adapter.targets: no linear of this model's layers is named {', '.join(missing)}. They are named "
                f"{known}."
            )
        chosen = {x.name for hits in found.values() for x in hits}
        return tuple(x for x in self.linears if x.name in chosen)


class NotPlannable(InputError):
    """The plan's formulas do not know this kind of model. It can still be trained."""


def shape_of(model: nn.Module, model_class: ModelClass = CAUSAL_LM) -> Shape:
    """Read the shapes off a model of this class; one without weights (`qvera.models.model_config`) will do.

    Raises:
        InputError: it has no decoder layers as this project knows them.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kept_dense = tuple(name for key in _SKIPPED_BY_CONFIG for name in stored.get(key) or ())
    linears: list[Linear] = []
    beside = beside_the_layers(model)
    own_heads = tuple(f"{name}." for name in model_class.head_modules(model))  # type: ignore[arg-type]
    own_head = tuple((name, tuple(p.shape)) for name, p in model.named_parameters() if name.startswith(own_heads))
    for name, module in model.named_modules():
        size = layer_shape(module)
        if size is None or module is head or f"{name}.".startswith(own_heads):
            continue
        layer = _LAYER.search(f".{name}.")
        skipped = any(name == k or name.endswith(f".{k}") or f".{k}." in f".{name}." for k in kept_dense)
        converted = type(module) in (nn.Linear, Conv1D) and not skipped
        linears.append(Linear(name, *size, int(layer[1]) if layer else None, converted, name not in beside))
    layers = {x.layer for x in linears} - {None}
    if not layers or (head is None and not own_head):
        raise NotPlannable(f"model.path: {type(model).__name__} has no decoder layers that a plan could be made for.")
    for key in ("num_attention_heads", "hidden_size"):
        if not isinstance(getattr(config, key, None), int):
            raise NotPlannable(
                f"model.path: the config of {type(model).__name__} has no whole number {key} to plan with."
            )
    hidden, heads = config.hidden_size, config.num_attention_heads
    output = embedding if head is None else head
    table = getattr(output, "weight", None)  # patches of images are in none
    tied = bool(getattr(config, "tie_word_embeddings", False)) or table is getattr(embedding, "weight", None)
    dense = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(own_heads))
    dense -= sum(x.n * x.m for x in linears if x.quantizable)
    if tied and table is not getattr(
        embedding, "weight", None
    ):  # a model on the meta device may not have tied them yet
        dense -= output.weight.numel()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    height, width = (image_sides(config) or (0, 0)) if model_class.reads_images else (0, 0)
    return Shape(
        model_type=str(config.model_type),
        hidden=hidden,
        ff=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        layers=len(layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_size(model) or hidden // heads,
        vocabulary=0 if table is None else int(table.shape[0]),
        longest_tokens=int(getattr(config, "max_position_embeddings", None) or 2**31),
        tied=tied,
        head_norms="q_norm" in names and "k_norm" in names,
        linears=tuple(linears),
        dense_numbers=dense,
        expert_numbers=sum(p.numel() for p in expert_weights(model).values()),
        head=own_head,
        image_tokens=image_tokens(config, height, width) if height else 0,
        image_numbers=3 * height * width,
        attention=str(getattr(config, "_attn_implementation", None) or "sdpa"),
    )
