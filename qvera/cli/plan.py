"""`qvera plan`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvera.cli.common import Json, Overrides, console, progress, quiet_libraries
from qvera.utils.errors import InputError
from qvera.utils.paths import resolve_path

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data import Datasets


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, as for train.")],
    overrides: Overrides,
    gpu: Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for a GPU of that size: 24GB, 24GiB.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Plan for N equal machines.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, metavar="M", help="Plan for M processes on each machine.")] = None,
    as_json: Json = False,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Do not time a step.")] = False,
) -> None:
    """Estimate memory, time and files of a run.

    Reads the model's config, no weights. The longest batch is that of the data if it is local, else data.max_length.
    Without --gpu it plans for this machine and times a step (a few seconds). If the run does not fit, it names the
    nearest changes that make it fit. --nodes and --gpus: one process of many, under each ZeRO stage, and which stage is
    right.

    Example:
        qvera plan recipes/instruct/llama2-7b.yaml --gpu 24GB
    """
    from rich.console import Console

    from qvera.adapters.files.save_load import check_start
    from qvera.config.load import load_recipe
    from qvera.distributed.zero_config import zero_config_of
    from qvera.training.plan import Sharing, gpu_machine, make_plan, parse_size, time_step
    from qvera.training.plan.plan import print_plan
    from qvera.utils import accelerator

    quiet_libraries()
    loaded = load_recipe(recipe, overrides)
    check_start(loaded.adapter)
    device = accelerator.current_device()
    machine = None if gpu is None else gpu_machine(loaded.model, parse_size(gpu))
    several = nodes is not None or gpus is not None
    sharing = Sharing.of(zero_config_of(loaded), nodes or 1, gpus or 1)
    data = _local_data(loaded)
    rows, adapter_rows = (None, []) if data is None else (data.train, [len(one.train) for one in data.adapters])
    made = make_plan(loaded, machine or device, rows, sharing, several, adapter_rows, data)
    if machine is None and not no_timing:
        with progress("Timing this machine"):
            made = dataclasses.replace(made, seconds=time_step(made, device))
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        print_plan(made, Console())


def _local_data(recipe: Recipe) -> Datasets | None:
    """The rows, if they and the tokenizer are local: a plan must not wait for a download."""
    from qvera.data import build_datasets
    from qvera.models.tokenizer import load_processor
    from qvera.tasks import task_of

    if not Path(resolve_path(recipe.data.path)).exists() or not Path(resolve_path(recipe.model.path)).is_dir():
        return None
    try:
        tokenizer = load_processor(recipe.model, task_of(recipe).exported_class)
    except InputError:
        return None
    return build_datasets(recipe.data, tokenizer, console)
