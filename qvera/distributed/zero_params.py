"""Parameters that ZeRO-3 shards over the ranks. Without ZeRO-3 nothing here imports DeepSpeed or does anything."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from qvera.config.schema import Recipe
from qvera.distributed.zero_config import Sizes, ZeroConfig, deepspeed_module, return_buffers_at_once
from qvera.utils import accelerator
from qvera.utils.errors import InputError


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a rank holds only its shard of this parameter. It is gathered while its module is called."""
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    """Whether all ranks have to run this model together."""
    return any(is_sharded(p) for p in model.parameters())


def whole_numel(parameter: torch.Tensor) -> int:
    """Return the elements of the whole parameter, over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make these parameters whole on every rank inside the block. All ranks have to come here."""
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        yield
        return
    with deepspeed_module().zero.GatheredParameters(sharded):
        yield


def gather_at_call(module: nn.Module) -> None:
    """Let a module outside the DeepSpeed engine, such as the output head, gather its own weights when it is called."""
    blocks: list[contextlib.AbstractContextManager[None]] = []

    def before(*_: object) -> None:
        blocks.append(gathered(module.parameters(recurse=False)))
        blocks[-1].__enter__()

    def after(*_: object) -> None:
        blocks.pop().__exit__(None, None, None)

    if any(is_sharded(p) for p in module.parameters(recurse=False)):
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


class BaseSharder:
    """Shards each big weight of the base as soon as it is read (`deepspeed.zero.Init`).

    A rank never holds more of the base than its shard and one whole tensor. DeepSpeed shards rank 0's bytes and sends
    them to the others, whose own copies only give the size. ``scratch`` is a directory of this run.
    """

    def __init__(self, config: ZeroConfig, recipe: Recipe, rank: int, world_size: int, scratch: Path) -> None:
        self.config, self.recipe, self.rank, self.world_size = config, recipe, rank, world_size
        self.scratch = Path(os.path.abspath(scratch))
        self.sizes = Sizes()
        self._first: dict[bool, nn.Parameter] = {}
        self.folder = config.nvme_folder(self.scratch)  # None: not on NVMe
        self.discard()  # the files of a run that was killed
        if not accelerator.is_available():
            return_buffers_at_once()

    def expect(self, largest_weight: int, weights_per_layer: int) -> None:
        """Set the sizes of the layers, as in `Sizes`, before the first weight comes."""
        self.sizes = Sizes(largest_weight=largest_weight, weights_per_layer=weights_per_layer)

    def __call__(self, weight: nn.Parameter, table: bool) -> None:
        """Replace a whole weight by this rank's shard, in place. All ranks have to come with the same one.

        ``table``: it is the input embedding or the head. Its shard stays in RAM when the layers go to NVMe: every
        buffer is as large as the largest weight there, and a table is twelve times the largest linear of a 7B. Raises
        InputError for a weight that goes to NVMe and is not bfloat16.
        """
        on_nvme = self.folder is not None
        table = table and on_nvme
        if on_nvme and not table and weight.dtype != torch.bfloat16:
            raise InputError(
                f"deepspeed: {self.recipe.deepspeed} reads weights through buffers of bfloat16, and "
                f"{self.recipe.model.path} stores them as {str(weight.dtype).removeprefix('torch.')}. Quantize the "
                "base with `qvera quantize` and model.quant_storage: bfloat16, or use zero3-offload-cpu."
            )
        if table in self._first:
            # as one more of those that Init was given
            self._first[table].convert_to_zero_parameters(param_list=[weight])  # type: ignore[attr-defined]
            return
        holder = nn.Module()
        holder.weight = weight
        tree = self.config.complete(self.recipe.training, self.world_size, self.sizes, self.scratch)
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
        """Remove this rank's files on NVMe. The base can't be used after that."""
        if self.folder is None:
            return
        own = self.folder / "zero_stage_3" / "bfloat16params" / f"rank{self.rank}"  # as DeepSpeed's swapper names it
        shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank has files there, or has been faster
            for folder in own.parents[:2]:
                folder.rmdir()
            if self.folder == self.scratch:  # else it is the user's
                self.folder.rmdir()
                self.folder.parent.rmdir()  # of a run that has written nothing else
