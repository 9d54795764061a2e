"""Where things are: the cache, paths from a recipe, and names of files."""

import os
from pathlib import Path

RECIPE_FILE = "recipe.yaml"
"""In a run's directory."""
RUN_OWNER = ".qvera_run.owner"
"""In a run's directory: the process that trains there (host, pid, start in ISO format)."""
RUN_PROGRESS = ".qvera_run.progress"
"""In a run's directory: how far the present phase is (`qvera.utils.progress.Phase`)."""
ADAPTERS = "adapters"
"""In a run that trained many adapters: one directory for each."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
"""transformers' file; beside an adapter of the hub, the template that it was trained with."""
TRAINING_FACTS = "qvera_training.json"
"""Beside an adapter's vectors: what a fine-tuning job trained it on."""
CERTIFICATE = "qvera_export.json"
"""Beside an exported checkpoint: what was merged onto what."""


def cache_root() -> Path:
    """``$QVERA_CACHE``, else ``$XDG_CACHE_HOME/qvera``, else ``~/.cache/qvera``."""
    if own := os.environ.get("QVERA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qvera"


def resolve_path(path: str) -> str:
    """A recipe's model or tokenizer path with ``~`` expanded; hub ids stay as they are."""
    return os.path.expanduser(path) if path.startswith("~") else path
