"""The base model without weights: what its config alone says about modules and shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qvera.config.schema import ModelSection
from qvera.utils.errors import InputError, first_line
from qvera.utils.paths import resolve_path


def empty_model(section: ModelSection, source: Path | str | None = None) -> torch.nn.Module:
    """The base without weights, to see which modules there are and of which kind.

    Raises:
        InputError: its config can't be read.
    """
    name = str(source or resolve_path(section.path))
    trust = section.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(
            name, revision=None if source else section.revision, trust_remote_code=trust
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"model.path: no model can be made from the config of {name!r}; it can't be loaded as a causal language model: "
            f"{first_line(error)}"
        ) from None
