"""The method `uni-lora`: PEFT's numbers with the same places, places that are random, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import UniLoraConfig, get_peft_model
from torch import Tensor

from qvera.adapters import QveraLinear
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.save_load import attach, named_vectors, save_adapter
from qvera.config.sections import AdapterSection
from qvera.lab.uni_lora import places
from qvera.utils.errors import InputError
from tests.adapters.helpers import IDS, perturb
from tests.conftest import small_llama

SETTINGS: dict[str, Any] = {"method": "uni-lora", "rank": 3, "theta_length": 500}
CPU = torch.device("cpu")


def test_outputs_and_gradients_are_those_of_peft_with_the_same_places() -> None:
    """PEFT's division is left out, and its layers get our places."""
    ours = perturb(attach(small_llama(), AdapterSection(**SETTINGS))).double()
    config = UniLoraConfig(r=3, theta_d_length=500, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(small_llama().double(), config)
    theta = next(iter(named_vectors(ours).values()))
    other = theirs.base_model.unilora_theta_d["default"]
    other.data = theta.detach().clone()
    layers = {m.spec.name: m for m in ours.modules() if isinstance(m, QveraLinear)}
    for name, layer in layers.items():
        m, n = layer.out_features, layer.in_features
        A, B = places(0, name, 3 * (m + n), 500, CPU).long().split([3 * n, 3 * m])
        of_peft = theirs.base_model.model.get_submodule(name)
        for kind, taken in (("A", A.view(3, n)), ("B", B.view(m, 3))):
            getattr(of_peft, f"unilora_indices_{kind}")["default"] = taken
            getattr(of_peft, f"unilora_scales_{kind}")["default"] = torch.ones(taken.shape, dtype=torch.float64)
        ours_y: list[Tensor] = []
        theirs_y: list[Tensor] = []
        for layer_of, theta_of, found in ((layer, theta, ours_y), (of_peft, other, theirs_y)):
            torch.manual_seed(0)
            x, upstream = torch.randn(5, n).double().requires_grad_(), torch.randn(5, m).double()
            y = layer_of(x)
            found += [y, *torch.autograd.grad(y, (x, theta_of), upstream)]
        for one, two in zip(ours_y, theirs_y, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert len(layers) == 14


def test_every_number_is_taken_about_equally_often() -> None:
    """Counts of independent draws: their variance is their mean, within and across linears of one name's length."""
    drawn = torch.cat([places(7, f"layers.{i}.q", 20_000, 10_000, CPU) for i in range(10)])
    counts = torch.bincount(drawn, minlength=10_000).double()
    assert counts.mean() == 20
    assert counts.var().item() == pytest.approx(20, rel=0.06)
    one, two, other_seed = (places(s, f"layers.{i}.q", 20_000, 10_000, CPU) for s, i in ((7, 0), (7, 1), (8, 0)))
    for other in (two, other_seed, one.roll(1)):
        assert (one == other).sum() < 12  # 2 are to be expected


def test_the_places_are_the_same_on_every_machine() -> None:
    assert places(0, "model.layers.0.self_attn.q_proj", 4, 480_960, CPU).tolist() == [44816, 286918, 159738, 231615]
    assert places(2**64 - 1, "q", 70_000, 2**31 - 1, CPU).min() >= 0


def test_a_linear_does_not_depend_on_which_others_are_adapted() -> None:
    all_of_them, some = (
        attach(small_llama(), AdapterSection(**SETTINGS, targets=targets)) for targets in ("all-linear", ["v_proj"])
    )
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    one, two = (model.get_submodule(name).delta_weight_fp32("default") for model in (all_of_them, some))
    assert torch.equal(one, two)
    assert 0 < one.abs().max() < 3 * 0.01**2


def test_more_numbers_than_a_and_b_have_are_refused() -> None:
    most = 3 * sum(m.in_features + m.out_features for m in attach(small_llama(), AdapterSection(**SETTINGS)).modules()
                   if isinstance(m, QveraLinear))  # fmt: skip
    attach(small_llama(), AdapterSection(**SETTINGS | {"theta_length": most}))
    with pytest.raises(InputError, match=rf"adapter\.theta_length: takes at most {most}, .* got {most + 1}\."):
        attach(small_llama(), AdapterSection(**SETTINGS | {"theta_length": most + 1}))
    unset = AdapterSection(method="uni-lora", rank=3)
    with pytest.raises(InputError, match="got None"):
        method_of(unset).shared_tensors(unset, [LinearSpec("q", 4, 4)], None)


def test_an_adapter_of_another_seed_or_length_is_no_start(tmp_path: Path) -> None:
    save_adapter(perturb(attach(small_llama(), AdapterSection(**SETTINGS))), tmp_path)
    settings = SETTINGS | {"init_from": str(tmp_path)}
    model = attach(small_llama(), AdapterSection(**settings))
    assert model(input_ids=IDS).logits.isfinite().all()
    for key, value in (("seed", 1), ("theta_length", 501)):
        with pytest.raises(InputError, match=rf"adapter\.init_from.*{key}"):
            attach(small_llama(), AdapterSection(**settings | {key: value}))
