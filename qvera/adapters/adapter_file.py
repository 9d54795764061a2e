"""Reads an adapter directory without a model, checks it against its base, and converts PEFT's LoRA files.

A ``lora`` adapter is stored as stock PEFT's, so that any tool can load it. What only qvera knows, such as the base's
fingerprint, is JSON in the header of the weights file (`safetensors_io.FACTS`). It may be missing.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, VeraConfig
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from qvera.adapters.config import PEFT_TYPE, PREFIX, QveraConfig
from qvera.adapters.methods import LinearSpec, method_of
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.safetensors_stream import write_shard
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECIPE_FILE, no_directory, read_json
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import FACTS, TensorSpec, own_facts, same_base, unreadable_error

LORA = "LORA"


def read_adapter(directory: Path, content: bytes | None = None) -> tuple[QveraConfig | VeraConfig, dict[str, Tensor]]:
    """Read an adapter directory without a model: one of ours, or one of PEFT's VeRA or plain LoRA.

    ``content`` is the weights file if it was read already. Otherwise the file is mapped: no process may truncate it.
    InputError: it is no adapter that qvera reads, the file is damaged, or the two files do not belong together.
    """
    config, weights_file = read_config(directory), directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(weights_file) if content is None else load(content)
    except (SafetensorError, OSError) as error:
        raise unreadable_error(weights_file, error) from None
    method = method_of(config) if isinstance(config, QveraConfig) else None
    # a LoRA is stored under PEFT's keys and in PEFT's layout: from here on it has ours
    if method is not None and method.peft_type == "LORA":
        tensors = {_renamed(key, _TO_OURS): tensor for key, tensor in tensors.items()}
        if config.experts != "none":  # type: ignore[union-attr]
            tensors = dict(_of_experts(key, tensor, config, weights_file) for key, tensor in tensors.items())
    for key, tensor in sorted(tensors.items()):
        name, _, kind = key.removeprefix(PREFIX).rpartition(".")
        dtype = torch.float32 if method is None else method.traits(kind, config).dtype  # type: ignore[arg-type]
        holds_places = not dtype.is_floating_point
        if tensor.dtype != torch.int32 if holds_places else not tensor.dtype.is_floating_point:
            expected = "torch.int32" if holds_places else "a floating-point dtype"
            raise InputError(f"{weights_file}: {key} is stored as {tensor.dtype}, expected {expected}.")
        if kind != ("vera_lambda_d" if method is None else "qvera_d"):
            continue
        # d has one value for each rank, so it shows a config of another adapter
        if isinstance(config, QveraConfig):
            setting, rank = "rank", method_of(config).rank_at(config, LinearSpec(name, config.rank, config.rank))
        else:
            setting, rank = "r", config.r
        if tensor.shape[-1:] != (rank,):
            raise InputError(
                f"{directory / ADAPTER_CONFIG}: {setting} is {rank}, but {key} in {ADAPTER_WEIGHTS} has "
                f"{tensor.numel()} values: the two files do not belong together, or one was changed."
            )
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise InputError(f"{weights_file}: {first_of(broken)} has NaN or Inf in it.")
    return config, tensors


def read_config(directory: Path) -> QveraConfig | VeraConfig:
    """Return an adapter directory's config: a `QveraConfig`, also for a LoRA, or the `VeraConfig` of PEFT's own VeRA.

    InputError: it is neither.
    """
    config_file = directory / ADAPTER_CONFIG
    if not directory.is_dir():
        raise InputError(no_directory(directory))
    require_files(directory)
    raw = read_json(config_file, "a PEFT adapter config", keys=["peft_type"])
    kind = {PEFT_TYPE: QveraConfig, "VERA": VeraConfig, LORA: LoraConfig}.get(str(raw["peft_type"]))
    if kind is None:
        raise InputError(
            f"{config_file}: peft_type is {raw['peft_type']}, expected {PEFT_TYPE} (or PEFT's own VERA or LORA)."
        )
    known = {f.name for f in dataclasses.fields(kind)}
    try:
        with warnings.catch_warnings():
            # PEFT warns of projections that are not in the file; here they are drawn and used
            warnings.simplefilter("ignore", UserWarning)
            if kind is LoraConfig:
                return _config_of_lora(raw, directory)
            return kind(**{k: v for k, v in raw.items() if k in known})
    except InputError as error:
        raise InputError(f"{config_file}: {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{config_file}: a value has the wrong type, or is out of range ({error}).") from None


def require_files(directory: Path) -> None:
    """Raise InputError unless both files of an adapter directory are there."""
    # a pickle of weights does not count: opening it can run code
    if not (directory / ADAPTER_WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(f"{directory}: has no {ADAPTER_WEIGHTS}; pickled adapters are not read.")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            inside = directory / "adapter"  # where a run's directory has it
            meant = f" Did you mean {inside}?" if (inside / name).is_file() else ""
            if directory.name == inside.name and (recipe := directory.parent / RECIPE_FILE).is_file():
                meant = f" `qvera train {recipe} --resume` writes it again from the run's last checkpoint."
            raise InputError(f"{directory}: has no {name}, so it is not an adapter directory.{meant}")


def model_class_of(directory: Path, raw: dict[str, Any]) -> ModelClass:
    """The model class that an adapter needs, from its adapter_config.json. InputError: a classifier without labels."""
    if raw["peft_type"] in (PEFT_TYPE, LORA) and runs_on_our_layers(raw):
        config = read_config(directory)
        if isinstance(config, QveraConfig) and config.labels:
            return config.model_class
    if raw.get("task_type") == "SEQ_CLS":
        raise InputError(
            f"{directory / ADAPTER_CONFIG}: is a classifier's (task_type SEQ_CLS), and does not say what its outputs "
            "mean, as qvera's own adapters and LoRAs do (labels). Open it with PEFT."
        )
    return CAUSAL_LM


def runs_on_our_layers(raw: dict[str, Any]) -> bool:
    """Whether qvera's layers can run the adapter with this adapter_config.json. PEFT loads every other one."""
    if raw["peft_type"] == LORA:
        return lora_refusal(raw) is None
    return raw["peft_type"] in (PEFT_TYPE, "VERA")


