"""The adapted linear: a frozen base layer plus a low-rank path, for every adapter that it carries.

`LowRankPath` is the forward pass, of qvera's own layers and of PEFT's VeRA layers after `accelerate_peft`. Its
subclasses say what the factors are: `QveraLinear` asks the adapter's method (`qvera.adapters.methods`).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters import functional, fused
from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods import Method, Place, method_of
from qvera.adapters.projection import OwnProjection, Pair, SharedProjection
from qvera.adapters.sparse import Watch
from qvera.adapters.token_sampling import TokenSampler
from qvera.distributed.zero_params import is_sharded
from qvera.models import linear, quantization


def layer_shape(base_layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[0], base_layer.weight.shape[1]
    if isinstance(base_layer, nn.Linear):  # bitsandbytes' linears are nn.Linear too
        return base_layer.in_features, base_layer.out_features
    return None


class LowRankPath:
    """Mixed into a PEFT layer with a frozen ``base_layer``; what a kind of adapter adds is where its factors are."""

    base_layer: Any  # a linear of torch, bitsandbytes or transformers
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    unmerge: Callable[[], None]
    _get_available_adapters: Callable[[], set[str]]
    _inference_weight: torch.Tensor | None = None
    _inference_adapters: tuple[str, ...] = ()
    _training_weight: fused.HeldWeight | None = None
    _builds_per_pass: float = fused.BUILDS_UNHELD
    gradient_watch: Watch | None = None
    """Called in backward with the output's gradient and the input, for methods that choose places by it."""
    _row_forward: Callable[..., torch.Tensor] | None = None
    """The forward pass of a batch whose rows use different adapters, while there is one (`multi_adapter.RowPlan`)."""

    @abstractmethod
    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""

    @abstractmethod
    def parts(self, adapter: str) -> Factors:
        """The factors of one adapter in this layer; A and B are views of the shared pair."""

    @abstractmethod
    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""

    def token_sampler(self, adapter: str) -> TokenSampler | None:
        """What draws the tokens of x that backward keeps; None: it keeps all, where it needs x."""
        return None

    @abstractmethod
    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """z = A x in ``dtype``, shared with the layers that read the same x; None where the adapter has A itself."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """y = W x + ΔW x, summed over the active adapters; with VeRA ΔW = s diag(b) B diag(d) A (equation 2).

        x [..., in_features] gives y [..., out_features] in the base layer's output dtype.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if (y := self._fast_forward(x, *args, **kwargs)) is not None:
            return y
        y = self.base_layer(x, *args, **kwargs)  # W x
        overwrite = self._owns_output(y)
        for adapter in self._adapters_in_use():
            y = self.add_adapter(adapter, x, y, overwrite)
        return y

    def add_adapter(self, adapter: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """The output with one adapter more: y is without it."""
        return self.add_low_rank(adapter, x, y, overwrite)

    def add_low_rank(self, adapter: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """y + s diag(b) B M A diag(a) x, the path of all methods whose change is `Factors`."""
        factors = self.parts(adapter)
        z = self.project(x, adapter, factors.A, factors.a)  # A x
        return factors.expand(y, z, overwrite)  # y + s diag(b) B M z

    def _owns_output(self, y: torch.Tensor) -> bool:
        """Whether nobody but this layer reads the base layer's output, so that the adapter may be added in its memory.

        True on accelerators, where adding it elsewhere is a launch more, for linears without hooks. None of them keeps
        its output for backward.
        """
        base = self.base_layer
        if y.device.type == "cpu" or torch.compiler.is_compiling():
            return False
        return isinstance(base, (nn.Linear, Conv1D)) and not base._forward_hooks

    def active_names(self) -> list[str]:
        """The active adapters that this layer carries."""
        return [name for name in self.active_adapters if self.carries(name)]

    def _adapters_in_use(self) -> list[str]:
        return [] if self.disable_adapters or self.merged else self.active_names()

    def project(self, x: torch.Tensor, adapter: str, A: torch.Tensor, a: torch.Tensor | None = None) -> torch.Tensor:
        """z = A diag(a) dropout(x) in the compute dtype."""
        dtype = linear.compute_dtype(self.base_layer, x)
        dropout = self.dropout_of(adapter)
        if isinstance(dropout, nn.Identity) and a is None and (z := self.shared_z(adapter, x, dtype)) is not None:
            return z
        # every layer drops other elements and has its own a, so there is nothing to share
        inner = dropout(x).to(dtype)
        if a is not None:
            inner = functional.scale_input(inner, a)
        return functional.project(inner, A.to(dtype))

    def _fast_forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor | None:
        """The same y in a cheaper way, or with another adapter for each row.

        None where the formula itself has to be taken.
        """
        if self._row_forward is not None:
            return self._row_forward(self, x, *args, **kwargs)
        names = self._adapters_in_use()
        # another adapter may have been made active since the weight was made: then the normal path is the right one
        held = self._inference_weight is not None and tuple(names) == self._inference_adapters
        if held and names and not torch.is_grad_enabled():
            return self.inference_product(x)
        return self._forward_with_base(x, names[0]) if len(names) == 1 else None

    def _forward_with_base(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """y by a node that has the frozen product in it, where there is one for the adapter and the base allows it."""
        base = self.base_layer
        # ZeRO-3 gathers a weight when its module is called, and here it is not
        if isinstance(base, Conv1D) or is_sharded(base.weight) or x.device != base.weight.device:
            return None
        trains_bias = base.bias is not None and base.bias.requires_grad
        if trains_bias or not isinstance(self.dropout_of(adapter), nn.Identity):
            return None
        return self.with_base(adapter, x)

    def with_base(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """(W + ΔW) x in one node, else None; asked where `Method.with_base` says."""
        return self._summed_forward(x, adapter)

    def _summed_forward(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """y by one product with W + ΔW where that is cheaper and loses nothing (`fused.pays`), else None."""
        if not self.is_low_rank(adapter):
            return None
        base, factors = self.base_layer, self.parts(adapter)
        if factors.vectors is None:
            return None
        if torch.compiler.is_compiling():  # one path for all numbers of tokens (`qvera.models.compile`)
            return None
        dtype, scaled = linear.compute_dtype(base, x), factors.a is not None
        sizes = x.numel() // self.in_features, self.in_features, self.out_features, factors.rank
        # evaluations go one way whether W + ΔW is held or not, and so give the same loss in every process
        builds = self._builds_per_pass if torch.is_grad_enabled() else fused.BUILDS_UNHELD
        if not fused.pays(*sizes, dtype, x.device.type, scaled, builds):
            return None
        z = None
        if torch.is_grad_enabled() and not fused.keeps_input(*sizes, scaled):
            with torch.no_grad():
                z = self.shared_z(adapter, x, dtype)
        return fused.summed_linear(base, x.to(dtype), z, factors, self._training_weight).to(x.dtype)

    def delta_weight_fp32(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter in fp32, oriented as the base layer's weight: [out, in], or [in, out] for a Conv1D."""
        delta = self.delta(adapter)
        return delta.t() if isinstance(self.base_layer, Conv1D) else delta

    def delta(self, adapter: str) -> torch.Tensor:
        """ΔW [m, n] of one adapter in fp32, without a graph."""
        return self.parts(adapter).delta()

    def is_low_rank(self, adapter: str) -> bool:
        """Whether the adapter adds ΔW x with the ΔW of `parts`, and does nothing else."""
        return True

    def has_delta(self, adapter: str) -> bool:
        """Whether the adapter adds one ΔW x, the same ΔW for all tokens."""
        return True

    def hold_inference_weight(self, hold: bool, base_only: bool = False) -> None:
        """Hold W + ΔW of the active adapters [m, n] in the compute dtype, or let go of it.

        One product then serves base and adapters: on a CPU that is as fast as the 4-bit kernel on the base alone. For
        answers only; with gradients enabled the layer takes its normal path.

        Args:
            hold: False lets go.
            base_only: hold W alone, for batches whose rows use different adapters.
        """
        # the class' None takes its place: code compiled before would be compiled again for a None of its own
        self.__dict__.pop("_inference_weight", None)
        if self._training_weight is not None:
            self._training_weight.drop()
        names = [] if base_only else self.active_names()
        may = not self.merged and not isinstance(self.base_layer, Conv1D) and all(map(self.has_delta, names))
        if hold and may and (names or base_only):
            weight = quantization.dequantized_weight(self.base_layer, torch.float32).detach()
            for name in names:
                weight = weight + self.delta_weight_fp32(name)
            self._inference_weight, self._inference_adapters = weight.to(self.held_dtype()), tuple(names)

    def hold_training_weight(self, hold: bool, builds: float | None = None) -> None:
        """Where the layer goes through W + ΔW (`fused`), hold it [m, n] until a vector changes; False lets go.

        ``builds``: see `hold_training_weights`.
        """
        self._training_weight = fused.HeldWeight() if hold else None
        self._builds_per_pass = (1.0 if hold else fused.BUILDS_UNHELD) if builds is None else builds

    def held_dtype(self) -> torch.dtype:
        """The dtype of `hold_inference_weight`."""
        base = self.base_layer
        dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
        # int8: A and B are held in the dtype that their layers compute in
        return dtype if dtype.is_floating_point else self.parts(min(self._get_available_adapters()))[0].dtype

    def inference_product(self, x: torch.Tensor) -> torch.Tensor:
        """y by one product with the held weight."""
        weight, bias = self._inference_weight, self.base_layer.bias
        assert weight is not None
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    @property
    def holds_inference_weight(self) -> bool:
        """Whether the layer holds W + ΔW (or W alone) now."""
        return self._inference_weight is not None


def hold_training_weights(model: nn.Module, hold: bool = True, builds: float | None = None) -> None:
    """Hold W + ΔW of every adapted layer between optimizer steps (`LowRankPath.hold_training_weight`).

    Beside the model it takes all adapted weights in the compute dtype; worth it on a CPU with that much memory to
    spare. `qvera train` does it by itself where the plan says that it fits. Layers that take another path for it
    (`fused.pays`) give other last bits.

    Args:
        model: with an adapter.
        hold: False lets go.
        builds: how often W + ΔW is made in a forward and backward pass, by which a layer in training chooses its path:
            1/4 where it is held over the four passes of a step. None: once where it is held, else twice.
    """
    for module in model.modules():
        if isinstance(module, LowRankPath):
            module.hold_training_weight(hold, builds)


class VectorDict(nn.ParameterDict):
    """Adapter name → vector.

    Stays fp32 when the model is cast to 16 bits: the optimizer's steps are finer than bf16.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VectorDict:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)


class QveraLinear(LowRankPath, nn.Module, BaseTunerLayer):
    """y = base(x) + ΔW x over `Linear4bit`, `Linear8bitLt`, `Linear` or `Conv1D`.

    The tensors of an adapter, fp32, lie under the names that its method gives them (`Method.tensors`): VeRA's are
    ``qvera_d`` [rank] and ``qvera_b`` [out_features]. `LowRankPath.forward` has the formula; it runs in the base
    layer's compute dtype.
    """

    adapter_layer_names: tuple[str, ...] = ()  # grows with the adapters
    tensor_names: tuple[str, ...] = ()  # likewise: all of them
    other_param_names: tuple[str, ...] = ("qvera_settings", "qvera_dropout", "qvera_projection", "qvera_frozen")
    # PEFT's, which a type checker can't see
    enable_adapters: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        projection: SharedProjection | OwnProjection | None,
        config: QveraConfig,
        full_name: str = "",
    ) -> None:
        super().__init__()
        shape = layer_shape(base_layer)
        if shape is None:
            raise TypeError(f"QVERA adapts linear layers, not {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.in_features, self.out_features = shape
        self.qvera_dropout: Any = nn.ModuleDict()
        # every layer names the same module, so that moving any part of the model moves the one pair with it
        self.qvera_projection: Any = nn.ModuleDict()
        self.qvera_frozen: Any = nn.ModuleDict()
        """Adapter → what its method made from the weight (`Method.put_on`)."""
        self.qvera_settings: dict[str, tuple[Method, QveraConfig]] = {}
        self.place = Place(full_name, self.in_features, self.out_features)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: nn.Parameter | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, projection, config)

    def update_layer(
        self, adapter_name: str, projection: SharedProjection | OwnProjection | None, config: QveraConfig
    ) -> None:
        """Add the tensors of one more adapter, with the initial values of its method."""
        device, method = self.base_layer.weight.device, method_of(config)
        self.qvera_settings[adapter_name] = method, config
        if projection is not None:
            self.qvera_projection[adapter_name] = projection
        self.qvera_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for name, shape in method.tensors(config, self.place).items():
            holds_places = name in method.place_names
            if not hasattr(self, name):
                setattr(self, name, VectorDict())
                if holds_places:  # PEFT asks every tensor of the other list for gradients
                    self.other_param_names = (*self.other_param_names, name)
                else:
                    self.adapter_layer_names = (*self.adapter_layer_names, name)
                self.tensor_names = (*self.tensor_names, name)
            if device.type == "meta":
                start = torch.empty(shape, device=device, dtype=torch.int32 if holds_places else torch.float32)
            else:
                start = method.start(name, shape, config, self.place).to(device)
            getattr(self, name)[adapter_name] = nn.Parameter(start, requires_grad=not holds_places)
        method.put_on(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters active, and train them, but for what their methods keep frozen; PEFT calls it."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        for name, (method, config) in self.qvera_settings.items():
            for kind, vector in self.vectors(name).items():
                if not method.is_trained(kind, config):
                    vector.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype of the base weight, which rounds fp32 vectors over a 16-bit base, and which
        # for packed weights is not even the dtype that the layer computes in
        device = device or self.base_layer.weight.device
        if device.type == "meta":
            return
        for vector in self.vectors(adapter_name).values():
            if not vector.is_meta:
                vector.data = vector.data.to(device)
        for modules in (self.qvera_projection, self.qvera_frozen):
            if adapter_name in modules:
                modules[adapter_name].to(device)

    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""
        return adapter in self.qvera_settings

    def vectors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's tensors in this layer, by their names in an adapter file."""
        return {name: getattr(self, name)[adapter] for name in self.tensor_names if adapter in getattr(self, name)}

    def method(self, adapter: str) -> Method:
        """The method of one adapter."""
        return self.qvera_settings[adapter][0]

    def token_sampler(self, adapter: str) -> TokenSampler | None:
        """See `LowRankPath.token_sampler`."""
        return self.qvera_settings[adapter][1].token_sampler

    def parts(self, adapter: str) -> Factors:
        """The factors of one adapter in this layer; a shared A and B are views of the pair."""
        method, config = self.qvera_settings[adapter]
        return method.factors(config, self.place, self.vectors(adapter), self.pair(adapter))

    def pair(self, adapter: str) -> Pair | None:
        """The frozen A and B of one adapter in this layer; None where its method has none."""
        if adapter not in self.qvera_projection:
            return None
        method, config = self.qvera_settings[adapter]
        rank = method.rank_at(config, self.place)
        return self.qvera_projection[adapter].slices(rank, self.in_features, self.out_features)

    def add_adapter(self, adapter: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """The output with one adapter more, as its method computes it."""
        return self.method(adapter).add(self, adapter, x, y, overwrite)

    def with_base(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """(W + ΔW) x in one node, as the adapter's method has it, or by W + ΔW."""
        y = self.method(adapter).with_base(self, adapter, x)
        return super().with_base(adapter, x) if y is None else y

    def delta(self, adapter: str) -> torch.Tensor:
        """ΔW [m, n] of one adapter in fp32, without a graph."""
        return self.method(adapter).delta(self, adapter)

    def is_low_rank(self, adapter: str) -> bool:
        """Whether the adapter adds ΔW x with the ΔW of `parts`, and does nothing else."""
        return self.method(adapter).is_low_rank

    def has_delta(self, adapter: str) -> bool:
        """Whether the adapter adds one ΔW x, the same ΔW for all tokens."""
        return self.method(adapter).has_delta

    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""
        return self.qvera_dropout[adapter]

    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """z = A x in ``dtype``, shared with the layers that read the same x; None where the adapter has A itself."""
        if adapter not in self.qvera_projection:
            return None
        method, config = self.qvera_settings[adapter]
        return self.qvera_projection[adapter].project(x, method.rank_at(config, self.place), dtype)

    get_delta_weight = LowRankPath.delta_weight_fp32  # PEFT's name for it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given (default: active) adapters to the base weight; `unmerge` restores the original bytes.

        A quantized weight is quantized again; a warning gives the measured error of that.

        Raises:
            ValueError: ``safe_merge`` and the merged weight has NaN or Inf; the layer is left as it was.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if self.carries(n)]
        if not adapter_names:
            return
        base = self.base_layer
        merged = quantization.dequantized_weight(base, torch.float32)
        merged = merged + sum(self.get_delta_weight(name) for name in adapter_names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {adapter_names} gives NaN or Inf: the adapter or the base weight is broken")
        original = base.weight
        if isinstance(base, quantization.Linear8bit):
            # a stock forward before qvera moves rows and scales into the layer's state: unmerge needs them on the
            # weight
            original.CB, original.SCB = quantization.int8_rows(base)
        if isinstance(base, (quantization.Linear4bit, quantization.Linear8bit)):
            self._install(quantization.requantized(base, merged))
            error = quantization.dequantized_weight(base, torch.float32) - merged
            relative = (error.norm() / merged.norm()).item()
            warnings.warn(
                f"merged into a quantized weight, which is quantized again: relative error {relative:.2e} (Frobenius). "
                "Export to 16 bits for an exact merge",
                stacklevel=2,
            )
        else:
            self._install(nn.Parameter(merged.to(original.dtype), requires_grad=original.requires_grad))
        if self._unmerged_weight is None:
            self._unmerged_weight = original
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Put the original weight back: the very bytes that were there before `merge`."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._install(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _install(self, weight: Any) -> None:
        base = self.base_layer
        base.weight = weight
        if isinstance(base, quantization.Linear4bit):
            base.quant_state = weight.quant_state
        elif isinstance(base, quantization.Linear8bit):
            base.state.CB, base.state.SCB = weight.CB, weight.SCB

    def extra_repr(self) -> str:
        """Adapters and their ranks, for `print(model)`."""
        return ", ".join(f"{name}: {m.name}, rank={c.rank}" for name, (m, c) in self.qvera_settings.items())
