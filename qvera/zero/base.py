"""The frozen base spread over the ranks while it is read: a rank never holds more of it than its share and one tensor."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..metrics import memory_text
from ..recipe import Recipe
from .config import Sizes, ZeroConfig
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
        self.sizes = Sizes()
        self._first: dict[bool, Any] = {}
        self._swap_folder: Path | None = None
        if not torch.cuda.is_available():
            return_buffers_at_once()

    def expect(self, weight_numel: int, weights: int, numel: int) -> None:
        """Told before the first weight what the layers are made of.

        Args:
            weight_numel, weights: `Sizes.weight` and `Sizes.weights`.
            numel: elements of all weights of all layers.

        Raises:
            InputError: the disk that they are to go to has no room for the shares of this machine's ranks.
        """
        self.sizes = Sizes(weight=weight_numel, weights=weights)
        if not self._on_nvme:
            return
        tree = self.config.complete(self.recipe, self.world_size, self.sizes, self.scratch)
        folder = Path(tree["zero_optimization"]["offload_param"]["nvme_path"])
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or self.world_size)
        needed = ranks * torch.bfloat16.itemsize * -(-numel // self.world_size)
        free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
        if free < needed:
            raise InputError(
                f"deepspeed: {self.config.source} writes {memory_text(needed)} of the base to {folder}, where {memory_text(free)} "
                "are free. Make room, or name a directory on another disk as offload_param.nvme_path in a copy of the file."
            )

    def __call__(self, weight: nn.Parameter, table: bool) -> None:
        """Replace a whole weight by this rank's share, in place. All ranks have to come with the same one.

        Args:
            table: it is the input embedding or the head. Their shares stay in RAM where the layers go to NVMe: every buffer is as
                large as the largest weight that goes there, and a table is twelve times a 7B's largest linear.

        Raises:
            InputError: it is to go to NVMe and is not stored as bfloat16.
        """
        table = table and self._on_nvme
        if self._on_nvme and not table and weight.dtype != torch.bfloat16:
            raise InputError(
                f"deepspeed: {self.config.source} reads weights through buffers of bfloat16, and {self.recipe.model.path} stores "
                f"them as {str(weight.dtype).removeprefix('torch.')}. Quantize the base with `qvera quantize` and "
                "model.quant_storage: bfloat16, or use zero3-offload-cpu."
            )
        if table in self._first:
            # as one more of those that Init was given
            self._first[table].convert_to_zero_parameters(param_list=[weight])
            return
        holder = nn.Module()
        holder.weight = weight
        tree = self.config.complete(self.recipe, self.world_size, self.sizes, self.scratch)
        if table:
            offload = tree["zero_optimization"]["offload_param"]
            tree["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": offload["pin_memory"]}
        elif self._on_nvme:
            self.scratch.mkdir(parents=True, exist_ok=True)
        spread = deepspeed_module().zero.Init(
            module=holder,
            config_dict_or_path=tree,
            mem_efficient_linear=False,
            dtype=torch.bfloat16,  # of the buffers that a base on NVMe goes through; nothing is cast
        )
        if spread.param_swapper is not None:
            self._swap_folder = Path(spread.param_swapper.swap_folder)
        self._first[table] = weight

    @property
    def _on_nvme(self) -> bool:
        return self.config.offload_device == "nvme"

    def discard(self) -> None:
        """Remove what this rank keeps on NVMe; the base can't be used after that."""
        if self._swap_folder is None:
            return
        shutil.rmtree(self._swap_folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank has something there, or has been faster
            for folder in (*self._swap_folder.parents[:2], self.scratch):
                folder.rmdir()
