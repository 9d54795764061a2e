"""Each loss that TRL computes for us is its paper's, gradients too: a TRL that computes something else fails here."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qvera.adapters.save_load import attach, named_vectors
from qvera.config.sections import AdapterSection, ModelSection, TrainingSection
from qvera.data import Example
from qvera.models.loader import load_base
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb
from tests.conftest import small_llama, small_tokenizer
from tests.families import FAMILIES

pytest.importorskip("trl", reason="pip install 'qvera[trl]'")

from qvera.tasks import preference
from qvera.tasks.preference import Preferences

BETA = 0.3


def example(prompt: int, chosen: int, rejected: int | None, seed: int, desirable: bool | None = None) -> Example:
    """A row of random tokens, with so many of each."""
    numbers = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        return numbers.integers(3, 300, count).astype(np.int32)

    ids = np.append(draw(prompt), draw(chosen))
    other = None if rejected is None else draw(rejected)
    trained = np.arange(len(ids)) >= prompt
    about = {"prompt_text": "", "reference": None, "rejected_ids": other, "desirable": desirable}
    return Example(ids, trained, f"row {seed}", ids[:prompt], **about)  # type: ignore[arg-type]


PAIRS = [example(5, 3, 7, 0), example(2, 9, 1, 1), example(11, 1, 4, 2)]
JUDGED = [example(5, 3, None, 3, True), example(2, 9, None, 4, False), example(11, 1, None, 5, True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Of a base with tied embeddings."""
    directory = tmp_path_factory.mktemp("model")
    small_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return adapted(directory)


def adapted(directory: Path) -> nn.Module:
    """The base in 4 bits, with an adapter whose vectors are not zero."""
    base = load_base(ModelSection(path=str(directory), compute_dtype="float32"), torch.device("cpu"))
    return perturb(attach(base.model, AdapterSection(rank=8), str(directory))).eval()


