"""Whether a run keeps a sample of the tokens for backward (``training.sample_tokens``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.adapters.methods import method_of
from qvera.adapters.products.token_sampling import TokenSampler
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.config.schema import Recipe


def token_sampler(recipe: Recipe) -> TokenSampler | None:
    """What draws the sample; None where all tokens are kept.

    Raises:
        InputError: the adapter's method keeps no input that sampling would make smaller.
    """
    share, method = recipe.training.sample_tokens, method_of(recipe.adapter)
    if not share:
        return None
    if not method.keeps_input:
        raise InputError(
            f"training.sample_tokens: there is nothing to save with adapter.method {method.name}. A is frozen, so "
            f"backward keeps no input of a layer, only z = A x, {recipe.adapter.rank} numbers a token. Remove it."
        )
    if not method.samples_tokens:
        raise InputError(
            f"training.sample_tokens: adapter.method {method.name} keeps its inputs for more than the gradient of a "
            "trained A. Remove it."
        )
    return TokenSampler(share)
