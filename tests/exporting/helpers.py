"""Adapters on tiny models, for the exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qvera.adapters import QveraLinear
from qvera.adapters.files.save_load import attach, save_adapter
from qvera.config.schema import AdapterSection, ModelSection
from qvera.models.loader import load_base
from tests.adapters.helpers import perturb


def trained_adapter(
    base: Path, directory: Path, model: Any = None, *, knows_base: bool = False, **adapter: Any
) -> tuple[Any, ModelSection, Path]:
    """A perturbed adapter on a base (in NF4, unless ``model`` says otherwise), saved: model, section, directory.

    ``knows_base``: it has the base's fingerprint, and is refused on any other.
    """
    section = ModelSection(path=str(base), **{"compute_dtype": "float32", **(model or {})})
    loaded = load_base(section)
    fingerprint = loaded.facts["fingerprint"] if knows_base else None
    peft_model = attach(loaded.model, AdapterSection(**{"rank": 8, **adapter}), section.path, fingerprint)
    perturb(peft_model)
    save_adapter(peft_model, directory)
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
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if quantization == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)
