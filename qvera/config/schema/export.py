"""The section ``export`` of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from qvera.config.fields import NonNegative, Section


class ExportSection(Section):
    """The defaults of ``qvera export``; its flags override them."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """The dtype of the exported weights."""
    base: Literal["original", "dequantized"] = "dequantized"
    """Merge into the dequantized weights that the vectors were trained with, so that the export answers as the run
    does, or into the original 16-bit ones."""
    max_shard_size_bytes: Annotated[int, Strict(), Field(ge=1, le=2**50)] = 5_000_000_000
    """The largest safetensors file, in bytes."""
    certificate_rows: NonNegative = 16
    """Held-out rows on which the trained and the exported model are compared; training rows where none are held out."""
