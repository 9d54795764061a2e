"""The adapted linear: a frozen base layer, the tensors of each adapter, and the forward pass y = W x + ΔW x.

An adapter's method says what its tensors compute. `accelerate_peft` mixes `AdaptedForward` into PEFT's VeRA layers too.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods import LinearSpec, Method, method_of
from qvera.adapters.methods.base import Change, trains_pair
from qvera.adapters.methods.vera import RowNorms
from qvera.adapters.products import functional, fused
from qvera.adapters.products.low_rank import Sampler, trained_linear
from qvera.adapters.projection import OwnProjection, Pair, SharedProjection
from qvera.distributed.zero import is_sharded
from qvera.models import linear, quantization
from qvera.models.experts import ExpertStack, expert_specs
from qvera.models.structure import returns_more
from qvera.utils import accelerator


def layer_shape(base_layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[0], base_layer.weight.shape[1]
    if isinstance(base_layer, nn.Linear) and not returns_more(base_layer):  # bitsandbytes' are nn.Linear too
        return base_layer.in_features, base_layer.out_features
    return (base_layer.in_features, base_layer.out_features) if isinstance(base_layer, ExpertStack) else None


def spec_of(name: str, base_layer: nn.Module) -> LinearSpec:
    """Return the `LinearSpec` of a layer, by which methods know it. TypeError: the layer can't be adapted."""
    if (shape := layer_shape(base_layer)) is None:
        raise TypeError(f"QVERA adapts linear layers, not {type(base_layer).__name__}")
    return LinearSpec(name, *shape, base_layer.spec.experts if isinstance(base_layer, ExpertStack) else 0)


def linear_specs(model: nn.Module) -> dict[str, LinearSpec]:
    """A model's linears and experts that can be adapted, by name."""
    found = {name: spec_of(name, m) for name, m in model.named_modules() if layer_shape(m) is not None}
    for name, (experts, m, n, is_transposed) in expert_specs(model).items():  # experts that are parameters still
        found[name] = LinearSpec(name, *((m, n) if is_transposed else (n, m)), experts)
    return found


