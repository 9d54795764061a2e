"""What a method of adaptation declares: its tensors, where they start, and the factors of ΔW that they make.

A method is one file in this package. The layer, the adapter file, the exports and the plan ask it and know no method by
name. docs/methods/adding.md shows how to add one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch

from qvera.adapters.products.low_rank import trained_path
from qvera.models import linear

if TYPE_CHECKING:
    from torch import nn

    from qvera.adapters.adapted_forward import AdaptedForward
    from qvera.adapters.config import QveraConfig
    from qvera.adapters.factors import Factors
    from qvera.adapters.hooks import TrainingHook
    from qvera.adapters.projection import Pair
    from qvera.config.schema import AdapterSection, Recipe
    from qvera.distributed.group import Group

    AdapterSettings: TypeAlias = QveraConfig | AdapterSection
    """What a method reads its settings from; both have the same names for them."""


class Source(Enum):
    """Where the A [r, n] and B [m, r] of a linear come from."""

    SEEDED = "seeded"
    """Frozen prefixes of one random pair of a seed, which all linears share."""
    OWN = "own"
    """Frozen, each linear's own (`Method.own_pair`)."""
    STORED = "stored"
    """Frozen, and in the adapter's file: they are among `Method.tensors`."""
    TRAINED = "trained"
    """Trained, or made of what is trained, so that backward needs the input x and not only z = A x."""


class Change(Enum):
    """What an adapter does to the output W x of a linear."""

    LOW_RANK = "low rank"
    """It adds ΔW x with the ΔW of `Method.factors`, and exports as an exact LoRA."""
    DENSE = "dense"
    """It adds ΔW x with a ΔW that is of no low rank."""
    SCALED = "scaled"
    """It scales the rows of W + ΔW: no other adapter may be active, or merged, with it."""
    PER_TOKEN = "per token"
    """It adds another change for each token: it can't be merged, and W + ΔW can't be held."""


class Traits(NamedTuple):
    """What one tensor of a method is."""

    dtype: torch.dtype = torch.float32
    """Of the tensor in memory and in the file. Whole numbers are rising places in the flattened weight."""
    is_trained: bool = True
    rate: float = 1.0
    """Its learning rate as a multiple of ``training.learning_rate``."""


class LinearBytes(NamedTuple):
    """What one linear takes in a step, for the plan."""

    kept: int
    """What autograd keeps beside x, z, y and the casts."""
    working: int
    """The most that products take for the moment, beside W and the gradient of x."""
    cast: int
    """A and B in the compute dtype that are kept for backward, beside the tensors."""
    state: int | None = None
    """Of the method's own `optimizer` and `step_hook`; None: it has none of its own."""


@dataclass(frozen=True)
class LinearSpec:
    """One adapted linear of a model."""

    name: str
    """Its name in the base model, such as ``model.layers.3.self_attn.q_proj``; empty where it is not known."""
    in_features: int
    out_features: int


