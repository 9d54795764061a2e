"""The PEFT side: which modules are adapted, the shared projections, and the names under which PEFT finds all this."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from qvera.adapters.config import PEFT_TYPE, QveraConfig
from qvera.adapters.layer import QveraLinear, layer_shape
from qvera.adapters.multi_adapter import BASE, SeedBank, plan_rows
from qvera.adapters.projection import SharedProjection, projection_sha256
from qvera.models import linear, norm_mlp
from qvera.models.tokenizer import PLACED
from qvera.utils.errors import InputError


class QveraModel(BaseTuner):
    """Adapts the linears of a model with VeRA; one pair A, B serves all layers and all adapters of a seed."""

    uses_shared_state: bool = True
    prefix: str = "qvera_"
    tuner_layer_cls = QveraLinear
    target_module_mapping: dict[str, list[str]] = {}

    def _projection(self, seed: int, device: torch.device, dtype: torch.dtype) -> SharedProjection:
        """The pair of this seed on this device (a model spread over devices has one on each)."""
        pool = self.__dict__.setdefault("_projection_pool", [])
        for projection in pool:
            if (projection.seed, projection.A.device, projection.A.dtype) == (seed, device, dtype):
                return projection
        pool.append(SharedProjection(seed, device, dtype))
        return pool[-1]

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way in for ``adapter_names``, one name for each row of the batch; ``__base__`` is no adapter.

        Raises:
            ValueError: the model is training, or there is no adapter of that name.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        banks: list[SeedBank] = self.__dict__.get("banks", [])
        known = {BASE, *self.peft_config}.union(*(bank.names for bank in banks))
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        layers = [module for module in self.modules() if isinstance(module, QveraLinear)]
        device: Any = layers[0].base_layer.weight.device
        plan = plan_rows([name for name in names for _ in range(beams)], banks, device)
        try:
            for layer in layers:
                layer._row_plan = plan
            yield
        finally:
            for layer in layers:
                layer._row_plan = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check the targets and the projections of an adapter, draw the pair that it needs, then let PEFT put it in.

        Here and not in PEFT's `_pre_injection_hook`, which PEFT calls for a model's first adapter only.

        Raises:
            InputError: a target matches nothing or no linear, or the adapter belongs to other projections.
        """
        config = self.peft_config[adapter_name]
        tokens = getattr(config, "added_tokens", None)
        if tokens and getattr(model, PLACED, None) != tokens:
            raise InputError(
                f"this adapter adds the tokens {', '.join(tokens)}, and the model has not been given their rows, which PEFT does "
                "not read. Open it with qvera.evaluation.load.open_run, or load the base with them (ModelSection.added_tokens) and put the "
                "adapter on with qvera.adapters.save_load.load_adapter."
            )
        self._prepare_projection(model, config)
        norm_mlp.reduce_saved_activations(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_projection(self, model: nn.Module, config: Any) -> None:
        if getattr(model, "dtype", None) is None and not any(True for _ in model.parameters()):
            raise InputError("the model has no parameters: there is nothing to adapt.")
        linear.freeze_linears(model)
        config = _maybe_include_all_linear_layers(config, model)
        if config.target_modules is None:
            raise InputError("target_modules: takes `all-linear` or a list of module names, got nothing.")
        matched: list[tuple[str, nn.Module]] = []
        names: set[str] = (
            {config.target_modules} if isinstance(config.target_modules, str) else set(config.target_modules)
        )
        unmatched, wrong_kind = set(names), []
        for key, module in model.named_modules():
            if not self._check_target_module_exists(config, key):
                continue
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if layer_shape(base) is None:
                wrong_kind.append(f"{key} ({type(base).__name__})")
                continue
            matched.append((key, base))
            unmatched -= {name for name in names if key == name or key.endswith(f".{name}")}
        if isinstance(config.target_modules, str) and matched:
            unmatched = set()  # a regular expression
        if wrong_kind:
            raise InputError(
                f"targets: QVERA adapts linear layers, but these are none: {', '.join(wrong_kind[:5])}. Name linears only."
            )
        if unmatched or not matched:
            linears = sorted({k.rpartition(".")[2] for k, m in model.named_modules() if layer_shape(m) is not None})
            raise InputError(
                f"targets: no module of this model is named {', '.join(sorted(unmatched)) or names}. "
                f"Its linears are named {', '.join(linears)}."
            )
        config.target_modules = _short_names(config.target_modules, [key for key, _ in matched], model)
        shapes = [layer_shape(base) for _, base in matched]
        largest_in = max(shape[0] for shape in shapes if shape)
        largest_out = max(shape[1] for shape in shapes if shape)
        self._check_projection(config, largest_in, largest_out)
        for _, base in matched:
            projection = self._projection(config.projection_seed, *_home(base, model))
            projection.ensure(config.rank, largest_in, largest_out)

    @staticmethod
    def _check_projection(config: QveraConfig, largest_in: int, largest_out: int) -> None:
        shapes = {"A": [config.rank, largest_in], "B": [largest_out, config.rank]}
        digest = projection_sha256(config.rank, largest_in, largest_out, config.projection_seed)
        if config.projection_shapes is not None and config.projection_shapes != shapes:
            raise InputError(
                f"this adapter was trained with projections of shapes {config.projection_shapes}, but this model and its "
                f"targets need {shapes}: it belongs to another base model."
            )
        if config.projection_sha256 is not None and config.projection_sha256 != digest:
            raise InputError(
                f"the projections of seed {config.projection_seed} have SHA-256 {digest[:16]}… here and "
                f"{config.projection_sha256[:16]}… in the adapter: the adapter file was changed, or made by another generator."
            )
        config.projection_shapes, config.projection_sha256 = shapes, digest

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        projection = self._projection(peft_config.projection_seed, *_home(base, self.model))
        if isinstance(target, QveraLinear):
            target.update_layer(adapter_name, projection, peft_config)
            return
        layer = QveraLinear(target, adapter_name, projection, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would move and cast the new module; ours is already where and what it should be
        setattr(parent, child_name, new_module)


def _short_names(targets: str | set[str] | list[str], matched: list[str], model: nn.Module) -> str | list[str]:
    """Last names (``q_proj``) in place of full ones where they mean the same modules; sorted, so files are reproducible."""
    if isinstance(targets, str):
        return targets
    last_names = {key.rpartition(".")[2] for key in matched}
    same = {
        key for key, module in model.named_modules() if key.rpartition(".")[2] in last_names and "base_layer" not in key
    }
    return sorted(last_names if same == set(matched) else set(targets))


def _home(base: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer's low-rank path lives: its device, and the dtype it computes in."""
    weight: Any = base.weight
    compute = getattr(base, "compute_dtype", None)
    if compute is None:
        compute = weight.dtype
    if not compute.is_floating_point:
        # int8 layers hold integers and compute in their input's dtype: that of the embeddings, which come first
        compute = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.bfloat16)
    return weight.device, compute


def register() -> None:
    """Make PEFT know ``QVERA``: `PeftModel.from_pretrained` and `save_pretrained` then work. Harmless when repeated.

    PEFT's own registration helper takes names of its enum only; its mappings take any string.
    """
    key: Any = PEFT_TYPE
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = QveraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = QveraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = QveraModel.prefix
