"""Classification: the model gives each row a class, or a number.

The model of texts is transformers' own ``…ForSequenceClassification``, called as a whole: its head reads the last token
of a decoder, or the first one of an encoder. The model of images is ``…ForImageClassification``; the checkpoint's image
processor makes the pixel values. Logits are fp32, whatever the base computes in.
"""

import dataclasses
import inspect
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from qvera.data import Datasets, Example
from qvera.data.images import Draw, pixel_batch, require_pillow
from qvera.data.labelled import VALUE, Labels, labelled_arrays
from qvera.data.rows import round_up_length, rounds_lengths
from qvera.distributed.group import ALONE, Group
from qvera.evaluation.held_out import over_held_out
from qvera.evaluation.metrics import TOP5_CLASSES, class_scores, own_scores, require_scorers, value_scores
from qvera.models import linear
from qvera.models.attention import needs_padding_mask, open_mask
from qvera.models.model_class import ModelClass, classification_class, image_class
from qvera.models.structure import causal_model
from qvera.tasks.base import Core, Progress, Task, own_loss_sum
from qvera.utils import accelerator
from qvera.utils.errors import InputError


class Classification(Task):
    """The task to label rows. A row has one target, its label, and counts once in the loss, however long it is."""

    unit = "row"
    scores = ("loss", "accuracy", "f1", "matthews", "top5", "pearson", "spearman")
    row_format: ClassVar[str]
    """The ``data.format`` of its rows."""
    too_large: ClassVar[str]
    """The advice if a single row does not fit into memory."""

    def check(self) -> None:
        require_scorers(self.name)  # scikit-learn and scipy, for the scores

    def prepare_rows(self, datasets: Datasets) -> None:
        """Raise InputError if the score that chooses the best step is one that these labels do not have."""
        labels, wanted = datasets.labels, self.training.metric_for_best_model
        assert labels is not None
        of_classes = ["accuracy", "f1", "matthews", *(["top5"] if len(labels.names) >= TOP5_CLASSES else [])]
        known = ["loss", *(["pearson", "spearman"] if labels.is_regression else of_classes)]
        if wanted in self.scores and wanted not in known:
            kind = "numbers" if labels.is_regression else f"{len(labels.names)} classes"
            raise InputError(
                f"training.metric_for_best_model: the labels are {kind}, which have no {wanted}. "
                f"Take one of {', '.join(known)}."
            )

    @property
    def _labels(self) -> Labels:
        assert self.datasets.labels is not None  # the format of a classification's rows gives them
        return self.datasets.labels

    @abstractmethod
    def row_logits(self, model: nn.Module, rows: Sequence[Example], pad_id: int, core: Core = None) -> torch.Tensor:
        """Return the logits of rows, fp32 [B, outputs]; ``core``: see `Task.loss`."""

    def loss(
        self, model: nn.Module, rows: Sequence[Example], core: Core = None, expected_grad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """Return the cross entropy, or the squared error of a regression, summed over rows."""
        labels = self._labels
        logits = self.row_logits(model, rows, self.datasets.pad_id, core)
        targets = accelerator.tensor_on(logits.device, labels.targets(rows))
        if self.own_loss is not None:
            return own_loss_sum(self.own_loss, logits, targets, rows), len(rows)
        smoothing = self.training.label_smoothing
        return _row_losses(logits, targets, labels.is_regression, smoothing).sum(), len(rows)

    def held_out_loss(
        self, model: nn.Module, rows: Sequence[Example], group: Group = ALONE, progress: Progress = None
    ) -> dict[str, Any]:
        """Score the rows by their mean loss and the scores of `qvera.evaluation.metrics`."""
        started, labels = time.perf_counter(), self._labels
        logits = self.held_out_logits(model, rows, group, progress)
        scores = label_scores(logits, rows, labels)
        if self.own_metrics:
            found = predictions(logits, rows, labels)
            columns = [[row["prediction"] for row in found], [row["label"] for row in found], found]
            scores |= group.on_first(lambda: own_scores(self.own_metrics, *columns))
        return {**scores, "seconds": time.perf_counter() - started}

    def logits(
        self, model: nn.Module, rows: Sequence[Example], pad_id: int, labels: Labels | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert labels is not None
        return self.row_logits(model, rows, pad_id).cpu(), torch.from_numpy(labels.targets(rows))

    def held_out_logits(
        self, model: nn.Module, rows: Sequence[Example], group: Group = ALONE, progress: Progress = None
    ) -> torch.Tensor:
        """Return the logits of all rows, fp32 [rows, outputs] on the CPU. Ranks share the rows; all get the result."""

        def compute(numbers: list[int]) -> torch.Tensor:
            return self.row_logits(model, [rows[i] for i in numbers], self.datasets.pad_id)

        size = self.training.per_device_eval_batch_size
        found = over_held_out(model, rows, compute, size, self.too_large, progress, group)
        mine = [(numbers, logits.float().cpu()) for numbers, logits in found]
        # a rank without rows does not know how many outputs the model has
        outputs = max(group.gather(mine[0][1].shape[1] if mine else 0))
        logits = torch.zeros(len(rows), outputs)
        for numbers, batch in mine:
            logits[numbers] = batch
        group.all_reduce([logits])  # a row is one rank's, and 0 on the others
        return logits

    def line(self, scores: dict[str, Any]) -> str:
        shares, numbers = ("accuracy", "top5"), ("f1", "matthews", "pearson", "spearman")
        shown = [f"{name} {scores[name]:.1%}" for name in shares if scores.get(name) is not None]
        shown += [f"{name} {scores[name]:.4f}" for name in numbers if scores.get(name) is not None]
        return ", ".join([f"held-out loss {scores['loss']:.4f}", *shown])


class SequenceClassification(Classification):
    """The task to label texts or pairs of texts. A label may be a number."""

    name = "sequence-classification"
    exported_class = classification_class()
    row_format = "classification"
    too_large = "Lower data.max_length."

    def model_class(self, datasets: Datasets | None) -> ModelClass:
        """Return the class with a head for the labels; without rows for ``data.label_names``, or two classes.

        Raises:
            InputError: a regression has label_smoothing.
        """
        labels, recipe = None if datasets is None else datasets.labels, self.recipe
        if labels is None and recipe.data.regression is True:
            labels = Labels((VALUE,), True)
        labels = labels or Labels(tuple(recipe.data.label_names or ["0", "1"]))
        if labels.is_regression and recipe.training.label_smoothing:
            raise InputError(
                "training.label_smoothing: spreads the probability of classes, and the labels are numbers "
                "(data.regression), which have none. Remove the key, or set data.regression: false."
            )
        return classification_class(labels.names, labels.is_regression, recipe.training.seed)

    def row_logits(self, model: nn.Module, rows: Sequence[Example], pad_id: int, core: Core = None) -> torch.Tensor:
        """Return the logits of texts. On a CPU in 16 bits their length is rounded up (`qvera.data.rows`)."""
        inner = causal_model(model)
        device, implementation = next(model.parameters()).device, inner.config._attn_implementation
        tokens = max(len(row.input_ids) for row in rows)
        if rounds_lengths(linear.embedding_dtype(inner.get_input_embeddings()), device.type):
            most = getattr(inner.config, "max_position_embeddings", None) or 2**31
            tokens = max(tokens, min(round_up_length(tokens), most))
        batch = accelerator.tensors_on(device, labelled_arrays(rows, tokens, pad_id, needs_padding_mask(inner)))
        if "attention_mask" not in batch and (mask := open_mask(implementation, batch["input_ids"])) is not None:
            batch["attention_mask"] = mask
        takes_cache = "use_cache" in inspect.signature(type(inner).forward).parameters
        return (core or inner)(**batch, **({"use_cache": False} if takes_cache else {})).logits.float()


class ImageClassification(Classification):
    """The task to label images."""

    name = "image-classification"
    exported_class = image_class()
    row_format = "image"
    too_large = "Use a base of a smaller image size."

    def check(self) -> None:
        super().check()
        require_pillow()

    def model_class(self, datasets: Datasets | None) -> ModelClass:
        """Return the class with a head for the labels; without rows for ``data.label_names``, or two classes."""
        labels = None if datasets is None else datasets.labels
        names = (self.recipe.data.label_names or ["0", "1"]) if labels is None else labels.names
        return image_class(names, self.training.seed)

    def training_row(self, row: Example, number: int, step: int) -> Example:
        """Return the row with a random crop and flip, which depend only on ``data.seed``, the step and the row."""
        data = self.recipe.data
        if data.augment == "none":
            return row
        assert row.image is not None
        drawn = dataclasses.replace(row.image, draw=Draw(data.seed, step, number))
        return dataclasses.replace(row, images=(drawn,))

    def row_logits(self, model: nn.Module, rows: Sequence[Example], pad_id: int, core: Core = None) -> torch.Tensor:
        inner, device = causal_model(model), next(model.parameters()).device
        pixels = pixel_batch([row.image for row in rows if row.image is not None])
        values = accelerator.tensor_on(device, pixels)
        return (core or inner)(pixel_values=values.to(inner.dtype)).logits.float()


def _row_losses(
    logits: torch.Tensor, targets: torch.Tensor, is_regression: bool, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the loss of each row [B], from logits [B, outputs]."""
    if is_regression:
        return (logits.squeeze(1) - targets).square()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def label_scores(logits: torch.Tensor, rows: Sequence[Example], labels: Labels) -> dict[str, Any]:
    """Return loss and scores of logits fp32 [rows, outputs], without ``seconds``."""
    targets = torch.from_numpy(labels.targets(rows))
    losses = _row_losses(logits.double(), targets.double() if labels.is_regression else targets, labels.is_regression)
    counts = {"loss": float(losses.mean()), "rows": len(rows), "trained_tokens": len(rows)}
    if labels.is_regression:
        return counts | value_scores(targets.numpy(), logits.squeeze(1).numpy())
    return counts | class_scores(targets.numpy(), logits.numpy())


def predictions(logits: torch.Tensor, rows: Sequence[Example], labels: Labels) -> list[dict[str, Any]]:
    """Return for each row ``source``, ``text``, ``label`` and ``prediction``, and for classes ``probabilities``."""
    found = []
    for row, values in zip(rows, logits, strict=True):
        what = {"text": row.prompt_text} if row.image is None else {}
        about: dict[str, Any] = {"source": row.source, **what}
        if row.reference:
            about["label"] = float(row.reference) if labels.is_regression else row.reference
        if labels.is_regression:
            about["prediction"] = float(values[0])
        else:
            shares = dict(zip(labels.names, values.double().softmax(0).tolist(), strict=True))
            about |= {"prediction": labels.names[int(values.argmax())], "probabilities": shares}
        found.append(about)
    return found
