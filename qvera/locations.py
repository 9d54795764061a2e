"""Where things are: the cache, and the directory behind a recipe's ``model.path``."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import InputError
from .recipe import ModelSection


def cache_root() -> Path:
    """``$QVERA_CACHE``, else ``$XDG_CACHE_HOME/qvera``, else ``~/.cache/qvera``."""
    if own := os.environ.get("QVERA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qvera"


def resolve_path(path: str) -> str:
    """A recipe's model or tokenizer path with ``~`` expanded; hub ids stay as they are."""
    return os.path.expanduser(path) if path.startswith("~") else path


def base_directory(section: ModelSection) -> Path:
    """The directory of the base's weights: the local one, or the hub's snapshot (downloaded where it is not yet).

    Raises:
        InputError: it can't be had.
    """
    name = resolve_path(section.path)
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise InputError(f"model.path: {name!r} is not a directory. Expected one with config.json and *.safetensors.")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    patterns += ["*.py"] if section.trust_remote_code else []
    try:
        return Path(
            snapshot_download(
                name,
                revision=section.revision,
                allow_patterns=patterns,
                ignore_patterns=["original/*", "consolidated*.safetensors"],  # the same weights again
            )
        )
    except Exception as error:  # noqa: BLE001  # huggingface_hub raises httpx's, OSError's and its own
        raise InputError(
            f"model.path: the base {name!r} can't be had from the hub ({type(error).__name__}: {error})."
        ) from None
