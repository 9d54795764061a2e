"""What stands between a recipe and its first step, for the training loop and the learning-rate range test alike.

In order: `configured` (how processes share the work), `ready_device`, `read_rows` (data, checked), `load` (plan, base, adapter,
optimizer), `start_engine` (the longest batch once, and what steps).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from qvera.adapters.save_load import attach, named_vectors
from qvera.config.schema import Recipe
from qvera.data import Batches, Datasets, batches_of, build_datasets, print_preflight
from qvera.distributed.group import Group
from qvera.distributed.zero_config import ZeroConfig, check_optimizer, read_config
from qvera.models.loader import Base, enable_checkpointing, load_base, pick_device, require_packing
from qvera.models.tokenizer import load_tokenizer
from qvera.training import memory_check
from qvera.training.engine import LocalEngine
from qvera.training.optim import build_optimizer
from qvera.training.plan import Plan, Sharing
from qvera.training.plan.sharding import spread_of
from qvera.training.rank_checks import disk_everywhere, nodes_of, room_everywhere, same_data
from qvera.utils.errors import InputError


@dataclasses.dataclass
class Ready:
    """A loaded base with a fresh adapter on it, and what trains it.

    Attributes:
        plan: None where none could be made.
        vectors: all of the adapter's, by their keys in its file; trained: those that need a gradient.
        spread: what spreads the base over the ranks (ZeRO-3); None where each has it whole.
    """

    plan: Plan | None
    base: Base
    model: Any
    vectors: dict[str, nn.Parameter]
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: Batches
    zero: ZeroConfig | None
    spread: Any


def configured(recipe: Recipe, base: Base | None, group: Group) -> ZeroConfig | None:
    """The recipe's ``deepspeed`` key, read and checked by all ranks."""
    found: list[ZeroConfig | None] = []

    def configure() -> None:
        zero = read_config(recipe.deepspeed)
        if zero is not None:
            check_optimizer(recipe)
            if base is not None and zero.shards_base:
                raise InputError(
                    f"deepspeed: {zero.source} spreads the base while it is read; call train without a loaded base."
                )
        found.append(zero)

    group.agree(configure)
    return found[0]


def ready_device(recipe: Recipe, group: Group) -> torch.device:
    """This rank's device, its random state seeded, deterministic kernels where the recipe wants them."""
    device = pick_device()
    torch.manual_seed((recipe.training.seed + group.rank) % 2**64)  # ranks drop out different elements
    if recipe.training.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def read_rows(recipe: Recipe, base: Base | None, console: Console, group: Group) -> Datasets:
    """The recipe's rows, shown, and the same on all ranks.

    Data comes before the model: a wrong row is found before minutes go into loading and quantizing one.

    Raises:
        InputError: anything wrong with the data, or no row left to train on.
    """
    found: list[Datasets] = []

    def read() -> None:
        tokenizer = base.tokenizer if base is not None else load_tokenizer(recipe.model)
        datasets = build_datasets(recipe.data, tokenizer, console)
        if not datasets.train:
            raise InputError(f"{recipe.data.path}: no row is left to train on. Raise data.max_length.")
        print_preflight(datasets, tokenizer, console)
        found.append(datasets)

    group.agree(read)
    same_data(found[0], recipe, group)
    return found[0]


@contextlib.contextmanager
def spreading(zero: ZeroConfig | None, recipe: Recipe, run_dir: Path, group: Group) -> Iterator[Any]:
    """What spreads the base over the ranks (ZeRO-3), or None. What it keeps on a disk goes at the end of the block.

    Args:
        run_dir: where that is, unless the configuration names a place.
    """
    if zero is None or not zero.shards_base:
        yield None
        return
    from qvera.distributed.zero_base import Spreader

    spread = Spreader(zero, recipe, group.rank, group.world_size, run_dir / "offload")
    try:
        yield spread
    finally:
        spread.discard()


def load(
    recipe: Recipe,
    datasets: Datasets,
    zero: ZeroConfig | None,
    device: torch.device,
    base: Base | None,
    console: Console,
    group: Group,
    spread: Any,
) -> Ready:
    """Plan, load the base, put a fresh adapter on it, and make its optimizer.

    Args:
        base: an already loaded one.
        spread: of `spreading`.

    Raises:
        InputError: it does not fit, or the base or the adapter are wrong.
    """
    nodes, per_node = nodes_of(group)
    sharing = Sharing.of(zero, nodes, per_node, group.world_size)
    plan = memory_check.plan_run(recipe, datasets, device, base, console, sharing)
    room_everywhere(plan, group, console)
    if spread is not None and spread.folder is not None and plan is not None:
        disk_everywhere(spread.folder, -(-spread_of(plan.shape).packed // group.world_size), group)
    loaded = [base] if base is not None else []
    with console.status(f"Loading {recipe.model.path}") as status:

        def quantizing(stage: str, done: int, total: int, what: str) -> None:
            status.update(
                f"{stage.capitalize()} {recipe.model.path}: {done / max(total, 1):.0%} of {total / 1e9:.1f} GB"
            )

        def read() -> None:
            if not loaded:
                loaded.append(load_base(recipe.model, device, quantizing, spread))

        if spread is None:
            group.agree(read)
        else:  # in which the ranks meet already
            read()
        (base,) = loaded
        facts = base.facts
        model = attach(
            base.model,
            recipe.adapter,
            recipe.model.path,
            facts.get("fingerprint"),
            facts.get("added_tokens"),
            recipe.model,
        )
    if recipe.data.packing:
        require_packing(model)
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(model)
    vectors = named_vectors(model)
    trained = {name: vector for name, vector in vectors.items() if vector.requires_grad}
    optimizer = build_optimizer(recipe.training, trained)
    batches = batches_of(recipe, datasets.train)
    return Ready(plan, base, model, vectors, trained, optimizer, batches, zero, spread)


def start_engine(
    ready: Ready,
    recipe: Recipe,
    run_dir: Path,
    datasets: Datasets,
    schedule: Any,
    steps: int,
    rehearsed: bool,
    console: Console,
    group: Group,
) -> Any:
    """What goes backward, clips and steps, after the longest batch was tried once.

    Args:
        steps: so many will be taken.
        rehearsed: the longest batch is known to fit; it is not tried.

    Raises:
        InputError: the longest batch does not fit into memory.
    """

    def rehearse() -> None:
        if not rehearsed and steps and recipe.training.rehearse_longest_batch:
            with console.status("Trying the longest batch"):
                vectors = list(ready.trained.values())
                memory_check.run_longest_batch(ready.model, recipe, datasets, ready.plan, steps, vectors)

    if ready.spread is None:
        group.agree(rehearse)
    engine = make_engine(ready, recipe, schedule, group, run_dir)
    if (
        ready.spread is not None
    ):  # whose hooks gather the weights; the ranks meet in it, and one that fails tells the others
        rehearse()
    return engine


def make_engine(ready: Ready, recipe: Recipe, schedule: Any, group: Group, run_dir: Path) -> Any:
    """Plain torch, or DeepSpeed where the recipe asks for it."""
    if ready.zero is None:
        return LocalEngine(ready.trained, ready.optimizer, schedule, recipe.training.max_grad_norm, group)
    from qvera.training.zero_engine import ZeroEngine

    parts = ready.model, ready.trained, ready.optimizer, schedule
    return ZeroEngine(ready.zero, recipe, *parts, group, run_dir / "offload")
