"""LoRTA (arXiv 2410.04060): one tensor for all linears, in canonical polyadic form; all factors are trained and shared.

    ΔW = s B' A'        A' = Aᵀ        B' = the blocks B ⊙ C_h[h] ⊙ C_l[layer] ⊙ C_m[module], one below the other

    A [n, r]      B [r, head size]      C_h [heads, r]      C_l [layers, r]      C_m [modules, r]      s = alpha / r

That is input-first, as in the authors' language-model code (github.com/ihounie/lorta, instruction_tuning/lit_gpt).
Their fork of PEFT is output-first: A [m, r] is on the output's side, and the columns of ΔW are cut into heads. Both
adapt attention only, of one width, with as many key heads as query heads. Here:

- k and v with fewer heads take the first rows of C_h (output-first: of A).
- Each part of a layer and each in_features in it (`_group`) has its own A, B and C_h, so the MLP can be adapted too.
  Where heads do not divide a width, the last block is cut off.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearBytes, LinearSpec, Method, Shapes, Source, Tensors
from qvera.adapters.methods.lora import start_generator, uniform
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.lab.keys import Settings
from qvera.utils.errors import InputError

LAYERS = "qvera_layers"
"""C_l: row i is that of layer i."""


class Lorta(Method):
    """The tensors are A, B and C_h of each group, C_l as ``qvera_layers``, and rows of C_m as ``qvera_module_…``."""

    name = "lorta"
    title = "LoRTA"
    keys = {"alpha": True, "lorta_convention": True}
    source = Source.TRAINED
    usual = {"adapter.rank": 64, "training.learning_rate": 1e-2}

    def variant(self, adapter: Settings) -> Method:
        return self if _is_input_first(adapter) else _OUTPUT_FIRST

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        return {}

    def shared_tensors(self, adapter: Settings, specs: Sequence[LinearSpec], head_size: int | None) -> Shapes:
        if head_size is None:
            raise InputError("adapter.method: lorta cuts weights into attention heads, and this model has none.")
        rank, shapes = adapter.rank, Shapes()
        groups: dict[str, list[LinearSpec]] = {}
        for spec in specs:
            groups.setdefault(_group(spec), []).append(spec)
        for group, members in groups.items():
            sides = members[0].in_features, max(spec.out_features for spec in members)
            whole, cut = sides if _is_input_first(adapter) else sides[::-1]
            shapes[f"qvera_A_{group}"] = whole, rank
            shapes[f"qvera_B_{group}"] = rank, head_size
            shapes[f"qvera_heads_{group}"] = math.ceil(cut / head_size), rank
        shapes[LAYERS] = 1 + max(_layer_and_module(spec)[0] for spec in specs), rank
        return shapes | {_module_row(spec): (rank,) for spec in specs}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> Tensor:
        """B = 0. The others are uniform, with the bounds of the authors' code for this convention."""
        if name.startswith("qvera_B_") and getattr(adapter, "init_weights", True):
            return torch.zeros(shape)
        is_wide = not _is_input_first(adapter) and not name.startswith("qvera_A_")
        bound = math.sqrt((6 if is_wide else 1) / adapter.rank)
        return uniform(shape, bound, start_generator(adapter, name))

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        group, (layer, _) = _group(spec), _layer_and_module(spec)
        A, B, heads = (at_least_fp32(tensors[f"qvera_{kind}_{group}"]) for kind in ("A", "B", "heads"))
        # The factors of the layer and of the module are the same for all heads, so they are multiplied first.
        d = at_least_fp32(tensors[LAYERS])[layer] * at_least_fp32(tensors[_module_row(spec)])
        cut = spec.out_features if _is_input_first(adapter) else spec.in_features
        heads = heads[: math.ceil(cut / B.shape[1])] * d
        blocks = (heads.unsqueeze(1) * B.t()).flatten(0, 1)[:cut]  # [cut, r]
        scale = (adapter.rank if adapter.alpha is None else adapter.alpha) / adapter.rank
        if _is_input_first(adapter):
            return Factors(A.t(), blocks, scale=scale)
        return Factors(blocks.t(), A[: spec.out_features], scale=scale)

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        # the blocks of each linear and their gradient, the gradient of A in fp32, and A where it is cast
        cut = spec.out_features if _is_input_first(adapter) else spec.in_features
        pair = super().memory(adapter, spec, tokens, dtype, on_accelerator)
        cast = max(pair.cast, adapter.rank * cut * dtype.itemsize)
        return LinearBytes(0, 4 * adapter.rank * (2 * spec.out_features + spec.in_features), cast)


class _OutputFirst(Lorta):
    samples_tokens = False  # its input side is made of B and C: their gradients would be samples too


_OUTPUT_FIRST = _OutputFirst()


def _is_input_first(adapter: Settings) -> bool:
    return adapter.lorta_convention == "input-first"


def _layer_and_module(spec: LinearSpec) -> tuple[int, str]:
    """Split a linear's name: ``model.layers.3.self_attn.q_proj`` gives 3 and ``self_attn.q_proj``."""
    parts = spec.name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return int(part), ".".join(parts[index + 1 :])
    raise InputError(
        f"adapter.targets: {spec.name or 'a linear'} is in no numbered layer, and lorta has a factor for the layers. "
        "Name linears of the model's layers only, or use another adapter.method."
    )


def _group(spec: LinearSpec) -> str:
    """Name the group of linears that share A, B and C_h, by part of the layer and in_features: ``self_attn_4096``."""
    *part, _ = _layer_and_module(spec)[1].split(".")
    return "_".join([*part, str(spec.in_features)])


def _module_row(spec: LinearSpec) -> str:
    return "qvera_module_" + _layer_and_module(spec)[1].replace(".", "_")
