"""Pictures → a model's pixel values, by the image processor of its checkpoint; crops and flips for training."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvera.data.images import open_image
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

_STREAM = 2**62
"""Of the random numbers; no stream of `qvera.data.sampler.random_order` has this number."""
_TRIES = 10
_AREAS, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)
"""Share of an image that a random crop covers, and its width : height, as torchvision's RandomResizedCrop has them."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What the crop and the flip of one training row depend on, and nothing else.

    A resumed run draws them anew, and neither passes nor ranks change them.
    """

    seed: int
    step: int
    row: int

    def numbers(self, count: int) -> np.ndarray:
        """Random numbers of 0 <= x < 1, fp64 [count], from raw words of numpy's Philox (see `random_order`)."""
        key = np.array([self.seed % 2**64, _STREAM], dtype=np.uint64)
        counter = np.array([0, self.row, self.step, 0], dtype=np.uint64)  # the first one counts blocks of words
        words = np.random.Philox(key=key, counter=counter).random_raw(count)
        return (words >> np.uint64(11)) * 2.0**-53


def crop_box(width: int, height: int, draw: Draw) -> tuple[tuple[int, int, int, int], bool]:
    """A random crop (left, top, right, bottom) of an image of that size, and whether it is flipped.

    Area and shape are drawn as torchvision's RandomResizedCrop draws them; the middle is taken where none of ten draws
    fits.
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

    Args:
        processor: transformers' own.
        size: height and width of the images that the model takes.
        patches: how many tokens the model makes of one.
    """

    def __init__(self, processor: Any, size: tuple[int, int], patches: int) -> None:
        self.processor, self.size, self.patches = processor, size, patches

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write preprocessor_config.json."""
        self.processor.save_pretrained(directory)

    def pixels(self, image: Image, source: str, draw: Draw | None = None) -> np.ndarray:
        """The model's input, fp32 [3, height, width]: as the processor makes it, or of a random crop.

        A crop is brought to the model's size by the processor's own interpolation, then scaled and normalized as it
        says.

        Raises:
            InputError: the processor makes an image of another size than the model's.
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


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The image of a row, decoded when it is asked for.

    Attributes:
        content: a file's path, or its bytes.
        source: names it in messages.
        processor: that of the model.
        draw: of a training row that is cropped and flipped at random.
    """

    content: str | bytes | pa.Buffer
    source: str
    processor: ImageProcessor | None = None
    draw: Draw | None = None

    @property
    def stored_bytes(self) -> bytes | None:
        """The bytes of one that is in no file."""
        return self.content if isinstance(self.content, bytes) else None

    def read_bytes(self) -> bytes:
        """The bytes, whatever they are kept in."""
        return Path(self.content).read_bytes() if isinstance(self.content, str) else bytes(self.content)

    def open(self) -> Image:
        """The picture, in RGB."""
        return open_image(self.content, self.source)

    def pixels(self) -> np.ndarray:
        """The model's input, fp32 [3, height, width]."""
        assert self.processor is not None  # `build_datasets` gives it to all rows
        return self.processor.pixels(self.open(), self.source, self.draw)

    def drawn(self, draw: Draw) -> StoredImage:
        """The same, cropped and flipped."""
        return replace(self, draw=draw)


def pixel_batch(images: Sequence[StoredImage]) -> np.ndarray:
    """The pixel values of some images, fp32 [B, 3, height, width]; several threads decode them."""
    threads = min(len(images), len(os.sched_getaffinity(0)))
    if threads < 2:
        return np.stack([image.pixels() for image in images])
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(StoredImage.pixels, images)))
