"""Causal language modelling: the loss is the cross entropy of the trained tokens, and the model answers prompts."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qvera.data import IGNORED, Datasets, Example, Labels
from qvera.data.images import thumbnail_uris
from qvera.distributed.group import ALONE, Group
from qvera.distributed.zero import any_sharded
from qvera.evaluation import held_out
from qvera.evaluation.metrics import own_scores
from qvera.models import forward
from qvera.models.loss import Head
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.structure import causal_model
from qvera.tasks.base import Core, Progress, Task, own_loss_sum


class CausalLM(Task):
    """The task to predict each token from those before it. A target is a trained token."""

    name = "causal-lm"
    unit = "token"
    joins_rows = True
    has_answers = True
    scores: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "exact_match")

    def model_class(self, datasets: Datasets | None) -> ModelClass:
        return CAUSAL_LM

    def loss(
        self, model: nn.Module, rows: Sequence[Example], core: Core = None, expected_grad: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        data, training = self.recipe.data, self.training
        batch = forward.make_batch(model, rows, self.datasets.pad_id, data.prefix_once, data.packing)
        chunk, smoothing = training.loss_chunk_tokens, training.label_smoothing
        if self.own_loss is not None:
            logprobs, labels = forward.trained_logprobs(model, batch, chunk, core)
            return own_loss_sum(self.own_loss, logprobs, labels, rows), len(labels)
        return forward.batch_nll(model, batch, chunk, core, expected_grad, smoothing)

    def held_out_loss(
        self, model: nn.Module, rows: Sequence[Example], group: Group = ALONE, progress: Progress = None
    ) -> dict[str, Any]:
        """Score the rows by their mean loss and ``perplexity`` (`Task.held_out_loss`)."""
        return held_out.held_out_loss(
            model,
            rows,
            pad_id=self.datasets.pad_id,
            batch_size=self.training.per_device_eval_batch_size,
            chunk_tokens=self.training.loss_chunk_tokens,
            progress=progress,
            group=group,
        )

    def logits(
        self, model: nn.Module, rows: Sequence[Example], pad_id: int, labels: Labels | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = forward.make_batch(model, rows, pad_id, prefix_once=False)
        # position t predicts the token at t + 1
        hidden, targets = forward.hidden_states(model, batch)[:, :-1], batch["labels"][:, 1:]
        trained, head = targets != IGNORED, Head.of(causal_model(model))
        return head.logits(head.module(hidden[trained]).float()).cpu(), targets[trained].cpu()

    def answers(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Example],
        group: Group,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Answer prompts greedily for samples, for exact match if the recipe asks for it, and for the caller's metrics.

        Only rank 0 answers. With weights sharded by ZeRO-3 all ranks must take part, and rank 0's answers count.
        """
        training = self.training
        asked = (i for i, row in enumerate(rows) if len(row.prompt_ids))
        with_reference = (i for i, row in enumerate(rows) if len(row.prompt_ids) and row.reference is not None)
        sample_rows = list(itertools.islice(asked, training.sample_count))
        most = training.exact_match_rows or (len(rows) if self.own_metrics else 0)
        match_rows = list(itertools.islice(with_reference, most))
        indices = list(dict.fromkeys(match_rows + sample_rows))  # each is answered once
        answers: list[dict[str, Any]] = []
        if indices and (group.first or any_sharded(model)):  # sharded weights are gathered by all ranks together
            progress(0, len(indices))
            answers = held_out.answer_rows(
                model,
                tokenizer,
                [rows[i] for i in indices],
                max_new_tokens=training.sample_max_new_tokens,
                batch_size=training.answer_batch_size,
                progress=lambda done: progress(done, len(indices)),
            )
        by_row = dict(zip(indices, group.broadcast(answers), strict=True))
        scores: dict[str, Any] = {}
        if match_rows:
            scores["exact_match"] = sum(bool(by_row[i]["exact"]) for i in match_rows) / len(match_rows)
            scores["exact_match_rows"] = len(match_rows)
            references = Counter(by_row[i]["reference"] for i in match_rows)
            # the exact match of a model that gives every prompt the commonest answer
            scores["commonest_reference"] = references.most_common(1)[0][1] / len(match_rows)
        if self.own_metrics:
            matched = [by_row[i] for i in match_rows]
            columns = [[row["answer"] for row in matched], [row["reference"] for row in matched], matched]
            scores |= group.on_first(lambda: own_scores(self.own_metrics, *columns))
        return scores, [by_row[i] | {"images": thumbnail_uris(rows[i].images)} for i in sample_rows]

    def line(self, scores: dict[str, Any]) -> str:
        text = f"held-out loss {scores['loss']:.4f}, "
        if "exact_match" in scores:
            return text + f"exact match {scores['exact_match']:.1%} of {scores['exact_match_rows']} rows"
        return text + f"perplexity {scores['perplexity']:.3f}"
