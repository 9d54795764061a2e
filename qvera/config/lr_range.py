"""The options of ``qvera train --find-lr`` and their defaults."""

import dataclasses

from qvera.utils.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrRange:
    """The options of a range test (Smith, arXiv 1506.01186, section 3.3); InputError if they make no sense."""

    start: float = 1e-5
    """``--lr-from``: the first learning rate, too low to change anything."""
    end: float = 1.0
    """``--lr-to``: the last learning rate, which should be too high."""
    steps: int = 100
    """``--lr-steps``: the rate grows by the same factor in each."""

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end < float("inf"):
            rates = f"--lr-from {self.start:g}, --lr-to {self.end:g}"
            raise InputError(f"{rates}: expected two rates, 0 < from < to, such as 1e-5 and 1.")
        if self.steps < 10:
            raise InputError(f"--lr-steps: takes a whole number >= 10 (a curve needs points), got {self.steps}.")