def log_probabilities(model: nn.Module, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """log p of each token of the answer, of one row alone: no padding, no tiles, all logits."""
    ids = torch.from_numpy(np.append(prompt, answer).astype(np.int64))[None]
    found = F.log_softmax(model(input_ids=ids).logits.float(), -1)[0, :-1]
    return found.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def parts(row: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start = row.answer_start
    rejected = row.input_ids[start:] if row.rejected_ids is None else row.rejected_ids
    return row.input_ids[:start], row.input_ids[start:], rejected


def log_ratio(model: Any, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """log of the answer's probability over that of the base."""
    with torch.no_grad(), model.disable_adapter():
        reference = log_probabilities(model, prompt, answer)
    return (log_probabilities(model, prompt, answer) - reference).sum()


def dpo(loss: Callable[..., torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """The sum over pairs of a loss of the log ratios of both answers and their lengths."""

    def total(model: Any) -> torch.Tensor:
        losses = []
        for prompt, chosen, rejected in map(parts, PAIRS):
            ratios = [log_ratio(model, prompt, answer) for answer in (chosen, rejected)]
            losses.append(loss(*ratios, len(chosen), len(rejected)))
        return torch.stack(losses).sum()

    return total


def orpo(model: Any) -> torch.Tensor:
    """Equation 6 of arXiv 2403.07691; the likelihood is that of prompts and chosen answers, as TRL has it."""
    likelihoods, ratios = [], []
    for prompt, chosen, rejected in map(parts, PAIRS):
        likelihoods.append(log_probabilities(model, prompt[:1], np.append(prompt[1:], chosen)))
        means = [log_probabilities(model, prompt, answer).mean() for answer in (chosen, rejected)]
        odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        ratios.append(F.logsigmoid(odds[0] - odds[1]))
    return len(PAIRS) * (-torch.cat(likelihoods).mean() - BETA * torch.stack(ratios).mean())


def kto(model: Any) -> torch.Tensor:
    """Equation 8 of arXiv 2402.01306, with z₀ from each prompt and the answer of the row before it."""
    rows = [parts(row)[:2] for row in JUDGED]
    with torch.no_grad():
        shifts = [log_ratio(model, prompt, rows[i - 1][1]) for i, (prompt, _) in enumerate(rows)]
        z = torch.stack(shifts).mean().clamp(min=0)
    total = torch.zeros(())
    for (prompt, answer), row in zip(rows, JUDGED, strict=True):
        sign, weight = (1, 2.0) if row.desirable else (-1, 0.5)
        total = total + weight * (1 - torch.sigmoid(sign * BETA * (log_ratio(model, prompt, answer) - z)))
    return total


SIGMOID = torch.sigmoid
DPO: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": lambda w, r, *_: -F.logsigmoid(BETA * (w - r)),
    "hinge": lambda w, r, *_: F.relu(1 - BETA * (w - r)),
    "ipo": lambda w, r, n, m: (w / n - r / m - 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda w, r, *_: 1 - SIGMOID(BETA * w) + SIGMOID(BETA * r),
    "apo_down": lambda w, r, *_: SIGMOID(BETA * w) + 1 - SIGMOID(BETA * (w - r)),
}
FORMULAS: dict[str, tuple[dict[str, Any], list[Example], Callable[[Any], torch.Tensor]]] = {
    **{name: ({"objective": "dpo", "loss_type": name}, PAIRS, dpo(loss)) for name, loss in DPO.items()},
    "orpo": ({"objective": "orpo"}, PAIRS, orpo),
    "kto": ({"objective": "kto", "desirable_weight": 2.0, "undesirable_weight": 0.5}, JUDGED, kto),
}


def prepared(model: Any, **settings: Any) -> Preferences:
    task = Preferences(SimpleNamespace(training=TrainingSection(**settings)))  # type: ignore[arg-type]
    task.prepare(model, small_tokenizer(), SimpleNamespace(pad_id=0))  # type: ignore[arg-type]
    return task


def loss_of(task: Preferences, model: Any, rows: list[Example]) -> tuple[torch.Tensor, int]:
    return task.loss(model, rows)


@pytest.mark.parametrize("name", list(FORMULAS))
def test_loss_and_gradients_are_those_of_the_formula(model: Any, name: str) -> None:
    settings, rows, formula = FORMULAS[name]
    vectors = list(named_vectors(model).values())
    before = [vector.detach().clone() for vector in vectors]
    held_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    task = prepared(model, beta=BETA, **settings)
    # no second model, and no second adapter; the vectors are as they were, and fp32
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == held_bytes
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(vectors, before, strict=True))
    found, count = loss_of(task, model, rows)
    assert count == len(rows)
    expected = formula(model)
    assert found.item() == pytest.approx(expected.item(), rel=2e-4)
    ours, theirs = torch.autograd.grad(found, vectors), torch.autograd.grad(expected, vectors)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.mark.parametrize("name", ["gemma3", pytest.param("qwen3_5", marks=pytest.mark.matrix)])
def test_the_loss_of_text_by_a_model_that_takes_images_is_that_of_the_formula(name: str, tmp_path: Path) -> None:
    FAMILIES[name].write(tmp_path)
    test_loss_and_gradients_are_those_of_the_formula(adapted(tmp_path), "sigmoid")


def test_a_model_whose_decoder_trl_does_not_find_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama4"].write(tmp_path)
    with pytest.raises(InputError, match="can't tell the decoder of Llama4ForConditionalGeneration from its head"):
        prepared(adapted(tmp_path), objective="dpo")


def test_metrics_are_means_over_the_passes_that_count(model: Any) -> None:
    task = prepared(model, objective="dpo", beta=BETA)
    rewards = [[BETA * log_ratio(model, prompt, a).item() for a in answers] for prompt, *answers in map(parts, PAIRS)]
    with torch.no_grad():
        for rows in (PAIRS[:2], PAIRS[2:]):  # of other sizes, so that a mean of the passes' means is another one
            loss_of(task, model, rows)
            task.count_pass()
        loss_of(task, model, PAIRS[:1])  # of a step that is not taken, say
    found = task.take_metrics()
    chosen, rejected = (sum(reward) / len(PAIRS) for reward in zip(*rewards, strict=True))
    assert found["rewards/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert found["rewards/margins"] == pytest.approx(chosen - rejected, abs=1e-4)
    assert found["rewards/accuracies"] == pytest.approx(sum(w > r for w, r in rewards) / len(PAIRS))
    assert task.take_metrics() == {}


def test_judged_answers_of_one_kind_have_no_margin(model: Any) -> None:
    task = prepared(model, objective="kto")
    good = [dataclasses.replace(row, desirable=True) for row in copy.copy(JUDGED)]
    with torch.no_grad():
        total, _ = loss_of(task, model, good)
    task.count_pass()
    found = task.take_metrics()
    assert math.isfinite(total.item()) and "rewards/chosen" in found
    assert not {"rewards/rejected", "rewards/margins"} & set(found)


def test_a_missing_trl_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, make_recipe: Any, tmp_path: Path
) -> None:
    recipe = make_recipe(training={"objective": "dpo"})
    monkeypatch.setattr(preference, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"TRL is not installed: pip install 'qvera\[trl\]'"):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(preference, "version", lambda name: "1.9.2")
    with pytest.raises(InputError, match=r"TRL 1.9.2 is installed: pip install 'qvera\[trl\]'"):
        train(recipe, tmp_path / "run")
