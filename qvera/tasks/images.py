"""Image classification by transformers' own ``…ForImageClassification``.

The checkpoint's image processor makes the pixel values, here and in an exported checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qvera.data.images import Draw, pixel_batch, require_pillow
from qvera.models.model_class import ModelClass, image_class
from qvera.models.structure import causal_model
from qvera.tasks.classification import Classification
from qvera.utils import accelerator

if TYPE_CHECKING:
    from torch import nn

    from qvera.data import Datasets, Example


class ImageClassification(Classification):
    """A row has one target, its label."""

    name = "image-classification"
    exported_class = image_class()
    row_format = "image"
    too_large = "Use a base of a smaller image size."

    def check(self) -> None:
        super().check()
        require_pillow()

    def model_class(self, datasets: Datasets | None) -> ModelClass:
        """If the rows are not known, the head is of ``data.label_names``, or of two classes."""
        labels = None if datasets is None else datasets.labels
        names = (self.recipe.data.label_names or ["0", "1"]) if labels is None else labels.names
        return image_class(names, self.training.seed)

    def training_row(self, row: Example, number: int, step: int) -> Example:
        """A random crop and flip that depend only on ``data.seed``, the step and the row."""
        data = self.recipe.data
        if data.augment == "none":
            return row
        assert row.image is not None
        return replace(row, image=row.image.drawn(Draw(data.seed, step, number)))

    def row_logits(
        self, model: nn.Module, rows: Sequence[Example], pad_id: int, core: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        inner, device = causal_model(model), next(model.parameters()).device
        pixels = pixel_batch([row.image for row in rows if row.image is not None])
        values = accelerator.tensors_on(device, {"pixel_values": pixels})["pixel_values"]
        return (core or inner)(pixel_values=values.to(inner.dtype)).logits.float()
