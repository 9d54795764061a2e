"""The frozen base spread over the ranks while it is read: a rank never holds more of it than its share and one tensor."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvera.config.schema import Recipe
from qvera.distributed.zero_config import Sizes, ZeroConfig
from qvera.distributed.zero_settings import deepspeed_module, return_buffers_at_once
from qvera.utils.errors import InputError


class Spreader:
    """Takes each big weight of the base as soon as it is read, and leaves this rank its share (`deepspeed.zero.Init`).

    Rank 0's bytes are the ones that are spread: DeepSpeed sends them to the others, whose own copies only give the size.

    Args:
        scratch: a directory of this run, for a base that is kept on NVMe.

    Attributes:
        folder: where the base goes on NVMe; None where it does not.
    """

    def __init__(self, config: ZeroConfig, recipe: Recipe, rank: int, world_size: int, scratch: Path) -> None:
        self.config, self.recipe, self.rank, self.world_size = config, recipe, rank, world_size
        self.scratch = Path(os.path.abspath(scratch))
        self.sizes = Sizes()
        self._first: dict[bool, Any] = {}
        self.folder = config.nvme_folder(self.scratch)
        self.discard()  # what a run that was killed has left
        if not torch.cuda.is_available():
            return_buffers_at_once()

    def expect(self, weight_numel: int, weights: int) -> None:
        """Told before the first weight what the layers are made of: `Sizes.weight` and `Sizes.weights`."""
        self.sizes = Sizes(weight=weight_numel, weights=weights)

    def __call__(self, weight: nn.Parameter, table: bool) -> None:
        """Replace a whole weight by this rank's share, in place. All ranks have to come with the same one.

        Args:
            table: it is the input embedding or the head. Their shares stay in RAM where the layers go to NVMe: every buffer is as
                large as the largest weight that goes there, and a table is twelve times a 7B's largest linear.

        Raises:
            InputError: it is to go to NVMe and is not stored as bfloat16.
        """
        on_nvme = self.folder is not None
        table = table and on_nvme
        if on_nvme and not table and weight.dtype != torch.bfloat16:
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
        elif self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        deepspeed_module().zero.Init(
            module=holder,
            config_dict_or_path=tree,
            mem_efficient_linear=False,
            dtype=torch.bfloat16,  # of the buffers that a base on NVMe goes through; nothing is cast
        )
        self._first[table] = weight

    def discard(self) -> None:
        """Remove what this rank keeps on NVMe; the base can't be used after that."""
        if self.folder is None:
            return
        own = self.folder / "zero_stage_3" / "bfloat16params" / f"rank{self.rank}"  # as DeepSpeed's swapper names it
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank has something there, or has been faster
            for folder in own.parents[:2]:
                folder.rmdir()
            if self.folder == self.scratch:  # else it is the user's
                self.folder.rmdir()
                self.folder.parent.rmdir()  # of a run that had nothing else to leave