class Method(ABC):
    """One method of adaptation. Stateless: one instance serves all adapters and layers."""

    name: ClassVar[str]
    """``adapter.method`` in a recipe, and ``method`` in adapter_config.json."""
    title: ClassVar[str] = ""
    """The name as people write it, where that is another one."""
    keys: ClassVar[Mapping[str, bool]] = {}
    """The keys of the adapter section that it reads beside those that every method has → whether its tensors mean
    nothing without the value: then ``adapter.init_from`` takes only an adapter with the same one."""
    usual: ClassVar[Mapping[str, Any]] = {}
    """Usual values by the recipe's keys, for the error that asks for them."""
    source: ClassVar[Source] = Source.SEEDED
    change: ClassVar[Change] = Change.LOW_RANK
    peft_type: ClassVar[str | None] = None
    """The method of PEFT whose tensors it has: ``VERA``, d and b over a pair that all linears share, which a bank takes
    (`qvera.adapters.bank`), or ``LORA``, whose files it writes."""

    def variant(self, adapter: AdapterSettings) -> Method:
        """The method for these settings: itself, or another one that an option turns it into."""
        return self

    @abstractmethod
    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        """The tensors that an adapter file has for one linear: name → shape. Names begin with ``qvera_``."""

    def shared_tensors(
        self, adapter: AdapterSettings, specs: Sequence[LinearSpec], head_size: int | None
    ) -> dict[str, tuple[int, ...]]:
        """The tensors that all adapted linears share, held once: name → shape. Names begin with ``qvera_``.

        Args:
            adapter: the adapter's settings.
            specs: all linears that it adapts.
            head_size: the size of the model's attention heads; None where it has none.

        Raises:
            InputError: the linears can't share them.
        """
        return {}

    @abstractmethod
    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> torch.Tensor:
        """The initial value of one of these tensors on the CPU; of `shared_tensors` the linear has no name or size."""

    @abstractmethod
    def factors(
        self, adapter: AdapterSettings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        """ΔW of one linear in factors.

        Args:
            adapter: the adapter's settings.
            spec: the linear.
            tensors: its tensors by name, and those that it shares.
            pair: its frozen A [r, n] and B [m, r], where `source` has one.
        """

    def prepare(self, adapter: QveraConfig, linears: Sequence[tuple[LinearSpec, nn.Module]]) -> None:  # noqa: B027
        """Called before the adapter is put on these linears: what its shapes depend on is written into its config."""

    def traits(self, name: str, adapter: AdapterSettings) -> Traits:
        """What the tensor of that name is."""
        return Traits()

    def rank_at(self, adapter: AdapterSettings, spec: LinearSpec) -> int:
        """The rank at one linear."""
        return adapter.rank

    def own_pair(self, adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module | None) -> Pair | None:
        """The frozen pair of one linear where `source` is OWN, made from its base layer.

        Without one: the pair as this machine keeps it, or None.
        """
        return None

    def memory(
        self, adapter: AdapterSettings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        """What a step takes at one linear, with so many tokens in a pass and this compute dtype."""
        rank, shapes = self.rank_at(adapter, spec), self.tensors(adapter, spec).values()
        working = spec.out_features * rank * dtype.itemsize + 4 * max(map(math.prod, shapes), default=0)
        casts = self.source is Source.TRAINED and dtype.itemsize < 4
        return LinearBytes(0, working, rank * (spec.in_features + spec.out_features) * dtype.itemsize if casts else 0)

    def add(
        self, layer: AdaptedForward, adapter_name: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool
    ) -> torch.Tensor:
        """The layer's output with the adapter: y [..., m] is W x, the result is (W + ΔW) x.

        Args:
            layer: the adapted linear.
            adapter_name: which of its adapters.
            x: its input [..., n].
            y: the base layer's output.
            overwrite: the result may take y's memory.
        """
        if self.source is not Source.TRAINED:
            return layer.add_low_rank(adapter_name, x, y, overwrite)
        factors, sampler = layer.parts(adapter_name), layer.input_sampler
        inner = layer.dropout_of(adapter_name)(x).to(linear.compute_dtype(layer.base_layer, x))
        return trained_path(y, inner, factors.A, factors.B, factors.scale, overwrite, sampler)

    def optimizer(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer | None:
        """An optimizer of the method's own over its trained tensors; None: the one that the recipe names.

        Raises:
            InputError: the recipe asks for one that does not suit the method.
        """
        return None

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook | None:
        """What is done between optimizer steps; None: nothing.

        Args:
            model: base and adapter.
            recipe: the run's.
            optimizer: over the trained tensors.
            steps: how many the run has.
            group: its processes.
        """
        return None


def trains_pair(method: Method) -> bool:
    """Whether the path is that of trained factors, which may have the frozen product in its node (`trained_linear`)."""
    return method.source is Source.TRAINED and type(method).add is Method.add
