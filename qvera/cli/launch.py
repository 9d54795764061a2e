"""`qvera launch`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.common import FindLr, LrFrom, LrSteps, LrTo, Overrides, RecipePath, Resume
from qvera.cli.train import range_test


def launch(
    recipe: RecipePath,
    overrides: Overrides,
    gpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes per machine (default: GPUs).")] = None,
    hostfile: Annotated[Path | None, typer.Option(metavar="FILE", help="A line `HOST slots=N` a machine.")] = None,
    node_rank: Annotated[int | None, typer.Option(metavar="K", help="This machine's number, from 0.")] = None,
    nnodes: Annotated[int | None, typer.Option(metavar="N", help="Number of machines.")] = None,
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 is reached.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, metavar="N", help="Restarts from the last checkpoint.")] = 0,
    resume: Resume = False,
    find_lr: FindLr = False,
    lr_from: LrFrom = None,
    lr_to: LrTo = None,
    lr_steps: LrSteps = None,
) -> int:
    """Train with several processes or machines.

    On one machine: --gpus N. From one machine on all that a host file names, by ssh: --hostfile FILE. Under a
    scheduler, on each machine: --node-rank K --nnodes N --rdzv HOST:PORT.

    It prints and runs torchrun, or deepspeed for a host file. Both also work directly: torchrun ... -m qvera train
    RECIPE. The recipe's deepspeed key says how the processes share the model.

    Example:
        qvera launch recipes/instruct/llama2-7b.yaml --gpus 4
    """
    from qvera.config.load import load_recipe
    from qvera.distributed import launch as launcher

    load_recipe(recipe, overrides, of_a_run=resume)  # an error in it is reported once, before anything starts
    range_test(find_lr, lr_from, lr_to, lr_steps, resume=resume)
    options = {"resume": resume, "find_lr": find_lr, "lr_from": lr_from, "lr_to": lr_to, "lr_steps": lr_steps}
    command = launcher.launch_command(
        recipe,
        gpus=gpus,
        hostfile=hostfile,
        node_rank=node_rank,
        nnodes=nnodes,
        rdzv=rdzv,
        max_restarts=max_restarts,
        train_arguments=train_arguments(overrides, **options),
    )
    if hostfile is not None:
        launcher.require_hosts(hostfile)
    print(shlex.join(command), file=sys.stderr)
    return launcher.run(command)


def train_arguments(overrides: list[str], **options: float | None) -> list[str]:
    """The options of `qvera launch` that go to `qvera train`, as its arguments."""
    found = [part for override in overrides for part in ("--set", override)]
    for name, value in options.items():
        if value is not None and value is not False:
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found
