"""A base model's image processor, or its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from transformers import AutoImageProcessor

from qvera.config.schema import ModelSection
from qvera.data.images import ImageProcessor, require_pillow
from qvera.models.hub import require_model_files
from qvera.models.model_class import ModelClass
from qvera.models.model_config import load_config
from qvera.models.tokenizer import load_tokenizer
from qvera.utils.errors import InputError, first_line
from qvera.utils.paths import resolve_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qvera.data.source import Processor

PROCESSOR_FILE = "preprocessor_config.json"


def load_processor(section: ModelSection, model_class: ModelClass) -> Processor:
    """The image processor of a model that reads images, else the tokenizer; raises as their loaders."""
    return load_image_processor(section) if model_class.reads_images else load_tokenizer(section)


def load_image_processor(section: ModelSection) -> ImageProcessor:
    """The image processor of a model, on Pillow: a run gives the same bits with and without torchvision."""
    require_pillow()
    name = resolve_path(section.path)
    require_model_files(name)
    try:
        config = load_config(section)
        if Path(name).is_dir() and not (Path(name) / PROCESSOR_FILE).is_file():
            raise OSError(f"it has no {PROCESSOR_FILE}")
        processor = AutoImageProcessor.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, KeyError, ImportError, HFValidationError) as error:
        raise InputError(
            f"model.path: no image processor can be loaded from {name!r} ({first_line(error)}). Expected "
            f"{PROCESSOR_FILE} beside the weights: copy it from the model that the weights are of."
        ) from None
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise InputError(f"model.path: {name!r} takes images of {channels} channels, and rows are read as RGB, of 3.")
    height, width = _input_size(config, processor, name)
    return ImageProcessor(processor, (height, width), image_tokens(config, height, width))


def _input_size(config: PretrainedConfig, processor: Any, name: str) -> tuple[int, int]:
    """Height and width of a model's images: by its config, else as the processor makes them."""
    crop, size = getattr(processor, "crop_size", None), getattr(processor, "size", None)
    made = dict((crop if getattr(processor, "do_center_crop", False) else size) or {})
    if (sides := image_sides(config)) is not None:
        return sides
    height, width = made.get("height"), made.get("width")
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    raise InputError(
        f"model.path: neither the config of {name!r} (image_size) nor its {PROCESSOR_FILE} (size or crop_size, with "
        "height and width) says how large its images are, and a batch needs images of one size. Add it there."
    )


def image_sides(config: PretrainedConfig) -> tuple[int, int] | None:
    """Height and width of the images that a model takes, where its config says so."""
    size = getattr(config, "image_size", None)
    pair = (size, size) if isinstance(size, int) else tuple(size or ())
    return pair if len(pair) == 2 and all(isinstance(side, int) for side in pair) else None


def image_tokens(config: PretrainedConfig, height: int, width: int) -> int:
    """Tokens that a vision transformer makes of an image, that of the class included; 1 of any other model."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return 1
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return (height // rows) * (width // columns) + 1
