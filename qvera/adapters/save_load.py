"""An adapter on a base: put there, saved, read back, and held against the base it was trained on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qvera.adapters import QveraConfig, QveraLinear, accelerated_peft
from qvera.adapters.config import KINDS, PEFT_TYPE
from qvera.config.schema import AdapterSection, ModelSection
from qvera.models.loader import Base
from qvera.models.tokenizer import ADDED_ROWS, put_token_rows, read_token_rows, save_token_rows
from qvera.utils.atomic import disk_errors, flush
from qvera.utils.errors import InputError, first_line
from qvera.utils.paths import resolve_path
from qvera.utils.safetensors_io import same_base

ADAPTER_WEIGHTS = "adapter_model.safetensors"


ADAPTER_CONFIG = "adapter_config.json"


def attach(
    model: nn.Module,
    section: AdapterSection,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    added_tokens: dict[str, int] | None = None,
    tokens: ModelSection | None = None,
) -> PeftModel:
    """Put a fresh adapter (or, with ``init_from``, the vectors of an existing one) on a loaded base.

    Only its vectors are trainable afterwards. ``base_name`` and ``base_fingerprint`` go into the adapter's config, and so do
    ``added_tokens`` (token → id, whose rows the model has) and what ``tokens`` says of padding and eos.

    Raises:
        InputError: a target matches nothing, or ``init_from`` does not fit.
    """
    config = QveraConfig(
        rank=section.rank,
        b_groups=section.b_groups,
        input_scale=section.input_scale,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        d_initial=section.d_initial,
        dropout=section.dropout,
        projection_seed=section.seed,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        base_fingerprint=base_fingerprint,
        added_tokens=dict(added_tokens) if added_tokens else None,
        pad_token=None if tokens is None else tokens.pad_token,
        eos_token=None if tokens is None else tokens.eos_token,
    )
    peft_model = _put_on(model, config)
    if section.init_from is not None:
        stored, vectors = read_adapter(Path(resolve_path(section.init_from)))
        if stored.peft_type != PEFT_TYPE:
            raise InputError(
                f"adapter.init_from: {section.init_from} is an adapter of PEFT's own VeRA, whose projections are not drawn from a "
                "seed as ours are. Train it further with PEFT after qvera.adapters.accelerate_peft(), or start anew."
            )
        for ours, theirs, key in (
            (config.rank, stored.rank, "rank"),
            (config.b_groups, stored.b_groups, "b_groups"),
            (config.input_scale, stored.input_scale, "input_scale"),
            (config.projection_seed, stored.projection_seed, "seed"),
            (config.projection_shapes, stored.projection_shapes, "projections (by its targets and base) of shapes"),
            (config.projection_sha256, stored.projection_sha256, "projections' SHA-256"),
        ):
            if ours != theirs:
                raise InputError(f"adapter.init_from: {section.init_from} has {key} {theirs}, the recipe {ours}.")
        require_base(stored, section.init_from, str(base_name), base_fingerprint)
        require_tokens(stored, section.init_from, added_tokens)
        if added_tokens:
            directory = Path(resolve_path(section.init_from))
            put_token_rows(model, added_tokens, read_token_rows(directory), directory / ADDED_ROWS)
        load_vectors(peft_model, vectors, section.init_from)
    if not section.train_d:
        for name, vector in named_vectors(peft_model).items():
            vector.requires_grad_(not name.endswith(".qvera_d"))
    return peft_model


def named_vectors(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """``layer.qvera_b``, ``layer.qvera_d`` and, where there is one, ``layer.qvera_a`` → parameter, for every adapted layer.

    The keys are those of the adapter file.
    """
    vectors: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, QveraLinear) and adapter in module.qvera_d:
            for kind in KINDS:
                if adapter in getattr(module, kind):
                    vectors[f"{name}.{kind}"] = getattr(module, kind)[adapter]
    return vectors


def adapter_facts(model: PeftModel, adapter: str = "default") -> dict[str, Any]:
    """Counts read from the live adapter (the ``adapter`` object of run.json, less the file size)."""
    layers = [m for m in model.modules() if isinstance(m, QveraLinear) and adapter in m.qvera_d]
    config: Any = model.peft_config[adapter]
    return {
        "rank": config.rank,
        "b_groups": config.b_groups,
        "input_scale": config.input_scale,
        "targets": sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, QveraLinear)}),
        "adapted_modules": len(layers),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seed": config.projection_seed,
        "lora_r64_parameters": sum(64 * (m.in_features + m.out_features) for m in layers),
    }


def save_adapter(model: PeftModel, directory: Path, tokenizer: Any = None) -> int:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (fp32 vectors, no projections); returns their bytes.

    Where tokens were added, their rows (`ADDED_ROWS`) and ``tokenizer`` go beside them; the tokenizer is not counted.

    Written to a temporary name and renamed, so that a half-written adapter never stands under its final name.

    Raises:
        RunFailed: the disk is full; an adapter that was there before is still there.
    """
    with disk_errors(str(directory), "The run's checkpoints are kept; make room and go on with --resume."):
        _write_adapter(model, directory, tokenizer)
    ours = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADDED_ROWS)
    return sum(f.stat().st_size for f in directory.iterdir() if f.name in ours)


