"""The directory behind a recipe's ``model.path``: a local one, or a snapshot from the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

from qvera.config.schema import ModelSection
from qvera.utils.errors import InputError
from qvera.utils.paths import resolve_path
from qvera.utils.safetensors_io import INDEX, weight_map


def base_directory(section: ModelSection) -> Path:
    """The directory of the base's weights: the local one, or the hub's snapshot (downloaded where it is not yet).

    Raises:
        InputError: there is none, or it can't be downloaded.
    """
    name = resolve_path(section.path)
    require_model_files(name)
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    patterns += ["*.py"] if section.trust_remote_code else []
    again = ["original/*", "consolidated*.safetensors"]  # the same weights in another format
    try:
        return Path(snapshot_download(name, revision=section.revision, allow_patterns=patterns, ignore_patterns=again))
    except Exception as error:  # huggingface_hub raises httpx's, OSError's and its own
        raise InputError(
            f"model.path: the base {name!r} can't be downloaded from the hub ({type(error).__name__}: {error})."
        ) from None


def require_model_files(name: str) -> None:
    """Raises InputError for a local path that is no directory with a config and safetensors weights."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or path.exists()
    if looks_local and not path.is_dir():
        raise InputError(f"model.path: {name!r} is not a directory. Expected one with config.json and *.safetensors.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model.path: {name!r} has no config.json, so it is not a model directory.")
        if (path / INDEX).is_file():
            weight_map(path / INDEX)  # transformers would follow its names anywhere
        if not any(path.glob("*.safetensors")):
            pickles = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
            found = f"; it has {', '.join(pickles[:3])}, which are pickles and are not read" if pickles else ""
            raise InputError(
                f"model.path: {name!r} has no *.safetensors weights{found}. Convert the weights to safetensors."
            )
