"""Where things are: the cache, paths as a recipe gives them, and names of files."""

import os
from pathlib import Path

RECIPE_FILE = "recipe.yaml"
"""The recipe in a run's directory."""
RUN_OWNER = ".qvera_run.owner"
"""The file in a run's directory in which the process that trains there says who it is: host, pid, started (ISO)."""
ADAPTERS = "adapters"
"""The directory of a run that trained many adapters, with one directory for each."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
"""transformers' file of a chat template: beside an adapter of the hub, the one that it was trained with."""
TRAINING_FACTS = "qvera_training.json"
"""The file beside an adapter's vectors in which a fine-tuning job says what it was trained on."""
CERTIFICATE = "qvera_export.json"
"""The file beside an exported checkpoint that says what was merged onto what."""


def cache_root() -> Path:
    """``$QVERA_CACHE``, else ``$XDG_CACHE_HOME/qvera``, else ``~/.cache/qvera``."""
    if own := os.environ.get("QVERA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qvera"


def resolve_path(path: str) -> str:
    """A recipe's model or tokenizer path with ``~`` expanded; hub ids stay as they are."""
    return os.path.expanduser(path) if path.startswith("~") else path
