"""What `qvera info` reports of a run or adapter directory, read from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qvera.adapters import save_load
from qvera.evaluation.load import find_adapter
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of a run or adapter directory, read from its files: base model, adapter, counts, hashes, versions."""
    path = Path(path)
    recipe, section, directory = find_adapter(path)
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
