"""The facts that `qvera info` shows. Reads files only, and imports neither torch nor PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qvera.config import plugins
from qvera.config.schema import Recipe, load_recipe
from qvera.evaluation.named_adapters import (
    adapters_root,
    kind_of,
    named_directories,
    no_adapter_in,
    refuse_name,
    require_named,
)
from qvera.evaluation.report.read import REPLACED, entry_of, get, is_replaced, read_run, status_of
from qvera.models.hub import local_directory
from qvera.utils.errors import InputError
from qvera.utils.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS,
    CERTIFICATE,
    RECIPE_FILE,
    RUN_OWNER,
    file_sha256,
    read_json,
    try_read_json,
)
from qvera.utils.safetensors_io import own_facts, unreadable_error

_UNTRAINED = frozenset({"vera_A", "vera_B", "qvera_frozen_A", "qvera_frozen_B", "qvera_places"})
"""Last parts of the names of tensors that are not trained."""
_CERTIFICATE_TEXTS = {"base": ("path", "weights"), "adapter": ("path", "sha256"), "files": (), "delta": ()}
"""Sections of a merged export's certificate, and the texts that each must have."""
_LORA_TEXTS = {"base": ("path",), "adapter": ("path", "sha256"), "files": ()}  # the same for a LoRA
_EXPORTS = {"merged": "merged export", "gguf": "merged export (GGUF)", "gguf-lora": "LoRA (GGUF)"}
"""`kind_of` an export → what people call it."""


