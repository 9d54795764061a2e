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
from torch import Tensor, nn

from qvera.adapters.factors import Factors
from qvera.adapters.layer import AdaptedForward
from qvera.adapters.methods.base import Method
from qvera.adapters.methods.vera import Vera
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import SharedInput
from qvera.models import linear


class _Pair(SharedInput):
    """PEFT's A and B of one model, cast once for each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[tuple[str, torch.dtype, torch.device], tuple[Any, int, Tensor]] = {}

    def cast(self, adapter: str, held: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast A to ``dtype``; the copy is reused until the tensor is replaced or changed in place."""
        if held.dtype == dtype:
            return held
        key = adapter, dtype, held.device
        found = self._casts.get(key)
        if found is None or found[0]() is not held or found[1] != held._version:
            found = self._casts[key] = weakref.ref(held), held._version, held.detach().to(dtype)
        return found[2]

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

    def method(self, adapter: str) -> Method:
        return _VERA

    def parts(self, adapter: str) -> Factors:
        d, b = at_least_fp32(self.vera_lambda_d[adapter]), at_least_fp32(self.vera_lambda_b[adapter])
        # PEFT leaves its buffers where they are when only a layer is moved
        A = self.vera_A[adapter][:, : self.in_features].to(d.device)
        B = self.vera_B[adapter][: self.out_features, :].to(d.device)
        return Factors(A, B, d, b, 1.0)

    def dropout_of(self, adapter: str) -> nn.Module:
        return self.vera_dropout[adapter]

    def shared_z(self, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        held = self.vera_A[adapter].to(x.device)
        A = self._pair.cast(adapter, held, dtype)[:, : self.in_features]
        return self._pair.project(x, A, dtype, (adapter, A.data_ptr(), held._version))

    def int8_dtype(self) -> torch.dtype:
        return self.parts(min(self.vera_lambda_d)).A.dtype

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return super().forward(x, *args, **kwargs).to(x.dtype)


_VERA = Vera()
_accelerated: dict[type, type] = {}
"""PEFT's VeRA layer class, of which there is one for each kind of base layer → its subclass that computes our way."""


class AcceleratedVeraModel(VeraModel):
    """PEFT's VeraModel whose layers compute by `AdaptedForward`."""

    def _pre_injection_hook(self, model: nn.Module, config: VeraConfig, adapter_name: str) -> None:
        linear.freeze_linears(model)
        super()._pre_injection_hook(model, config, adapter_name)

    # PEFT's is static
    def _create_new_module(self, *args: object, **kwargs: object) -> VeraLayer:  # type: ignore[override]
        layer = VeraModel._create_new_module(*args, **kwargs)
        if isinstance(layer, VeraLayer):
            stock = type(layer)
            if stock not in _accelerated:
                bases, about = (_AcceleratedLayer, stock), {"__module__": __name__}
                _accelerated[stock] = type(f"Accelerated{stock.__name__}", bases, about)
            layer.__class__ = _accelerated[stock]
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