def _write_adapter(model: PeftModel, directory: Path, tokenizer: Any) -> None:
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # save_embedding_layers=False: PEFT would otherwise look the base up on the hub
        model.save_pretrained(str(partial), save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        ids = getattr(model.peft_config["default"], "added_tokens", None)
        if ids:
            save_token_rows(model.get_base_model(), ids, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            flush(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)
    flush(directory.parent)
    for leftover in directory.parent.iterdir():  # of a process that was killed in here
        found = re.fullmatch(rf"\.{re.escape(directory.name)}\.(?:partial|old)-(\d+)", leftover.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def read_adapter(directory: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read an adapter directory without a model: one of ours, or one of PEFT's own VeRA.

    Returns:
        The config (`QveraConfig`, or PEFT's `VeraConfig`) and the tensors of the adapter file by their keys.

    Raises:
        InputError: it is not an adapter directory, not a VeRA adapter, truncated, or has NaN or Inf in it.
    """
    config, weights_file = read_config(directory), directory / ADAPTER_WEIGHTS
    try:
        vectors = load_file(weights_file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights_file}: not a readable safetensors file, or cut short ({error}).") from None
    broken = sorted(name for name, tensor in vectors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise InputError(f"{weights_file}: {broken[0]} (and {len(broken) - 1} more) has NaN or Inf in it.")
    return config, vectors


def read_config(directory: Path) -> Any:
    """The config of an adapter directory: ours, or that of PEFT's own VeRA.

    Raises:
        InputError: it is not an adapter directory, or not a VeRA adapter.
    """
    config_file, weights_file = directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS
    if not directory.is_dir():
        raise InputError(f"{directory}: no such adapter directory.")
    for file in (config_file, weights_file):
        if not file.is_file():
            raise InputError(f"{directory}: has no {file.name}, so it is not an adapter directory.")
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
        kind = raw["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config_file}: not a PEFT adapter config ({type(error).__name__}: {error}).") from None
    classes: dict[Any, Any] = {PEFT_TYPE: QveraConfig, "VERA": VeraConfig}
    if kind not in classes:
        raise InputError(f"{config_file}: peft_type is {kind}, expected {PEFT_TYPE} (or PEFT's own VERA).")
    known = {f.name for f in dataclasses.fields(classes[kind])}
    try:
        with (
            warnings.catch_warnings()
        ):  # PEFT warns of projections that are not in the file; here they are drawn and used
            warnings.simplefilter("ignore", UserWarning)
            config = classes[kind](**{k: v for k, v in raw.items() if k in known})
    except InputError as error:
        raise InputError(f"{config_file}: {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{config_file}: a value has the wrong type, or is out of range ({error}).") from None
    return config


def load_vectors(model: nn.Module, vectors: dict[str, torch.Tensor], source: str, adapter: str = "default") -> None:
    """Copy vectors read from a file into a model; names and shapes must be exactly those that the model has.

    Raises:
        InputError: a vector is missing, unknown or of another shape; nothing was copied.
    """
    ours = named_vectors(model, adapter)
    missing, unknown = sorted(ours.keys() - vectors.keys()), sorted(vectors.keys() - ours.keys())
    if missing or unknown:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for keys, what in ((missing, "missing"), (unknown, "unknown"))
            if keys
        ]
        raise InputError(f"{source}: its vectors do not fit this model and these targets: {', '.join(parts)}.")
    for name, parameter in ours.items():
        if parameter.shape != vectors[name].shape:
            raise InputError(
                f"{source}: {name} has shape {list(vectors[name].shape)}, this model needs {list(parameter.shape)}."
            )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(vectors[name])


def _put_on(model: nn.Module, config: QveraConfig) -> PeftModel:
    """`get_peft_model`, with the base named as the config names it.

    PEFT would put the loaded model's name there, with a warning where that is another way of writing the same (``~``, a link).
    """
    name, config.base_model_name_or_path = config.base_model_name_or_path, None
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    if name is not None:
        config.base_model_name_or_path = name
    return peft_model


def load_adapter(model: nn.Module, directory: Path, base: Base | None = None) -> PeftModel:
    """Attach the adapter in ``directory`` to a loaded base, checked: projections, names, shapes, finite values.

    Args:
        base: what `load_base` gave for ``model``: the adapter must have been trained on the same, by content.

    Raises:
        InputError: it is no adapter, or not one for this model.
    """
    config, vectors = read_adapter(directory)
    ids = getattr(config, "added_tokens", None)
    if base is not None:
        require_base(config, directory, base.facts["path"], base.facts.get("fingerprint"))
        require_tokens(config, directory, base.facts.get("added_tokens"))
        if ids:
            put_token_rows(model, ids, read_token_rows(directory), directory / ADDED_ROWS)
    else:
        require_tokens(config, directory, None)  # a model as it comes from the hub has no such rows
    if config.peft_type != PEFT_TYPE:
        return _load_stock_adapter(model, directory)
    try:
        peft_model = _put_on(model, config)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    load_vectors(peft_model, vectors, str(directory / ADAPTER_WEIGHTS))
    peft_model.requires_grad_(False)
    peft_model.eval()
    return peft_model


def _load_stock_adapter(model: nn.Module, directory: Path) -> PeftModel:
    """An adapter of PEFT's own VeRA on our layers: PEFT reads the file, its projections and all."""
    try:
        with warnings.catch_warnings(), accelerated_peft():
            warnings.simplefilter("ignore", UserWarning)
            peft_model = PeftModel.from_pretrained(model, str(directory))  # type: ignore[arg-type]
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{directory}: does not fit this base model: {first_line(error)}") from None
    missing = [name for name, p in peft_model.named_parameters() if "vera_lambda" in name and p.is_meta]
    if missing:
        raise InputError(f"{directory}: has no values for {missing[0]} (and {len(missing) - 1} more).")
    peft_model.requires_grad_(False)
    return peft_model.eval()


def require_tokens(config: Any, adapter: Path | str, ids: dict[str, int] | None) -> None:
    """Hold the tokens that an adapter's recipe added against those of the base at hand (token → id, or None for none).

    Raises:
        InputError: they are not the same.
    """
    expected = getattr(config, "added_tokens", None) or {}
    if expected != (ids or {}):
        raise InputError(
            f"{adapter}: was trained with the added tokens {expected or 'none'}, and the base at hand has {ids or 'none'}. Set "
            f"model.added_tokens: [{', '.join(map(repr, expected))}] for the same model and tokenizer."
        )


def require_base(config: Any, adapter: Path | str, name: str, fingerprint: str | None) -> None:
    """Hold the base at hand against the one that an adapter was trained on, by content.

    Args:
        config: the adapter's.
        name: path or hub id of the base at hand; ``fingerprint``: its own, None where unknown.

    Raises:
        InputError: it is another base. An adapter that doesn't say (an old one, or PEFT's own) passes.
    """
    expected = getattr(config, "base_fingerprint", None)
    if not same_base(expected, fingerprint):
        raise InputError(
            f"{adapter}: was trained on another base model than {name!r}. Expected the base "
            f"{config.base_model_name_or_path!r} with fingerprint {str(expected)[:16]}; {name!r} has {str(fingerprint)[:16]}. "
            "Point model.path at the base it was trained on."
        )
