"""Shared by all commands: options, console, progress, and how errors end a command."""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from qvera.utils.errors import EXIT_DONE, EXIT_FAILED, InputError, QveraError
from qvera.utils.status_line import status_line

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/ and docs/recipe.md.")]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run or an adapter: its directory, or USER/NAME on the hub.")
]
RunOrServer = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run, an adapter or an exported checkpoint: its directory, or USER/NAME on the hub; or http://SERVER.",
    ),
]
EvalPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run, an adapter or an exported checkpoint: its directory, or USER/NAME on the hub."
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        default_factory=list,
        show_default=False,
        help="Override one key of the recipe (repeatable), e.g. --set training.max_steps=100.",
    ),
]
AdapterName = Annotated[
    str | None, typer.Option("--adapter", metavar="NAME", help="Which adapter, of a run that trained many.")
]
AdapterNames = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="NAME",
        default_factory=list,
        show_default=False,
        help="Which adapter, of a run that trained many (repeatable).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Dtype = Literal["float16", "bfloat16", "float32"]
GgufDtype = Literal["float16", "bfloat16", "float32", "q8_0"]

# What `qvera launch` passes on to `qvera train`. The default rates are those of qvera.config.lr_range.LrRange.
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest intact checkpoint.")]
FindLr = Annotated[bool, typer.Option("--find-lr", help="Test a range of learning rates; suggest one.")]
LrFrom = Annotated[float | None, typer.Option(metavar="R", help="With --find-lr: the first rate (default: 1e-05).")]
LrTo = Annotated[float | None, typer.Option(metavar="R", help="With --find-lr: the last rate (default: 1).")]
LrSteps = Annotated[int | None, typer.Option(metavar="N", help="With --find-lr: steps (default: 100).")]


def _top_p(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise typer.BadParameter(f"{value:g} is not in the range 0<x<=1.")
    return value


Temperature = Annotated[float, typer.Option(min=0.0, metavar="T", help="Sampling temperature; 0: greedy.")]
TopP = Annotated[float, typer.Option(callback=_top_p, metavar="P", help="Nucleus sampling: probability mass.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, metavar="N", help="Seed of the sampling.")]

console = Console(stderr=True)


def progress(text: str) -> contextlib.AbstractContextManager[Callable[[str], None]]:
    """Show what a command is doing; yields a function that takes a new text (`status_line`)."""
    return status_line(console, text)


def print_table(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print rows of (name, cells) below their titles. In a pipe they are not cut: it has no width."""
    from rich.table import Column, Table

    columns = [Column(title, justify="right") for title in titles[1:]]
    table = Table(Column(titles[0], overflow="fold"), *columns, box=None, pad_edge=False)
    for name, cells in rows:
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 250, highlight=False, markup=False).print(table)


def quiet_libraries() -> None:
    """Turn off transformers' progress bars and advice; imports transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _quiet_imports() -> None:
    """Silence other libraries before they are imported: a user of qvera can't act on what they show."""
    import logging
    import warnings

    if not console.is_terminal:  # a download's bar would write a line of a log ten times a second
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses a renamed attribute


def require_packages(extra: str, *names: str) -> None:
    """Raise InputError where packages of one of qvera's extras are missing."""
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(
            f"needs the package {missing[0]}, which is not installed. Install it with: pip install 'qvera[{extra}]'"
        )


def require_new_file(path: Path) -> None:
    """Raise InputError where an output file exists or can't be made, before any work goes into it."""
    if path.exists():
        raise InputError(f"{path}: exists; nothing is overwritten, name another file.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: its directory does not exist or can't be written.")


def with_exit_code(
    command: str, function: Callable[..., int | None], show_traceback: Callable[[], bool]
) -> Callable[..., None]:
    """Wrap a command's function: it ends with its exit code, and errors become a message on stderr."""

    @functools.wraps(function)
    def run(**arguments: object) -> None:
        _quiet_imports()
        try:
            code = function(**arguments) or EXIT_DONE
            sys.stdout.flush()
        except (QveraError, KeyboardInterrupt, OSError) as error:
            if show_traceback():
                raise
            code = report(command, error)
        raise typer.Exit(code)

    return run


def report(command: str, error: BaseException) -> int:
    """Print an error; return the exit code."""
    if isinstance(error, BrokenPipeError):  # `qvera info ... | head`: nobody reads on
        return EXIT_FAILED
    name = f"qvera {command}".strip()
    if isinstance(error, QveraError):
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print(f"{name}: interrupted before there was anything to save.", file=sys.stderr)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {where}{error.strerror or error}", file=sys.stderr)
    return EXIT_FAILED


def help_of(function: Callable[..., object]) -> tuple[str, str]:
    """A command's help and its example: the docstring of its function, and the section ``Example:`` at its end."""
    text, _, example = inspect.cleandoc(function.__doc__ or "").partition("\n\nExample:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "\n\n".join(paragraphs).replace("[", "\\["), inspect.cleandoc(example)  # rich reads [...] as markup
