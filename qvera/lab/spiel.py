"""SpIEL (arXiv 2401.16405): ΔW has k trained values at k places of the weight, and the places change in training.

k is rank (in_features + out_features), as in LoRA. The authors give every weight the same share of its elements.

Every ``reselect_every`` steps the smallest values are dropped and as many new places start at zero (section 3.2):

- accumulated gradient (AG), with AdamW: candidates are the k places where the gradient of one micro-batch is largest.
  Their gradients are summed over some steps, and the largest sums win.
- momentum approximation (MA), with SM3: where the product of its row and column accumulators is largest.

No tensor has the weight's size: gᵀ x and the products come in blocks of rows (`sparse.largest_places`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qvera.adapters.hooks import TrainingHook
from qvera.adapters.layer import AdaptedForward, adapted_layers
from qvera.adapters.methods.base import Change, LinearBytes, LinearSpec, Method, Shapes, Source, Tensors, Traits
from qvera.adapters.methods.lora import seed_of
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.config.schema import Recipe
from qvera.distributed.group import Group
from qvera.lab import sparse
from qvera.lab.keys import Settings
from qvera.lab.sparse import SparseChange, largest_places, largest_products, row_blocks, sampled_product
from qvera.utils.errors import InputError

VALUES, PLACES = "qvera_values", "qvera_places"


class Spiel(Method):
    """Values [k] start at 0. Places, int32 [k], are sorted indices into the flattened weight."""

    name = "spiel"
    title = "SpIEL"
    keys = {"growth": False, "reselect_every": False, "accumulate_steps": False, "drop_share": False}
    usual = {"adapter.rank": 8, "training.learning_rate": 1e-3}
    source = Source.TRAINED
    change = Change.DENSE

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        n, m = spec.in_features, spec.out_features
        count, name = adapter.rank * (n + m), spec.name or "a linear"
        if 2 * count > n * m:
            raise InputError(
                f"adapter.rank: {adapter.rank} gives {name} {count} values, more than half of its {n * m} weights. "
                f"With adapter.method spiel it can be at most {n * m // (2 * (n + m))} here."
            )
        if n * m >= 2**31:
            raise InputError(f"adapter.targets: {name} has {n * m} weights, and places are 32-bit numbers.")
        return {VALUES: (count,), PLACES: (count,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> Tensor:
        if name == VALUES:
            return super().start(name, shape, adapter, spec)
        return random_places(shape[0], spec.in_features * spec.out_features, seed_of(adapter), spec.name)

    def traits(self, name: str, adapter: Settings) -> Traits:
        return Traits() if name == VALUES else Traits(torch.int32, is_trained=False)

    def rank_at(self, adapter: Settings, spec: LinearSpec) -> int:
        return 0

    def factors(  # type: ignore[override]  # no factors, but what the exports need of them
        self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None
    ) -> SparseChange:
        return SparseChange(tensors[VALUES], tensors[PLACES], spec.out_features, spec.in_features)

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        (count,), n, m = self.tensors(adapter, spec)[VALUES], spec.in_features, spec.out_features
        working = sparse.working_bytes(tokens, m, n, count, dtype.itemsize, on_accelerator)
        # SM3: momentum and two accumulators. AdamW: age and two averages of each value; place, two sums and the step's
        # gradient of each candidate
        state = 4 * (count + m + n) if adapter.growth == "momentum" else 4 * (3 + 4) * count
        return LinearBytes(0, working, 0, state)

    def add(self, layer: AdaptedForward, adapter_name: str, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
        values, places, *_ = layer.parts(adapter_name)
        watch = getattr(layer, "gradient_watch", None)
        return sparse.add_sparse(y, layer.dropout_of(adapter_name)(x), at_least_fp32(values), places, overwrite, watch)

    def optimizer(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        training, layers = recipe.training, _sparse_layers(model).values()
        adapter: Settings = recipe.adapter
        values, rate, decay = [each.values for each in layers], training.learning_rate, training.weight_decay
        if adapter.growth == "momentum":
            places = [(each.places, (each.layer.out_features, each.layer.in_features)) for each in layers]
            return SparseSM3(values, places, rate, training.adam_beta1, training.adam_epsilon, decay)
        return AgedAdamW(values, rate, (training.adam_beta1, training.adam_beta2), training.adam_epsilon, decay)

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook:
        assert isinstance(optimizer, AgedAdamW | SparseSM3)
        return Reselection(_sparse_layers(model), optimizer, recipe.adapter, steps, group)


def _sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    layers = [layer for layer in adapted_layers(model) if layer.carries("default")]
    vectors = [(layer, layer.vectors("default")) for layer in layers]
    return {layer.spec.name: SparseLayer(layer, own[VALUES], own[PLACES]) for layer, own in vectors}


def random_places(count: int, among: int, seed: int, name: str) -> Tensor:
    """``count`` different sorted int32 numbers below ``among``, the same for the same seed and linear."""
    words = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64))
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:  # drawn one after another until there are enough, so that every choice is as likely
        drawn = (words.random_raw(count - len(found)) >> np.uint64(32)).astype(np.int64) * among >> 32
        found = np.union1d(found, drawn)
    return torch.from_numpy(found.astype(np.int32))


class Candidates:
    """Places of one weight that may get a value next (int32 [k], sorted), and their gradients.

    ``step`` [k] is of the current optimizer step; ``total`` and ``squares`` [k] are sums over ``steps`` steps, fp32 or
    wider. When a step is dropped, the places stay if ``agreed``: a step was counted, or all ranks have the same places.
    """

    def __init__(self, count: int) -> None:
        self.count, self.steps, self.agreed = count, 0, False
        self.indices: Tensor | None = None
        self.step: Tensor | None = None
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    @torch.no_grad()
    def watch(self, g: Tensor, x: Tensor) -> None:
        """Add a micro-batch: the gradient of the output [T, m] and the input [T, n]. The first one finds the places."""
        if self.indices is None:
            self.indices, self.step = largest_products(g, x, self.count)
        else:
            found = sampled_product(g, x, self.indices)
            self.step = found if self.step is None else self.step + found

    def drop_step(self) -> None:
        """Forget a step that was not taken; before the places are agreed on, forget them too."""
        self.step = None
        if not self.agreed:
            self.indices = None

    def end_step(self, loss_scale: float = 1.0) -> None:
        """Add a step that was taken, if any token came through the layer."""
        if self.step is None:
            return
        step, self.step = self.step / loss_scale, None
        if self.total is None or self.squares is None:
            self.total, self.squares = torch.zeros_like(step), torch.zeros_like(step)
        self.total += step
        self.squares.addcmul_(step, step)
        self.steps += 1
        self.agreed = True


def by_accumulated_gradient(
    indices: Tensor, values: Tensor, share: float, candidates: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose new places: the largest |total| among the ``candidates`` (places, int32) that have no value that stays.

    Drops the ``share`` smallest of the values [k] at ``indices``; with too few candidates, fewer. A place that is both
    dropped and chosen keeps its value. Returns positions of the dropped values, their new places (int32), and the
    positions of these among the candidates, [c] each.
    """
    dropped = values.abs().topk(int(len(values) * share), largest=False, sorted=True).indices
    stays = torch.ones_like(values, dtype=torch.bool)
    stays[dropped] = False
    free = (~torch.isin(candidates, indices[stays])).nonzero().squeeze(1)
    grown = free[total[free].abs().topk(min(len(dropped), len(free)), sorted=True).indices]
    # A place that is dropped and chosen at once drops out of both lists, so its value and state stay.
    slots = dropped[~torch.isin(indices[dropped], candidates[grown])]
    grown = grown[~torch.isin(candidates[grown], indices[dropped])]
    return slots[: len(grown)], candidates[grown], grown


