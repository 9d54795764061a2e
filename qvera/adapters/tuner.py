"""The PEFT side: which modules are adapted, the shared projections, and the registration with PEFT.

`QveraExperts` adapts the projections of a mixture's experts. With VeRA all layers and experts share the pair A, B:

    y_s = W_e x_s + b_e ⊙ B (s d_e ⊙ A x_s)        for a row s that was routed to expert e

With LoRA each expert has its own A_e and B_e.

VeRA computes A x once for each token, whatever number of experts that goes to. With ``adapter.experts: each`` every
expert has its own d_e and b_e, which is the product of a batch whose tokens use different adapters (`products.slots`).
With ``shared`` the experts of a layer have one d and one b.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from qvera.adapters.bank import MixedForward, User
from qvera.adapters.config import PEFT_TYPE, QveraConfig
from qvera.adapters.layer import QveraLinear, SharedTensors, VectorDict, adapted_layers, layer_shape, spec_of, start_on
from qvera.adapters.methods import LinearSpec, Source, method_of
from qvera.adapters.products.slots import PATHS, TokenSlots
from qvera.adapters.projection import OwnProjection, SharedProjection
from qvera.config.sections import ModelSection
from qvera.models import lean_layers, linear
from qvera.models.experts import ExpertStack, Routing, misread_by_peft, require_experts, stack_experts, stacks
from qvera.models.hub import fingerprint_of
from qvera.models.structure import beside_the_layers, head_size, share_tied_modules
from qvera.models.tokenizer import PLACED
from qvera.utils.errors import InputError
from qvera.utils.files import CERTIFICATE, try_read_json
from qvera.utils.safetensors_io import same_base


class QveraExperts(QveraLinear):
    """The experts of a layer over an `ExpertStack`. It is called with the rows' experts."""

    def forward(self, x: Tensor, routing: Routing, of_tokens: bool = False) -> Tensor:  # type: ignore[override]
        """See `qvera.models.experts.ExpertStack.forward`: rows [S, in_features] give [S, out_features]."""
        if self.mixed is not None:
            return self.mixed.forward_experts(self, x, routing, of_tokens)
        y = self.base_layer(x, routing, of_tokens)
        for adapter in () if self.disable_adapters else self.active_names():
            y = self.add_routed(adapter, x, y, routing, of_tokens)
        return y

    def add_routed(self, adapter: str, x: Tensor, y: Tensor, routing: Routing, of_tokens: bool) -> Tensor:
        """y + ΔW_e x for the rows of each expert e."""
        method, config = self.qvera_settings[adapter]
        if config.experts == "each":
            experts = TokenSlots(routing.experts, self.spec.experts, tuple(routing.ends))
            gather = routing.tokens if of_tokens else None
            return PATHS[method.peft_type](self, adapter, x, y, self.vectors(adapter), experts, gather)
        factors = self.parts(adapter)
        z = self.project(x, adapter, factors.A, factors.a)
        return factors.expand(y, z[routing.tokens] if of_tokens else z)

    def cache_merged_weight(self, hold: bool, base_only: bool = False) -> None:
        """Nothing is held: only some of the experts are read for a batch."""

    def delta_weight_fp32(self, adapter: str) -> Tensor:
        """ΔW of each expert in fp32: [E, m, n] as the file has the weights."""
        factors, experts = self.parts(adapter), range(self.spec.experts)
        each = [factors.expert(number).delta() for number in experts]
        return torch.stack([delta.t() if self.base_layer.spec.is_transposed else delta for delta in each])

    get_delta_weight = delta_weight_fp32  # PEFT's name for it

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError: quantized experts would be quantized again. `qvera export --to merged` writes exact weights."""
        raise ValueError("adapted experts can't be merged in place; export a merged checkpoint (qvera export).")


BASE = "__base__"
"""PEFT's name for "no adapter" in ``adapter_names``."""