def directory_facts(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """Collect facts of a directory: base, adapter, counts, hashes, versions.

    Args:
        path: a run, an adapter directory of any PEFT type, a merged export, or the hub id of an adapter. Also a run
            that trained several adapters or a directory of adapters; ``adapters`` then lists all.
        name: show only this one of several adapters.

    InputError: it is none of these, it has no adapter of this name, or a file is damaged.
    """
    path = local_directory(Path(path))
    kind, root = kind_of(path), adapters_root(path)
    if root is None:
        refuse_name(path, name)
    if kind == "checkpoint":
        raise no_adapter_in(path)
    if kind in ("adapter", "lora"):
        return {"kind": "adapter", "path": str(path), **_adapter(path)}
    if kind not in ("run", "many"):
        return _export(path, kind)
    summary = path / "run.json"
    run = read_json(summary, "the summary of a run") if summary.is_file() else {}
    listed = run["adapters"] if isinstance(run.get("adapters"), list) else []
    if root is not None and name is not None:
        directory = require_named(path, name)
        own = entry_of(run, name)
        facts = {"kind": "adapter", "path": str(directory), "name": name, **_adapter(directory)}
        if is_replaced(own.get("sha256"), directory / ADAPTER_WEIGHTS):
            return {**facts, "replaced": REPLACED}
        return facts | {key: value for key, value in own.items() if key not in ("name", "directory", "sha256")}
    facts = {"kind": "run" if root is None else "directory of adapters", "path": str(path)}
    if (path / RECIPE_FILE).is_file():
        recipe = load_run_recipe(path)
        about = {"base": recipe.model.path, "base_revision": recipe.model.revision}
        facts["quantization"] = recipe.model.quantization
        if root is None:
            facts |= _adapter(path / "adapter") | about
        else:
            facts |= {"kind": "run of many adapters", **about}
            facts |= {"method": recipe.adapter.method, "rank": recipe.adapter.rank}
        if run:
            facts |= {"status": status_of(run), "versions": run.get("versions")}
            result = run.get("result") or {}
            if root is None and "steps" not in result:  # of a killed run: it writes that when it ends
                result = {"planned_steps": run.get("planned_steps"), **read_run(path).totals}
            if is_replaced(get(run, "adapter", "sha256"), path / "adapter" / ADAPTER_WEIGHTS):
                facts["replaced"] = REPLACED
            facts["result"] = {key: value for key, value in result.items() if not isinstance(value, dict)}
    if root is not None:
        found = named_directories(root)
        known = {entry.get("name") for entry in listed if isinstance(entry, dict)}
        # A run that goes on saves adapters that its run.json does not list yet.
        others = [{"name": one, "directory": place.name} for one, place in found.items() if one not in known]
        facts |= {"saved_adapters": len(found), "adapters": [*listed, *others]}
    return facts


def load_run_recipe(path: Path) -> Recipe:
    """The recipe of a run that has an adapter. InputError: it can't be read, or has no adapter yet."""
    run = try_read_json(path / "run.json") or {}
    recipe = load_recipe(path / RECIPE_FILE, of_a_run=True)
    if not (path / "adapter").is_dir() and not (path / ADAPTERS).is_dir():
        finish = "Finish"
        if status_of(run) == "running" and (holder := try_read_json(path / RUN_OWNER)):
            who = f"Process {holder.get('pid')} on {holder.get('host')}"
            finish = f"{who} trains it: wait for it. If that is gone, finish"
        raise InputError(
            f"{path}: this run has no adapter/ yet. {finish} it with `qvera train {path / RECIPE_FILE} --resume`."
        )
    return recipe


def _adapter(directory: Path) -> dict[str, Any]:
    weights = directory / ADAPTER_WEIGHTS
    config = read_json(directory / ADAPTER_CONFIG, "the config of a PEFT adapter", keys=("peft_type",))
    counts: dict[str, int] = {}
    try:
        with safe_open(weights, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                part = tensors.get_slice(name)
                counts[name] = int(np.prod(part.get_shape(), dtype=np.int64))
                if part.get_dtype() in ("F32", "F16") and not np.isfinite(tensors.get_tensor(name)).all():
                    raise InputError(f"{weights}: {name} has NaN or Inf in it.")
    except (SafetensorError, OSError) as error:
        raise unreadable_error(weights, error) from None
    trained = {name: count for name, count in counts.items() if name.rpartition(".")[2] not in _UNTRAINED}
    saved = config.get("modules_to_save")
    heads = tuple(f"base_model.model.{name}." for name in (saved if isinstance(saved, list) else ()))
    head = {name: trained.pop(name) for name in list(trained) if name.startswith(heads)}
    is_lora = config["peft_type"] == "LORA"
    config |= own_facts(weights) if is_lora else {}
    targets = config.get("target_modules")
    tokens = config.get("added_tokens")
    if isinstance(tokens, dict):  # PEFT writes its JSON with sorted keys; ids say in which order tokens were added
        tokens = dict(sorted(tokens.items(), key=lambda pair: str(pair[1]).zfill(12)))
    return {
        "base": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "method": "lora" if is_lora else config.get("method", "vera"),
        "rank": config.get("rank", config.get("r")),
        "b_groups": config.get("b_groups", 1),
        "input_scale": config.get("input_scale", False),
        "experts": config.get("experts", "none"),
        "magnitude": bool(config.get("magnitude")),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
        "adapted_modules": config.get("shared_by")
        or len({name.removesuffix(".weight").rpartition(".")[0] for name in trained}),
        "trained_parameters": sum(trained.values()),
        **({"head_parameters": sum(head.values()), "labels": config.get("labels")} if head else {}),
        "adapter_file_bytes": weights.stat().st_size,
        "projection_seed": config.get("projection_seed", config.get("projection_prng_key")),
        **{k: v for k, default in plugins.facts().items() if (v := config.get(k, default)) is not None},
        "projection_generator": config.get("projection_generator"),
        "projection_sha256": config.get("projection_sha256"),
        "adapter_sha256": file_sha256(weights),
        "base_fingerprint": config.get("base_fingerprint"),
        "added_tokens": tokens,
        "format_version": config.get("format_version"),
        "peft_type": config["peft_type"],
    }


def read_certificate(directory: Path) -> dict[str, Any]:
    """The certificate of a merged export, or of a LoRA. InputError: it is damaged."""
    file, what = directory / CERTIFICATE, "the certificate of a merged export"
    fix = "Export again, or remove it to have the directory taken for a plain checkpoint."
    is_lora = (try_read_json(file) or {}).get("kind") in ("lora", "gguf-lora")
    texts: dict[str, tuple[str, ...]] = _LORA_TEXTS if is_lora else _CERTIFICATE_TEXTS
    certificate = read_json(file, what, tuple(texts), fix)
    for section, keys in texts.items():
        tree = certificate[section]
        if not isinstance(tree, dict) or not all(isinstance(tree.get(key), str) for key in keys):
            raise InputError(f"{file}: {section} is no mapping, or lacks a text; expected {what}. {fix}")
    return certificate


def _export(path: Path, kind: str) -> dict[str, Any]:
    certificate = read_certificate(path)
    base, adapter = certificate["base"], certificate["adapter"]
    return {
        "kind": _EXPORTS[kind],
        "path": str(path),
        "base": base["path"],
        "base_revision": base.get("revision"),
        "base_weights": base.get("weights"),
        "base_fingerprint": base.get("fingerprint"),
        "adapter": adapter["path"],
        "adapter_sha256": adapter["sha256"],
        "rank": certificate.get("rank", adapter.get("rank")),
        "changed_weights": len(certificate.get("delta", ())),
        "weights_bytes": sum((path / name).stat().st_size for name in certificate["files"]),
        "added_tokens": certificate.get("added_tokens"),
        "difference": certificate.get("difference"),
        "versions": certificate.get("versions"),
    }
