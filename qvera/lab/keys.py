"""The keys of a recipe that this package's methods and schedules read, and what the recipe alone can say against them.

Each class extends a section (`qvera.config.plugins.extensible`). This module is imported with the recipe's schema, so
it imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from qvera.config.fields import Fraction, NonNegativeFloat, Number, Positive, Section
from qvera.utils.errors import InputError

Problems = Iterator[tuple[str, str]]
Settings: TypeAlias = Any
"""A `QveraConfig` or the adapter section of a recipe, both with the keys of this module."""


class AdapterKeys(Section):
    """Of the section ``adapter``."""

    growth: Literal["accumulated-gradient", "momentum"] = "accumulated-gradient"
    """With spiel, which places of a weight get a value: those with the largest gradient over ``accumulate_steps``
    steps, with AdamW, or with the largest product of SM3's row and column accumulators, with SM3, whose momentum is
    ``training.adam_beta1``: 4 bytes a value, where AdamW and the candidates take 28."""
    reselect_every: Positive = 20
    """With spiel, the steps from one change of places to the next. The first one comes after ``accumulate_steps``."""
    accumulate_steps: Positive = 5
    """With spiel, the optimizer steps over which the gradient at new places is summed before each change."""
    drop_share: Fraction = 0.2
    """With spiel, the share of the values that get a new place each time: those of smallest size. It falls to zero
    along a line until the last step. The first change moves all values, whose places were random."""
    orthogonal_penalty: NonNegativeFloat = 0.1
    """Read by ``bilora``: γ of γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²), which is added to the loss for every linear. 0: none."""
    singular_share: Annotated[float, Field(gt=0, le=1), *Number] = 0.1
    """Read by ``sara``: a layer's rank is the number of its weight's leading singular values whose sum is this share of
    the sum of all, and at most ``rank``."""
    frozen_pair: Literal["seeded", "svd"] = "seeded"
    """Read by ``sara``: A and B are VeRA's shared random pair, or each layer's own from the SVD of its weight."""
    experts: Positive = 1
    """Read by ``sara``: vectors d that a trained router mixes for each token (Mo-SARA). Above 1 the adapter can't be
    merged or exported as a LoRA."""
    lorta_convention: Literal["input-first", "output-first"] = "input-first"
    """Read by ``lorta``: the side of each weight that the shared A is on; the other side is cut into heads. The
    authors' language-model code is input-first, their fork of PEFT output-first."""
    gradient_rows: Positive = 50
    """Read by ``lora-sb``: the first rows of the training, from whose gradient A, B and R are made."""

    def contradictions(self) -> Problems:
        """Yield keys that contradict each other."""
        yield from super().contradictions()
        if self.accumulate_steps > self.reselect_every:
            yield "accumulate_steps", f"{self.accumulate_steps} is more than adapter.reselect_every."


@dataclasses.dataclass
class ConfigFields:
    """Of adapter_config.json.

    Args:
        singular_share: SARA's share of the sum of a weight's singular values, by which its rank is chosen.
        frozen_pair: where SARA's A and B come from.
        experts: SARA's sets of values that a router mixes.
        ranks: linear → the rank that SARA's rule gave.
        lorta_convention: on which side of a weight LoRTA's A is.
        seed_chain: the seeds of the phases of a run that resampled its projections, ``projection_seed`` first. The rank
            is that of all phases together, and each has one of ``b_groups`` vectors b (`qvera.lab.resample`).
    """

    singular_share: float = 0.1
    frozen_pair: str = "seeded"
    experts: int = 1
    ranks: dict[str, int] | None = None
    lorta_convention: str = "input-first"
    seed_chain: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        config: Any = self
        self.current_phase: int | None = None
        """The phase of ``seed_chain`` that is trained now; None outside of training. Not part of the file."""
        if not (chain := self.seed_chain):
            return
        config.format_version = max(config.format_version, 3)
        whole = isinstance(chain, list) and all(type(seed) is int and 0 <= seed < 2**64 for seed in chain)
        if not whole or chain[0] != config.projection_seed or len(chain) != config.b_groups:
            raise InputError(
                f"seed_chain: takes the seeds of {config.b_groups} phases (b_groups), the first of them "
                f"{config.projection_seed} (projection_seed), got {chain!r}."
            )

    @property
    def seeds(self) -> int | tuple[int, ...]:
        """The seed of A and B, or those of its phases."""
        config: Any = super()
        return tuple(self.seed_chain) if self.seed_chain else config.seeds
