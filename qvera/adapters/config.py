"""The adapter's config: what `adapter_config.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from qvera.adapters.projection import GENERATOR
from qvera.config.schema import AdapterSection
from qvera.utils.errors import InputError

PEFT_TYPE = "QVERA"
FORMAT_VERSION = 2
"""The newest format that is read. 1: one b and one d a linear; 2: ``b_groups``, ``input_scale``.

An adapter names the oldest that has all it needs."""


KINDS = ("qvera_b", "qvera_d", "qvera_a")
"""The vectors of a linear by their names in an adapter file; the last one is there with ``input_scale`` only."""


def vector_shapes(adapter: Any, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """What one linear has of an adapter: which of `KINDS`, in that order, and their shapes.

    Args:
        adapter: a `QveraConfig`, or the adapter section of a recipe.
    """
    groups = adapter.b_groups
    shapes: dict[str, tuple[int, ...]] = {"qvera_b": (out_features,) if groups == 1 else (groups, out_features)}
    shapes["qvera_d"] = (adapter.rank,)
    if adapter.input_scale:
        shapes["qvera_a"] = (in_features,)
    return shapes


_DEFAULTS = AdapterSection()


@dataclass
class QveraConfig(PeftConfig):
    """A VeRA adapter over a (quantized) base. Defaults are those of a recipe's adapter section.

    Args:
        rank: length of d and number of rows of A.
        target_modules: ``"all-linear"`` (every linear but the head) or names; each name must match something.
        b_groups: into how many equal groups the rank is cut, each with a b of its own (`qvera.adapters.functional`).
        input_scale: a third trained vector a [in_features] a linear, on A's right, from 1 (`qvera.adapters.functional`).
        d_initial: initial value of every element of d (0.1, VeRA section 3.2).
        dropout: dropout probability on the adapter's input.
        projection_seed: the seed of A and B, see `qvera.adapters.projection`.
        projection_generator, projection_shapes, projection_sha256: filled in when the adapter is attached and checked when it
            is loaded, so that an adapter never runs on other projections than it was trained with.
        format_version: version of this file's meaning.
        base_fingerprint: `qvera.utils.safetensors_io.base_fingerprint` of the base it was trained on; None in adapters without one.
        added_tokens: token → id of the tokens that its recipe added (`qvera.models.tokenizer`), whose rows lie beside the vectors; pad_token,
            eos_token: those of the recipe.
        magnitude, seed_chain: reserved for later formats; refused when set.

    Raises:
        InputError: the config was written by a newer format or by another generator.
    """

    rank: int = field(default=_DEFAULTS.rank)
    target_modules: str | list[str] | set[str] | None = field(default="all-linear")
    b_groups: int = field(default=_DEFAULTS.b_groups)
    input_scale: bool = field(default=_DEFAULTS.input_scale)
    d_initial: float = field(default=_DEFAULTS.d_initial)
    dropout: float = field(default=_DEFAULTS.dropout)
    projection_seed: int = field(default=_DEFAULTS.seed)
    projection_generator: str = field(default=GENERATOR)
    projection_shapes: dict[str, list[int]] | None = field(default=None)
    projection_sha256: str | None = field(default=None)
    format_version: int = field(default=1)
    base_fingerprint: str | None = field(default=None)
    added_tokens: dict[str, int] | None = field(default=None)
    pad_token: str | None = field(default=None)
    eos_token: str | None = field(default=None)
    magnitude: bool | None = field(default=None)
    seed_chain: list[int] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PEFT_TYPE  # a string: PEFT's enum stays as it is
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.format_version > FORMAT_VERSION or self.magnitude or self.seed_chain:
            raise InputError(
                f"this QVERA adapter has format version {self.format_version} and optional parts this qvera does not know "
                f"(it reads version {FORMAT_VERSION}): update qvera."
            )
        if self.projection_generator != GENERATOR:
            raise InputError(
                f"this QVERA adapter's projections come from the generator {self.projection_generator!r}; this qvera has "
                f"{GENERATOR!r} only: update qvera."
            )
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank: takes a whole number >= 1, got {self.rank!r}.")
        if type(self.input_scale) is not bool:
            raise InputError(f"input_scale: takes true or false, got {self.input_scale!r}.")
        if type(self.b_groups) is not int or self.b_groups < 1 or self.rank % self.b_groups:
            raise InputError(
                f"b_groups: takes a whole number >= 1 that divides the rank, {self.rank}, got {self.b_groups!r}."
            )
        if self.b_groups > 1 or self.input_scale:
            self.format_version = max(self.format_version, 2)
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout: takes a number >= 0 and < 1, got {self.dropout!r}.")
        added = self.added_tokens or {}
        if not isinstance(added, dict) or any(type(i) is not int or i < 0 for i in added.values()):
            raise InputError(f"added_tokens: takes token → id (whole numbers >= 0), got {self.added_tokens!r}.")
        if added:  # PEFT writes its JSON with sorted keys; ids say in which order tokens were added
            self.added_tokens = dict(sorted(added.items(), key=lambda pair: pair[1]))
        if not isinstance(self.projection_seed, int) or not 0 <= self.projection_seed < 2**64:
            raise InputError(f"projection_seed: takes a whole number >= 0 and < 2**64, got {self.projection_seed!r}.")
