"""What a training needs before its first step: DeepSpeed's configuration, the device, the rows, a sharded base."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.text import Text

from qvera.config.schema import Recipe
from qvera.data import Datasets, build_datasets, data_warnings, print_preflight
from qvera.distributed.group import Group
from qvera.distributed.zero_config import ZeroConfig, check_optimizer, load_zero_config
from qvera.models.loader import Base, load_base, pick_device
from qvera.models.tokenizer import load_tokenizer
from qvera.training.logging import StatusLine
from qvera.training.rank_checks import check_same_data
from qvera.utils.errors import InputError
from qvera.utils.formatting import size

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.distributed.zero_params import BaseSharder


def read_zero_config(recipe: Recipe, base: Base | None, group: Group) -> ZeroConfig | None:
    """The recipe's ``deepspeed`` key, read and checked by all ranks; None where it is not set."""
    found: list[ZeroConfig | None] = []

    def read() -> None:
        zero = load_zero_config(recipe.deepspeed)
        if zero is not None:
            check_optimizer(recipe)
            if base is not None and zero.shards_base:
                raise InputError(
                    f"deepspeed: {zero.source} shards the base while it is read; call train without a loaded base."
                )
        found.append(zero)

    group.agree(read)
    return found[0]


def select_device(recipe: Recipe, group: Group) -> torch.device:
    """This rank's device, with its random state seeded and deterministic kernels where the recipe asks for them."""
    device = pick_device()
    torch.manual_seed((recipe.training.seed + group.rank) % 2**64)  # ranks drop out different elements
    if recipe.training.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def load_datasets(recipe: Recipe, base: Base | None, console: Console, group: Group, preview: bool) -> Datasets:
    """The recipe's rows, tokenized and the same on all ranks.

    Data comes before the model: a wrong row is found before minutes go into loading and quantizing one. ``preview``:
    print rows too, as `qvera preview` does.

    Raises:
        InputError: anything wrong with the data, no row left to train on, or ranks with different rows.
    """
    found: list[Datasets] = []

    def read() -> None:
        tokenizer = base.tokenizer if base is not None else load_tokenizer(recipe.model)
        datasets = build_datasets(recipe.data, tokenizer, console)
        if not datasets.train:
            raise InputError(f"{recipe.data.path}: no row is left to train on. Raise data.max_length.")
        if preview:
            print_preflight(datasets, tokenizer, console)
        else:
            _print_summary(datasets, console)
        found.append(datasets)

    group.agree(read)
    check_same_data(found[0], recipe, group)
    return found[0]


def _print_summary(datasets: Datasets, console: Console) -> None:
    stats = datasets.stats
    console.print(
        f"Data: {stats.train_rows:,} rows to train on, {stats.eval_rows:,} held out; the loss covers "
        f"{stats.trained_tokens:,} of "
        f"{stats.tokens:,} tokens. `qvera preview` shows the rows.",
        highlight=False,
        soft_wrap=True,
    )
    for line in data_warnings(stats):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def load_base_everywhere(
    recipe: Recipe, device: torch.device, sharder: BaseSharder | None, group: Group, console: Console
) -> Base:
    """The quantized base, on all ranks.

    Raises:
        InputError: it is wrong on one of them.
    """
    found: list[Base] = []
    with StatusLine(console, f"Loading {recipe.model.path}") as status:

        def progress(stage: str, done: int, total: int, _: str) -> None:
            status.update(f"{stage.capitalize()} {recipe.model.path}: {done / max(total, 1):.0%} of {size(total)}")

        def read() -> None:
            found.append(load_base(recipe.model, device, progress, sharder))

        if sharder is None:
            group.agree(read)
        else:  # the ranks already meet while they shard it
            read()
    return found[0]


@contextlib.contextmanager
def base_sharder(zero: ZeroConfig | None, recipe: Recipe, scratch: Path, group: Group) -> Iterator[BaseSharder | None]:
    """What shards the base over the ranks (ZeRO-3), or None.

    What it keeps on a disk (in ``scratch``, unless the configuration names a place) is removed at the end of the block.
    """
    if zero is None or not zero.shards_base:
        yield None
        return
    from qvera.distributed.zero_params import BaseSharder

    sharder = BaseSharder(zero, recipe, group.rank, group.world_size, scratch)
    try:
        yield sharder
    finally:
        sharder.discard()
