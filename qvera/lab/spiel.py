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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from qvera.adapters.hooks import TrainingHook
from qvera.adapters.methods.base import Change, LinearBytes, LinearSpec, Method, Source, Traits
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.config.schema import AdapterSection
from qvera.distributed.group import Group
from qvera.lab.keys import Settings
from qvera.lab.sparse import (
    SparseChange,
    add_sparse,
    largest_places,
    largest_products,
    row_blocks,
    sampled_product,
    working_bytes,
)
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.adapted_forward import AdaptedForward
    from qvera.config.schema import Recipe


VALUES, PLACES = "qvera_values", "qvera_places"


class Spiel(Method):
    """Values [k] start at 0. Places, int32 [k], are sorted indices into the flattened weight."""

    name = "spiel"
    title = "SpIEL"
    keys = {"growth": False, "reselect_every": False, "accumulate_steps": False, "drop_share": False}
    usual = {"adapter.rank": 8, "training.learning_rate": 1e-3}
    source = Source.TRAINED
    change = Change.DENSE

    def tensors(self, adapter: Settings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
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

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> torch.Tensor:
        if name == PLACES:
            seed = adapter.seed if isinstance(adapter, AdapterSection) else adapter.projection_seed
            return random_places(shape[0], spec.in_features * spec.out_features, seed, spec.name)
        return torch.zeros(shape) if getattr(adapter, "init_weights", True) else torch.randn(shape)

    def traits(self, name: str, adapter: Settings) -> Traits:
        return Traits() if name == VALUES else Traits(torch.int32, is_trained=False)

    def rank_at(self, adapter: Settings, spec: LinearSpec) -> int:
        return 0

    def factors(  # type: ignore[override]  # no factors, but what the exports need of them
        self, adapter: Settings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> SparseChange:
        return SparseChange(tensors[VALUES], tensors[PLACES], spec.out_features, spec.in_features)

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        (count,), size = self.tensors(adapter, spec)[VALUES], dtype.itemsize
        working = working_bytes(tokens, spec.out_features, spec.in_features, count, size, on_accelerator)
        # SM3: momentum and two accumulators. AdamW: age and two averages of each value; place, two sums and the step's
        # gradient of each candidate
        is_sm3 = adapter.growth == "momentum"
        state = 4 * (count + spec.out_features + spec.in_features) if is_sm3 else 4 * (3 + 4) * count
        return LinearBytes(0, working, 0, state)

    def add(
        self, layer: AdaptedForward, adapter_name: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool
    ) -> torch.Tensor:
        values, places, *_ = layer.parts(adapter_name)
        x = layer.dropout_of(adapter_name)(x)
        return add_sparse(y, x, at_least_fp32(values), places, overwrite, getattr(layer, "gradient_watch", None))

    def optimizer(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        training = recipe.training
        values = _sparse_layers(model)
        shared: dict[str, Any] = {
            "lr": training.learning_rate,
            "eps": training.adam_epsilon,
            "weight_decay": training.weight_decay,
        }
        adapter: Settings = recipe.adapter
        if adapter.growth == "momentum":
            places = [(one.places, (one.layer.out_features, one.layer.in_features)) for one in values.values()]
            return SparseSM3([one.values for one in values.values()], places, momentum=training.adam_beta1, **shared)
        betas = training.adam_beta1, training.adam_beta2
        return AgedAdamW([one.values for one in values.values()], betas=betas, **shared)

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook:
        assert isinstance(optimizer, AgedAdamW | SparseSM3)
        section: Settings = recipe.adapter
        settings = section.reselect_every, section.accumulate_steps, section.drop_share
        return Reselection(_sparse_layers(model), optimizer, *settings, steps, section.init_from is None, group)


def _sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    from qvera.adapters.layer import QveraLinear  # which imports the methods

    found = {}
    for module in model.modules():
        if isinstance(module, QveraLinear) and module.carries("default"):
            tensors = module.vectors("default")
            found[module.spec.name] = SparseLayer(module, tensors[VALUES], tensors[PLACES])
    return found


def random_places(count: int, among: int, seed: int, name: str) -> torch.Tensor:
    """``count`` different sorted int32 numbers below ``among``, the same for the same seed and linear."""
    words = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], dtype=np.uint64))
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:  # drawn one after another until there are enough, so that every choice is as likely
        drawn = (words.random_raw(count - len(found)) >> np.uint64(32)).astype(np.int64) * among >> 32
        found = np.union1d(found, drawn)
    return torch.from_numpy(found.astype(np.int32))


