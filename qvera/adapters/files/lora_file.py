"""The files of PEFT's LoRA, written and read: what a `lora` adapter is on disk, so that any tool can load it.

The config and the tensors are stock PEFT's. What only qvera knows, such as the fingerprint of the base, is JSON in the
header of the weights file (`safetensors_io.FACTS`), which PEFT and others pass over; an adapter without it is read too.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from qvera.adapters.config import QveraConfig
from qvera.models.safetensors_stream import write_shard
from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_WEIGHTS
from qvera.utils.safetensors_io import FACTS, TensorSpec, own_facts

PEFT_TYPE = "LORA"

_OWN_FIELDS = (
    "format_version", "projection_seed", "base_fingerprint", "added_tokens", "pad_token", "eos_token", "labels",
    "problem_type",
)  # fmt: skip
_SAME = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "use_rslora",
    "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision", "task_type", "inference_mode",
)  # fmt: skip
_READ = {*_SAME, "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights"}
_WITHOUT_EFFECT = {
    "peft_type", "peft_version", "auto_mapping", "fan_in_fan_out", "megatron_core", "runtime_config", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Of no effect on what an adapter computes once it is trained, or only together with another key that is refused."""

_STARTS = {True: "default", "gaussian": "gaussian", "orthogonal": "orthogonal", False: "default", "eva": "default"}
"""Starts that leave the base weights as they are. PiSSA, OLoRA, LoftQ and others change them."""

_SUFFIXES = {"lora_A.weight": "qvera_A", "lora_B.weight": "qvera_B"}


def refusal(raw: dict[str, Any]) -> str | None:
    """Why qvera can't compute with an adapter of this LoRA config, as ``key: sentence``; None: it can."""
    defaults = LoraConfig().to_dict()
    for key, value in sorted(raw.items()):
        if key not in _READ | _WITHOUT_EFFECT and value and value != defaults.get(key):
            return f"{key}: is {value!r}, which this qvera's LoRA has not"
    if raw.get("init_lora_weights", True) not in _STARTS:
        return (
            f"init_lora_weights: is {raw['init_lora_weights']!r}, which may have changed the base weights; convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    return None


def config_of(raw: dict[str, Any], directory: Path) -> QveraConfig:
    """Our config of a LoRA in ``directory`` whose adapter_config.json is ``raw``.

    Raises:
        InputError: it has parts that qvera's LoRA has not, or values out of range.
    """
    why = refusal(raw)
    if why is not None:
        raise InputError(f"{why}. Expected a plain LoRA.")
    known = {field.name for field in fields(QveraConfig)}
    values = {key: raw[key] for key in _SAME if raw.get(key) not in (None, {}) and key in known}
    values["target_modules"] = raw.get("target_modules")
    for ours, theirs in (("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
        if theirs in raw:
            values[ours] = raw[theirs]
    if raw.get("bias", "none") != "none":
        values["bias"] = {"lora_only": "qvera_only"}.get(raw["bias"], raw["bias"])
    values["init_lora_weights"] = _STARTS[raw.get("init_lora_weights", True)]
    facts = own_facts(directory / ADAPTER_WEIGHTS)
    return QveraConfig(method="lora", **values, **{key: facts[key] for key in _OWN_FIELDS if key in facts})


def lora_config(config: QveraConfig) -> LoraConfig:
    """The config that stock PEFT reads."""
    start = {"default": True}.get(config.init_lora_weights, config.init_lora_weights)
    alpha = config.rank if config.alpha is None else config.alpha
    stock = LoraConfig(
        r=config.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=config.dropout,
        bias={"qvera_only": "lora_only"}.get(config.bias, config.bias),
        init_lora_weights=start,
        **{key: value for key in _SAME if (value := getattr(config, key)) is not None},
    )
    for key in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(stock, key), set):  # so that the same adapter is the same file
            setattr(stock, key, sorted(names))
    return stock


def write(directory: Path, config: QveraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors for stock PEFT; ``tensors`` have our keys."""
    stock = lora_config(config)
    stock.inference_mode = True
    stock.save_pretrained(str(directory))
    facts = {key: value for key in _OWN_FIELDS if (value := getattr(config, key)) is not None}
    found = {to_peft(key): tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
    specs = [TensorSpec(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in found.items()]
    # safetensors' own writer puts the entries of the header in any order
    write_shard(directory / ADAPTER_WEIGHTS, specs, iter(found.values()), {FACTS: json.dumps(facts)})


def to_peft(key: str) -> str:
    """PEFT's key of one of our tensors: ``….qvera_A`` → ``….lora_A.weight``; others as they are."""
    name, _, kind = key.rpartition(".")
    return next((f"{name}.{theirs}" for theirs, ours in _SUFFIXES.items() if ours == kind), key)


def to_ours(key: str) -> str:
    """Our key of one of PEFT's tensors; others as they are."""
    return next((key.removesuffix(theirs) + ours for theirs, ours in _SUFFIXES.items() if key.endswith(theirs)), key)
