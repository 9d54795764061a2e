"""A sample of tokens for the gradient of a trained A: refused where there is nothing to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvera.adapters.files.save_load import attach
from qvera.adapters.layer import adapted_layers
from qvera.adapters.methods import check_recipe
from qvera.config.schema import AdapterSection
from qvera.lab.sample_tokens import TokenSampler
from qvera.models.checkpointing import enable_checkpointing
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb
from tests.conftest import small_llama
from tests.training.runs import cut_off, losses, same, vectors

LORA = {"method": "lora", "rank": 4}


def test_vera_has_nothing_to_save(make_recipe: Any) -> None:
    recipe = make_recipe(training={"sample_tokens": 0.3})
    for refused in (lambda: check_recipe(recipe), lambda: make_plan(recipe, torch.device("cpu"))):
        with pytest.raises(
            InputError, match="nothing to save with adapter.method vera. A is frozen, so .* only z = A x, 8"
        ):
            refused()


def test_a_method_whose_input_side_is_made_of_others_is_refused(make_recipe: Any) -> None:
    for adapter in (
        {"method": "bilora", "rank": 4, "alpha": 4},
        {"method": "lorta", "lorta_convention": "output-first", "rank": 4, "alpha": 4},
    ):
        with pytest.raises(InputError, match="keeps its inputs for more than the gradient of a trained A"):
            check_recipe(make_recipe(adapter=adapter, training={"sample_tokens": 0.3, "learning_rate": 1e-3}))


def sampled_lora(share: float | None) -> Any:
    model = attach(small_llama(), AdapterSection(**LORA))
    perturb(model)
    for layer in adapted_layers(model):
        layer.input_sampler = None if share is None else TokenSampler(share).draw
    return model


def kept_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """What one forward pass holds for backward, each storage once, without parameters."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids).logits.square().mean()
    del loss
    return sum(held.values())


def test_a_sampled_lora_holds_less_for_backward() -> None:
    """Each layer's four inputs, of which a fifth is kept: 64 of the norms' and attention's, 192 of the MLP's."""
    ids = torch.randint(3, 300, (2, 100))
    whole, sampled = (kept_bytes(sampled_lora(share), ids) for share in (None, 0.2))
    inputs = 2 * 200 * (64 + 64 + 192) * 4  # attention keeps o_proj's own
    assert whole - sampled > 0.5 * inputs


@pytest.mark.process
def test_a_sampled_lora_learns_nearly_as_well_and_resumes_to_the_bit(make_recipe: Any, tmp_path: Path) -> None:
    training = {"learning_rate": 1e-2, "max_steps": 8, "save_total_limit": 9}
    for name, more in (("whole", {}), ("sampled", {"sample_tokens": 0.3})):
        train(make_recipe(adapter=LORA, training={**training, **more}), tmp_path / name)
    mine, exact = losses(tmp_path / "sampled"), losses(tmp_path / "whole")
    assert mine != exact
    assert mine[-1] < mine[0] - 0.5 * (exact[0] - exact[-1])
    again = cut_off(tmp_path / "sampled", tmp_path / "again", after=3)
    train(make_recipe(adapter=LORA, training={**training, "sample_tokens": 0.3}), again, resume=True)
    assert losses(again) == mine
    assert same(vectors(again), vectors(tmp_path / "sampled"))


def test_recomputed_layers_draw_in_their_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[bool] = []
    real = TokenSampler.draw

    def draw(self: TokenSampler, x: torch.Tensor) -> Any:
        draws.append(torch._C._current_graph_task_id() >= 0)  # in backward
        return real(self, x)

    monkeypatch.setattr(TokenSampler, "draw", draw)
    model = sampled_lora(0.3)
    enable_checkpointing(model, True)
    model.train()
    ids = torch.randint(3, 300, (2, 40))
    model(ids).logits.square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "qvera_A" in name]
    assert all(grad is not None and grad.any() for grad in grads)
    assert draws.count(True) == draws.count(False) >= len(grads)


def test_a_plan_counts_the_sample(make_recipe: Any) -> None:
    def held(share: float) -> int:
        recipe = make_recipe(
            adapter=LORA, training={"sample_tokens": share, "gradient_checkpointing": False, "learning_rate": 1e-2}
        )
        memory = make_plan(recipe, torch.device("cpu")).memory
        return sum(part.bytes for part in memory.at("backward"))

    assert held(0.0) > held(0.5) > held(0.1)