class Candidates:
    """Places of one weight that may get a value next (int32 [k], sorted), and their gradients.

    ``total`` and ``squares`` [k] are sums over ``steps`` optimizer steps, fp32 or wider. When a step is dropped, the
    places stay if ``agreed``: a step was counted, or all ranks have the same places.
    """

    def __init__(self, count: int) -> None:
        self.count, self.steps = count, 0
        self.indices: torch.Tensor | None = None
        self.agreed = False
        self.total: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None
        self._step: torch.Tensor | None = None

    @torch.no_grad()
    def watch(self, g: torch.Tensor, x: torch.Tensor) -> None:
        """Add a micro-batch: the gradient of the output [T, m] and the input [T, n]. The first one finds the places."""
        if self.indices is None:
            self.indices, self._step = largest_products(g, x, self.count)
            return
        found = sampled_product(g, x, self.indices)
        self._step = found if self._step is None else self._step + found

    def drop_step(self) -> None:
        """Forget a step that was not taken; before the places are agreed on, forget them too."""
        self._step = None
        if not self.agreed:
            self.indices = None

    def agree(self, indices: torch.Tensor) -> None:
        """Take these places, and forget the gradients of the current step."""
        self.indices, self._step, self.agreed = indices, None, True

    def step_gradient(self) -> torch.Tensor:
        """[k], of the current step; to be summed over ranks in place."""
        if self._step is None:  # this rank had no rows
            assert self.indices is not None
            self._step = torch.zeros(len(self.indices), device=self.indices.device)
        return self._step

    def end_step(self, loss_scale: float = 1.0) -> None:
        if self._step is None:
            return
        step, self._step = self._step / loss_scale, None
        if self.total is None or self.squares is None:
            self.total, self.squares = torch.zeros_like(step), torch.zeros_like(step)
        self.total += step
        self.squares.addcmul_(step, step)
        self.steps += 1
        self.agreed = True


class Replacement(NamedTuple):
    """Values that move, and their new places."""

    slots: torch.Tensor
    """Positions of the dropped values, [c]."""
    places: torch.Tensor
    """The new places, int32 [c]; none has a value now."""
    chosen: torch.Tensor | None = None
    """By accumulated gradient: the positions of the new places among the candidates, [c]."""


def smallest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Positions of the smallest |values|, smallest first; ``share`` of k is rounded down."""
    return values.abs().topk(int(len(values) * share), largest=False, sorted=True).indices


def by_accumulated_gradient(
    indices: torch.Tensor, values: torch.Tensor, share: float, candidates: torch.Tensor, total: torch.Tensor
) -> Replacement:
    """Choose the largest |total| among the ``candidates`` (places, int32) that keep no value.

    Drops the ``share`` smallest of the values [k] at ``indices``; with too few candidates, fewer. A place that is both
    dropped and chosen keeps its value.
    """
    dropped = smallest(values, share)
    stays = torch.ones_like(values, dtype=torch.bool)
    stays[dropped] = False
    free = (~torch.isin(candidates, indices[stays])).nonzero().squeeze(1)
    best = total[free].abs().topk(min(len(dropped), len(free)), sorted=True).indices
    grown = free[best]
    places = candidates[grown]
    new = ~torch.isin(places, indices[dropped])
    slots = dropped[~torch.isin(indices[dropped], places)]
    grown = grown[new]
    return Replacement(slots[: len(grown)], candidates[grown], grown)


def by_momentum(
    indices: torch.Tensor, values: torch.Tensor, share: float, row: torch.Tensor, column: torch.Tensor
) -> Replacement:
    """Choose the largest row_i column_j (SM3's accumulators [m] and [n]) among the places that have no value.

    Drops the ``share`` smallest of the values [k] at ``indices``, int32 [k], sorted.
    """
    dropped = smallest(values, share)
    products = (rows.unsqueeze(1) * column for rows in row_blocks(row, len(column)))
    places, _ = largest_places(products, len(dropped), skip=indices)
    return Replacement(dropped[: len(places)], places)


@torch.no_grad()
def replace(indices: torch.Tensor, values: torch.Tensor, change: Replacement) -> torch.Tensor:
    """Move values in place: new ones start at zero, all are sorted by place again. Returns their old positions, [k]."""
    indices[change.slots] = change.places
    values[change.slots] = 0.0
    order = indices.argsort()
    indices.copy_(indices[order])
    values.copy_(values[order])
    return order


class SparseLayer(NamedTuple):
    """A linear with sparse values."""

    layer: AdaptedForward
    values: nn.Parameter  # [k]
    places: torch.Tensor  # int32 [k]


class Reselection(TrainingHook):
    """Changes the places of sparse values between optimizer steps.

    A change follows steps ``accumulate``, ``every`` + ``accumulate``, 2 ``every`` + ``accumulate`` and so on, but not
    the last step. It moves ``drop_share`` of the values times the share of steps that are left. With
    ``places_are_random`` the first change moves all of them.

    With several ranks the candidates come from the first micro-batch of rank 0. The step that finds them is not counted
    then: the other ranks have no gradients at these places yet.

    Args:
        layers: by name. Each gets a ``gradient_watch`` while gradients are accumulated.
        optimizer: of all values. Its class decides how new places are chosen.
        accumulate: steps over which gradients are summed before a change, at most ``every``.
        places_are_random: at the start; False: another training chose them.
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        optimizer: AgedAdamW | SparseSM3,
        every: int,
        accumulate: int,
        drop_share: float,
        total_steps: int,
        places_are_random: bool = True,
        group: Group | None = None,
    ) -> None:
        self.layers, self.optimizer, self.group = dict(layers), optimizer, group or Group()
        self.every, self.accumulate, self.drop_share, self.total_steps = every, accumulate, drop_share, total_steps
        self.places_are_random = places_are_random
        self.candidates: dict[str, Candidates] = {}
        if self.group.world_size > 1 and accumulate == 1 and isinstance(optimizer, AgedAdamW):
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
        if self.candidates:
            self._end_step(loss_scale)
        if step % self.every == self.accumulate % self.every:
            left = max(0.0, 1 - step / self.total_steps)
            moves_all = step == self.accumulate and self.places_are_random
            for name in self.layers if left else ():
                self._change(name, 1.0 if moves_all else self.drop_share * left)
            self.candidates = {}

    def _end_step(self, loss_scale: float) -> None:
        several = self.group.world_size > 1
        if several and not all(candidates.agreed for candidates in self.candidates.values()):
            for name, candidates in self.candidates.items():  # one at a time: together they are as large as the adapter
                found = {} if candidates.indices is None else {name: candidates.indices.cpu()}
                candidates.agree(self.group.broadcast_tensors(found)[name].to(self.layers[name].values.device))
            return
        for candidates in self.candidates.values():
            if several:
                self.group.all_reduce([candidates.step_gradient()])
            candidates.end_step(loss_scale)

    def _change(self, name: str, share: float) -> None:
        _, values, places = self.layers[name]
        if isinstance(self.optimizer, SparseSM3):
            state = self.optimizer.state_of(values)
            change = by_momentum(places, values, share, state["row"], state["column"])
            self.optimizer.take_over(values, change.slots, replace(places, values, change))
            return
        found = self.candidates[name]
        if found.indices is None or found.total is None or found.squares is None:  # no token came through the layer
            return
        change = by_accumulated_gradient(places, values, share, found.indices, found.total)
        chosen = change.chosen
        seeds = Seeds(found.total[chosen] / found.steps, found.squares[chosen] / found.steps, found.steps)
        self.optimizer.take_over(values, change.slots, replace(places, values, change), seeds)

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, candidates in self.candidates.items():
            for part in ("indices", "total", "squares"):
                if (tensor := getattr(candidates, part)) is not None:
                    found[f"{name}:{part}"] = tensor
            found[f"{name}:steps"] = candidates.steps
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.candidates = {}
        for key, value in state.items():
            name, _, part = key.rpartition(":")
            candidates = self.candidates.setdefault(name, Candidates(len(self.layers[name].values)))
            on_device = value.to(self.layers[name].values.device) if isinstance(value, torch.Tensor) else value
            setattr(candidates, part, on_device)
            candidates.agreed = True


