"""What a task declares: its model, its loss, and how held-out rows are scored.

A task is one file in this package. The loop, the plan, the commands and the exports ask it and know no task by name.
The data room reads its rows, by ``data.format``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from qvera.config.schema import Recipe, TrainingSection
from qvera.distributed.group import ALONE, Group
from qvera.models.model_class import CAUSAL_LM, ModelClass

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from qvera.adapters.hooks import TrainingHook
    from qvera.data import Datasets, Example, Labels


class Task(ABC):
    """One kind of run. It holds the run's recipe; `prepare` makes what else a run needs."""

    name: ClassVar[str]
    """``task`` in a recipe."""
    joins_rows: ClassVar[bool] = False
    """Whether rows may stand in one sequence (``data.prefix_once``, ``data.packing``)."""
    unit: ClassVar[str]
    """What has a loss of its own: a token, or a row."""
    loss_is_trl: ClassVar[bool] = False
    """TRL computes its loss: it pads rows, cuts logits in its own way, and enables checkpointing anew in each pass."""
    makes_all_logits: bool = False
    """Whether the logits of all tokens of a pass are held at once."""
    passes_without_gradient: int = 0
    """Forward passes over the rows, apart from the one with a gradient."""
    has_reference: bool = False
    """Whether its loss compares the model with itself without the adapter."""
    exported_class: ClassVar[ModelClass] = CAUSAL_LM
    """The class of a finished checkpoint. The meaning of its outputs is in its config."""
    has_answers: ClassVar[bool] = False
    """Whether its model writes text, as chat, generate, serve and the text metrics need."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = cast("Recipe", recipe)  # None: of a model whose recipe is not known, which can be scored only
        self.training = TrainingSection() if recipe is None else recipe.training

    def check(self) -> None:  # noqa: B027  # optional
        """Called before anything is read. InputError if a package that the task needs is missing."""

    @abstractmethod
    def model_class(self, datasets: Datasets | None) -> ModelClass:
        """The class of model made of the base. ``datasets`` is None if the rows are not known, as in a plan."""

    def prepare_rows(self, datasets: Datasets) -> None:  # noqa: B027
        """Called when rows are read, before the plan."""

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Datasets) -> None:  # noqa: B027
        """Called with a base with a fresh adapter, before `loss` and `held_out_loss`."""

    def targets(self, rows: Sequence[Example]) -> int:
        """How many targets the rows have, without a pass over them."""
        return sum(row.trained_tokens for row in rows)

    def step_rows(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Datasets,
        rows: Sequence[int],
        step: int,
        group: Group,
    ) -> Sequence[Example] | None:
        """What optimizer step ``step`` (from 1) trains on in place of these training rows; None: on them.

        All ranks call this together and get the same.
        """
        return None

    def step_hook(self) -> TrainingHook | None:
        """A hook that keeps what later steps need (`qvera.adapters.hooks`); None: no hook."""
        return None

    def training_row(self, row: Example, number: int, step: int) -> Example:
        """A training row as optimizer step ``step`` (from 1) sees it. ``number`` is its place among all rows."""
        return row

    @abstractmethod
    def loss(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        datasets: Datasets,
        core: Callable[..., Any] | None = None,
        expected_grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """The training loss of a forward pass, summed over its targets (scalar), and the number of targets.

        Args:
            core: called in place of the model's `qvera.models.structure.core_of`, such as a DeepSpeed engine.
            expected_grad: see `qvera.models.loss.fused_linear_cross_entropy`.
        """

    def count_pass(self) -> None:  # noqa: B027
        """Add to the step's metrics what the latest pass measured besides its loss."""

    def take_metrics(self, group: Group = ALONE) -> dict[str, float]:
        """The metrics since the last call, over all ranks, for metrics.jsonl. All ranks call this together."""
        return {}

    def forget_metrics(self) -> None:  # noqa: B027
        """Drop the metrics of a step that was not taken."""

    @abstractmethod
    def held_out_loss(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        datasets: Datasets,
        group: Group = ALONE,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """The mean loss over all targets of ``rows``, and scores. All ranks call this together.

        Returns:
            ``loss``, ``rows``, ``trained_tokens`` (targets), ``seconds``, and what the task adds. Only the seconds
            differ between ranks.
        """

    @abstractmethod
    def logits(
        self, model: nn.Module, rows: Sequence[Example], pad_id: int, labels: Labels | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the rows' targets, row after row, fp32 [targets, outputs], and the targets, on the CPU."""

    def answers(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        group: Group,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Scores of answers to held-out rows, and answers to show. Both are empty for a model that writes no text."""
        return {}, []

    @abstractmethod
    def line(self, scores: dict[str, Any]) -> str:
        """The scores of `held_out_loss` and `answers` as a short text."""