class AdaptedForward:
    """Mixed into a PEFT layer with a frozen ``base_layer``. Subclasses say where an adapter's factors are."""

    base_layer: Any  # a linear of torch, bitsandbytes or transformers
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    unmerge: Callable[[], None]
    _inference_weight: Tensor | None = None
    _inference_adapters: tuple[str, ...] = ()
    _training_weight: fused.HeldWeight | None = None
    _builds_per_pass: float = fused.BUILDS_UNHELD
    input_sampler: Sampler | None = None
    """Chooses the tokens of x that backward keeps for the gradient of a trained A; None: all are kept."""
    needs_whole_passes: bool = False
    """The method has to see all tokens of a pass at once, so an MLP must not be computed in tiles."""

    @abstractmethod
    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""

    @abstractmethod
    def method(self, adapter: str) -> Method:
        """The method of one adapter."""

    @abstractmethod
    def parts(self, adapter: str) -> Factors:
        """The factors of one adapter in this layer; a shared A and B are views of the pair."""

    @abstractmethod
    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""

    @abstractmethod
    def shared_z(self, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """z = A x in ``dtype``, shared with the layers that read the same x; None where A is this layer's own."""

    @abstractmethod
    def int8_dtype(self) -> torch.dtype:
        """The compute dtype over an int8 base, whose weight does not tell it."""

    def active_names(self) -> list[str]:
        """The active adapters that this layer carries."""
        return [name for name in self.active_adapters if self.carries(name)]

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """y = W x + ΔW x, summed over the active adapters, in the base layer's output dtype."""
        # with VeRA ΔW = s diag(b) B diag(d) A (equation 2)
        # without adapters W x is asked for, and a merged weight has ΔW in it
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.active_names()
        # another adapter may have been made active since the weight was made: then the normal path is the right one
        held = self._inference_weight is not None and tuple(names) == self._inference_adapters
        if held and names and not torch.is_grad_enabled():
            return self.inference_product(x)
        # one adapter: base and ΔW in one node, if possible and worth it
        if len(names) == 1 and (joined := self.with_base(names[0], x)) is not None:
            return joined
        base = self.base_layer
        y = base(x, *args, **kwargs)  # W x
        # overwriting y saves a launch on an accelerator: no linear keeps its output for backward, and without hooks
        # only this layer reads it
        on_accelerator = y.device.type != "cpu" and not torch.compiler.is_compiling()
        overwrite = on_accelerator and isinstance(base, (nn.Linear, Conv1D)) and not base._forward_hooks
        for adapter in names:
            y = self.method(adapter).add(self, adapter, x, y, overwrite)
        return y

    def add_low_rank(self, adapter: str, x: Tensor, y: Tensor, overwrite: bool = False) -> Tensor:
        """y + s diag(b) B M A diag(a) x, for all methods whose change is `Factors`."""
        factors = self.parts(adapter)
        z = self.project(x, adapter, factors.A, factors.a)  # A x
        return factors.expand(y, z, overwrite)  # y + s diag(b) B M z

    def project(self, x: Tensor, adapter: str, A: Tensor, a: Tensor | None = None) -> Tensor:
        """z = A diag(a) dropout(x) in the compute dtype."""
        dtype, dropout = linear.compute_dtype(self.base_layer, x), self.dropout_of(adapter)
        if isinstance(dropout, nn.Identity) and a is None and (z := self.shared_z(adapter, x, dtype)) is not None:
            return z
        # every layer drops other elements and has its own a, so there is nothing to share
        inner = dropout(x).to(dtype)
        return functional.project(inner if a is None else functional.scale_input(inner, a), A.to(dtype))

    def with_base(self, adapter: str, x: Tensor) -> Tensor | None:
        """Return W x + ΔW x from one autograd node; None: this layer and input have to take the normal path.

        - A trained pair (LoRA): `trained_linear`, which keeps less for backward.
        - VeRA: one product with W + ΔW where that is cheaper and as exact (`fused.pays`). Else, on an accelerator, the
          low-rank path with the frozen product in it (`functional.joined_linear`).
        """
        base, grad = self.base_layer, torch.is_grad_enabled()
        dtype, method = linear.compute_dtype(base, x), self.method(adapter)
        weight, bias = base.weight, base.bias
        with torch._C.DisableTorchFunctionSubclass():  # as in `quantization.dequantized_weight`
            is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
            is_elsewhere = x.device != weight.device
        # ZeRO-3 gathers a weight when its module is called, and here it is not
        if is_trained or is_elsewhere or is_sharded(weight) or isinstance(base, Conv1D):
            return None
        if not isinstance(self.dropout_of(adapter), nn.Identity):
            return None
        # its hooks too run only when it is called
        if base._forward_hooks or base._forward_pre_hooks:
            return None
        if trains_pair(method):
            if not grad:  # there is nothing to keep less of
                return None
            factors = self.parts(adapter)
            y = trained_linear(base, x.to(dtype), factors.A, factors.B, factors.scale, self.input_sampler)
            return y.to(x.dtype)
        if method.change is not Change.LOW_RANK or (vectors := (factors := self.parts(adapter)).vectors) is None:
            return None
        if torch.compiler.is_compiling():  # one path for all numbers of tokens (`qvera.models.checkpointing`)
            return None
        scaled, device_type = factors.a is not None, x.device.type
        sizes = x.numel() // self.in_features, self.in_features, self.out_features, factors.rank
        builds = self._builds_per_pass if grad else fused.BUILDS_UNHELD
        # evaluations go one way whether W + ΔW is held or not, and so give the same loss in every process
        if not fused.pays(*sizes, dtype, device_type, scaled, builds):
            # the low-rank path in one node, for accelerators only: there the host's time for a node shows
            if not grad or scaled or x.dtype != dtype or not accelerator.is_accelerator(device_type):
                return None
            joined = x, self.project(x, adapter, factors.A), *vectors, factors.B, factors.scale
            return functional.joined_linear(base, *joined)
        z = None
        if grad and not fused.keeps_input(*sizes, scaled):
            # z only helps backward to the vectors' gradients: the gradient of x goes through W + ΔW
            with torch.no_grad():
                z = self.project(x, adapter, factors.A)
        return fused.summed_linear(base, x.to(dtype), z, factors, self._training_weight).to(x.dtype)

    def delta_weight_fp32(self, adapter: str) -> Tensor:
        """The change of the weight by one adapter in fp32, without a graph: [out, in], or [in, out] for a Conv1D."""
        is_conv = isinstance(self.base_layer, Conv1D)
        if self.method(adapter).change is Change.SCALED:
            weight = quantization.dequantized_weight(self.base_layer, torch.float32)
            delta = self.parts(adapter).change(weight.t() if is_conv else weight)
        else:
            delta = self.parts(adapter).delta()
        return delta.t() if is_conv else delta

    def cache_merged_weight(self, hold: bool, base_only: bool = False) -> None:
        """Hold W + ΔW of the active adapters [m, n] in the compute dtype for inference, or drop it.

        On a CPU the one product is as fast as the 4-bit kernel on the base alone. ``base_only`` holds W, for batches
        whose rows use different adapters.
        """
        # the class' None takes its place: code compiled before would be compiled again for a None of its own
        self.__dict__.pop("_inference_weight", None)
        if self._training_weight is not None:
            self._training_weight.drop()
        names = [] if base_only else self.active_names()
        changes = [self.method(name).change for name in names]
        # one weight can stand for the adapters if no token has a ΔW of its own, and if one that scales W + ΔW is alone
        has_one_weight = Change.PER_TOKEN not in changes and (len(names) == 1 or Change.SCALED not in changes)
        may = has_one_weight and not self.merged and not isinstance(self.base_layer, Conv1D)
        if hold and may and (names or base_only):
            weight = quantization.dequantized_weight(self.base_layer, torch.float32).detach()
            for name in names:
                weight = weight + self.delta_weight_fp32(name)
            self._inference_weight, self._inference_adapters = weight.to(self.held_dtype()), tuple(names)

    def held_dtype(self) -> torch.dtype:
        """The dtype of the weight that `cache_merged_weight` holds."""
        dtype = getattr(self.base_layer, "compute_dtype", None) or self.base_layer.weight.dtype
        return dtype if dtype.is_floating_point else self.int8_dtype()

    def inference_product(self, x: Tensor) -> Tensor:
        """y as one product with the held weight."""
        weight, bias = self._inference_weight, self.base_layer.bias
        assert weight is not None
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    @property
    def holds_inference_weight(self) -> bool:
        """Whether the layer holds W + ΔW, or W alone, now."""
        return self._inference_weight is not None


def hold_training_weights(model: nn.Module, hold: bool = True, builds: float | None = None) -> None:
    """Hold W + ΔW of every adapted layer until a vector changes, or drop it; this pays on a CPU.

    It takes as much memory as all adapted weights in the compute dtype. `qvera train` does it by itself where the plan
    says that it fits. It can change a layer's path (`fused.pays`), and so the last bits.

    ``builds``: how often W + ΔW is made in a forward and backward pass, such as 1/4 if held over a step of four passes.
    None: once where it is held, else twice.
    """
    for module in model.modules():
        if isinstance(module, AdaptedForward):
            module._training_weight = fused.HeldWeight() if hold else None
            module._builds_per_pass = (1.0 if hold else fused.BUILDS_UNHELD) if builds is None else builds


class VectorDict(nn.ParameterDict):
    """Adapter name → vector. Casting the model to 16 bits leaves it fp32, since optimizer steps are finer than bf16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)


def start_on(
    device: torch.device, method: Method, name: str, shape: tuple[int, ...], config: QveraConfig, spec: LinearSpec
) -> Tensor:
    """The start value of one of a method's tensors; on the meta device it is not drawn."""
    if device.type == "meta":
        return torch.empty(shape, device=device, dtype=method.traits(name, config).dtype)
    return method.start(name, shape, config, spec).to(device)


class SharedTensors(nn.ModuleDict):
    """Adapter → `VectorDict` of the tensors that all its linears share, by name. The tuner holds it, as ``shared``."""

    def vectors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's tensors, by their names in an adapter file."""
        tensors: Any = self[adapter] if adapter in self else {}  # noqa: SIM401  # a ModuleDict has no get
        return dict(tensors.items())


class QveraLinear(AdaptedForward, nn.Module, BaseTunerLayer):
    """y = base(x) + ΔW x over `Linear4bit`, `Linear8bitLt`, `Linear` or `Conv1D`, in the base layer's compute dtype.

    Adapter tensors are fp32 attributes, under their names in `Method.tensors`: VeRA's ``qvera_d`` and ``qvera_b``.
    """

    adapter_layer_names: tuple[str, ...] = ("qvera_shared",)  # grows with the adapters
    tensor_names: tuple[str, ...] = ()  # likewise: all of them
    other_param_names: tuple[str, ...] = ("qvera_settings", "qvera_dropout", "qvera_projection", "qvera_frozen")
    made_in: torch.dtype = torch.float32
    """The layer's compute dtype when it was made. A trained pair does not tell it."""
    mixed: Any = None
    """The current batch's `qvera.adapters.bank.MixedForward`, if its tokens use different adapters."""
    # PEFT's, which a type checker can't see
    enable_adapters: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        projection: SharedProjection | OwnProjection | None,
        config: QveraConfig,
        full_name: str = "",
        shared: VectorDict | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec_of(full_name, base_layer)
        self.base_layer = base_layer
        self.in_features, self.out_features = self.spec.in_features, self.spec.out_features
        self.qvera_dropout: Any = nn.ModuleDict()
        # every layer names the same module, so that moving any part of the model moves the one pair with it
        self.qvera_projection: Any = nn.ModuleDict()
        self.qvera_frozen: Any = nn.ModuleDict()
        """Adapter → norms of the weight's rows, if it has a magnitude."""
        self.qvera_shared: dict[str, VectorDict] = {}
        """Adapter → tensors that belong to the whole model (`SharedTensors`), so not to this module."""
        self.qvera_settings: dict[str, tuple[Method, QveraConfig]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: nn.Parameter | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, projection, config, shared)

    def update_layer(
        self,
        adapter_name: str,
        projection: SharedProjection | OwnProjection | None,
        config: QveraConfig,
        shared: VectorDict | None = None,
    ) -> None:
        """Add the tensors of one more adapter, at their start values. Under ZeRO-3 all ranks must do it together."""
        device, method = self.base_layer.weight.device, method_of(config)
        self.qvera_settings[adapter_name] = method, config
        if projection is not None:
            self.qvera_projection[adapter_name] = projection
        if shared is not None:
            self.qvera_shared[adapter_name] = shared
        self.qvera_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for name, shape in method.tensors(config, self.spec).items():
            dtype = method.traits(name, config).dtype
            holds_places = not dtype.is_floating_point
            # the tuple becomes this object's own: a layer names the tensors of its own adapters only
            if not hasattr(self, name):
                setattr(self, name, VectorDict())
                if holds_places:  # PEFT asks every tensor of the other list for gradients
                    self.other_param_names = (*self.other_param_names, name)
                else:
                    self.adapter_layer_names = (*self.adapter_layer_names, name)
                self.tensor_names = (*self.tensor_names, name)
            start = start_on(device, method, name, shape, config, self.spec)
            getattr(self, name)[adapter_name] = nn.Parameter(start, requires_grad=not holds_places)
        if method.change is Change.SCALED:  # the magnitude starts at the weight's row norms
            pair, A = self.qvera_projection[adapter_name], self.parts(adapter_name).A
            others = (norms for other, norms in self.qvera_frozen.items() if self.qvera_projection[other] is pair)
            # adapters over the same pair can share norms: W Aᵀ of a smaller rank is a part of that of a larger one
            held = next((norms for norms in others if norms.products.shape[1] >= A.shape[0]), None)
            norms = RowNorms(self.base_layer, A, self.out_features) if held is None else held
            self.qvera_frozen[adapter_name] = norms
            magnitude = self.vectors(adapter_name)["qvera_m"]
            if not magnitude.is_meta:
                magnitude.data.copy_(norms.squares.sqrt())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters and train them, except what their methods keep frozen. PEFT calls it."""
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        # PEFT makes every tensor of the active adapters trainable
        for name, (method, config) in self.qvera_settings.items():
            for kind, vector in self.tensors(name).items():
                if not method.traits(kind, config).is_trained:
                    vector.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype of the base weight, which rounds fp32 vectors over a 16-bit base, and which
        # for packed weights is not even the dtype that the layer computes in
        device = device or self.base_layer.weight.device
        if device.type == "meta":
            return
        for vector in self.tensors(adapter_name).values():
            if not vector.is_meta:
                vector.data = vector.data.to(device)
        for modules in (self.qvera_projection, self.qvera_frozen):
            if adapter_name in modules:
                modules[adapter_name].to(device)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Compute `AdaptedForward.forward`, or `mixed` where each token uses its own adapter."""
        if self.mixed is not None:
            return self.mixed.forward(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def carries(self, adapter: str) -> bool:
        return adapter in self.qvera_settings

    def vectors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's own tensors in this layer, by their names in an adapter file."""
        held: Any = self._modules  # to ask the modules by their names takes three times as long
        return {
            name: tensor for name in self.tensor_names if (tensor := held[name]._parameters.get(adapter)) is not None
        }

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """One adapter's own tensors and those that it shares."""
        own, shared = self.vectors(adapter), self.qvera_shared.get(adapter)
        return own if shared is None else {**own, **shared}

    def method(self, adapter: str) -> Method:
        return self.qvera_settings[adapter][0]

    def parts(self, adapter: str) -> Factors:
        method, config = self.qvera_settings[adapter]
        return method.factors(config, self.spec, self.tensors(adapter), self.pair(adapter))

    def pair(self, adapter: str) -> Pair | None:
        """The adapter's frozen A and B for this layer; None if its method has none."""
        projections: Any = self._modules["qvera_projection"]
        if (projection := projections._modules.get(adapter)) is None:
            return None
        method, config = self.qvera_settings[adapter]
        return projection.slices(method.rank_at(config, self.spec), self.in_features, self.out_features)

    def dropout_of(self, adapter: str) -> nn.Module:
        held: Any = self._modules["qvera_dropout"]
        return held._modules[adapter]

    def shared_z(self, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        projections: Any = self._modules["qvera_projection"]
        if not isinstance(projection := projections._modules.get(adapter), SharedProjection):
            return None
        method, config = self.qvera_settings[adapter]
        return projection.project(x, method.rank_at(config, self.spec), dtype)

    def int8_dtype(self) -> torch.dtype:
        return next((pair.A.dtype for pair in self.qvera_projection.values()), self.made_in)

    get_delta_weight = AdaptedForward.delta_weight_fp32  # PEFT's name for it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given (default: active) adapters to the base weight; `unmerge` restores the original bytes.

        A quantized weight is quantized again, and a warning gives the error of that. ValueError: the result has NaN or
        Inf (with ``safe_merge``), or one of several adapters can't be merged with others. The layer is unchanged then.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if self.carries(n)]
        if not adapter_names:
            return
        together = {*self.merged_adapters, *adapter_names}
        alone = [name for name in sorted(together) if self.method(name).change is Change.SCALED]
        if len(together) > 1 and alone:
            raise ValueError(f"{alone[0]} scales the rows of W + ΔW and can't be merged together with others.")
        base = self.base_layer
        merged = quantization.dequantized_weight(base, torch.float32)
        merged = merged + sum(self.get_delta_weight(name) for name in adapter_names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging {adapter_names} gives NaN or Inf: the adapter or the base weight is broken")
        original = base.weight
        if isinstance(base, quantization.Linear8bit):
            # a stock forward pass, before qvera had the model, moves rows and scales into the layer's state; unmerge
            # needs them on the weight
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
        if self._unmerged_weight is None:  # of several merges, unmerge goes back to before the first
            self._unmerged_weight = original
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, byte for byte."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._install(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _install(self, weight: Any) -> None:
        base = self.base_layer
        base.weight = weight
        # bitsandbytes computes with references of its own to what the weight holds
        if isinstance(base, quantization.Linear4bit):
            base.quant_state = weight.quant_state
        elif isinstance(base, quantization.Linear8bit):
            base.state.CB, base.state.SCB = weight.CB, weight.SCB

    def extra_repr(self) -> str:
        """Adapters and their ranks, for `print(model)`."""
        return ", ".join(f"{name}: {m.name}, rank={c.rank}" for name, (m, c) in self.qvera_settings.items())


def adapted_layers(model: nn.Module) -> list[QveraLinear]:
    """All adapted linears of a model."""
    return [module for module in model.modules() if isinstance(module, QveraLinear)]
