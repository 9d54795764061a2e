"""The interface of a task: its model, its loss, and how held-out rows are scored.

A task is one file in this package. The loop, the plan, the commands and the exports ask it and know no task by name.
Its rows are read by `qvera.data`, as ``data.format`` says.

A caller may give a loss of their own: a function of log-probabilities, or of a classifier's logits, in plain torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qvera.adapters.hooks import TrainingHook
from qvera.config.schema import Recipe
from qvera.config.sections import TrainingSection
from qvera.data import Datasets, Example, Labels
from qvera.distributed.group import ALONE, Group
from qvera.evaluation.metrics import Metric
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.utils.errors import InputError, OwnCodeFailed, did_you_mean, one_line, require_takes
from qvera.utils.memory import is_out_of_memory


class LossBatch(NamedTuple):
    """The n targets of a pass, as a loss gets them beside the model's outputs.

    Attributes:
        labels: int64 [n], the trained tokens or the classes; fp32 [n], the numbers of a regression.
        row: int64 [n], the place of each target's row in ``rows``.
        rows: for each row its ``source``, ``prompt`` and ``reference``.
    """

    labels: torch.Tensor
    row: torch.Tensor
    rows: list[dict[str, Any]]


Core: TypeAlias = Callable[..., Any] | None
"""Called in place of the model's `qvera.models.structure.core_of`, such as a DeepSpeed engine; None: that itself."""
Progress: TypeAlias = Callable[[int], None] | None
"""Takes the number of rows that are done."""
OwnLoss: TypeAlias = Callable[[torch.Tensor, LossBatch], torch.Tensor]
"""Outputs of a pass → the loss of each target [n], or their mean (scalar)."""


