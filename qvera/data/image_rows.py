"""Rows of the format ``image``: an image and a label. Checked once, and decoded again when a step asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvera.config.schema import DataSection
from qvera.data.conversations import row_value
from qvera.data.image_processor import StoredImage
from qvera.data.labelled import row_label
from qvera.data.readers import RawRow, describe
from qvera.data.row_format import RowFormat
from qvera.data.rows import Example
from qvera.data.tokenization import RowCounts, RowTokenizer
from qvera.utils.errors import InputError

FORMAT = "image"


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A row: the image's bytes or the path of its file, and its label, a name or a number as text."""

    content: str | bytes
    label: str
    source: str
    owner: str | None = None


class ImageEncoder:
    """What stands in for a tokenizer's `qvera.data.encoding.Encoder`: an image is as many tokens as it has patches."""

    tokenizer = None
    pad_id = 0
    pads_with_eos = False

    def __init__(self, patches: int) -> None:
        self.patches = patches

    def sha256(self) -> str:
        """What the rows depend on: they have absolute paths, where a recipe may have relative ones."""
        return f"{self.patches} tokens, from {Path.cwd()}"


class ImageReader(RowTokenizer):
    """Rows → examples. Each image is decoded once to see that it can be, and is kept as it is stored.

    An example has a token for each patch that the model makes of its image. The last one stands for its one target, the
    label (`Example.is_labelled`).
    """

    def __init__(self, section: DataSection, encoder: ImageEncoder, row_format: RowFormat) -> None:
        self.section, self.encoder, self.row_format = section, encoder, row_format  # type: ignore[assignment]
        self.patches = encoder.patches

    def _parse(self, row: RawRow) -> Any:
        label = row_label(row, self.row_format, self.section.label_names)
        return LabelledImage(_content(row, row_value(row, self.row_format, "image"), self._column), label, row.source)

    @property
    def _column(self) -> str:
        return self.row_format.column("image")

    def _is_empty(self, row: Any) -> bool:
        return False

    def encode(self, rows: Sequence[LabelledImage]) -> tuple[list[Example], RowCounts]:  # type: ignore[override]
        """See `RowTokenizer.encode`."""
        tokens = self.patches
        ids, nothing, trained = np.zeros(tokens, np.int32), np.zeros(0, np.int32), np.zeros(tokens, dtype=bool)
        trained[-1:] = True
        examples = []
        for row in rows:
            image = StoredImage(row.content, row.source)
            image.open()
            where = row.content if isinstance(row.content, str) else ""
            examples.append(Example(ids, trained, row.source, nothing, where, row.label, row.owner, image=image))
        return examples, RowCounts()


def _content(row: RawRow, value: object, column: str) -> str | bytes:
    """The bytes of an image, or the path of its file, which a data file may write relative to itself."""
    if isinstance(value, Mapping):  # as `datasets.Image` stores it
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{row.source}: {column} must be an image: its bytes, the path of a file, or an object with bytes or path; "
            f"got {describe(value)}. Fix the row, or remove it."
        )
    directory = Path() if row.file is None else row.file.parent
    return str((directory / Path(value).expanduser()).absolute())
