"""qvera beside stock PEFT: PEFT's own VeRA on our layers, and what PEFT makes of a LoRA when it opens its file.

`accelerate_peft` and `restore_peft`: PEFT keeps its projections, files, keys, vectors, merging and errors. Only the
layers' computation is ours. `require_kept`: which layers PEFT adapts by a LoRA's file, and which tensors it drops.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import (
    LoraConfig,
    PeftType,
    VeraConfig,
    VeraModel,
    get_peft_model,
    get_peft_model_state_dict,
    mapping,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvera.adapters.config import PREFIX
from qvera.adapters.factors import Factors
from qvera.adapters.layer import AdaptedForward
from qvera.adapters.methods.base import Method
from qvera.adapters.methods.vera import Vera
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import SharedInput
from qvera.models import linear
from qvera.models.structure import share_tied_modules
from qvera.utils.errors import InputError, first_line
from qvera.utils.formatting import first_of


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
    """Mixed before one of PEFT's VeRA layer classes, whose attributes have PEFT's names."""

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

    # static in PEFT; here it needs the model's pair
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
    """Apply `accelerate_peft` within the context, and restore what was there before."""
    before = mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA]
    accelerate_peft()
    try:
        yield
    finally:
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = before


class PeftPlace(NamedTuple):
    """Where PEFT has the LoRA of a layer's experts."""

    module: str
    """The path of the wrapper with the LoRA. PEFT wraps a module once for each parameter, one wrapper in the other."""
    turned: bool
    """Whether PEFT takes their matrices [in, out] for [out, in], so that A and B change places."""


Places = Mapping[str, PeftPlace]


def other_places(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Map each further place of a linear to its name, for modules that stand in several (`share_tied_modules`)."""
    shared = share_tied_modules(model).items()
    return {
        place + name.removeprefix(source): name
        for name in names
        for place, source in shared
        if name.startswith(f"{source}.")
    }


def require_kept(config: LoraConfig, layers: Mapping[str, bool | None], model: PreTrainedModel) -> Places:
    """Put a LoRA on a model like a base, as PEFT does when it opens a file. Returns where PEFT has that of experts.

    In models with experts PEFT takes names such as ``down_proj`` for those of experts, and drops the tensors of dense
    MLPs with these names, or of shared experts (Laguna).

    Args:
        layers: what is adapted: the names of linears → None, of experts → whether their matrices are [in, out].
        model: needs no weights.

    InputError: it refuses the targets, or would adapt other layers.
    """
    weights, kept, places = dict(model.named_parameters()), set(), {}
    if flat := sorted(name for name, turned in layers.items() if turned is not None and weights[name].dim() == 2):
        raise InputError(
            f"PEFT takes {first_of(flat)} for one matrix, where the adapter changes each expert. Export with --to "
            "merged."
        )
    try:
        with torch.device("meta"):  # not the base itself, where modules stand in several places
            adapted = get_peft_model(type(model)(model.config), config)
    except ValueError as error:
        raise InputError(
            f"PEFT refuses a LoRA of this adapter's targets: {first_line(error)} Export with --to merged, or train "
            "with adapter.targets that leave these out."
        ) from None
    # the tensors that PEFT would lose between writing this adapter and reading it
    own = get_peft_model_state_dict(adapted)
    missing = set_peft_model_state_dict(adapted, own).missing_keys  # PEFT renames tensors when it reads them
    lost = {name.partition(".lora_")[0].removeprefix(PREFIX) for name in missing if ".lora_" in name}
    # what PEFT has adapted, under our names: a wrapper of a parameter stands for that parameter
    for path, module in adapted.get_base_model().named_modules():
        name = path
        if isinstance(module, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            takes_turned, turned = getattr(module.get_base_layer(), "is_transposed", False), layers.get(name)
            places[name] = PeftPlace(path, turned is not None and turned != takes_turned)
        if isinstance(module, LoraLayer) and path not in lost:
            kept.add(name)
    if other := sorted(layers.keys() - kept) or sorted(kept - layers.keys()):
        raise InputError(
            f"PEFT would not adapt {first_of(other)} of this model as the adapter does: it takes the name for that of "
            "experts, and the export would lose it. Export with --to merged, or train with adapter.targets that name "
            "attention only."
        )
    return places