def own_loss_sum(loss: OwnLoss, outputs: torch.Tensor, labels: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
    """Call a caller's loss, and return it summed over the n targets of a pass. A mean counts n times.

    ``outputs`` [n, ...]: the model's. OwnCodeFailed: the function raises, or returns something else than a loss.
    """
    counts = torch.tensor([1 if row.is_labelled else row.trained_tokens for row in rows])
    row = torch.repeat_interleave(torch.arange(len(rows)), counts).to(labels.device)
    told = [{"source": each.source, "prompt": each.prompt_text, "reference": each.reference} for each in rows]
    try:
        found: Any = loss(outputs, LossBatch(labels, row, told))
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        problem = None if shape in ((), (len(labels),)) else f"returned {shape}"
        if problem is None and outputs.requires_grad and not found.requires_grad:
            problem = "returned a tensor without a gradient"
    except Exception as error:
        if is_out_of_memory(error):  # smaller passes may help (`Loop.take_step`)
            raise
        problem = f"raised {type(error).__name__} ({one_line(error)})"
    if problem is None:
        return found.sum() if found.dim() else found * len(labels)
    where = ", ".join(each.source for each in rows)
    raise OwnCodeFailed(
        f"loss: {own_name(loss)} {problem} on {where}; expected a scalar, their mean, or the losses [{len(labels)}] of "
        "their targets, as a tensor that has a gradient."
    )


def own_name(function: Callable[..., Any]) -> str:
    """Return the name of a caller's function, for messages and run.json."""
    return getattr(function, "__qualname__", type(function).__name__)


# keys of a record that a caller's metric may not be named after
_ABOUT_SCORES = (
    "rows",
    "trained_tokens",
    "seconds",
    "exact_match_rows",
    "commonest_reference",
    "kind",
    "step",
    "epoch",
)


class Task(ABC):
    """One kind of run. It holds the run's recipe; `prepare` makes what else a run needs."""

    name: ClassVar[str]
    """The value of ``task`` in a recipe."""
    joins_rows: ClassVar[bool] = False
    """Whether rows may stand in one sequence (``data.prefix_once``, ``data.packing``)."""
    unit: ClassVar[str]
    """The thing that has a loss of its own: a token, or a row."""
    loss_is_trl: ClassVar[bool] = False
    """Whether TRL computes its loss: it pads rows, cuts logits its own way, and enables checkpointing in each pass."""
    makes_all_logits: bool = False
    """Whether the logits of all tokens of a pass are held at once."""
    passes_without_gradient: int = 0
    """The number of forward passes over the rows, apart from the one with a gradient."""
    has_reference: bool = False
    """Whether its loss compares the model with itself without the adapter."""
    exported_class: ClassVar[ModelClass] = CAUSAL_LM
    """The class of a finished checkpoint. The meaning of its outputs is in its config."""
    has_answers: ClassVar[bool] = False
    """Whether its model writes text, as chat, generate, serve and the text metrics need."""

    scores: ClassVar[tuple[str, ...]]
    """Held-out scores that ``training.metric_for_best_model`` may name."""
    takes_loss: ClassVar[bool] = True
    """Whether its loss may be one of the caller's."""
    own_metrics: Mapping[str, Metric] = {}
    """The caller's metrics, by name."""
    own_loss: OwnLoss | None = None
    datasets: Datasets
    """The rows of the run; set by `prepare`."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = cast("Recipe", recipe)  # None: the model's recipe is not known, so it can only be scored
        self.training = TrainingSection() if recipe is None else recipe.training

    def take_own(self, metrics: Mapping[str, Metric], loss: OwnLoss | None) -> None:
        """Take the caller's metrics and loss. InputError where these, or the score of the best step, do not fit."""
        data, training = self.recipe.data, self.training
        if not isinstance(metrics, Mapping):
            raise InputError(f'metrics: expected names with functions, such as {{"length": f}}, got {metrics!r}.')
        if (metrics or loss is not None) and data.has_adapters:
            raise InputError(
                "metrics, loss: are for a run of one adapter, and data.adapter_column or adapter_files has many."
            )
        if metrics and not data.has_held_out_rows:
            raise InputError("metrics: no rows are held out. Set data.eval_path, eval_split or eval_fraction.")
        for name, function in metrics.items():
            if not callable(function):
                raise InputError(f"metrics: {name!r} is no function.")
            if name in (*self.scores, *_ABOUT_SCORES):
                raise InputError(f"metrics: {name!r} is the name of another score here; take another name.")
            require_takes(function, 3, f"metrics: {name}")  # predictions, references, rows
        if loss is not None:
            if not callable(loss):
                raise InputError(f"loss: {loss!r} is no function.")
            if not self.takes_loss or training.label_smoothing:
                key = "training.label_smoothing" if self.takes_loss else f"training.objective: {training.objective}"
                raise InputError(
                    f"loss: takes the place of the cross entropy, and {key} asks for another one. Leave one out."
                )
            require_takes(loss, 2, "loss")
        if training.metric_for_best_model not in (known := [*self.scores, *metrics]):
            near = did_you_mean(training.metric_for_best_model, known)
            raise InputError(
                f"training.metric_for_best_model: there is no score {training.metric_for_best_model!r} here{near} "
                f"There are {', '.join(known)}, and those that `qvera.train(metrics=...)` is given."
            )
        self.own_metrics, self.own_loss = metrics, loss

    @property
    def own(self) -> dict[str, Any]:
        """The names of the caller's metrics and loss, for run.json."""
        loss = {} if self.own_loss is None else {"loss": own_name(self.own_loss)}
        return loss | ({"metrics": list(self.own_metrics)} if self.own_metrics else {})

    def check(self) -> None:  # noqa: B027  # optional
        """Check for what the task needs, before anything is read. InputError if a package is missing."""

    @abstractmethod
    def model_class(self, datasets: Datasets | None) -> ModelClass:
        """Return the class of model to make of the base. ``datasets`` is None if rows are not known, as in a plan."""

    def prepare_rows(self, datasets: Datasets) -> None:  # noqa: B027
        """Check or change rows that have been read, before the plan is made. InputError: they do not fit the recipe."""

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Datasets) -> None:
        """Prepare for `loss` and `held_out_loss` with a base that has got a fresh adapter."""
        self.datasets = datasets

    def targets(self, rows: Sequence[Example]) -> int:
        """Return how many targets the rows have, without a pass over them."""
        return sum(row.trained_tokens for row in rows)

    def step_rows(self, model: nn.Module, rows: Sequence[int], step: int, group: Group) -> Sequence[Example] | None:
        """Return the rows that optimizer step ``step`` (from 1) trains on in place of these; None: it trains on these.

        All ranks call this together and get the same.
        """
        return None

    def has_gradient(self, row: Example) -> bool:
        """Whether a row that `step_rows` made changes the gradient. One that does not is counted and gets no pass."""
        return True

    def step_hook(self) -> TrainingHook | None:
        """Return a hook that keeps what later steps need (`qvera.adapters.hooks`); None: no hook."""
        return None

    def training_row(self, row: Example, number: int, step: int) -> Example:
        """Return a training row as optimizer step ``step`` (from 1) sees it. ``number``: its place among all rows."""
        return row

    @abstractmethod
    def loss(
        self, model: nn.Module, rows: Sequence[Example], core: Core = None, expected_grad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """Return the training loss of a forward pass, summed over its targets (scalar), and the number of targets.

        ``expected_grad``: see `qvera.models.loss.target_loss`.
        """

    def count_pass(self) -> None:  # noqa: B027
        """Add to the step's metrics what the latest pass measured besides its loss."""

    def take_metrics(self, group: Group = ALONE) -> dict[str, float]:
        """Return the metrics since the last call, over all ranks, for metrics.jsonl. All ranks call this together."""
        return {}

    def forget_metrics(self) -> None:  # noqa: B027
        """Drop the metrics of a step that was not taken."""

    @abstractmethod
    def held_out_loss(
        self, model: nn.Module, rows: Sequence[Example], group: Group = ALONE, progress: Progress = None
    ) -> dict[str, Any]:
        """Compute the mean loss over all targets of ``rows``, and scores. All ranks call this together.

        Returns:
            ``loss``, ``rows``, ``trained_tokens`` (targets), ``seconds``, and what the task adds. Only the seconds
            differ between ranks.
        """

    @abstractmethod
    def logits(
        self, model: nn.Module, rows: Sequence[Example], pad_id: int, labels: Labels | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the rows' targets, fp32 [targets, outputs], and the targets, by row, on the CPU."""

    def answers(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        group: Group,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return scores of answers to held-out rows, and answers to show. Both are empty if it writes no text."""
        return {}, []

    @abstractmethod
    def line(self, scores: dict[str, Any]) -> str:
        """Return the scores of `held_out_loss` and `answers` as a short text."""