def require_tokens(config: QveraConfig | VeraConfig, adapter: Path | str, ids: dict[str, int] | None) -> None:
    """Raise InputError if an adapter's added tokens differ from those of the loaded base (token → id, or None)."""
    expected = getattr(config, "added_tokens", None) or {}
    if expected != (ids or {}):
        raise InputError(
            f"{adapter}: was trained with the added tokens {expected or 'none'}, and the loaded base has "
            f"{ids or 'none'}. Set model.added_tokens: [{', '.join(map(repr, expected))}] for the same model."
        )


def require_base(config: QveraConfig | VeraConfig, adapter: Path | str, name: str, fingerprint: str | None) -> None:
    """Raise InputError if the adapter was trained on another base. A missing fingerprint on either side passes."""
    expected = getattr(config, "base_fingerprint", None)
    if not same_base(expected, fingerprint):
        trained_on = config.base_model_name_or_path
        todo = f"Point model.path, or without a recipe base_model_name_or_path in {ADAPTER_CONFIG}, at that base."
        if trained_on == name:
            todo = "The files there are others by now: put back those that it was trained on."
        raise InputError(
            f"{adapter}: was trained on another base model than {name!r}. Expected the base {trained_on!r} with "
            f"fingerprint {str(expected)[:16]}; {name!r} has {str(fingerprint)[:16]}. {todo}"
        )


# PEFT's LoRA

