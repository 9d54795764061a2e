"""Images from rows or messages → RGB pictures by Pillow (the extra ``vision``) → pixel values for the model."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import io
import math
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qvera.utils.cores import core_ids
from qvera.utils.errors import InputError, require_packages
from qvera.utils.files import resolve_path
from qvera.utils.formatting import describe

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


T = TypeVar("T")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
"""Files with these endings are read from a directory. Pillow then goes by their content."""
OTHER_IMAGES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg")
"""Pictures that Pillow needs a plugin for. They are refused: nobody would miss them if they were left out."""
_THUMBNAIL_PIXELS = 96
_MOST_THUMBNAILS = 8
"""Only so many images of a row are shown; each takes a few kB."""
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)
"""The errors that Pillow's decoders raise on damaged bytes."""
_STREAM = 2**62
"""Philox's second key word. ``data.rows_per_label`` has the same one, but other counters, since steps start at 1."""
_TRIES = 10
_AREAS, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)
"""Area share and width : height of a random crop, as in torchvision's RandomResizedCrop."""


def require_pillow() -> None:
    """Raises InputError if Pillow is missing."""
    require_packages("vision", "PIL", what="reading images ")


def open_image(content: str | bytes | pa.Buffer, source: str) -> Image:
    """Decode an image (a path or bytes) to 8-bit RGB, rotated as its EXIF data says.

    An animation gives its first frame. Transparent pixels stand before white. 16-bit greys are scaled by 1/257. Raises
    InputError: no such file, no image, damaged, more pixels than Pillow's limit, or pixels of no known range.
    """
    import pyarrow as pa
    from PIL import Image, ImageOps, UnidentifiedImageError

    limit = Image.MAX_IMAGE_PIXELS
    if isinstance(content, str):
        if not os.path.isfile(content):  # nor a directory, or a pipe, which would be waited for
            raise InputError(f"{source}: there is no image file {content}. Fix the path, or remove the row.")
        # an image of a directory is its own source, but by its relative path
        source = source if source.endswith(content) or content.endswith(source) else f"{source}: {content}"
    try:
        if not isinstance(content, str):
            # an Arrow buffer is read from the mapped pages, without a copy
            content = io.BytesIO(content) if isinstance(content, bytes) else pa.BufferReader(content)
        with Image.open(content) as image:
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError
            image.load()
            turned: Image.Image = image
            with contextlib.suppress(*_DAMAGED):  # its EXIF data may be
                turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):  # whole numbers of 16 or 32 bits
                values = np.asarray(turned)
                if values.size and (values.min() < 0 or values.max() > 65_535):
                    raise InputError(f"{source}: has grey values beyond 16 bits. Convert it to 8 or 16 bits.")
                return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
            if turned.mode == "F":
                raise InputError(f"{source}: has fractions as pixels, whose range is not known. Convert it to 8 bits.")
            if turned.has_transparency_data:
                seen = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
            return turned.convert("RGB")
    except PermissionError:
        problem = "can't be read: permission denied. Change its mode, or remove the row."
    except UnidentifiedImageError:
        problem = (
            "is no image that Pillow can read. Expected JPEG, PNG, WebP, GIF, BMP or TIFF; convert it, or remove it."
        )
    except Image.DecompressionBombError:
        problem = (
            f"has more than {limit:,} pixels, Pillow's limit for images that are safe to unpack. Make it smaller, or "
            "remove it."
        )
    except _DAMAGED as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        problem = f"the image is damaged ({reason}). Replace it, or remove it."
    raise InputError(f"{source}: {problem}") from None


def thumbnail_uris(images: Sequence[StoredImage]) -> list[str]:
    """Small copies of a row's first images as data URIs."""
    found = []
    for image in images[:_MOST_THUMBNAILS]:
        small, stream = image.open(), io.BytesIO()
        small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        small.save(stream, "JPEG", quality=80)
        found.append("data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii"))
    return found


@dataclass(frozen=True, slots=True)
class Draw:
    """The crop and flip of a training row depend on these only, so resumed runs, passes and ranks draw the same."""

    seed: int
    step: int
    row: int

    def numbers(self, count: int) -> np.ndarray:
        """Random numbers in [0, 1), fp64 [count], from raw words of numpy's Philox (see `random_order`)."""
        key = np.array([self.seed % 2**64, _STREAM], dtype=np.uint64)
        counter = np.array([0, self.row, self.step, 0], dtype=np.uint64)  # the first one counts blocks of words
        words = np.random.Philox(key=key, counter=counter).random_raw(count)
        return (words >> np.uint64(11)) * 2.0**-53


