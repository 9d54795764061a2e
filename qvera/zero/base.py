"""The frozen base spread over the ranks while it is read: a rank never holds more of it than its share and one tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..recipe import Recipe
from .config import ZeroConfig
from .settings import deepspeed_module, return_buffers_at_once


class Spreader:
    """Takes each big weight of the base as soon as it is read, and leaves this rank its share (`deepspeed.zero.Init`).

    Rank 0's bytes are the ones that are spread: DeepSpeed sends them to the others, whose own copies only give the size.

    Args:
        scratch: a directory of this run, for a base that is kept on NVMe.
    """

    def __init__(self, config: ZeroConfig, recipe: Recipe, world_size: int, scratch: Path) -> None:
        self.config, self.recipe, self.world_size = config, recipe, world_size
        self.scratch = Path(os.path.abspath(scratch))
        self.largest_numel = 0
        self._first: Any = None
        if not torch.cuda.is_available():
            return_buffers_at_once()

    def expect(self, largest_numel: int) -> None:
        """Told before the first weight: elements, as stored, of the largest one."""
        self.largest_numel = largest_numel

    def __call__(self, weight: nn.Parameter) -> None:
        """Replace a whole weight by this rank's share, in place. All ranks have to come with the same one."""
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[weight])  # as one more of those that Init was given
            return
        if self.config.offload_device == "nvme":
            self.scratch.mkdir(parents=True, exist_ok=True)
        holder = nn.Module()
        holder.weight = weight
        tree = self.config.complete(self.recipe, self.world_size, layer_numel=self.largest_numel, scratch=self.scratch)
        deepspeed_module().zero.Init(
            module=holder,
            config_dict_or_path=tree,
            mem_efficient_linear=False,
            dtype=torch.bfloat16,  # of the buffers that a base on NVMe goes through; nothing is cast
        )
        self._first = weight
