"""The declarations of a method of adaptation. Other packages ask these, and know no method by name.

docs/methods/adding.md shows how to add a method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qvera.adapters.products.low_rank import trained_path
from qvera.models import linear

if TYPE_CHECKING:
    from torch import nn

    from qvera.adapters.config import QveraConfig
    from qvera.adapters.factors import Factors
    from qvera.adapters.hooks import TrainingHook
    from qvera.adapters.layer import AdaptedForward
    from qvera.adapters.projection import Pair
    from qvera.config.schema import Recipe
    from qvera.config.sections import AdapterSection
    from qvera.distributed.group import Group

    AdapterSettings: TypeAlias = QveraConfig | AdapterSection
    """A method reads its settings from either; both use the same names."""

Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Tensor name → shape; the names begin with ``qvera_``."""
Tensors: TypeAlias = Mapping[str, Tensor]


class Source(Enum):
    """Where the A [r, n] and B [m, r] of a linear come from."""

    SEEDED = "seeded"
    """Frozen, and shared by all linears: prefixes of one random pair, drawn from a seed."""
    OWN = "own"
    """Frozen, one pair for each linear (`Method.own_pair`)."""
    STORED = "stored"
    """Frozen, and stored in the adapter's file: they are among `Method.tensors`."""
    TRAINED = "trained"
    """Trained, or computed from what is trained. Backward needs the input x, not only z = A x."""


class Change(Enum):
    """What an adapter does to the output W x of a linear."""

    LOW_RANK = "low rank"
    """It adds ΔW x with the ΔW of `Method.factors`. It can be exported as an exact LoRA."""
    DENSE = "dense"
    """It adds ΔW x, and ΔW has no low rank."""
    SCALED = "scaled"
    """It scales the rows of W + ΔW. No other adapter can be active or merged beside it."""
    PER_TOKEN = "per token"
    """Each token gets its own change. It can't be merged, and W + ΔW can't be held."""


class Traits(NamedTuple):
    """Properties of one tensor of a method."""

    dtype: torch.dtype = torch.float32
    """The dtype in memory and in the file. Integers are rising indices into the flattened weight."""
    is_trained: bool = True
    rate: float = 1.0
    """Its learning rate as a multiple of ``training.learning_rate``."""


class LinearBytes(NamedTuple):
    """Memory of one linear in a training step, in bytes, for the plan."""

    kept: int
    """Kept by autograd beside x, z, y and the casts."""
    working: int
    """Peak of temporary memory, beside W and the gradient of x."""
    cast: int
    """A and B in the compute dtype, kept for backward."""
    state: int | None = None
    """Held by the method's own `optimizer` and `step_hook`; None: it has neither."""


@dataclass(frozen=True)
class LinearSpec:
    """One adapted linear of a model."""

    name: str
    """The name in the base model, such as ``model.layers.3.self_attn.q_proj``; empty if unknown."""
    in_features: int
    out_features: int
    experts: int = 0
    """Experts of a mixture, each of which has a weight of this shape; 0: it is one linear."""


class Method(ABC):
    """One method of adaptation. It has no state: one instance serves all adapters and layers."""

    name: ClassVar[str]
    """``adapter.method`` in a recipe, and ``method`` in adapter_config.json."""
    title: ClassVar[str] = ""
    """The name for people, if it differs."""
    keys: ClassVar[Mapping[str, bool]] = {}
    """Keys that it reads beyond those of all methods → whether ``adapter.init_from`` needs the same value."""
    usual: ClassVar[Mapping[str, Any]] = {}
    """Recipe key → a usual value, for the error about a missing key."""
    source: ClassVar[Source] = Source.SEEDED
    change: ClassVar[Change] = Change.LOW_RANK
    peft_type: ClassVar[str | None] = None
    """``VERA``: it has d and b over a shared pair. ``LORA``: A and B for each linear, in PEFT's LoRA files. Both can be
    one of many in a batch (`qvera.adapters.bank`)."""

    def variant(self, adapter: AdapterSettings) -> Method:
        """The method for these settings: self, or another one that an option selects."""
        return self

    @abstractmethod
    def tensors(self, adapter: AdapterSettings, spec: LinearSpec) -> Shapes:
        """Tensors in the file for one linear."""

    def shared_tensors(self, adapter: AdapterSettings, specs: Sequence[LinearSpec], head_size: int | None) -> Shapes:
        """Tensors that all adapted linears share; InputError if they can't. ``head_size``: None without attention."""
        return {}

    def start(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings, spec: LinearSpec) -> Tensor:
        """The start value of a tensor, on the CPU. For `shared_tensors` the spec has no name or sizes."""
        made = torch.zeros if getattr(adapter, "init_weights", True) else torch.randn
        return made(shape).to(self.traits(name, adapter).dtype)

    @abstractmethod
    def factors(self, adapter: AdapterSettings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        """ΔW of one linear, from its tensors (shared ones too) and, by `source`, its frozen A [r, n] and B [m, r]."""

    def prepare(self, adapter: QveraConfig, linears: Sequence[tuple[LinearSpec, nn.Module]]) -> None:  # noqa: B027
        """Write into the config what tensor shapes depend on. Called before the adapter is put on these linears."""

    def traits(self, name: str, adapter: AdapterSettings) -> Traits:
        """Properties of the tensor of that name."""
        return Traits()

    def rank_at(self, adapter: AdapterSettings, spec: LinearSpec) -> int:
        """The rank at one linear."""
        return adapter.rank

    def own_pair(self, adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module | None) -> Pair | None:
        """Return a linear's own frozen pair (`Source.OWN`), made from its base layer.

        Without a base layer: the pair in this machine's cache, or None.
        """
        return None

    def memory(
        self, adapter: AdapterSettings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        """Return the memory of one linear in a training step, with ``tokens`` tokens a pass and this compute dtype."""
        rank, shapes = self.rank_at(adapter, spec), self.tensors(adapter, spec).values()
        working = spec.out_features * rank * dtype.itemsize + 4 * max(map(math.prod, shapes), default=0)
        casts = self.source is Source.TRAINED and dtype.itemsize < 4
        return LinearBytes(0, working, rank * (spec.in_features + spec.out_features) * dtype.itemsize if casts else 0)

    def add(self, layer: AdaptedForward, adapter_name: str, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
        """Return (W + ΔW) x for x [..., n] and y = W x [..., m]; with ``overwrite`` it may take y's memory."""
        if self.source is not Source.TRAINED:
            return layer.add_low_rank(adapter_name, x, y, overwrite)
        factors, sampler = layer.parts(adapter_name), layer.input_sampler
        inner = layer.dropout_of(adapter_name)(x).to(linear.compute_dtype(layer.base_layer, x))
        return trained_path(y, inner, factors.A, factors.B, factors.scale, overwrite, sampler)

    def optimizer(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer | None:
        """The method's own optimizer; None: the recipe's. InputError: the recipe's does not suit the method."""
        return None

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook | None:
        """A hook for a run of ``steps`` optimizer steps on the processes of ``group``; None: no hook."""
        return None


def trains_pair(method: Method) -> bool:
    """Whether a method computes by `trained_path`, so that `trained_linear` may take its place."""
    # a method with an `add` of its own computes something else
    return method.source is Source.TRAINED and type(method).add is Method.add
