"""The weight gradient from a sample of tokens: the authors' numbers, and no bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters.layer import adapted_layers
from qvera.adapters.products.low_rank import trained_linear, trained_path
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection
from qvera.lab.sample_tokens import (
    TokenSample,
    TokenSampler,
    drawn_weights,
    kept_count,
    sample_tokens,
    token_probabilities,
)
from qvera.models.checkpointing import enable_checkpointing
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from tests.adapters.helpers import perturb
from tests.conftest import small_llama
from tests.lab.authors import numbers_of
from tests.training.runs import cut_off, losses, same, vectors

AUTHORS = numbers_of("wtacrs_linear")
CASES = ["peaked", "flat", "ratio50"]


def sampled_product(g: torch.Tensor, x_rows: torch.Tensor, sample: TokenSample) -> torch.Tensor:
    """Σ w_t g_t x_tᵀ over the sample: [m, n]; ``x_rows`` are the rows of x that it names."""
    return (g[sample.tokens] * sample.weight.unsqueeze(1).to(g.dtype)).t() @ x_rows.to(g.dtype)


def stored(case: str, name: str) -> torch.Tensor:
    value = AUTHORS[f"{case}_{name}"]
    return value.flatten(0, 1) if name in ("h", "dz") else value  # [batch, length, ·] → [tokens, ·]


@pytest.mark.parametrize("case", CASES)
def test_probabilities_and_estimates_are_the_authors_given_their_draws(case: str) -> None:
    x, g = stored(case, "h"), stored(case, "dz")
    p = token_probabilities(x, g.norm(dim=1))
    torch.testing.assert_close(p, stored(case, "prob"), rtol=0, atol=1e-8)  # theirs add up to slightly more than 1
    p, kept = stored(case, "prob"), stored(case, "deter_indices")
    assert kept_count(p.topk(int(stored(case, "k"))).values) == int(stored(case, "deter_k"))
    for drawn, estimate in zip(stored(case, "draws"), stored(case, "grad_W_estimates"), strict=True):
        weight = torch.cat([p.new_ones(len(kept)), drawn_weights(p[drawn], 1 - p[kept].sum(), len(drawn))])
        sample = TokenSample(torch.cat([kept, drawn]), weight)
        torch.testing.assert_close(sampled_product(g, x[sample.tokens], sample), estimate, rtol=0, atol=1e-11)
    torch.testing.assert_close(weight[len(kept) :], stored(case, "weights_of_last_draw"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_has_no_bias_also_where_gradients_are_unknown(case: str) -> None:
    x, g, k = stored(case, "h"), stored(case, "dz"), int(stored(case, "k"))
    for p in (stored(case, "prob"), token_probabilities(x)):
        generator = torch.Generator().manual_seed(5)
        found = torch.stack(
            [sampled_product(g, x[s.tokens], s) for s in (sample_tokens(p, k, generator) for _ in range(400))]
        )
        error = found.mean(0) - g.t() @ x
        z = error / (found.std(0) / len(found) ** 0.5)
        assert z.abs().max() < 4.5  # of 96 entries
        assert z.square().mean() < 2.5  # the entries depend on one another


def test_all_tokens_are_the_exact_gradient_and_odd_rows_are_no_trouble() -> None:
    """A run that diverges ends by its loss and not in the draw."""
    x, g = torch.randn(6, 3), torch.randn(6, 2)
    sample = sample_tokens(token_probabilities(x), 6)
    torch.testing.assert_close(sampled_product(g, x[sample.tokens], sample), g.t() @ x)
    p = token_probabilities(torch.zeros(5, 3))
    torch.testing.assert_close(p, torch.full((5,), 0.2))
    assert torch.isfinite(sample_tokens(p, 3).weight).all()
    for value in (float("nan"), float("inf")):
        x[2, 1] = value
        p = token_probabilities(x)
        assert torch.isfinite(p).all()
        assert len(sample_tokens(p, 3).tokens) == 3


def test_a_draw_does_not_make_the_host_wait() -> None:
    """On meta tensors nothing can be read, so that no shape depends on a value."""
    sample = sample_tokens(token_probabilities(torch.randn(40, 3, device="meta")), 12)
    assert sample.tokens.shape == sample.weight.shape == (12,)


def lora_parts(tokens: int = 60, n: int = 24, m: int = 20, r: int = 4) -> tuple[torch.Tensor, ...]:
    x, base, g = torch.randn(2, tokens // 2, n), torch.randn(2, tokens // 2, m), torch.randn(2, tokens // 2, m)
    x = (x * torch.rand(2, tokens // 2, 1).pow(3)).requires_grad_()
    return x, base, g, torch.randn(r, n).requires_grad_(), torch.randn(m, r).requires_grad_()


@pytest.mark.parametrize("one_node", [False, True])
def test_a_sampled_lora_has_exact_gradients_except_for_a_whose_mean_is_right(one_node: bool) -> None:
    torch.manual_seed(3)
    x, base, g, A, B = lora_parts()
    module = torch.nn.Linear(24, 20).requires_grad_(False)

    def gradients(sampler: Any) -> tuple[torch.Tensor, ...]:
        if one_node:
            y = trained_linear(module, x, A, B, 0.5, sampler)
        else:
            y = trained_path(base, x, A, B, 0.5, sampler=sampler)
        return torch.autograd.grad((y * g).sum(), (x, A, B))

    exact = gradients(None)
    found = [gradients(TokenSampler(0.3).draw) for _ in range(200)]
    for mine, theirs in ((found[0][0], exact[0]), (found[0][2], exact[2])):
        torch.testing.assert_close(mine, theirs)
    estimates = torch.stack([one[1] for one in found])
    z = (estimates.mean(0) - exact[1]) / (estimates.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4.5
    assert (estimates[0] - exact[1]).norm() > 1e-3 * exact[1].norm()


def test_layers_that_read_the_same_input_keep_one_sample_of_it() -> None:
    x, base, g, A, B = lora_parts()
    sampler, kept = TokenSampler(0.25), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        outputs = [trained_path(base, x, A, B, 0.5, sampler=sampler.draw) for _ in range(3)]
    inputs = {t.data_ptr(): t.numel() for t in kept if t.is_floating_point() and t.shape[-1] == 24 and len(t) != 4}
    assert list(inputs.values()) == [15 * 24]  # of 60 tokens
    torch.autograd.grad(sum((y * g).sum() for y in outputs), (x, A, B))
    other = x.detach().clone()
    assert sampler.draw(other)[0].data_ptr() not in inputs


LORA = {"method": "lora", "rank": 4}


@pytest.mark.process
def test_a_sampled_lora_learns_nearly_as_well_and_resumes_to_the_bit(make_recipe: Any, tmp_path: Path) -> None:
    training = {"learning_rate": 2e-2, "max_steps": 5, "save_total_limit": 9}
    for name, more in (("whole", {}), ("sampled", {"sample_tokens": 0.3})):
        train(make_recipe(adapter=LORA, training={**training, **more}), tmp_path / name)
    mine, exact = losses(tmp_path / "sampled"), losses(tmp_path / "whole")
    assert mine != exact
    assert mine[-1] < mine[0] - 0.5 * (exact[0] - exact[-1])
    again = cut_off(tmp_path / "sampled", tmp_path / "again", after=3)
    train(make_recipe(adapter=LORA, training={**training, "sample_tokens": 0.3}), again, resume=True)
    assert losses(again) == mine
    assert same(vectors(again), vectors(tmp_path / "sampled"))


def test_recomputed_layers_draw_too() -> None:
    model = perturb(attach(small_llama(), AdapterSection(**LORA)))
    for layer in adapted_layers(model):
        layer.input_sampler = TokenSampler(0.3).draw
    enable_checkpointing(model, True)
    model.train()(torch.randint(3, 300, (2, 40))).logits.square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "qvera_A" in name]
    assert all(grad is not None and grad.any() for grad in grads)


def test_a_plan_counts_the_sample(make_recipe: Any) -> None:
    def held(share: float) -> int:
        recipe = make_recipe(
            adapter=LORA, training={"sample_tokens": share, "gradient_checkpointing": False, "learning_rate": 1e-2}
        )
        memory = make_plan(recipe, torch.device("cpu")).memory
        return sum(part.bytes for part in memory.at("backward"))

    assert held(0.0) > held(0.5) > held(0.1)
