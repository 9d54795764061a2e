"""What a task declares: the model that it trains, the loss of its rows, and how rows that were held out are scored.

A task is one file in this package. The loop, the plan, the commands and the exports ask it and know no task by name.
How its rows are read is the data room's, by ``data.format``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from qvera.distributed.group import ALONE, Group
from qvera.models.model_class import CAUSAL_LM, ModelClass

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from qvera.config.schema import Recipe, TrainingSection
    from qvera.data import Datasets, Example, Labels


class Task(ABC):
    """One kind of run. What has to be made for a run is made by `prepare`."""

    name: ClassVar[str]
    """``task`` in a recipe."""
    joins_rows: ClassVar[bool] = False
    """Whether rows may stand in one sequence (``data.prefix_once``, ``data.packing``)."""
    unit: ClassVar[str]
    """What has a loss of its own: a token, or a row."""
    loss_is_trl: ClassVar[bool] = False
    """Whether TRL computes its loss: it pads rows, makes logits in pieces of its own size, and enables gradient
    checkpointing anew in each pass."""
    makes_all_logits: bool = False
    """Whether the logits of all tokens of a pass are held at once."""
    passes_without_gradient: int = 0
    """Forward passes over the rows beside the one that the gradient comes from."""
    has_reference: bool = False
    """Whether its loss compares the model with itself without the adapter."""
    exported_class: ClassVar[ModelClass] = CAUSAL_LM
    """Which model a finished checkpoint of it is; what its outputs mean is in its config."""
    has_answers: ClassVar[bool] = False
    """Whether its model writes text: chat, generate, serve and the text metrics are for these."""

    def check(self, recipe: Recipe) -> None:  # noqa: B027  # optional
        """Called before anything is read.

        Raises:
            InputError: a package that the task needs is not installed.
        """

    @abstractmethod
    def model_class(self, recipe: Recipe, datasets: Datasets | None) -> ModelClass:
        """Which model is made of the base. ``datasets`` None: the rows are not known, as in a plan."""

    def prepare(  # noqa: B027
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Datasets, training: TrainingSection
    ) -> None:
        """Make what `loss` and `held_out_loss` need of a base with a fresh adapter, before they are called."""

    def targets(self, rows: Sequence[Example]) -> int:
        """How many targets the rows have, without a pass over them."""
        return sum(row.trained_tokens for row in rows)

    def training_row(self, row: Example, number: int, step: int, recipe: Recipe) -> Example:
        """A training row as optimizer step ``step`` (from 1) sees it; ``number`` is its place among all rows."""
        return row

    @abstractmethod
    def loss(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        datasets: Datasets,
        recipe: Recipe,
        core: Callable[..., Any] | None = None,
        expected_grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """The training loss of a forward pass, summed over its targets (scalar), and how many targets there are.

        Args:
            model: base and adapter.
            rows: of the pass.
            datasets: that the rows are of.
            recipe: the run's.
            core: what to call in place of the model's `qvera.models.loader.core_of`, such as a DeepSpeed engine.
            expected_grad: see `qvera.models.loss.fused_linear_cross_entropy`.
        """

    def count_pass(self) -> None:  # noqa: B027
        """Take what the latest pass measured besides its loss into the metrics of the step."""

    def take_metrics(self, group: Group = ALONE) -> dict[str, float]:
        """What was measured since it was taken last, over all ranks, for metrics.jsonl; all ranks call this."""
        return {}

    def forget_metrics(self) -> None:  # noqa: B027
        """Drop what was measured in passes of a step that was not taken."""

    @abstractmethod
    def held_out_loss(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        datasets: Datasets,
        training: TrainingSection,
        group: Group = ALONE,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """The mean loss over all targets of ``rows`` and the scores that come with it. All ranks call it together.

        Returns:
            ``loss``, ``rows``, ``trained_tokens`` (targets), ``seconds``, and what the task adds; the same on all
            ranks, up to the seconds.
        """

    @abstractmethod
    def logits(
        self, model: nn.Module, rows: Sequence[Example], pad_id: int, labels: Labels | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the targets of some rows, row after row: fp32 [targets, outputs], and the targets, on the CPU.

        ``labels``: of labelled rows.
        """

    def answers(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        training: TrainingSection,
        group: Group,
        progress: Callable[[str], None],
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Scores of answers to held-out rows, and answers to show; neither where a model writes no text."""
        return {}, []

    @abstractmethod
    def line(self, scores: dict[str, Any]) -> str:
        """What `held_out_loss` and `answers` found, in a few words."""
