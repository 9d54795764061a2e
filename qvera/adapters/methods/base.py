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
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import nn

    from qvera.adapters.adapted_forward import AdaptedForward
    from qvera.adapters.config import QveraConfig
    from qvera.adapters.factors import Factors
    from qvera.adapters.hooks import TrainingHook
    from qvera.adapters.layer import QveraLinear
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
    TRAINED = "trained"
    """Trained: they are among `Method.tensors`, or there is no pair."""


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
    keys: ClassVar[frozenset[str]] = frozenset()
    """The keys of the adapter section that it reads beside those that every method has."""
    usual: ClassVar[Mapping[str, Any]] = {}
    """Usual values by the recipe's keys, for the error that asks for them."""
    source: ClassVar[Source] = Source.SEEDED
    keeps_input: ClassVar[bool] = False
    """Whether backward needs the layer's input x [T, n], as it does where A is trained, and not only z [T, r]."""
    starts_at_base: ClassVar[bool] = True
    """Whether a fresh adapter leaves the base model's outputs as they are."""
    is_low_rank: ClassVar[bool] = True
    """Whether what it adds is ΔW x with the ΔW of `factors`: then it exports as an exact LoRA."""

    keeps_output: ClassVar[bool] = False
    """Whether backward needs W x + ΔW x [T, m]."""
    fields_of_start: ClassVar[tuple[str, ...]] = ()
    """The fields of the config that an adapter has from the one that it starts from (``adapter.init_from``)."""
    place_names: ClassVar[frozenset[str]] = frozenset()
    """Those of its tensors that hold places in a weight: int32, never trained by gradients."""
    has_delta: ClassVar[bool] = True
    """Whether it adds one ΔW x, the same ΔW for all tokens: then it can be merged, and W + ΔW held."""
    stands_alone: ClassVar[bool] = False
    """Whether no other adapter may be active, or merged, with it, since it scales what they add."""

    has_vectors: ClassVar[bool] = False
    """Whether its factors have d and b: VeRA's backward and the product with W + ΔW (`fused`) are for these."""
    writes_lora: ClassVar[bool] = False
    """Whether its tensors are ``qvera_A`` and ``qvera_B`` of a LoRA: adapters are then files of PEFT's LoRA."""
    is_banked: ClassVar[bool] = False
    """Whether many of them can be trained, served and held together, as rows of stacked tensors."""
    is_stock_vera: ClassVar[bool] = False
    """Whether its d and b are those of PEFT's own VeRA, over a pair that all linears share."""

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
        """The initial value of one of these tensors, in its `dtype` on the CPU."""

    def start_shared(self, name: str, shape: tuple[int, ...], adapter: AdapterSettings) -> torch.Tensor:
        """The initial value of one of `shared_tensors`, likewise."""
        raise NotImplementedError

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

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is held and saved in."""
        return torch.int32 if name in self.place_names else torch.float32

    def is_trained(self, name: str, adapter: AdapterSettings) -> bool:
        """Whether the tensor of that name is trained."""
        return True

    def check_tensors(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> None:  # noqa: B027  # optional
        """Check what an adapter file has for one linear, beyond names and shapes.

        Raises:
            InputError: a tensor has values that no training gives it.
        """

    def conditions(self, config: QveraConfig) -> dict[str, object]:
        """What its tensors mean nothing without, beside the rank: ``init_from`` takes an adapter with the same."""
        return {}

    def rate_factor(self, name: str, adapter: AdapterSettings) -> float:
        """The tensor's learning rate as a multiple of ``training.learning_rate``."""
        return 1.0

    def rank_at(self, adapter: AdapterSettings, spec: LinearSpec) -> int:
        """The rank at one linear."""
        return adapter.rank

    def own_pair(self, adapter: QveraConfig, spec: LinearSpec, base_layer: nn.Module | None) -> Pair | None:
        """The frozen pair of one linear where `source` is OWN, made from its base layer.

        Without one: the pair as this machine keeps it, or None.
        """
        return None

    def kept_bytes(self, adapter: AdapterSettings, spec: LinearSpec, tokens: int, itemsize: int) -> int:
        """Bytes that autograd keeps for one linear beside x, z and y; ``itemsize`` is that of the compute dtype."""
        return 0

    def working_bytes(
        self, adapter: AdapterSettings, spec: LinearSpec, tokens: int, itemsize: int, on_accelerator: bool
    ) -> int:
        """The most bytes that the products at one linear take for the moment, beside W and the gradient of x."""
        largest = max(math.prod(shape) for shape in self.tensors(adapter, spec).values())
        return spec.out_features * self.rank_at(adapter, spec) * itemsize + 4 * largest

    def cast_bytes(self, adapter: AdapterSettings, spec: LinearSpec, dtype: torch.dtype) -> int:
        """Bytes of A and B in the compute dtype ``dtype`` that one linear keeps for backward, beside its tensors."""
        numbers = self.rank_at(adapter, spec) * (spec.in_features + spec.out_features)
        return numbers * dtype.itemsize if self.keeps_input and dtype.itemsize < 4 else 0

    def state_bytes(self, adapter: AdapterSection, spec: LinearSpec) -> int | None:
        """Bytes that the method's own `optimizer` and `step_hook` hold for one linear; None: it has none of its own."""
        return None

    def put_on(self, layer: QveraLinear, adapter_name: str) -> None:  # noqa: B027  # optional
        """Make what is made from the weight of a linear, once it has the adapter's tensors with their initial values.

        What has to be held is a module in ``layer.qvera_frozen``. Under ZeRO-3 all ranks come here together.
        """

    def held_bytes(self, adapter: AdapterSettings, specs: Sequence[LinearSpec], itemsize: int) -> int:
        """Bytes that `put_on` makes the linears hold; ``itemsize`` is that of the compute dtype."""
        return 0

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
        return layer.add_low_rank(adapter_name, x, y, overwrite)

    def with_base(self, layer: AdaptedForward, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
        """(W + ΔW) x by one node with the frozen product in it, or None: `add` is then called with W x.

        Asked only where the layer has one adapter, without dropout, over a linear with a whole and frozen weight and
        bias.
        """
        return None

    def delta(self, layer: AdaptedForward, adapter_name: str) -> torch.Tensor:
        """ΔW [m, n] in fp32, without a graph."""
        return layer.parts(adapter_name).delta()

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

    def check(self, recipe: Recipe) -> None:  # noqa: B027  # optional
        """Check the values of a recipe beyond what its schema does.

        Raises:
            InputError: a value does not suit the method.
        """