class QveraModel(BaseTuner):
    """Adapts the linears of a model; one pair A, B of a seed serves all layers and adapters that use this seed."""

    uses_shared_state: bool = True
    prefix: str = "qvera_"
    tuner_layer_cls = QveraLinear
    target_module_mapping: dict[str, list[str]] = {}

    def _projection(self, config: QveraConfig, device: torch.device, dtype: torch.dtype) -> SharedProjection:
        """The pair of this adapter's seed on this device; a model spread over devices has one on each."""
        pool: list[SharedProjection] = self.__dict__.setdefault("_projection_pool", [])
        for projection in pool:
            A = projection.A
            # pairs of several seeds stand side by side in equal parts, so a smaller one is no prefix of a larger one
            same_size = isinstance(config.seeds, int) or len(A) in (0, config.rank)
            if same_size and (projection.seed, A.device, A.dtype) == (config.seeds, device, dtype):
                return projection
        pool.append(SharedProjection(config.seeds, device, dtype))
        return pool[-1]

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(
        self, *_: object, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **__: object
    ) -> Iterator[None]:
        """PEFT's hook for ``adapter_names``: one name for each row of the batch."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        banked: dict[str, User] = self.__dict__.get("banked", {})
        unknown = sorted(set(adapter_names) - {BASE, *self.peft_config, *banked})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        layers = adapted_layers(self)
        mixed = MixedForward(layers[0].base_layer.weight.device)
        users = [None if name == BASE else banked.get(name, name) for name in adapter_names]
        # beam search has the beams of a row one after the other
        mixed.use([user for user in users for _ in range(num_beams or 1)])
        with mixed.installed(layers):
            yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: object, **kwargs: object) -> None:
        """Check an adapter's targets, projections and tokens (InputError), draw its pair, then let PEFT put it in."""
        # not in `_pre_injection_hook`, which PEFT calls for a model's first adapter only
        config = self.peft_config[adapter_name]
        warn_of_other_base(model, {adapter_name: config})
        tokens = getattr(config, "added_tokens", None)
        if tokens and getattr(model, PLACED, None) != tokens:
            raise InputError(
                f"this adapter adds the tokens {', '.join(tokens)}, and the model has not been given their rows, which "
                "PEFT does not read. Open it with qvera.evaluation.load.open_run, or load the base with them "
                "(ModelSection.added_tokens) and put the adapter on with qvera.adapters.save_load.load_adapter."
            )
        # the modules that PEFT will look at: one where weights are tied, linears that run frozen, stacks of experts
        share_tied_modules(model)
        linear.freeze_linears(model)
        if config.experts != "none":
            stack_experts(model)
            require_experts(stacks(model))
            if method_of(config).peft_type == "LORA" and (family := misread_by_peft(model)):
                raise InputError(
                    f"adapter.experts: LoRAs are saved as PEFT's, and PEFT takes the matrices of {family}'s experts "
                    "for others. Use adapter.method: vera."
                )
        matched, method = self._match_targets(model, config), method_of(config)
        found = [(spec_of(name, base), base) for name, base in matched]
        method.prepare(config, found)
        self._share_tensors(model, config, adapter_name, found)
        if method.source is Source.SEEDED:
            shapes = [(spec.in_features, spec.out_features) for spec, _ in found]
            largest_in, largest_out = (max(sizes) for sizes in zip(*shapes, strict=True))
            config.check_projection(largest_in, largest_out)
            # the largest size at once: each growth draws the whole pair anew
            for home in dict.fromkeys(_home(base, model) for _, base in matched):
                self._projection(config, *home).ensure(config.rank, largest_in, largest_out)
        lean_layers.reduce_saved_activations(model)
        lean_layers.fuse_rotation(model)
        lean_layers.call_projections(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's ``autocast_adapter_dtype``: False casts the vectors to their layers' compute dtype."""
        # PEFT's own would cast all to fp32 and make them trainable
        for layer in () if autocast_adapter_dtype else adapted_layers(self):
            _, dtype = _home(layer.base_layer, self.model)
            for vector in layer.tensors(adapter_name).values():
                if vector.is_floating_point():
                    vector.data = vector.data.to(dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and the tensors that its linears share."""
        super().delete_adapter(adapter_name)
        if self._shared_of(adapter_name) is not None:
            del self.shared[adapter_name]

    def _shared_of(self, adapter_name: str) -> Any:
        shared: Any = self._modules.get("shared", {})
        return shared[adapter_name] if adapter_name in shared else None  # noqa: SIM401  # a ModuleDict has no get

    def _share_tensors(
        self, model: nn.Module, config: QveraConfig, adapter_name: str, linears: Sequence[tuple[LinearSpec, nn.Module]]
    ) -> None:
        """Make the tensors that all linears of an adapter share, if its method has any. They must be on one device."""
        method = method_of(config)
        shapes = method.shared_tensors(config, [spec for spec, _ in linears], head_size(model))
        if not shapes:
            return
        devices = sorted({str(base.weight.device) for _, base in linears})
        if len(devices) > 1:
            raise InputError(
                f"adapter.method: {method.name} has tensors that all linears share, and these are on {len(devices)} "
                f"devices: {', '.join(devices)}. Put the model on one, or use another adapter.method."
            )
        config.shared_by = len(linears)
        if "shared" not in self._modules:
            self.shared = SharedTensors()
        device, tensors = linears[0][1].weight.device, VectorDict()
        # held by the tuner and not by the layers, so that the model has them once
        for name, shape in shapes.items():
            start = start_on(device, method, name, shape, config, LinearSpec("", 0, 0))  # type: ignore[arg-type]
            tensors[name] = nn.Parameter(start, requires_grad=adapter_name in self.active_adapters)
        self.shared[adapter_name] = tensors

    def _match_targets(self, model: nn.Module, config: QveraConfig) -> list[tuple[str, nn.Module]]:
        """Find names and base layers of what the config adapts, and write short target names into the config."""
        before = config.target_modules
        config = _maybe_include_all_linear_layers(config, model)
        if config.target_modules is None:
            raise InputError("target_modules: takes `all-linear` or a list of module names, got nothing.")
        # PEFT has put full names of all linears in place of "all-linear": they would overrule layers_to_transform
        if config.target_modules is not before:
            experts = {n for n, m in model.named_modules() if isinstance(m, (ExpertStack, QveraExperts))}
            config.target_modules = set(config.target_modules or ()) - beside_the_layers(model) | experts
            config.target_modules = _short_names(config.target_modules, list(config.target_modules), model)
        targets = config.target_modules
        names = {targets} if isinstance(targets, str) else set(targets)
        matched: list[tuple[str, nn.Module]] = []
        unmatched = set(names)
        for key, module in model.named_modules():
            unmatched -= {name for name in names if key == name or key.endswith(f".{name}")}
            if self._check_target_module_exists(config, key):
                matched.append((key, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module))
        linears = [(key, base) for key, base in matched if not isinstance(base, ExpertStack)]
        # without adapted experts a name such as `down_proj` means the dense linears of that name only
        if config.experts == "none" and len(linears) < len(matched):
            matched, targets = linears, [key for key, _ in linears]
        wrong_kind = [f"{key} ({type(base).__name__})" for key, base in matched if layer_shape(base) is None]
        if wrong_kind:
            raise InputError(
                f"adapter.targets: QVERA adapts linear layers only, but these are none: {', '.join(wrong_kind[:5])}."
            )
        if not matched or (unmatched and not isinstance(targets, str)):
            known = sorted({k.rpartition(".")[2] for k, m in model.named_modules() if layer_shape(m) is not None})
            keys = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
            limits = [f"{k} {v}" for k in keys if (v := getattr(config, k)) is not None]
            wanted = f"is named {', '.join(sorted(unmatched or names))}"
            if isinstance(targets, str):
                listed = re.split(r"[,\s]+", targets)
                wanted = f"has a path that {targets!r} matches as a whole (names are written in a list: {listed})"
            raise InputError(
                f"adapter.targets: no module of this model {wanted}"
                f"{' within ' + ', '.join(limits) if limits else ''}. Its linears are named {', '.join(known)}."
            )
        config.target_modules = _short_names(targets, [key for key, _ in matched], model)
        return matched

    def _create_and_replace(
        self,
        peft_config: QveraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str = "",
        **_: object,
    ) -> None:
        # the frozen pair: the one of the seed, which all layers share, or this linear's own, or none
        base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        method, home = method_of(peft_config), _home(base, self.model)
        projection: SharedProjection | OwnProjection | None = None
        if method.source is Source.SEEDED:
            projection = self._projection(peft_config, *home)
        elif (pair := method.own_pair(peft_config, spec_of(current_key, base), base)) is not None:
            peft_config.check_pair(current_key, pair)
            A, B = (factor.to(*home) for factor in pair)
            projection = OwnProjection(A, B)
        shared = self._shared_of(adapter_name)
        if isinstance(target, QveraLinear):
            target.update_layer(adapter_name, projection, peft_config, shared)
            return
        kind = QveraExperts if isinstance(base, ExpertStack) else QveraLinear
        layer = kind(target, adapter_name, projection, peft_config, current_key, shared)
        layer.made_in = home[1]
        if adapter_name not in self.active_adapters:
            # a further adapter is not trained until it is made active
            layer.requires_grad_(False)
            if shared is not None:
                shared.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would move and cast the new module; ours is already where and what it should be
        setattr(parent, child_name, new_module)


def _short_names(targets: str | set[str] | list[str], matched: list[str], model: nn.Module) -> str | list[str]:
    """Replace full names by last names (``q_proj``) if these match the same modules; sorted."""
    if isinstance(targets, str):
        return targets
    last_names = {key.rpartition(".")[2] for key in matched}
    names = (key for key, _ in model.named_modules() if "base_layer" not in key)
    same = {key for key in names if key.rpartition(".")[2] in last_names}
    return sorted(last_names if same == set(matched) else set(targets))


def warn_of_other_base(model: nn.Module, configs: Mapping[str, QveraConfig]) -> None:
    """Warn of adapters (by name) of other weights than the model's, and of ones that may be merged into it already."""
    saved = {name: config for name, config in configs.items() if config.base_fingerprint is not None}
    if not saved:  # for fresh ones no file is read
        return
    about = getattr(model, "config", None)  # PEFT takes any module
    loaded_from, at = getattr(about, "_name_or_path", ""), getattr(about, "_commit_hash", None)
    export = try_read_json(Path(loaded_from) / CERTIFICATE) or {}
    found: dict[str | None, str | None] = {}  # revision → fingerprint
    for name, config in saved.items():
        # recent transformers keeps no revision: then the same name means the adapter's
        revision = at or (config.revision if config.base_model_name_or_path == loaded_from else None)
        if loaded_from and revision not in found:
            found[revision] = None
            with contextlib.suppress(InputError):  # its files are not here, or can't be read
                found[revision] = fingerprint_of(ModelSection(path=loaded_from, revision=revision))
        here = found.get(revision)
        if export.get("base", {}).get("fingerprint") == config.base_fingerprint:
            warnings.warn(
                f"{loaded_from} is an export that an adapter of the same base was merged into, and {name!r} is added "
                "to it: the same adapter would act twice. Load it on its base.",
                stacklevel=2,
            )
        elif not same_base(config.base_fingerprint, here):
            warnings.warn(
                f"{name!r} was trained on other weights than those of {loaded_from}: its base is "
                f"{config.base_model_name_or_path} with fingerprint {str(config.base_fingerprint)[:16]}, and this one "
                f"has {str(here)[:16]}. It will not answer as it was trained to. Load it on its base.",
                stacklevel=2,
            )


def _home(base: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype of a layer's low-rank path."""
    weight: Any = base.weight
    compute = getattr(base, "compute_dtype", None) or weight.dtype
    if not compute.is_floating_point:
        # int8 layers hold integers and compute in their input's dtype: that of the embeddings, which come first
        compute = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.bfloat16)
    return weight.device, compute


def register() -> None:
    """Register ``QVERA`` with PEFT, for `PeftModel.from_pretrained` and `save_pretrained`. Calls may be repeated."""
    # PEFT's own registration helper accepts only names of its enum; its mappings take any string
    key: Any = PEFT_TYPE
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = QveraConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = QveraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = QveraModel.prefix