def by_momentum(indices: Tensor, values: Tensor, share: float, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Choose new places: the largest row_i column_j (SM3's accumulators [m], [n]) among those without a value.

    Drops the ``share`` smallest of the values [k] at ``indices``, int32 [k], sorted. Returns positions of the dropped
    values and their new places (int32), [c] each.
    """
    dropped = values.abs().topk(int(len(values) * share), largest=False, sorted=True).indices
    products = (rows.unsqueeze(1) * column for rows in row_blocks(row, len(column)))
    places, _ = largest_places(products, len(dropped), skip=indices)
    return dropped[: len(places)], places


@torch.no_grad()
def replace(indices: Tensor, values: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """Give the values ``slots`` [c] new places, where they start at zero, and sort all by place, everything in place.

    Returns the old positions of the sorted values, [k].
    """
    indices[slots] = places
    values[slots] = 0.0
    # Products need sorted places, so the caller gets the order for the optimizer's state too.
    order = indices.argsort()
    indices.copy_(indices[order])
    values.copy_(values[order])
    return order


class SparseLayer(NamedTuple):
    """A linear with sparse values, and their places."""

    layer: AdaptedForward
    values: nn.Parameter  # [k]
    places: Tensor  # int32 [k]


class Reselection(TrainingHook):
    """Changes the places of sparse values between optimizer steps.

    A change follows steps ``accumulate``, ``every`` + ``accumulate``, 2 ``every`` + ``accumulate`` and so on, but not
    the last step. It moves ``drop_share`` of the values times the share of steps that are left. With
    ``places_are_random`` (no other training chose them) the first change moves all of them.

    With several ranks the candidates come from the first micro-batch of rank 0. The step that finds them is not counted
    then: the other ranks have no gradients at these places yet.
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer],
        optimizer: AgedAdamW | SparseSM3,
        section: Settings,
        total_steps: int,
        group: Group,
    ) -> None:
        self.layers, self.optimizer, self.group, self.total_steps = layers, optimizer, group, total_steps
        self.every, self.accumulate = section.reselect_every, section.accumulate_steps
        self.drop_share, self.places_are_random = section.drop_share, section.init_from is None
        self.candidates: dict[str, Candidates] = {}
        if group.world_size > 1 and self.accumulate == 1 and isinstance(optimizer, AgedAdamW):
            raise InputError(
                "adapter.accumulate_steps: is 1, and with several processes the first of these steps only finds the "
                "candidates. Set it to 2 or more."
            )

    def before_step(self, step: int) -> None:
        """Watch gradients in the steps before a change; a failed attempt at this step is forgotten."""
        if (step - 1) % self.every >= self.accumulate or not isinstance(self.optimizer, AgedAdamW):
            return
        for name, (layer, values, _) in self.layers.items():
            candidates = self.candidates.setdefault(name, Candidates(len(values)))
            candidates.drop_step()
            layer.gradient_watch = candidates.watch  # type: ignore[attr-defined]
            layer.needs_whole_passes = True

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        for layer, *_ in self.layers.values():
            layer.gradient_watch, layer.needs_whole_passes = None, False  # type: ignore[attr-defined]
        several = self.group.world_size > 1
        # Ranks saw different rows. Rank 0's places count, and this step is not added: the others have no gradients
        # there.
        if several and not all(candidates.agreed for candidates in self.candidates.values()):
            for name, candidates in self.candidates.items():  # one at a time: together they are as large as the adapter
                found = {} if candidates.indices is None else {name: candidates.indices.cpu()}
                indices = self.group.broadcast_tensors(found)[name].to(self.layers[name].values.device)
                candidates.indices, candidates.step, candidates.agreed = indices, None, True
        else:
            for candidates in self.candidates.values():
                if several:
                    if candidates.step is None:  # this rank had no rows
                        assert candidates.indices is not None
                        candidates.step = torch.zeros(len(candidates.indices), device=candidates.indices.device)
                    self.group.all_reduce([candidates.step])
                candidates.end_step(loss_scale)
        if step % self.every == self.accumulate % self.every:
            left = max(0.0, 1 - step / self.total_steps)
            moves_all = step == self.accumulate and self.places_are_random
            for name in self.layers if left else ():
                self._change(name, 1.0 if moves_all else self.drop_share * left)
            self.candidates = {}

    def _change(self, name: str, share: float) -> None:
        _, values, places = self.layers[name]
        if isinstance(self.optimizer, SparseSM3):
            state = self.optimizer.state_of(values)
            slots, new = by_momentum(places, values, share, state["row"], state["column"])
            self.optimizer.take_over(values, slots, replace(places, values, slots, new))
            return
        found = self.candidates[name]
        if found.indices is None or found.total is None or found.squares is None:  # no token came through the layer
            return
        slots, new, chosen = by_accumulated_gradient(places, values, share, found.indices, found.total)
        means = found.total[chosen] / found.steps, found.squares[chosen] / found.steps
        self.optimizer.take_over(values, slots, replace(places, values, slots, new), *means, found.steps)

    def state_dict(self) -> dict[str, Any]:
        return {
            f"{name}:{part}": value
            for name, candidates in self.candidates.items()
            for part in ("indices", "total", "squares", "steps")
            if (value := getattr(candidates, part)) is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.candidates = {}
        for key, value in state.items():
            name, _, part = key.rpartition(":")
            values = self.layers[name].values
            candidates = self.candidates.setdefault(name, Candidates(len(values)))
            setattr(candidates, part, value.to(values.device) if isinstance(value, Tensor) else value)
            candidates.agreed = True


class AgedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose bias correction uses each value's own age (SpIEL, 2401.16405).

    The state is ``age`` (the gradients in the averages), ``exp_avg`` and ``exp_avg_sq``, in fp32 or wider. While no
    value moves, the steps are those of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                state = self._state_of(parameter)
                age, mean, square = state["age"].add_(1), state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                # Bias correction by each value's own age, where Adam has one count of steps for all.
                size = square.div(_weight_sum(beta2, age)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.addcdiv_(mean / _weight_sum(beta1, age), size, value=-rate)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state.update({key: torch.zeros_like(parameter) for key in ("age", "exp_avg", "exp_avg_sq")})
        return state

    @torch.no_grad()
    def take_over(
        self, parameter: nn.Parameter, slots: Tensor, order: Tensor, mean: Tensor, mean_square: Tensor, steps: int
    ) -> None:
        """Start the values ``slots`` [c] anew, then reorder all by ``order`` [k] (old positions).

        ``mean`` and ``mean_square`` [c] are of the gradients in ``steps`` steps. The new averages are those that Adam
        has after as many gradients with these means: bias correction gives the means themselves.
        """
        beta1, beta2 = next(g["betas"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        state, age = self._state_of(parameter), torch.tensor(float(steps), dtype=torch.float64)
        state["age"][slots] = float(steps)
        state["exp_avg"][slots] = (mean * _weight_sum(beta1, age).item()).to(parameter.dtype)
        state["exp_avg_sq"][slots] = (mean_square * _weight_sum(beta2, age).item()).to(parameter.dtype)
        for key, value in state.items():
            state[key] = value[order]


def _weight_sum(beta: float, age: Tensor) -> Tensor:
    """1 - beta ** age, the sum of the weights in an average of ``age`` gradients; exact where it is small."""
    return torch.expm1(age * math.log(beta)).neg_() if beta else torch.ones_like(age)


class SparseSM3(torch.optim.Optimizer):
    """SM3 (arXiv 1901.11150, algorithm SM3-II) with momentum and decoupled weight decay, over sparse values.

    It keeps the squares of gradients for each row [m] and column [n] of the weight, not for each value. ``places`` has
    for each parameter its flat indices (int32 [k], read at every step) and the weight's shape.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        places: Sequence[tuple[Tensor, tuple[int, int]]],
        lr: float,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self._places = dict(zip(params, places, strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                indices, (_, columns) = self._places[parameter]
                state, i, j = self.state_of(parameter), (indices // columns).long(), (indices % columns).long()
                square = torch.minimum(state["row"][i], state["column"][j]).addcmul_(grad, grad)
                state["row"].scatter_reduce_(0, i, square, "amax")
                state["column"].scatter_reduce_(0, j, square, "amax")
                update = square.add_(group["eps"]).rsqrt_().mul_(grad)
                state["momentum"].lerp_(update, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(state["momentum"], alpha=group["lr"])

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a parameter: momentum and both accumulators, zeros before the first step."""
        state = self.state[parameter]
        if not state:
            _, (rows, columns) = self._places[parameter]
            state["row"], state["column"] = parameter.new_zeros(rows), parameter.new_zeros(columns)
            state["momentum"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def take_over(self, parameter: nn.Parameter, slots: Tensor, order: Tensor) -> None:
        """Start the momentum of some values anew, then reorder all; see `AgedAdamW.take_over`."""
        momentum = self.state_of(parameter)["momentum"]
        momentum[slots] = 0.0
        self.state[parameter]["momentum"] = momentum[order]
