"""Adapters on tiny models, for the exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraLinear
from qvera.adapters.save_load import attach, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models.loader import load_base
from qvera.models.tokenizer import ids_of
from tests.adapters.helpers import perturb
from tests.models.helpers import stock_load


def trained_adapter(
    base: Path, directory: Path, model: Any = None, *, knows_base: bool = False, **adapter: Any
) -> tuple[Any, ModelSection, Path]:
    """A perturbed adapter on a base (in NF4, unless ``model`` says otherwise), saved: model, section, directory.

    ``knows_base``: it has the base's fingerprint, and is refused on any other.
    """
    section = ModelSection(path=str(base), **{"compute_dtype": "float32", **(model or {})})
    loaded = load_base(section)
    fingerprint = loaded.facts["fingerprint"] if knows_base else None
    keys, ids = AdapterSection(**{"rank": 8, **adapter}), ids_of(loaded.tokenizer, section.added_tokens) or None
    peft_model = perturb(attach(loaded.model, keys, section.path, fingerprint, ids, section))
    save_adapter(peft_model, directory, loaded.tokenizer)
    return peft_model.eval(), section, directory


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Name of each adapted weight → ΔW."""
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, QveraLinear)
    }


def stock_base(directory: Path, quantization: str) -> Any:
    """The base as transformers loads it."""
    if quantization == "nf4":
        return stock_load(directory, torch.float32)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
