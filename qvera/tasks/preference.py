"""Preference tuning (``training.objective``: dpo, orpo, kto) of a causal language model, by TRL's losses.

A target is a pair of answers, or for KTO one judged answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qvera.distributed.group import ALONE, Group
from qvera.evaluation.held_out import over_held_out
from qvera.tasks.causal_lm import CausalLM
from qvera.tasks.trl_loss import PreferenceLoss, require_trl

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from qvera.config.schema import Recipe, TrainingSection
    from qvera.data import Datasets, Example


class Preferences(CausalLM):
    """The loss compares answers. Each run has an instance of its own, which keeps TRL's trainer for the run's model."""

    joins_rows = False
    loss_is_trl = True
    _loss: PreferenceLoss

    def __init__(self, objective: str) -> None:
        self.has_reference = objective != "orpo"
        self.makes_all_logits = objective == "orpo"
        # the reference's, and for KTO two more over prompts with other rows' answers
        self.passes_without_gradient = {"orpo": 0, "dpo": 1, "kto": 3}[objective]

    def check(self, recipe: Recipe) -> None:
        """See `Task.check`: the losses are TRL's."""
        require_trl()

    def prepare(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, datasets: Datasets, training: TrainingSection
    ) -> None:
        """See `Task.prepare`."""
        self._loss = PreferenceLoss(model, tokenizer, datasets.pad_id, training)

    def targets(self, rows: Sequence[Example]) -> int:
        """See `Task.targets`."""
        return len(rows)

    def loss(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        datasets: Datasets,
        recipe: Recipe,
        core: Callable[..., Any] | None = None,
        expected_grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """See `Task.loss`, and `PreferenceLoss` for what depends on the rows of a pass."""
        return self._loss(rows)

    def count_pass(self) -> None:
        """See `Task.count_pass`."""
        self._loss.count_pass()

    def take_metrics(self, group: Group = ALONE) -> dict[str, float]:
        """See `Task.take_metrics`, and `PreferenceLoss.take_metrics` for what there is."""
        return self._loss.take_metrics(group)

    def forget_metrics(self) -> None:
        """See `Task.forget_metrics`."""
        self._loss.forget_metrics()

    def held_out_loss(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        datasets: Datasets,
        training: TrainingSection,
        group: Group = ALONE,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """See `Task.held_out_loss`; adds the metrics of `PreferenceLoss.take_metrics`."""
        started = time.perf_counter()
        self._loss.forget_metrics()

        def compute(numbers: list[int]) -> torch.Tensor:
            total, _ = self._loss([rows[i] for i in numbers])
            self._loss.count_pass()
            return total

        size = training.per_device_eval_batch_size
        found = over_held_out(model, rows, compute, size, "Lower data.max_length.", progress, group)
        (total,) = group.sum([sum(loss.item() for _, loss in found)])
        return {
            "loss": total / len(rows),
            "rows": len(rows),
            "trained_tokens": sum(row.trained_tokens for row in rows),
            **self._loss.take_metrics(group),
            "seconds": time.perf_counter() - started,
        }

    def line(self, scores: dict[str, Any]) -> str:
        """See `Task.line`."""
        text = f"held-out loss {scores['loss']:.4f}"
        if "rewards/margins" in scores:
            text += f", reward margin {scores['rewards/margins']:.4f}"
        if "rewards/accuracies" in scores:
            text += f", reward accuracy {scores['rewards/accuracies']:.1%}"
        if "exact_match" in scores:
            text += f", exact match {scores['exact_match']:.1%} of {scores['exact_match_rows']} rows"
        return text
