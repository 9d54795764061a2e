"""The weight gradient of a linear from some of its tokens: WTA-CRS (arXiv 2305.15265), winner-take-all and sampling.

A trained factor with input x [T, n] and output gradient g [T, m] has the gradient gᵀ x = Σ_t g_t x_tᵀ, for which
backward needs all of x. With probabilities p_t > 0, a sample of k tokens is

- C: the tokens with the largest p_t, each once with weight 1;
- k - |C| draws from the others, with replacement, with odds p_t and weights (1 - p_C) / (p_t (k - |C|)), where
  p_C = Σ_{t in C} p_t.

|C| makes (1 - p_C) / (k - |C|) smallest (theorem 2). Σ w_t g_t x_tᵀ over the sample is gᵀ x in expectation for any p.
Its variance is least for p_t ∝ ‖x_t‖ ‖g_t‖. The paper's code takes ‖g_t‖ from the epoch before, and its first epoch is
biased. Here p leaves out what is not known, which costs variance and no bias.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvera.adapters.layer import adapted_layers
from qvera.adapters.methods import method_of
from qvera.adapters.methods.base import Method, Source, trains_pair
from qvera.adapters.projection import LastInput
from qvera.config.plugins import Schedule
from qvera.utils.errors import InputError

_UNITS = 2**52


class TokenSample(NamedTuple):
    """Tokens and their weights; a token that was drawn twice is there twice."""

    tokens: Tensor  # int64 [k]
    weight: Tensor  # [k], of the dtype of the probabilities


def token_probabilities(x: Tensor, g_norms: Tensor | None = None) -> Tensor:
    """Return p [T] ∝ ‖x_t‖ ‖g_t‖ for x [T, n], fp32 or wider, all above 0. Without ``g_norms`` [T] only by ‖x_t‖."""
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    odds = norms if g_norms is None else norms * g_norms.to(norms.dtype)
    # a run that diverges ends by its loss: no place below is out of range, which on CUDA would end the whole process
    odds = torch.nan_to_num(odds, nan=1.0, posinf=1.0)
    # as the paper's code does: no probability is 0
    odds = odds + torch.finfo(odds.dtype).eps * odds.mean().clamp_min(torch.finfo(odds.dtype).tiny)
    return odds / odds.sum()


def _not_kept(highest: Tensor) -> Tensor:
    """Return 1 - p_C, fp64 [k], for C = the first 0, 1, .. k - 1 of the highest p [k]."""
    units = _in_units(highest)
    return 1 - (units.cumsum(0) - units).double() / _UNITS


def _in_units(p: Tensor) -> Tensor:
    # int64: on CUDA, torch's running sums are deterministic for integers and not for floats
    return (p.double() * _UNITS).long()


def kept_count(highest: Tensor) -> Tensor:
    """Return |C|, int64 [1]: how many of the tokens with the ``highest`` p [k] are kept for certain; less than k."""
    slots = len(highest) - torch.arange(len(highest), device=highest.device)
    return (_not_kept(highest) / slots).argmin(0, keepdim=True)


def sample_tokens(p: Tensor, k: int, generator: torch.Generator | None = None) -> TokenSample:
    """Draw ``k`` > 0 of T tokens; all, if k >= T. Shapes do not depend on the draws, so the host need not wait."""
    if k >= len(p):
        return TokenSample(torch.arange(len(p), device=p.device), torch.ones_like(p))
    highest = p.topk(k)
    count = kept_count(highest.values)
    is_kept = torch.arange(k, device=p.device) < count
    # Tokens that are kept for certain get no share of the draws; a draw is a place in the running sum of the rest.
    rest = _in_units(p.scatter(0, highest.indices, highest.values.masked_fill(is_kept, 0.0))).cumsum(0)
    numbers = torch.rand(k, dtype=torch.float64, device=p.device, generator=generator)
    places = torch.minimum((numbers * rest[-1:]).long(), rest[-1:] - 1)
    drawn = torch.searchsorted(rest, places, right=True)
    weight = drawn_weights(p[drawn], _not_kept(highest.values).gather(0, count), k - count)
    return TokenSample(torch.where(is_kept, highest.indices, drawn), weight.to(p.dtype).masked_fill(is_kept, 1.0))


def drawn_weights(p: Tensor, not_kept: Tensor, draws: Tensor | int) -> Tensor:
    """Return (1 - p_C) / (p_t (k - |C|)), where ``not_kept`` is 1 - p_C and ``draws`` is k - |C|."""
    return not_kept / (p * draws)


class TokenSampler(LastInput):
    """Draws what backward keeps of each input x: ``share`` of its tokens, rounded up.

    Layers that read the same x share a sample. Forward does not know ‖g_t‖, so p_t ∝ ‖x_t‖. Draws come from torch's
    default generator of x's device.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The kept rows [k, n] of x [..., n], which tokens they are, and their weights."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            rows = x.detach().reshape(-1, x.shape[-1])
            sample = sample_tokens(token_probabilities(rows), max(1, math.ceil(self.share * len(rows))))
            return rows[sample.tokens], *sample

        return self.get(x, None, make)


class SampleTokens(Schedule):
    """``training.sample_tokens``: the layers get a sampler."""

    name = "sample_tokens"
    keys = ("training.sample_tokens",)
    plans_steps = False

    def check(self, recipe: Any, method: Method) -> None:
        if method.source is not Source.TRAINED:
            raise InputError(
                f"training.sample_tokens: there is nothing to save with adapter.method {method.name}. A is frozen, so "
                f"backward keeps no input x for its gradient, only z = A x, {recipe.adapter.rank} numbers a token. "
                "Remove it."
            )
        if not _fits(method):
            raise InputError(
                f"training.sample_tokens: adapter.method {method.name}, as it is set here, keeps its inputs for more "
                "than the gradient of a trained A. Remove it."
            )

    def kept_share(self, recipe: Any) -> float | None:
        return recipe.training.sample_tokens if _fits(method_of(recipe.adapter)) else None

    def hook(self, training: Any) -> None:
        sampler = TokenSampler(training.recipe.training.sample_tokens)
        for layer in adapted_layers(training.model):
            layer.input_sampler = sampler.draw


def _fits(method: Method) -> bool:
    return trains_pair(method) and getattr(method, "samples_tokens", True)
