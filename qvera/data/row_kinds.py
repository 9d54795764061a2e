"""Which classes read rows: those of texts by a tokenizer, and those of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from qvera.config.schema import DataSection
from qvera.data.chat_template import ChatTemplate, resolve_template
from qvera.data.encoding import Encoder
from qvera.data.image_processor import ImageProcessor
from qvera.data.image_rows import ImageEncoder, ImageReader
from qvera.data.labelled import LabelledTokenizer
from qvera.data.row_format import LABELLED, RowFormat
from qvera.data.tokenization import RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Processor: TypeAlias = PreTrainedTokenizerBase | ImageProcessor
    """What makes rows into a model's input."""


def encoder_of(section: DataSection, processor: Processor) -> Encoder | ImageEncoder:
    """The encoder of a source's rows; raises as `Encoder`."""
    if isinstance(processor, ImageProcessor):
        return ImageEncoder(processor.patches)
    return Encoder(processor, has_answers=section.format not in LABELLED)


def template_of(section: DataSection, encoder: Encoder | ImageEncoder, format: str) -> ChatTemplate | None:
    """The template of a source's rows; None for images. Raises as `resolve_template`."""
    return None if isinstance(encoder, ImageEncoder) else resolve_template(section.template, encoder.tokenizer, format)


def row_tokenizer(
    section: DataSection, encoder: Encoder | ImageEncoder, template: ChatTemplate | None, format: RowFormat
) -> RowTokenizer:
    """What makes examples of a source's rows."""
    if isinstance(encoder, ImageEncoder):
        return ImageReader(section, encoder, format)
    assert template is not None
    kind = LabelledTokenizer if format.name in LABELLED else RowTokenizer
    return kind(section, encoder, template, format)
