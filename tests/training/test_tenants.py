"""Models that many tenants train by calls become what each becomes alone, and what the formulas say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from qvera.models.token_losses import TOKEN_LOSSES
from qvera.training.optim import AdamSettings
from qvera.training.tenants import ModelShape, RowResults
from tests.training.online_jobs import difference
from tests.training.tenant_calls import LORA, STEP, VERA, Calls, Reference, some_rows

DRO = {"beta": 0.05}
SETTINGS: dict[str, dict[str, float]] = {
    name: {
        **{key: usual for key, usual in loss.settings.items() if usual is not None},
        **(DRO if name == "dro" else {}),
    }
    for name, loss in TOKEN_LOSSES.items()
}


def reference_of(calls: Calls, model_id: str, shape: ModelShape) -> Reference:
    """By the model's numbers now."""
    numbers, columns = calls.tensors(model_id)["vectors"], calls.tenants._pools[shape].bank.layout.columns
    return Reference(shape, numbers, {key: one.shape for key, one in columns.items()})


def assert_same_results(found: RowResults, expected: RowResults, tolerance: float) -> None:
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert found.loss == pytest.approx(expected.loss, rel=tolerance, abs=10 * tolerance)
    assert found.metrics == {"loss:sum": found.loss}


@pytest.mark.parametrize("shape", [LORA, VERA], ids=["lora", "vera"])
@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_every_loss_is_that_of_dense_weights_in_fp64(loss: str, shape: ModelShape, tmp_path: Path) -> None:
    """The model is moved first, so that no vector is zero. Calls add up; some rows have one token."""
    calls = Calls(tmp_path)
    calls.create("one", shape, seed=3)
    calls.rows("one", some_rows(4, 1))
    calls.step("one")
    reference = reference_of(calls, "one", shape)
    parts = [some_rows(5, 2, loss), some_rows(3, 3, loss, 4 if loss == "cross_entropy" else 1)]
    for rows in parts:
        calls.rows("one", rows, loss, **(DRO if loss == "dro" else {}))
    found = calls.finish()["one"][-2:]
    for results, rows in zip(found, parts, strict=True):
        assert_same_results(results, reference.rows(rows, loss, SETTINGS[loss]), 1e-5)
    pending = calls.tensors("one")["pending"]
    assert difference(pending.double(), reference.gradient()) < 2e-5


KINDS = [
    ("anna", LORA, "cross_entropy", 1, STEP),
    ("anna", LORA, "ppo", 1, AdamSettings(3e-3, 0.8, 0.99, 1e-8, 0.1, 0.5)),
    ("ben", VERA, "cross_entropy", 3, STEP._replace(learning_rate=2e-2)),
    ("ben", VERA, "gspo", 1, STEP._replace(max_norm=1e-3)),
    ("cleo", LORA, "dro", 1, STEP),
    ("cleo", VERA, "importance_sampling", 1, STEP),
]


def train(calls: Calls, models: list[int], steps: int = 2) -> dict[str, Tensor]:
    """Two calls for each step of some of `KINDS`, interleaved; their numbers at the end."""
    for number in models:
        owner, shape, *_ = KINDS[number]
        calls.create(f"m{number}", shape, owner, seed=number)
    for step in range(steps):
        for number in models:
            _, _, loss, each, settings = KINDS[number]
            for part in range(2):
                rows = some_rows(2 + number % 2, 100 * number + 10 * step + part, loss, each)
                calls.rows(f"m{number}", rows, loss, **(DRO if loss == "dro" else {}))
            calls.step(f"m{number}", settings)
    calls.finish()
    return {f"m{number}": calls.tensors(f"m{number}")["vectors"] for number in models}


def test_each_model_among_others_is_what_it_is_alone_and_what_torch_makes_of_it(tmp_path: Path) -> None:
    together = Calls(tmp_path / "together")
    found = train(together, list(range(len(KINDS))))
    rows = sum(
        len(one.logprobs) for results in together.results.values() for one in results if isinstance(one, RowResults)
    )
    assert together.tenants.passes < rows / 3  # passes are shared
    for number, (_, shape, loss, each, settings) in enumerate(KINDS):
        name = f"m{number}"
        alone = Calls(tmp_path / name)
        alone.create(name, shape, seed=number)
        reference = reference_of(alone, name, shape)
        assert difference(found[name], train(Calls(tmp_path / f"alone {name}"), [number])[name]) < 1e-5
        norms = iter([one for one in together.results[name] if isinstance(one, dict) and "grad_norm:mean" in one])
        results = iter([one for one in together.results[name] if isinstance(one, RowResults)])
        for step in range(2):
            for part in range(2):
                rows_of_call = some_rows(2 + number % 2, 100 * number + 10 * step + part, loss, each)
                assert_same_results(next(results), reference.rows(rows_of_call, loss, SETTINGS[loss]), 2e-4)
            assert next(norms)["grad_norm:mean"] == pytest.approx(reference.step(settings), rel=1e-3)
        assert difference(found[name].double(), reference.flat()) < 1e-3
