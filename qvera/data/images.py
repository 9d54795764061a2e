"""Image files and bytes → RGB pictures, as a person sees them, by Pillow (the extra ``vision``)."""

from __future__ import annotations

import base64
import importlib.util
import io
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files of a directory with these names are read; Pillow then goes by their content."""
_THUMBNAIL_PIXELS = 96
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)
"""What Pillow's decoders raise on bytes that are not what their header says."""


def require_pillow() -> None:
    """Raises InputError where Pillow is missing."""
    if importlib.util.find_spec("PIL") is None:
        raise InputError(
            "task: image-classification reads images by Pillow, which is not installed. Run "
            "pip install 'qvera[vision]'."
        )


def open_image(content: str | bytes | pa.Buffer, source: str) -> Image:
    """Decode an image: turned as its EXIF data says, in 8-bit RGB. Of an animation the first frame.

    Transparent pixels stand before white. 16-bit greys are scaled by 1/257.

    Args:
        content: a file's path, or its bytes.
        source: names the image in messages.

    Raises:
        InputError: there is no such file, it is no image, it is damaged, it has more pixels than Pillow's limit
            (``PIL.Image.MAX_IMAGE_PIXELS``), or it has pixels of no known range.
    """
    from PIL import Image, UnidentifiedImageError

    limit = Image.MAX_IMAGE_PIXELS
    try:
        with Image.open(content if isinstance(content, str) else _stream(content)) as opened:
            width, height = opened.size
            if limit is not None and width * height > limit:
                raise Image.DecompressionBombError
            opened.load()
            return _as_rgb(_turned(opened), source)
    except FileNotFoundError:
        raise InputError(f"{source}: there is no image file {content!s}. Fix the path, or remove the row.") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{source}: is no image that Pillow can read. Expected JPEG, PNG, WebP, GIF, BMP or TIFF; convert it, or "
            "remove it."
        ) from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{source}: has more than {limit:,} pixels, Pillow's limit for images that are safe to unpack. Make it "
            "smaller, or remove it."
        ) from None
    except InputError:
        raise
    except _DAMAGED as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise InputError(f"{source}: the image is damaged ({reason}). Replace it, or remove it.") from None


def _stream(content: bytes | pa.Buffer) -> Any:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    import pyarrow as pa

    return pa.BufferReader(content)  # of mapped pages, without a copy


def _as_rgb(image: Image, source: str) -> Image:
    import PIL.Image as Pillow

    if image.mode.startswith("I"):  # whole numbers of 16 or 32 bits
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65_535):
            raise InputError(f"{source}: has grey values beyond 16 bits. Convert it to 8 or 16 bits.")
        return Pillow.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{source}: has fractions as pixels, whose range is not known. Convert it to 8 bits.")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Pillow.alpha_composite(Pillow.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _turned(image: Image) -> Image:
    """The image as its EXIF orientation says; as it is stored where that data is damaged."""
    from PIL.ImageOps import exif_transpose

    try:
        return exif_transpose(image)
    except _DAMAGED:
        return image


def thumbnail_uri(image: Image) -> str:
    """A small copy of an image as a data URI, for a page that stands alone."""
    small, stream = image.copy(), io.BytesIO()
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