# what PEFT's config has no key for: it goes into the header of the weights file
_LORA_FACTS = (
    "format_version", "projection_seed", "base_fingerprint", "added_tokens", "pad_token", "eos_token", "chat_template",
    "labels", "problem_type", "quantization", "double_quant",
)  # fmt: skip
# keys that mean the same in PEFT's config and in ours
_LORA_SAME = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "use_rslora",
    "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision", "task_type", "inference_mode",
)  # fmt: skip
_LORA_READ = {*_LORA_SAME, "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "target_parameters"}
_LORA_WITHOUT_EFFECT = {
    "peft_type", "peft_version", "auto_mapping", "fan_in_fan_out", "megatron_core", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Keys that do not change what a trained adapter computes, or only together with another key, which is refused."""

_LORA_STARTS = {True: "default", "gaussian": "gaussian", "orthogonal": "orthogonal", False: "default", "eva": "default"}
"""Starts that leave the base weights unchanged. PiSSA, OLoRA, LoftQ and others change them."""

_TO_OURS = {"lora_A.weight": "qvera_A", "lora_B.weight": "qvera_B"}
_LAST = "down_proj"
"""The last parameter of a module of experts. PEFT wraps it last, so its LoRA is in the outermost wrapper."""
_TO_PEFT = {ours: theirs for theirs, ours in _TO_OURS.items()}


def lora_refusal(raw: dict[str, Any]) -> str | None:
    """Why qvera can't run an adapter with this LoRA config, as ``key: sentence``; None: it can."""
    defaults = LoraConfig().to_dict()
    for key, value in sorted(raw.items()):
        if key not in _LORA_READ | _LORA_WITHOUT_EFFECT and value and value != defaults.get(key):
            return f"{key}: is {value!r}, which this qvera's LoRA has not"
    if raw.get("init_lora_weights", True) not in list(_LORA_STARTS):  # a list is unhashable
        return (
            f"init_lora_weights: is {raw['init_lora_weights']!r}, which may have changed the base weights; convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    if raw.get("target_parameters") and isinstance(raw.get("target_modules"), str):
        return "target_modules: is a pattern beside target_parameters, and has to be a list of names there"
    return None


def _config_of_lora(raw: dict[str, Any], directory: Path) -> QveraConfig:
    if (why := lora_refusal(raw)) is not None:
        raise InputError(f"{why}. Expected a plain LoRA.")
    known = {field.name for field in dataclasses.fields(QveraConfig)}
    values = {key: raw[key] for key in _LORA_SAME if raw.get(key) not in (None, {}) and key in known}
    values["target_modules"] = raw.get("target_modules")
    if raw.get("target_parameters"):
        values |= {"experts": "each", "target_modules": [*(values["target_modules"] or ()), *raw["target_parameters"]]}
    names = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    values |= {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}
    bias = raw.get("bias", "none")
    values["bias"] = "qvera_only" if bias == "lora_only" else bias
    values["init_lora_weights"] = _LORA_STARTS[raw.get("init_lora_weights", True)]
    facts = own_facts(directory / ADAPTER_WEIGHTS)
    return QveraConfig(method="lora", **values, **{key: facts[key] for key in _LORA_FACTS if key in facts})


def lora_config(config: QveraConfig) -> LoraConfig:
    """Return the config of a LoRA as stock PEFT reads it."""
    alpha = config.rank if config.alpha is None else config.alpha
    stock = LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        bias="lora_only" if config.bias == "qvera_only" else config.bias,  # type: ignore[arg-type]
        init_lora_weights=config.init_lora_weights == "default" or config.init_lora_weights,  # type: ignore[arg-type]
        **{key: value for key in _LORA_SAME if (value := getattr(config, key)) is not None},
    )
    for key in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(stock, key), set):  # so that the same adapter is the same file
            setattr(stock, key, sorted(names))
    return stock


def write_for_peft(directory: Path, config: QveraConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files of an adapter for stock PEFT; ``tensors`` have our keys."""
    stock = lora_config(config)
    stock.inference_mode = True
    # PEFT names experts as parameters and linears as modules; only tensors of experts have three dimensions
    if config.experts != "none":
        names = {key.removeprefix(PREFIX).rpartition(".")[0]: t.dim() for key, t in tensors.items() if ".qvera_" in key}
        stock.target_parameters = sorted(name for name, dimensions in names.items() if dimensions == 3)
        stock.target_modules = sorted(names.keys() - set(stock.target_parameters))
    stock.save_pretrained(str(directory))
    facts = {key: value for key in _LORA_FACTS if (value := getattr(config, key)) is not None}
    found = {}
    for key, tensor in sorted(tensors.items()):
        if tensor.dim() == 3:
            owner, child, kind = key.rsplit(".", 2)
            # PEFT wraps a module once for each of its parameters, in the order in which it has them
            key = f"{owner}{'.base_layer' if child != _LAST and f'{owner}.{_LAST}.{kind}' in tensors else ''}.{kind}"
            # PEFT stacks the A of all experts, [E r, n], and interleaves the columns of their B, [m, r E]
            tensor = tensor.flatten(0, 1) if kind == "qvera_A" else tensor.permute(1, 2, 0).flatten(1)
        found[to_peft(key)] = tensor.detach().cpu().contiguous()
    specs = [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()]
    # safetensors' own writer puts the entries of the header in any order
    write_shard(directory / ADAPTER_WEIGHTS, specs, iter(found.values()), {FACTS: json.dumps(facts)})


def _of_experts(key: str, tensor: Tensor, config: QveraConfig, file: Path) -> tuple[str, Tensor]:
    """Return our key and layout of one tensor of PEFT's; only those of experts change.

    PEFT's A [E r, n] becomes [E, r, n]. Its B [m, r E], whose columns are interleaved, becomes [E, m, r].
    """
    path, _, kind = key.rpartition(".")
    owner = path.replace(".base_layer", "")
    parts = (target.rpartition(".") for target in config.target_modules or ())
    inside = sorted({child for parent, _, child in parts if parent and owner.endswith(f".{parent}")}, key=_LAST.__eq__)
    if not inside:
        return key, tensor
    # the first parameter is wrapped first, so the depth of the wrapper says whose LoRA this is
    depth = path.count(".base_layer")
    name = f"{owner}.{inside[max(len(inside) - 1 - depth, 0)]}"
    rank = method_of(config).rank_at(config, LinearSpec(name.removeprefix(PREFIX), 0, 0))
    wide, side = (1, 0) if kind == "qvera_B" else (0, 1)
    if depth >= len(inside) or tensor.dim() != 2 or tensor.shape[wide] % rank:
        raise InputError(
            f"{file}: {key} is {list(tensor.shape)}, which is no LoRA of rank {rank} of {', '.join(inside)}."
        )
    if kind == "qvera_B":
        return f"{name}.{kind}", tensor.view(tensor.shape[side], rank, -1).permute(2, 0, 1).contiguous()
    return f"{name}.{kind}", tensor.view(-1, rank, tensor.shape[side])


def to_peft(key: str) -> str:
    """Return PEFT's key for one of ours: ``….lora_A.weight`` for ``….qvera_A``. Other keys stay."""
    return _renamed(key, _TO_PEFT)


def _renamed(key: str, ends: dict[str, str]) -> str:
    return next((f"{key.removesuffix(old)}{new}" for old, new in ends.items() if key.endswith(f".{old}")), key)


def require_places(spec: LinearSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError if an integer tensor is not of rising indices into the linear's flattened weight."""
    size = spec.in_features * spec.out_features
    for name, places in tensors.items():
        is_index = not places.is_floating_point()
        if is_index and (places[0] < 0 or places[-1] >= size or (places.diff() <= 0).any()):
            raise InputError(
                f"{name} of {spec.name} has to be rising numbers from 0 to {size - 1}, and is not: the file is "
                "damaged, or another model's adapter."
            )
