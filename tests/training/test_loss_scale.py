"""Training in float16: the loss scale keeps small gradients, an overflow repeats its step, and nothing else changes.

Emulated on a CPU; no card that computes in float16 has run it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters.save_load import attach, named_vectors
from qvera.config.sections import AdapterSection, LrRange, ModelSection
from qvera.models import forward
from qvera.models.loader import load_base
from qvera.training import optim
from qvera.training.trainer import find_lr, train
from qvera.utils.errors import RunFailed
from tests.adapters.helpers import perturb, relative
from tests.training.runs import assert_same_run, cut_off, losses, records, run_json, untimed

pytestmark = pytest.mark.process

FLOAT16 = {"compute_dtype": "float16"}


def gradients(directory: Path, dtype: str, trained_tokens: int, scale: float | None) -> list[torch.Tensor]:
    """Of the vectors, for a few rows that are the ``1/trained_tokens``-th part of a batch; ``scale`` None: as without one."""
    base = load_base(ModelSection(path=str(directory), compute_dtype=dtype), torch.device("cpu"))  # type: ignore[arg-type]
    model = attach(base.model, AdapterSection(rank=8))
    perturb(model)
    ids = torch.arange(3, 51).view(2, 24)
    places = torch.arange(48).view(2, 24)[:, :-1].flatten()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "trained": places}
    factor = torch.tensor((scale or 1.0) / trained_tokens)
    nll, _ = forward.batch_nll(model, batch, 16, None, None if scale is None else factor)
    (nll * factor).backward()
    found = [vector.grad for vector in named_vectors(model).values() if vector.requires_grad]
    return [grad / (scale or 1.0) for grad in found if grad is not None]


def test_the_gradients_of_a_large_batch_vanish_in_float16_without_a_scale(tiny_model_dir: Path) -> None:
    tokens = 10_000_000
    wanted = torch.cat([g.flatten() for g in gradients(tiny_model_dir, "float32", tokens, None)])
    scaled = torch.cat([g.flatten() for g in gradients(tiny_model_dir, "float16", tokens, 2.0**24)])
    plain = torch.cat([g.flatten() for g in gradients(tiny_model_dir, "float16", tokens, None)])
    assert relative(scaled, wanted) < 0.02
    assert relative(plain, wanted) > 0.5


@contextlib.contextmanager
def doubling_early() -> Iterator[None]:
    """A scale is doubled after two steps in a row without an overflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "GradScaler", functools.partial(optim.GradScaler, growth_interval=2))
        yield


@pytest.fixture(scope="module")
def whole(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A recipe and its run in float16, whose scale begins too high and is doubled, too early, every second step."""
    training = {"max_steps": 6, "save_steps": 3, "save_total_limit": 9}
    training |= {"initial_scale_power": 19}
    recipe = make_recipe(model=FLOAT16, adapter={"dropout": 0.1}, training=training)
    run_dir = tmp_path_factory.mktemp("float16") / "whole"
    with doubling_early():
        train(recipe, run_dir)
    return recipe, run_dir


def test_an_overflow_halves_the_scale_and_repeats_the_step(whole: tuple[Any, Path]) -> None:
    _, run_dir = whole
    steps, skipped = records(run_dir), records(run_dir, "skipped")
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert len([r for r in skipped if r["step"] == 1]) >= 2
    assert [r for r in skipped if r["step"] > 2]  # a scale that has grown too far
    scale = 2.0**19
    good = 0
    for record in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        if record["kind"] == "eval":
            continue
        assert record["loss_scale"] == scale
        good = 0 if record["kind"] == "skipped" else good + 1
        scale *= 0.5 if record["kind"] == "skipped" else 2.0 if good and good % 2 == 0 else 1.0
    result = run_json(run_dir)["result"]
    assert (result["skipped_steps"], result["steps"]) == (len(skipped), 6)


def test_a_resumed_float16_run_is_the_uninterrupted_one_to_the_bit(whole: tuple[Any, Path], tmp_path: Path) -> None:
    recipe, run_dir = whole
    with doubling_early():
        train(recipe, cut_off(run_dir, tmp_path / "cut", after=3), resume=True)
    for kind in ("train", "skipped"):
        assert untimed(records(tmp_path / "cut", kind)) == untimed(records(run_dir, kind))
    assert_same_run(tmp_path / "cut", run_dir)


def test_a_float16_run_learns_as_in_float32_whatever_its_scale(make_recipe: Any, tmp_path: Path) -> None:
    """Scales are powers of two, so another one changes no bit; a repeated step has the same rows and learning rate."""
    training = {"max_steps": 8, "learning_rate": 0.1}
    train(make_recipe(training=training), tmp_path / "float32")
    for power in (15, 18):
        recipe = make_recipe(model=FLOAT16, training={**training, "initial_scale_power": power})
        train(recipe, tmp_path / str(power))
    assert not records(tmp_path / "15", "skipped")
    assert records(tmp_path / "18", "skipped")
    assert_same_run(tmp_path / "18", tmp_path / "15")
    rates = [[r["learning_rate"] for r in records(tmp_path / name)] for name in ("15", "18", "float32")]
    assert rates[0] == rates[1] == rates[2]
    assert losses(tmp_path / "15") == pytest.approx(losses(tmp_path / "float32"), rel=1e-3)
    assert losses(tmp_path / "15")[-1] < losses(tmp_path / "15")[0] - 0.8
    assert "loss_scale" not in records(tmp_path / "float32")[0]


def test_a_gradient_that_no_scale_makes_finite_fails_the_run(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forward.batch_nll

    def poisoned(*args: Any) -> Any:
        nll, count = real(*args)
        if nll.requires_grad:
            nll.register_hook(lambda grad: grad * math.inf)
        return nll, count

    monkeypatch.setattr(forward, "batch_nll", poisoned)
    recipe = make_recipe(model=FLOAT16, training={"initial_scale_power": 2, "try_longest_batch": False})
    with pytest.raises(RunFailed, match=r"Step 1: .*rows\.jsonl:\d+"):
        train(recipe, tmp_path / "run")
    assert [r["loss_scale"] for r in records(tmp_path / "run", "skipped")] == [4.0, 2.0]


def test_the_range_test_repeats_steps_too(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(model=FLOAT16, training={"initial_scale_power": 20})
    result = find_lr(recipe, tmp_path, LrRange(start=1e-4, end=1e-3, steps=10))
    assert result is not None
    assert [point["step"] for point in result.points] == list(range(1, 11))
    rates = [point["learning_rate"] for point in result.points]
    assert rates == pytest.approx([1e-4 * 10 ** (n / 9) for n in range(10)])