class Seeds(NamedTuple):
    """Means over ``steps`` optimizer steps of the gradients at new places, one element for each."""

    mean: torch.Tensor
    mean_square: torch.Tensor
    steps: int


def _loss_of(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class AgedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose bias correction uses each value's own age (SpIEL, 2401.16405).

    The state is ``age`` (the gradients in the averages), ``exp_avg`` and ``exp_avg_sq``, in fp32 or wider. While no
    value moves, the steps are those of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _loss_of(closure)
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                state = self._state_of(parameter)
                age, mean, square = state["age"].add_(1), state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                size = square.div(_weight_sum(beta2, age)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.addcdiv_(mean / _weight_sum(beta1, age), size, value=-rate)
        return loss

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state.update({key: torch.zeros_like(parameter) for key in ("age", "exp_avg", "exp_avg_sq")})
        return state

    @torch.no_grad()
    def take_over(self, parameter: nn.Parameter, slots: torch.Tensor, order: torch.Tensor, seeds: Seeds) -> None:
        """Start the values ``slots`` [c] anew from ``seeds`` [c], then reorder all by ``order`` [k] (old positions).

        The new averages are those that Adam has after ``seeds.steps`` gradients with these means: bias correction gives
        the means themselves.
        """
        beta1, beta2 = next(g["betas"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        state, steps = self._state_of(parameter), torch.tensor(float(seeds.steps), dtype=torch.float64)
        state["age"][slots] = float(seeds.steps)
        state["exp_avg"][slots] = (seeds.mean * _weight_sum(beta1, steps).item()).to(parameter.dtype)
        state["exp_avg_sq"][slots] = (seeds.mean_square * _weight_sum(beta2, steps).item()).to(parameter.dtype)
        for key, value in state.items():
            state[key] = value[order]


def _weight_sum(beta: float, age: torch.Tensor) -> torch.Tensor:
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
        places: Sequence[tuple[torch.Tensor, tuple[int, int]]],
        lr: float,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self._places = dict(zip(params, places, strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _loss_of(closure)
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
        return loss

    def state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Zeros before the first step."""
        state = self.state[parameter]
        if not state:
            _, (rows, columns) = self._places[parameter]
            state["row"], state["column"] = parameter.new_zeros(rows), parameter.new_zeros(columns)
            state["momentum"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def take_over(self, parameter: nn.Parameter, slots: torch.Tensor, order: torch.Tensor) -> None:
        """Start the momentum of some values anew, then reorder all; see `AgedAdamW.take_over`."""
        momentum = self.state_of(parameter)["momentum"]
        momentum[slots] = 0.0
        self.state[parameter]["momentum"] = momentum[order]
