"""How the ranks of a run share its model: what a recipe's ``deepspeed`` key means on so many machines."""

from __future__ import annotations

from dataclasses import dataclass

from qvera.distributed.zero_config import ZeroConfig


@dataclass(frozen=True)
class Sharing:
    """How the ranks of a run share its model."""

    stage: int = 0  # of ZeRO; 0: each rank has all of it, and gradients are added up
    offload: str | None = None  # where a rank's share of the base lies in stage 3: None (the device), cpu or nvme
    nodes: int = 1
    per_node: int = 1  # ranks on each node (the most on one of them)
    ranks: int | None = None  # in all, where not every node has as many

    @classmethod
    def of(cls, zero: ZeroConfig | None, nodes: int = 1, per_node: int = 1, ranks: int | None = None) -> Sharing:
        """What a recipe's ``deepspeed`` key means on that many machines."""
        stage, offload = (0, None) if zero is None else (zero.stage, zero.offload_device)
        return cls(stage, offload, nodes, per_node, ranks)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.ranks or self.nodes * self.per_node

    @property
    def word(self) -> str:
        """As the recipe's ``deepspeed`` key takes it; ``none`` where that is left out."""
        return f"zero{self.stage}{f'-offload-{self.offload}' if self.offload else ''}" if self.stage else "none"


ALONE = Sharing()
"""One process."""


def share(whole: int, world_size: int) -> int:
    """The largest part of ``whole`` where so many ranks divide it."""
    return -(-whole // world_size)
