"""PEFT's own VeRA on our layers: `accelerate_peft` and `restore_peft`.

PEFT keeps its projections, files, keys, vectors, merging and errors. Only the layers' computation is ours.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftType, VeraConfig, VeraModel, mapping
from peft.tuners.vera.layer import VeraLayer
from torch import nn

from qvera.adapters.adapted_forward import AdaptedForward
from qvera.adapters.factors import Factors
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import SharedInput
from qvera.models import linear


class _Pair(SharedInput):
    """PEFT's A and B of one model, cast once for each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[tuple[str, str, torch.dtype, torch.device], tuple[Any, int, torch.Tensor]] = {}

    def cast(self, name: str, adapter: str, held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cast ``held`` to ``dtype``; the copy is reused until the tensor is replaced or changed in place."""
        if held.dtype == dtype:
            return held
        key = name, adapter, dtype, held.device
        found = self._casts.get(key)
        if found is not None and found[0]() is held and found[1] == held._version:
            return found[2]
        copy = held.detach().to(dtype)
        self._casts[key] = (weakref.ref(held), held._version, copy)
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_casts": {}}


class _AcceleratedLayer(AdaptedForward):
    vera_A: Any  # noqa: N815  # PEFT's names
    vera_B: Any  # noqa: N815
    vera_lambda_b: Any
    vera_lambda_d: Any
    vera_dropout: Any
    _pair: _Pair

    def carries(self, adapter: str) -> bool:
        return adapter in self.vera_lambda_d

    def parts(self, adapter: str) -> Factors:
        d, b = at_least_fp32(self.vera_lambda_d[adapter]), at_least_fp32(self.vera_lambda_b[adapter])
        # PEFT leaves its buffers where they are when only a layer is moved
        A = self.vera_A[adapter][:, : self.in_features].to(d.device)
        B = self.vera_B[adapter][: self.out_features, :].to(d.device)
        return Factors(A, B, d, b, 1.0)

    def dropout_of(self, adapter: str) -> nn.Module:
        return self.vera_dropout[adapter]

    def shared_z(self, adapter: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        held = self.vera_A[adapter].to(x.device)
        A = self._pair.cast("A", adapter, held, dtype)[:, : self.in_features]
        return self._pair.project(x, A, dtype, (adapter, A.data_ptr(), held._version))

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return super().forward(x, *args, **kwargs).to(x.dtype)


_accelerated: dict[type, type] = {}


def _accelerated_class(stock: type) -> type:
    """PEFT has one VeRA layer class for each kind of base layer; each gets one subclass."""
    if stock not in _accelerated:
        _accelerated[stock] = type(f"Accelerated{stock.__name__}", (_AcceleratedLayer, stock), {"__module__": __name__})
    return _accelerated[stock]


class AcceleratedVeraModel(VeraModel):
    """PEFT's VeraModel whose layers compute by `AdaptedForward`."""

    def _pre_injection_hook(self, model: nn.Module, config: VeraConfig, adapter_name: str) -> None:
        linear.freeze_linears(model)
        super()._pre_injection_hook(model, config, adapter_name)

    # PEFT's is static
    def _create_new_module(self, *args: object, **kwargs: object) -> VeraLayer:  # type: ignore[override]
        layer = VeraModel._create_new_module(*args, **kwargs)
        if isinstance(layer, VeraLayer):
            layer.__class__ = _accelerated_class(type(layer))
            layer.__dict__["_pair"] = self.__dict__.setdefault("_pair", _Pair())
        return layer


def accelerate_peft() -> None:
    """Make VERA adapters compute on our layers, in models that PEFT makes from now on. Calls may be repeated."""
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = AcceleratedVeraModel


def restore_peft() -> None:
    """Undo `accelerate_peft` for adapters made from now on."""
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = VeraModel


@contextmanager
def accelerated_peft() -> Iterator[None]:
    """`accelerate_peft` within the context."""
    before = mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA]
    accelerate_peft()
    try:
        yield
    finally:
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = before