def crop_box(width: int, height: int, draw: Draw) -> tuple[tuple[int, int, int, int], bool]:
    """A random crop (left, top, right, bottom), as by torchvision's RandomResizedCrop, and whether it is flipped.

    If none of ten draws fits, the crop is in the middle.
    """
    found = draw.numbers(1 + 4 * _TRIES)
    flipped = bool(found[0] < 0.5)
    for area, ratio, left, top in found[1:].reshape(_TRIES, 4).tolist():
        target = width * height * (_AREAS[0] + area * (_AREAS[1] - _AREAS[0]))
        low, high = map(math.log, _RATIOS)
        shape = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return (x, y, x + w, y + h), flipped
    w = min(width, max(1, round(height * _RATIOS[1])))
    h = min(height, max(1, round(width / _RATIOS[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return (x, y, x + w, y + h), flipped


class ImageProcessor:
    """A checkpoint's image processor.

    ``size`` is the model's height and width. ``patches`` is the number of tokens that one image becomes.
    """

    def __init__(self, processor: Any, size: tuple[int, int], patches: int) -> None:
        self.processor, self.size, self.patches = processor, size, patches

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write preprocessor_config.json."""
        self.processor.save_pretrained(directory)

    def pixels(self, image: Image, source: str, draw: Draw | None = None) -> np.ndarray:
        """The model's input, fp32 [3, height, width]: the whole image, or a random crop resized to the model's size.

        Raises InputError: the processor makes an image of another size than the model's.
        """
        options: dict[str, Any] = {}
        if draw is not None:
            from PIL.Image import Transpose

            box, flipped = crop_box(*image.size, draw)
            image = image.resize(self.size[::-1], self.processor.resample, box=box)
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT) if flipped else image
            options = {"do_resize": False, "do_center_crop": False}
        found = self.processor(images=image, return_tensors="np", **options)["pixel_values"][0]
        if found.shape != (3, *self.size):
            raise InputError(
                f"{source}: the image processor of model.path makes an array {list(found.shape)} of it, and the model "
                f"takes {[3, *self.size]}. Mend size and crop_size in preprocessor_config.json."
            )
        return found.astype(np.float32)


class ImageTextProcessor:
    """Places for images among text, by the model's own processor, which is loaded for the first image.

    Args:
        load: loads the processor. Raises InputError where the model has none, or it can't run here.
    """

    def __init__(self, load: Callable[[], ProcessorMixin]) -> None:
        self._load = load

    @functools.cached_property
    def processor(self) -> Any:
        """The model's processor."""
        return self._load()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the loaded processor. Its loader stays behind, because it is no part of the data modules."""
        try:
            return {"processor": self.processor}
        except InputError as error:  # a copy still reads rows without images
            return {"_load": functools.partial(_refuse, str(error))}

    def sha256(self) -> str:
        """A hash of all that decides how many tokens an image becomes."""
        try:
            processor = self.processor
        except InputError as error:  # only rows without images can be read
            return str(error)
        settings = {name: value for name, value in vars(processor).items() if isinstance(value, (str, int, float))}
        # images may be named by paths that start at the working directory
        about = f"{Path.cwd()} {type(processor).__name__} {settings} {processor.image_processor!r}"
        return hashlib.sha256(about.encode()).hexdigest()

    def expand(self, text: str, images: Sequence[StoredImage], source: str) -> tuple[str, list[tuple[int, int]]]:
        """Put the tokens of each image into its place in the text.

        Returns the longer text, and for each place its end before and after.

        Raises InputError: the text has more or fewer places than there are images, or an image can't be read.
        """
        if not images and self._is_without_places(text):
            return text, []
        pictures = [image.open() for image in images]
        token = self.processor.image_token
        if text.count(token) != len(images):
            raise InputError(
                f"{source}: its text has {text.count(token)} places for images ({token}), and {len(images)} images are "
                f"given. Take {token} out of the texts; if none has it, name a template that writes images."
            )
        try:
            found = self.processor(text=[text], images=[pictures], return_text_replacement_offsets=True)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise InputError(f"{source}: the model's processor refuses its images: {error}") from None
        places = found["text_replacement_offsets"][0]
        whole, ends, last = "", [], 0
        for place in places:
            start, end = place["span"]
            whole += text[last:start] + place["replacement"]
            ends.append((end, len(whole)))
            last = end
        return whole + text[last:], ends

    def _is_without_places(self, text: str) -> bool:
        try:
            return self.processor.image_token not in text
        except InputError:  # without a processor no image is put among texts
            return True

    def inputs(self, images: Sequence[StoredImage]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for the images of a batch, which stay in their order."""
        text = self.processor.image_token * len(images)
        found = self.processor(text=[text], images=[in_threads(StoredImage.open, images)], return_tensors="pt")
        return {name: value for name, value in found.items() if name not in ("input_ids", *_OF_TOKENS)}

    def token_types(self, ids: np.ndarray) -> np.ndarray:
        """1 where a token is an image's, else 0; int64 like ``ids``."""
        return np.isin(ids, self.processor.image_token_ids).astype(np.int64)


def _refuse(reason: str) -> ProcessorMixin:
    raise InputError(reason)


_OF_TOKENS = ("attention_mask", "token_type_ids", "mm_token_type_ids")
"""Names of the outputs of a processor that have a value for each token."""
_ATTRIBUTE = "qvera_images"


def give_images(tokenizer: PreTrainedTokenizerBase, images: ImageTextProcessor) -> None:
    """Let rows of this tokenizer hold images."""
    setattr(tokenizer, _ATTRIBUTE, images)


def text_only(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer for somebody else's rows, which may name no file of ours: a row with an image is refused."""
    alone = copy.copy(tokenizer)
    setattr(alone, _ATTRIBUTE, None)
    return alone


def images_of(tokenizer: Any) -> ImageTextProcessor | None:
    """Return what `give_images` attached to the tokenizer; None for a model of text."""
    return getattr(tokenizer, _ATTRIBUTE, None)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The image of a row, decoded when it is asked for."""

    content: str | bytes | pa.Buffer  # a file's path, or its bytes
    source: str  # for messages
    processor: ImageProcessor | ImageTextProcessor | None = None
    draw: Draw | None = None  # of a training row that is cropped and flipped

    @property
    def stored(self) -> dict[str, Any]:
        """The image as a table of rows stores it: by its path or its bytes."""
        return {"path" if isinstance(self.content, str) else "bytes": self.content}

    def read_bytes(self) -> bytes:
        """The encoded bytes."""
        return Path(self.content).read_bytes() if isinstance(self.content, str) else bytes(self.content)

    def open(self) -> Image:
        """The picture, in RGB."""
        return open_image(self.content, self.source)

    def pixels(self) -> np.ndarray:
        """The model's input, fp32 [3, height, width]."""
        assert isinstance(self.processor, ImageProcessor)  # `build_datasets` gives it to all rows
        return self.processor.pixels(self.open(), self.source, self.draw)


def pixel_batch(images: Sequence[StoredImage]) -> np.ndarray:
    """Pixel values, fp32 [B, 3, height, width]."""
    return np.stack(in_threads(StoredImage.pixels, images))


def in_threads(function: Callable[[StoredImage], T], images: Sequence[StoredImage]) -> list[T]:
    """Apply a function to each image, in several threads; the results keep the order of the images."""
    threads = min(len(images), len(core_ids()))
    if threads < 2:
        return [function(image) for image in images]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, images))


PLACE = "<image>"
"""A mark in a text for the place of the next image of the column ``images``."""
_IMAGE_KEYS = ("image", "image_url", "bytes", "base64", "path", "url")
"""Keys of a content part that may hold its image."""


def read_parts(
    value: object, where: str, column: deque[Any], directory: Path, has_places: bool = False
) -> tuple[tuple[dict[str, str], ...], tuple[str | bytes, ...]]:
    """Split the content of a message into parts, as templates take them, and find its images.

    Args:
        value: text, or OpenAI's content parts.
        where: the message, for errors.
        column: the row's images that have no place yet; those that no part holds are taken from it.
        directory: where relative paths start.
        has_places: `PLACE` in a text is the place of an image even where none is left, which is an error.

    Raises:
        InputError: neither text nor parts, a part of another kind, or an image is missing or none (`read_image`).
    """
    if isinstance(value, str):
        pieces = re.split(f"({PLACE})", value) if column or has_places else [value]
        value = [{"type": "image"} if piece == PLACE else {"type": "text", "text": piece} for piece in pieces if piece]
    elif not isinstance(value, list):
        raise InputError(f"{where} must be text, got {describe(value)}. Fix the row.")
    parts: list[dict[str, str]] = []
    images: list[str | bytes] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else describe(part)
        if kind in ("image", "image_url"):
            held = next((key for key in _IMAGE_KEYS if part.get(key)), None)
            if held is None and not column:
                raise InputError(
                    f"{where}: the image of a part is missing. Expected a path, bytes or a data: URL in its key "
                    f"image, or an image for each such part, and each {PLACE}, in order, in a column images."
                )
            shown = column.popleft() if held is None else part[held]
            images.append(read_image(shown, where, directory, is_encoded=held in ("bytes", "base64")))
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise InputError(f"{where}: a part of it is {kind!r}; only texts and images are read. Remove it.")
    return tuple(parts), tuple(images)


def read_image(value: Any, where: str, directory: Path, is_encoded: bool = False) -> str | bytes:
    """Return an image's bytes or its file's path. Relative paths start at ``directory``.

    ``is_encoded``: a text is the image in base64, not a path.

    Raises InputError: neither, an address, or no base64.
    """
    if isinstance(value, dict):  # as `datasets.Image` stores it, or OpenAI's {"url": ...}
        is_encoded = bool(value.get("bytes"))
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where} must be an image: its bytes, the path of a file, or an object with bytes or path; "
            f"got {describe(value)}. Fix the row, or remove it."
        )
    if re.match(r"\w+://", value):
        raise InputError(
            f"{where}: {value[:80]} is an address, from which no image is fetched. Expected the path of a file here."
        )
    if is_encoded or value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except ValueError as error:  # binascii's, or of letters beyond ASCII
            raise InputError(f"{where}: the image is no base64 ({error}). Replace it, or remove it.") from None
    return str((directory / resolve_path(value)).absolute())
