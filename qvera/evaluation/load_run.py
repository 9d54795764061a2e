"""Open what a run left behind: recipe, base model and trained adapter, from its directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qvera.adapters import save_load
from qvera.config.load import load_recipe
from qvera.config.schema import ModelSection, Recipe
from qvera.models import loader
from qvera.utils.errors import InputError
from qvera.utils.safetensors_io import file_sha256

RECIPE_FILE = "recipe.yaml"


@dataclasses.dataclass
class OpenRun:
    """A run ready to use. ``recipe`` is None for an adapter directory that stands alone."""

    path: Path
    recipe: Recipe | None
    base: loader.Base
    model: Any


def locate(path: Path) -> tuple[Recipe | None, ModelSection, Path]:
    """Recipe, model section and adapter directory of a run or adapter directory, without loading anything big.

    Raises:
        InputError: it is neither, or the run has no adapter yet.
    """
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory. Expected a run (with {RECIPE_FILE} and adapter/) or an adapter directory."
        )
    if (path / RECIPE_FILE).is_file():
        recipe = load_recipe(path / RECIPE_FILE)
        adapter = path / "adapter"
        if not adapter.is_dir():
            raise InputError(f"{path}: this run has no adapter/ yet; finish it with `qvera train ... --resume`.")
        return recipe, recipe.model, adapter
    if (path / save_load.ADAPTER_CONFIG).is_file():
        config, _ = save_load.read_adapter(path)
        if config.base_model_name_or_path is None:
            raise InputError(f"{path / save_load.ADAPTER_CONFIG}: names no base model (base_model_name_or_path).")
        section = ModelSection(
            path=config.base_model_name_or_path,
            revision=config.revision,
            added_tokens=list(getattr(config, "added_tokens", None) or ()),
            pad_token=getattr(config, "pad_token", None),
            eos_token=getattr(config, "eos_token", None),
        )
        return None, section, path
    raise InputError(
        f"{path}: is neither a run (it has no {RECIPE_FILE}) nor an adapter directory (it has no {save_load.ADAPTER_CONFIG})."
    )


def open_run(path: str | Path, *, adapter: bool = True) -> OpenRun:
    """Load base and adapter of a run or adapter directory, ready for answers.

    Args:
        adapter: False: the base model alone (for a comparison).
    """
    path = Path(path)
    recipe, section, directory = locate(path)
    if adapter:
        save_load.read_adapter(directory)  # a broken adapter is found before a big model is loaded
    base = loader.load_base(section)
    return OpenRun(path, recipe, base, save_load.load_adapter(base.model, directory, base) if adapter else base.model)


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of a run or adapter directory, read from its files: base, adapter, counts, hashes, versions (`qvera info`)."""
    path = Path(path)
    recipe, section, directory = locate(path)
    config, vectors = save_load.read_adapter(directory)
    facts: dict[str, Any] = {
        "kind": "run" if recipe is not None else "adapter",
        "path": str(path),
        "base": section.path,
        "base_revision": section.revision,
        "quantization": section.quantization if recipe is not None else None,
        "rank": getattr(config, "rank", getattr(config, "r", None)),
        "b_groups": getattr(config, "b_groups", 1),
        "input_scale": getattr(config, "input_scale", False),
        "targets": config.target_modules
        if isinstance(config.target_modules, str)
        else sorted(config.target_modules or ()),
        "adapted_modules": sum(name.endswith((".qvera_b", ".vera_lambda_b")) for name in vectors),
        "trained_numbers": sum(t.numel() for name, t in vectors.items() if not name.endswith(("vera_A", "vera_B"))),
        "adapter_file_bytes": (directory / save_load.ADAPTER_WEIGHTS).stat().st_size,
        "projection_seed": getattr(config, "projection_seed", getattr(config, "projection_prng_key", None)),
        "projection_generator": getattr(config, "projection_generator", "PEFT's"),
        "projection_sha256": getattr(config, "projection_sha256", None),
        "adapter_sha256": file_sha256(directory / save_load.ADAPTER_WEIGHTS),
        "base_fingerprint": getattr(config, "base_fingerprint", None),
        "added_tokens": getattr(config, "added_tokens", None),
        "format_version": getattr(config, "format_version", None),
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
    }
    summary = path / "run.json"
    if summary.is_file():
        try:
            run = json.loads(summary.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{summary}: is not JSON ({error}).") from None
        facts["status"] = run.get("status")
        facts["versions"] = run.get("versions")
        facts["result"] = {k: v for k, v in (run.get("result") or {}).items() if not isinstance(v, dict)}
    return facts
