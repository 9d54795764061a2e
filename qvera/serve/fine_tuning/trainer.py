"""What the worker knows of `qvera.training.online.OnlineTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data import Datasets
    from qvera.data.adapter_rows import AdapterRows
    from qvera.training.checkpoint import TrainState


class TrainedRun(Protocol):
    """The training of one adapter.

    Attributes:
        steps: optimizer steps that are planned.
        after: held-out loss of the vectors at the end; None without held-out rows.
        reason: why it was ended, where its loss was not finite or a row did not fit into memory.
        has_ended: whether nothing of it is left to compute.
    """

    id: str
    rows: AdapterRows
    steps: int
    state: TrainState
    after: dict[str, Any] | None
    reason: str | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is left to compute."""


class Trainer(Protocol):
    """Trains adapters that come and go. All but `prepare` is called in the engine's thread."""

    @property
    def free_slots(self) -> int:
        """How many more may begin."""

    def prepare(self, id: str, recipe: Recipe, datasets: Datasets) -> Any:
        """A run that has not begun; any thread. Raises InputError."""

    def begin(self, run: Any, saved: Path | None = None) -> None:
        """Take a slot; go on from what `save` wrote. Raises InputError where the file does not fit."""

    def run_slice(self) -> list[dict[str, Any]]:
        """One pass; returns records of kind ``train`` or ``eval`` with ``adapter``, ``step`` and ``loss``."""

    def end(self, run: Any) -> None:
        """Free a run's slot."""

    def save(self, run: Any, file: Path) -> None:
        """Write what a run goes on from, as a whole."""

    def save_adapter(self, run: Any, directory: Path) -> None:
        """Write a run's adapter, as a whole."""
