"""An adapter directory read without a model, and checked against the base that it was trained on."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, VeraConfig
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from qvera.adapters.config import PEFT_TYPE, PREFIX, QveraConfig
from qvera.adapters.files import lora_file
from qvera.adapters.methods import LinearSpec, method_of
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.utils.errors import InputError
from qvera.utils.files import read_json
from qvera.utils.formatting import first_of
from qvera.utils.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qvera.utils.safetensors_io import same_base, unreadable


def read_adapter(
    directory: Path, content: bytes | None = None
) -> tuple[QveraConfig | VeraConfig, dict[str, torch.Tensor]]:
    """Read an adapter directory without a model: one of ours, or one of PEFT's own VeRA.

    Args:
        directory: with the config and the vectors.
        content: of the file of vectors, where it has been read already. The file is mapped otherwise, and another
            process must not cut it short meanwhile.

    Returns:
        The config (`QveraConfig`, or PEFT's `VeraConfig`) and the tensors of the adapter file by their keys.

    Raises:
        InputError: it is not an adapter directory, not a VeRA adapter, truncated, has NaN, Inf or whole numbers in it,
            or vectors of another rank than its config says.
    """
    config, weights_file = read_config(directory), directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(weights_file) if content is None else load(content)
    except (SafetensorError, OSError) as error:
        raise unreadable(weights_file, error) from None
    if isinstance(config, QveraConfig) and method_of(config).writes_lora:
        tensors = {lora_file.to_ours(key): tensor for key, tensor in tensors.items()}
    key, suffix = ("rank", ".qvera_d") if isinstance(config, QveraConfig) else ("r", ".vera_lambda_d")
    place_names = method_of(config).place_names if isinstance(config, QveraConfig) else frozenset()
    for name, tensor in sorted(tensors.items()):
        holds_places = name.rpartition(".")[2] in place_names
        if tensor.dtype != torch.int32 if holds_places else not tensor.dtype.is_floating_point:
            expected = "torch.int32" if holds_places else "a floating-point dtype"
            raise InputError(f"{weights_file}: {name} is stored as {tensor.dtype}, expected {expected}.")
        if name.endswith(suffix) and tensor.shape[-1:] != (rank := _rank_of(config, name),):
            raise InputError(
                f"{directory / ADAPTER_CONFIG}: {key} is {rank}, but {name} in {ADAPTER_WEIGHTS} has {tensor.numel()} "
                "values: the two files do not belong together, or one was changed."
            )
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise InputError(f"{weights_file}: {first_of(broken)} has NaN or Inf in it.")
    return config, tensors


def _rank_of(config: QveraConfig | VeraConfig, key: str) -> int:
    """The rank that an adapter's config says for the linear of a key in its file."""
    if not isinstance(config, QveraConfig):
        return config.r
    name = key.removeprefix(PREFIX).rpartition(".")[0]
    return method_of(config).rank_at(config, LinearSpec(name, config.rank, config.rank))


def read_config(directory: Path) -> QveraConfig | VeraConfig:
    """The config of an adapter directory: ours, or that of PEFT's own VeRA.

    Raises:
        InputError: it is not an adapter directory, or not a VeRA adapter.
    """
    config_file = directory / ADAPTER_CONFIG
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter directory.")
    require_files(directory)
    raw = read_json(config_file, "a PEFT adapter config", keys=["peft_type"])
    kind = {PEFT_TYPE: QveraConfig, "VERA": VeraConfig, lora_file.PEFT_TYPE: LoraConfig}.get(str(raw["peft_type"]))
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
                return lora_file.config_of(raw, directory)
            return kind(**{k: v for k, v in raw.items() if k in known})
    except InputError as error:
        raise InputError(f"{config_file}: {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{config_file}: a value has the wrong type, or is out of range ({error}).") from None


def require_files(directory: Path) -> None:
    """Look for the two files of an adapter directory.

    Raises:
        InputError: one is missing. Weights in a pickle do not count: opening one can run code.
    """
    if not (directory / ADAPTER_WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(f"{directory}: has no {ADAPTER_WEIGHTS}; pickled adapters are not read.")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise InputError(f"{directory}: has no {name}, so it is not an adapter directory.")


def model_class_of(directory: Path, raw: dict[str, Any]) -> ModelClass:
    """Which model the adapter in ``directory`` is for; ``raw`` is its adapter_config.json.

    Raises:
        InputError: it is a classifier's, and nothing says what its outputs mean.
    """
    if raw["peft_type"] in (PEFT_TYPE, lora_file.PEFT_TYPE) and runs_on_our_layers(raw):
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
    """Whether an adapter with this adapter_config.json runs on qvera's layers. PEFT loads every other one."""
    if raw["peft_type"] == lora_file.PEFT_TYPE:
        return lora_file.refusal(raw) is None
    return raw["peft_type"] in (PEFT_TYPE, "VERA")


def require_tokens(config: QveraConfig | VeraConfig, adapter: Path | str, ids: dict[str, int] | None) -> None:
    """Compare the tokens that an adapter's recipe added with those of the loaded base (token → id, or None for none).

    Raises:
        InputError: they are not the same.
    """
    expected = getattr(config, "added_tokens", None) or {}
    if expected != (ids or {}):
        raise InputError(
            f"{adapter}: was trained with the added tokens {expected or 'none'}, and the loaded base has "
            f"{ids or 'none'}. Set model.added_tokens: [{', '.join(map(repr, expected))}] for the same model."
        )


def require_base(config: QveraConfig | VeraConfig, adapter: Path | str, name: str, fingerprint: str | None) -> None:
    """Compare the base model of that name and fingerprint with the one that an adapter was trained on.

    Raises:
        InputError: it is another base. One without a fingerprint passes, like an adapter without (PEFT's own).
    """
    expected = getattr(config, "base_fingerprint", None)
    if not same_base(expected, fingerprint):
        raise InputError(
            f"{adapter}: was trained on another base model than {name!r}. Expected the base "
            f"{config.base_model_name_or_path!r} with fingerprint {str(expected)[:16]}; {name!r} has "
            f"{str(fingerprint)[:16]}. Point model.path at the base it was trained on."
        )
