"""The directory behind a recipe's ``model.path``: a local one, or a snapshot from the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from qvera.config.schema import ModelSection
from qvera.utils.errors import InputError
from qvera.utils.paths import resolve_path


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
    except Exception as error:  # huggingface_hub raises httpx's, OSError's and its own
        raise InputError(
            f"model.path: the base {name!r} can't be had from the hub ({type(error).__name__}: {error})."
        ) from None
