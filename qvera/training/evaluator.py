"""Held-out loss and sample answers before, during and after a run, by all its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvera.config.schema import Recipe
from qvera.data import Datasets, Example
from qvera.distributed.group import Group
from qvera.distributed.zero_params import any_sharded
from qvera.evaluation import evaluate
from qvera.training.logging import StatusLine

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Evaluator:
    """Scores a model on a recipe's held-out rows. All ranks have to call each method together."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Datasets,
        recipe: Recipe,
        group: Group,
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.datasets, self.training = model, tokenizer, datasets, recipe.training
        self.group, self.console = group, console

    def held_out_loss(self) -> dict[str, Any]:
        """Loss and perplexity of all held-out rows, the very same values on all ranks."""
        result = evaluate.held_out_loss(
            self.model,
            self.datasets.eval,
            pad_id=self.datasets.pad_id,
            batch_size=self.training.per_device_eval_batch_size,
            chunk_tokens=self.training.loss_chunk_tokens,
            group=self.group,
        )
        return self.group.broadcast(result)

    def score(self, label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Held-out loss and, where the recipe asks for it, exact match of greedy answers.

        The ranks share the held-out rows. Rank 0 alone answers prompts, unless ZeRO-3 has sharded the weights: then all
        ranks walk through the layers together and rank 0's answers count.

        Returns:
            The scores, and the answers to show as samples.
        """
        answers: list[dict[str, Any]] = []
        with StatusLine(self.console, f"{label}: held-out loss") as status, evaluate.scoring(self.model):
            result = self.held_out_loss()
            match_rows, sample_rows = self._rows_to_answer()
            indices = list(dict.fromkeys(match_rows + sample_rows))  # each is answered once
            rows = [self.datasets.eval[i] for i in indices]
            if self.group.first or any_sharded(self.model):
                answers = evaluate.answer_rows(
                    self.model,
                    self.tokenizer,
                    rows,
                    max_new_tokens=self.training.sample_max_new_tokens,
                    batch_size=self.training.answer_batch_size,
                    progress=lambda done: status.update(f"{label}: {done} of {len(rows)} answers"),
                )
            answers = self.group.broadcast(answers)
        by_row = dict(zip(indices, answers, strict=True))
        text = f"{label}: held-out loss {result['loss']:.4f}"
        if match_rows:
            result["exact_match"] = sum(bool(by_row[i]["exact"]) for i in match_rows) / len(match_rows)
            result["exact_match_rows"] = len(match_rows)
            text += f", exact match {result['exact_match']:.1%} of {result['exact_match_rows']} rows"
        self.console.print(text)
        return result, [by_row[i] for i in sample_rows]

    def _rows_to_answer(self) -> tuple[list[int], list[int]]:
        """Indices of the first held-out rows with a prompt and a reference, and of the first ones with a prompt."""
        rows: Sequence[Example] = self.datasets.eval
        match_rows: list[int] = []
        sample_rows: list[int] = []
        for number, row in enumerate(rows):
            if len(match_rows) >= self.training.exact_match_rows and len(sample_rows) >= self.training.sample_count:
                break
            if len(row.prompt_ids) and len(sample_rows) < self.training.sample_count:
                sample_rows.append(number)
            if len(row.prompt_ids) and row.reference is not None and len(match_rows) < self.training.exact_match_rows:
                match_rows.append(number)
        return match_rows, sample_rows
