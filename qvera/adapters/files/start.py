"""Whether the vectors of an existing adapter (``adapter.init_from``) may start another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qvera.adapters.config import QveraConfig
from qvera.adapters.files.adapter_file import read_adapter, require_base, require_tokens
from qvera.adapters.methods import Source, method_of
from qvera.adapters.projection import require_same_pairs
from qvera.utils.errors import InputError
from qvera.utils.paths import resolve_path

if TYPE_CHECKING:
    import torch

_OF_RECIPE = {key: key for key in ("method", "rank", "b_groups", "input_scale", "magnitude")}
_SEEDS = {"projection_seed": "seed", "seed_chain": "seeds of phases"}
_OF_MODEL = {key: key for key in ("labels", "problem_type")}
_PROJECTIONS = {
    "projection_shapes": "projections (by its targets and base) of shapes",
    "projection_sha256": "projections' SHA-256",
}
"""Fields of `QveraConfig` that must agree → what an error calls them."""


def read_start(init_from: str) -> tuple[QveraConfig, dict[str, torch.Tensor]]:
    """The config and the tensors of the adapter directory ``init_from``.

    Raises:
        InputError: it is none, is damaged, or is an adapter of PEFT's own VeRA.
    """
    theirs, vectors = read_adapter(Path(resolve_path(init_from)))
    if not isinstance(theirs, QveraConfig):
        raise InputError(
            f"adapter.init_from: {init_from} is an adapter of PEFT's own VeRA, whose projections are not drawn from a "
            "seed as ours are. Train it further with PEFT after qvera.adapters.accelerate_peft(), or start anew."
        )
    return theirs, vectors


def require_same_recipe(theirs: QveraConfig, config: QveraConfig, init_from: str) -> None:
    """Compare what the recipe alone decides: before any model is loaded.

    Raises:
        InputError: the adapter has another method, rank or seed, or other settings of its method.
    """
    fields = _OF_RECIPE | (_SEEDS if method_of(config).source is not Source.TRAINED else {})
    _require_equal(theirs, config, init_from, fields)
    given, wanted = (method_of(one).conditions(one) for one in (theirs, config))
    for key, value in wanted.items():
        _require(given[key], value, key, init_from)


def require_same_model(theirs: QveraConfig, config: QveraConfig, init_from: str) -> None:
    """Compare what the base decides, once ``config`` is on its model.

    Raises:
        InputError: the adapter has other projections, other tokens or another base.
    """
    fields = _OF_MODEL | (_PROJECTIONS if method_of(config).source is not Source.TRAINED else {})
    _require_equal(theirs, config, init_from, fields)
    require_base(theirs, init_from, str(config.base_model_name_or_path), config.base_fingerprint)
    try:
        require_same_pairs(config.pair_numbers or {}, theirs.pair_numbers or {})
    except InputError as error:
        raise InputError(f"adapter.init_from: {init_from}: {error}") from None
    require_tokens(theirs, init_from, config.added_tokens)


def _require_equal(theirs: QveraConfig, config: QveraConfig, init_from: str, fields: dict[str, str]) -> None:
    for field, key in fields.items():
        _require(getattr(theirs, field), getattr(config, field), key, init_from)


def _require(given: object, wanted: object, key: str, init_from: str) -> None:
    if given != wanted:
        raise InputError(f"adapter.init_from: {init_from} has {key} {given}, the recipe {wanted}.")
