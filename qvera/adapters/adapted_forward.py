"""The forward pass of an adapted linear; `accelerate_peft` mixes it into PEFT's VeRA layers too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qvera.adapters.factors import Factors
from qvera.adapters.products import functional, fused
from qvera.adapters.products.low_rank import Sampler
from qvera.distributed.zero_params import is_sharded
from qvera.models import linear, quantization
from qvera.models.structure import returns_more


def layer_shape(base_layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that can be adapted, else None."""
    if isinstance(base_layer, Conv1D):
        return base_layer.weight.shape[0], base_layer.weight.shape[1]
    if returns_more(base_layer):
        return None
    if isinstance(base_layer, nn.Linear):  # bitsandbytes' linears are nn.Linear too
        return base_layer.in_features, base_layer.out_features
    return None


class AdaptedForward:
    """Mixed into a PEFT layer with a frozen ``base_layer``. Subclasses say where an adapter's factors are."""

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
    input_sampler: Sampler | None = None
    """Chooses the tokens of x that backward keeps for the gradient of a trained A; None: all are kept."""
    needs_whole_passes: bool = False
    """The method has to see all tokens of a pass at once, so an MLP must not be computed in tiles."""

    @abstractmethod
    def carries(self, adapter: str) -> bool:
        """Whether this layer has vectors of that adapter."""

    @abstractmethod
    def parts(self, adapter: str) -> Factors:
        """The factors of one adapter in this layer; A and B are views of the shared pair."""

    @abstractmethod
    def dropout_of(self, adapter: str) -> nn.Module:
        """The dropout on the adapter's input; an Identity where there is none."""

    @abstractmethod
    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """z = A x in ``dtype``, shared with the layers that read the same x; None where the adapter has A itself."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """y = W x + ΔW x, summed over the active adapters, in the base layer's output dtype."""
        # with VeRA ΔW = s diag(b) B diag(d) A (equation 2)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.active_names()
        # another adapter may have been made active since the weight was made: then the normal path is the right one
        held = self._inference_weight is not None and tuple(names) == self._inference_adapters
        if held and names and not torch.is_grad_enabled():
            return self.inference_product(x)
        if len(names) == 1 and self._may_join_base(names[0], x) and (y := self.with_base(names[0], x)) is not None:
            return y
        y = self.base_layer(x, *args, **kwargs)  # W x
        overwrite = self._owns_output(y)
        for adapter in names:
            y = self.add_adapter(adapter, x, y, overwrite)
        return y

    def add_adapter(self, adapter: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """Add one adapter to y, which is the output without it."""
        return self.add_low_rank(adapter, x, y, overwrite)

    def add_low_rank(self, adapter: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """y + s diag(b) B M A diag(a) x, for all methods whose change is `Factors`."""
        factors = self.parts(adapter)
        z = self.project(x, adapter, factors.A, factors.a)  # A x
        return factors.expand(y, z, overwrite)  # y + s diag(b) B M z

    def _owns_output(self, y: torch.Tensor) -> bool:
        # whether the adapter may overwrite y, which saves a launch on an accelerator: no linear keeps its output for
        # backward, and without hooks only this layer reads it
        base = self.base_layer
        if y.device.type == "cpu" or torch.compiler.is_compiling():
            return False
        return isinstance(base, (nn.Linear, Conv1D)) and not base._forward_hooks

    def active_names(self) -> list[str]:
        """The active adapters that this layer carries."""
        return [name for name in self.active_adapters if self.carries(name)]

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

    def _may_join_base(self, adapter: str, x: torch.Tensor) -> bool:
        """Whether one autograd node may hold the frozen product too: a whole, frozen linear and no dropout."""
        base = self.base_layer
        # ZeRO-3 gathers a weight when its module is called, and here it is not
        if isinstance(base, Conv1D) or is_sharded(base.weight) or x.device != base.weight.device:
            return False
        is_frozen = not any(p is not None and p.requires_grad for p in (base.weight, base.bias))
        return is_frozen and isinstance(self.dropout_of(adapter), nn.Identity)

    def with_base(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """(W + ΔW) x as one product, or None where that is not cheaper or less exact (`fused.pays`)."""
        if not self.is_low_rank(adapter):
            return None
        base, factors = self.base_layer, self.parts(adapter)
        if factors.vectors is None:
            return None
        if torch.compiler.is_compiling():  # one path for all numbers of tokens (`qvera.models.checkpointing`)
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
        """ΔW of one adapter in fp32, in the base weight's orientation: [out, in], or [in, out] for a Conv1D."""
        delta = self.delta(adapter)
        return delta.t() if isinstance(self.base_layer, Conv1D) else delta

    def delta(self, adapter: str) -> torch.Tensor:
        """ΔW [m, n] of one adapter in fp32, without a graph."""
        return self.parts(adapter).delta()

    def is_low_rank(self, adapter: str) -> bool:
        """Whether the adapter adds ΔW x, with the ΔW of `parts`, and does nothing else."""
        return True

    def has_delta(self, adapter: str) -> bool:
        """Whether the adapter adds ΔW x with the same ΔW for all tokens."""
        return True

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
        may = not self.merged and not isinstance(self.base_layer, Conv1D) and all(map(self.has_delta, names))
        if hold and may and (names or base_only):
            weight = quantization.dequantized_weight(self.base_layer, torch.float32).detach()
            for name in names:
                weight = weight + self.delta_weight_fp32(name)
            self._inference_weight, self._inference_adapters = weight.to(self.held_dtype()), tuple(names)

    def hold_training_weight(self, hold: bool, builds: float | None = None) -> None:
        """Hold W + ΔW [m, n] until a vector changes, if the layer uses it (`fused`). See `hold_training_weights`."""
        self._training_weight = fused.HeldWeight() if hold else None
        self._builds_per_pass = (1.0 if hold else fused.BUILDS_UNHELD) if builds is None else builds

    def held_dtype(self) -> torch.dtype:
        """The dtype of `cache_merged_weight`."""
        base = self.base_layer
        dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
        return dtype if dtype.is_floating_point else self.int8_dtype()

    def int8_dtype(self) -> torch.dtype:
        """The compute dtype over an int8 base, whose weight does not tell it: that of A and B."""
        return self.parts(min(self._get_available_adapters()))[0].dtype

    def inference_product(self, x: torch.Tensor) -> torch.Tensor:
        """y as one product with the held weight."""
        weight, bias = self._inference_weight, self.base_layer.bias
        assert weight is not None
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)

    @property
    def holds_inference_weight(self) -> bool:
        """Whether the layer holds W + ΔW, or W alone, now."""
        return self._inference_weight is not None


def hold_training_weights(model: nn.Module, hold: bool = True, builds: float | None = None) -> None:
    """Hold W + ΔW of every adapted layer between optimizer steps, or drop it; this pays on a CPU.

    It takes as much memory as all adapted weights in the compute dtype. `qvera train` does it by itself where the plan
    says that it fits. It can change a layer's path (`fused.pays`), and so the last bits.

    ``builds``: how often W + ΔW is made in a forward and backward pass, such as 1/4 if held over a step of four passes.
    None: once where it is held, else twice.
    """
    for module in model.modules():
        if isinstance(module, AdaptedForward):
            module.hold_training_weight(hold, builds)
