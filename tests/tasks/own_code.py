"""A loss, a metric and a callback of a user's, and a run with them in one of several processes.

python -m tests.tasks.own_code DIRECTORY        recipe.json in, the run in DIRECTORY/run
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

import qvera
from qvera.tasks.base import LossBatch


def focal(logprobs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """(1 - p)² times the cross entropy of each token, more for labels of an even number."""
    weights = 1 + (batch.labels % 2 == 0).to(logprobs.dtype)
    return -weights * (1 - logprobs.exp()).square() * logprobs


def mean_focal(logprobs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """The same as a scalar."""
    return focal(logprobs, batch).mean()


def by_row(logprobs: torch.Tensor, batch: LossBatch) -> torch.Tensor:
    """Each token weighs as much as its row is unlikely."""
    sums = logprobs.new_zeros(len(batch.rows)).index_add(0, batch.row, logprobs)
    return -logprobs * torch.sigmoid(-sums)[batch.row]


def first_letters(predictions: Sequence[str], references: Sequence[str], rows: Sequence[dict[str, Any]]) -> float:
    """The share of answers that begin as their reference does."""
    assert [row["answer"] for row in rows] == list(predictions) and all(row["source"] for row in rows)
    return sum(p[:1] == r[:1] for p, r in zip(predictions, references, strict=True)) / len(rows)


class AskOfTheSecondRank(TrainerCallback):
    """Asks for an evaluation after step 1 and the end after step 3, on the last rank only."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = not state.is_world_process_zero or state.max_steps == 99
        control.should_evaluate = last and state.global_step == 1
        control.should_training_stop = last and state.global_step == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    given: dict[str, Any] = {"loss": focal, "metrics": {"first_letters": first_letters}}
    qvera.train(json.loads((place / "recipe.json").read_text()), place / "run", callbacks=[AskOfTheSecondRank], **given)
