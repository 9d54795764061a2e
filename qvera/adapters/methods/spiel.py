"""SpIEL (arXiv 2401.16405): ΔW has k trained values at k places of the weight, and the places change in training.

k is what a LoRA of the same rank trains, rank (in_features + out_features). The authors give every weight the same
share of its elements instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qvera.adapters.hooks import TrainingHook
from qvera.adapters.methods.base import LinearSpec, Method, Source
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.products.sparse import SparseChange, add_sparse, working_bytes
from qvera.adapters.projection import Pair
from qvera.adapters.stepping.reselection import Reselection, SparseLayer
from qvera.adapters.stepping.sparse_optim import AgedAdamW, SparseSM3
from qvera.config.schema import AdapterSection
from qvera.distributed.group import Group
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from qvera.adapters.adapted_forward import AdaptedForward
    from qvera.adapters.methods.base import AdapterSettings
    from qvera.config.schema import Recipe

VALUES, PLACES = "qvera_values", "qvera_places"


class Spiel(Method):
    """Values [k] from 0, and their places, int32 [k]: sorted indices into the flattened weight."""

    name = "spiel"
    title = "SpIEL"
    keys = frozenset({"growth", "reselect_every", "accumulate_steps", "drop_share"})
    usual = {"adapter.rank": 8, "training.learning_rate": 1e-3}
    source = Source.TRAINED
    keeps_input = True
    is_low_rank = False
    place_names = frozenset({PLACES})

    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        n, m = spec.in_features, spec.out_features
        count = adapter.rank * (n + m)
        if 2 * count > n * m:
            raise InputError(
                f"adapter.rank: {adapter.rank} gives {spec.name or 'a linear'} {count} values, more than half of its "
                f"{n * m} weights. With adapter.method spiel it can be at most {n * m // (2 * (n + m))} here."
            )
        if n * m >= 2**31:
            raise InputError(
                f"adapter.targets: {spec.name or 'a linear'} has {n * m} weights, and places are 32-bit numbers."
            )
        return {VALUES: (count,), PLACES: (count,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        if name == PLACES:
            seed = adapter.seed if isinstance(adapter, AdapterSection) else adapter.projection_seed
            return random_places(shape[0], spec.in_features * spec.out_features, seed, spec.name)
        return torch.zeros(shape) if getattr(adapter, "init_weights", True) else torch.randn(shape)

    def is_trained(self, name: str, adapter: AdapterSettings) -> bool:
        return name == VALUES

    def check_tensors(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> None:
        places, size = tensors[PLACES], spec.in_features * spec.out_features
        if places[0] < 0 or places[-1] >= size or (places.diff() <= 0).any():
            raise InputError(
                f"{PLACES} of {spec.name} has to be rising numbers from 0 to {size - 1}, and is not: the file is "
                "damaged, or another model's adapter."
            )

    def rank_at(self, adapter: AdapterSettings, spec: LinearSpec) -> int:
        return 0

    def factors(  # type: ignore[override]  # no factors, but what the exports need of them
        self, adapter: AdapterSettings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> SparseChange:
        return SparseChange(tensors[VALUES], tensors[PLACES], spec.out_features, spec.in_features)

    def working_bytes(
        self, adapter: AdapterSettings, spec: LinearSpec, tokens: int, itemsize: int, on_accelerator: bool
    ) -> int:
        (count,) = self.tensors(adapter, spec)[VALUES]
        return working_bytes(tokens, spec.out_features, spec.in_features, count, itemsize, on_accelerator)

    def state_bytes(self, adapter: AdapterSection, spec: LinearSpec) -> int:
        (count,) = self.tensors(adapter, spec)[VALUES]
        if adapter.growth == "momentum":
            return 4 * (count + spec.out_features + spec.in_features)
        # age and two averages of each value; place, two sums and the step's gradient of each candidate
        return 4 * (3 + 4) * count

    def add(
        self, layer: AdaptedForward, adapter_name: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool
    ) -> torch.Tensor:
        values, places, *_ = layer.parts(adapter_name)
        x = layer.dropout_of(adapter_name)(x)
        return add_sparse(y, x, at_least_fp32(values), places, overwrite, layer.gradient_watch)

    def check(self, recipe: Recipe) -> None:
        training = recipe.training
        for key, given, taken in (
            ("training.optim", training.optim, "adamw"),
            ("deepspeed", recipe.deepspeed, None),
            ("training.torch_compile", training.torch_compile, False),
            ("task", recipe.task, "causal-lm"),
        ):
            if given != taken:
                raise InputError(
                    f"{key}: is {given}, and adapter.method spiel, whose values change their places between steps, has "
                    "optimizers of its own, over these values alone, that run in plain torch. Remove "
                    f"{key}, or choose another method."
                )

    def optimizer(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        training = recipe.training
        values = _sparse_layers(model)
        shared: dict[str, Any] = {
            "lr": training.learning_rate,
            "eps": training.adam_epsilon,
            "weight_decay": training.weight_decay,
        }
        if recipe.adapter.growth == "momentum":
            places = [(one.places, (one.layer.out_features, one.layer.in_features)) for one in values.values()]
            return SparseSM3([one.values for one in values.values()], places, momentum=training.adam_beta1, **shared)
        betas = training.adam_beta1, training.adam_beta2
        return AgedAdamW([one.values for one in values.values()], betas=betas, **shared)

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook:
        assert isinstance(optimizer, AgedAdamW | SparseSM3)
        section = recipe.adapter
        settings = section.reselect_every, section.accumulate_steps, section.drop_share
        return Reselection(_sparse_layers(model), optimizer, *settings, steps, section.init_from is None, group)


def _sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The linears with an adapter "default", by their names in the base model."""
    from qvera.adapters.layer import QveraLinear  # which imports the methods

    found = {}
    for module in model.modules():
        if isinstance(module, QveraLinear) and module.carries("default"):
            tensors = module.vectors("default")
            found[module.spec.name] = SparseLayer(module, tensors[VALUES], tensors[PLACES])
    return found


def random_places(count: int, among: int, seed: int, name: str) -> torch.Tensor:
    """``count`` different numbers below ``among``, int32, sorted; of this seed and linear always the same."""
    words = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64))
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:  # drawn one after another until there are enough, so that every choice is as likely
        drawn = (words.random_raw(count - len(found)) >> np.uint64(32)).astype(np.int64) * among >> 32
        found = np.union1d(found, drawn)
    return torch.from_numpy(found.astype(np.int32))
