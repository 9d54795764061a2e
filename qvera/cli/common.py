"""Shared by all commands: options, console, progress, streams that never end a run, and how errors end a command."""

import contextlib
import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperOption

from qvera.config.sections import LrRange
from qvera.utils.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, InputError, QveraError, near_path
from qvera.utils.files import NO_SPACE, RECIPE_FILE, plain_json, refuse_runs, runs_in, try_read_json
from qvera.utils.progress import Phase, warn


def option(metavar: str, help: str, *names: str) -> Any:
    """An option that takes a value. ``names``: where it is not called as its parameter."""
    return typer.Option(*names, metavar=metavar, help=help)


_ENDINGS = frozenset({".csv", ".html", ".json", ".jsonl", ".md", ".parquet", ".pdf", ".tsv", ".xlsx", ".yaml"})
"""Of files that other tools open by their names."""


# Typer has no public name for what a mistyped command, option or value raises; BadParameter is the public kind of it.
UsageError: Any = typer.BadParameter.__mro__[1]


class Command(TyperCommand):
    """A command whose options of one value are not given twice: the first would be lost without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise a usage error that names the option, and knows the command."""
        try:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
        except UsageError as error:
            error.ctx = ctx  # an option without its value has none
            raise
        for param in given:
            if isinstance(param, TyperOption) and not (param.multiple or param.is_flag) and given.count(param) > 1:
                raise typer.BadParameter("is given twice, and takes one value.", ctx, param)
        return super().parse_args(ctx, args)


def number(help: str, least: float = 1) -> Any:
    """An option that takes a number of at least ``least``."""
    return typer.Option(min=least, metavar="N", help=help)


def flag(name: str, help: str) -> Any:
    """An option that takes no value and has no opposite."""
    return typer.Option(name, help=help)


def repeated(metavar: str, help: str, name: str) -> Any:
    """An option that may be given several times; without it the list is empty."""
    return typer.Option(name, metavar=metavar, help=help, default_factory=list, show_default=False)


def argument(metavar: str, help: str) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=help)


RecipePath = Annotated[Path, argument("RECIPE", "A YAML file; see recipes/ and docs/recipe.md.")]
RunPath = Annotated[Path, argument("RUN", "A run or an adapter: its directory, or USER/NAME on the hub.")]
_ANY_RUN = "A run, an adapter or an exported checkpoint: its directory, or USER/NAME on the hub"
EvalPath = Annotated[Path, argument("RUN", f"{_ANY_RUN}.")]
RunOrServer = Annotated[Path, argument("RUN", f"{_ANY_RUN}; or http://SERVER.")]
_SET = "Override one key of the recipe (repeatable), e.g. --set training.max_steps=100."
Overrides = Annotated[list[str], repeated("SECTION.KEY=VALUE", _SET, "--set")]
_ADAPTER = "Which adapter, of a run that trained many"
AdapterName = Annotated[str | None, option("NAME", f"{_ADAPTER}.", "--adapter")]
AdapterNames = Annotated[list[str], repeated("NAME", f"{_ADAPTER} (repeatable).", "--adapter")]
Json = Annotated[bool, flag("--json", "Print JSON.")]
HtmlFile = Annotated[Path | None, option("FILE", "Write a page for a browser.")]

# What `qvera launch` passes on to `qvera train`.
Resume = Annotated[bool, flag("--resume", "Continue from the newest intact checkpoint.")]
_RAMP = LrRange()
FindLr = Annotated[bool, flag("--find-lr", f"Test {_RAMP.steps} learning rates, a step each; suggest one.")]
LrFrom = Annotated[float | None, option("R", f"With --find-lr: the first rate (default: {_RAMP.start:g}).")]
LrTo = Annotated[float | None, option("R", f"With --find-lr: the last rate (default: {_RAMP.end:g}).")]
LrSteps = Annotated[int | None, option("N", f"With --find-lr: steps (default: {_RAMP.steps}).")]


def _top_p(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise typer.BadParameter(f"{value:g} is not in the range 0<x<=1.")
    return value


Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, metavar="T", help="Sampling temperature; 0: greedy.")]
TopP = Annotated[float, typer.Option(callback=_top_p, metavar="P", help="Nucleus sampling: probability mass.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, metavar="N", help="Seed of the sampling.")]

console = Console(stderr=True)


def say(text: str, **style: Any) -> None:
    """Print a text to standard error as it is."""
    console.print(text, markup=False, highlight=False, **style)


def progress(name: str, total: int | None = None, **how: Any) -> Phase:
    """Show what a command is doing (`Phase`)."""
    return Phase(console, name, total, **how)


def print_table(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print rows of (name, cells) below their titles. In a pipe they are not cut: it has no width."""
    from rich.table import Column, Table

    columns = [Column(title, justify="right") for title in titles[1:]]
    table = Table(Column(titles[0], overflow="fold"), *columns, box=None, pad_edge=False)
    for name, cells in rows:
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 250, highlight=False, markup=False).print(table)


def print_json(value: Any) -> None:
    """Print a value as JSON, with null for what is not finite."""
    print(json.dumps(plain_json(value), indent=1))


def check_target(target: str | Path, *adapters: str | None, takes_bases: bool = False) -> None:
    """Raise InputError for what is found before torch is imported, as for an adapter that a run of many has not.

    Warns where the adapter is of a run that has not ended.

    ``target``: a run, an adapter directory or its hub id, an export, or with ``takes_bases`` a base too.
    """
    from qvera.evaluation.named_adapters import adapters_root, kind_of, require_all_named
    from qvera.evaluation.report.read import status_of

    run = Path(target)
    if re.match(r"\w+:/|[\w.-]+:\d+(/|$)", str(target)) and not run.exists():
        shown = re.sub(":/+", "://", str(target), count=1)  # a Path has one slash
        raise InputError(
            f"{shown}: is no directory here. A run is named by its directory, or as USER/NAME on the hub; a server, "
            "for chat and generate, as http://HOST:PORT."
        )
    is_nowhere = not run.exists() and run.parent.exists()  # so it is no id of the hub
    if takes_bases and is_nowhere:  # whose loader says more, unless a run is meant
        is_nowhere = Path("runs", run.name).is_dir() or near_path(run, runs_in(run.parent)) is not None
    if takes_bases and run.is_dir():  # a base may be anything else
        refuse_runs(run)
    elif run.exists() or is_nowhere:
        kind_of(run)
    if (asked := [name for name in adapters if name is not None]) and adapters_root(run) is not None:
        require_all_named(run, asked)
    status = status_of(try_read_json(run / "run.json") or {})
    if status in ("running", "interrupted", "failed") and (run / "adapter").is_dir():  # as where it was made longer
        warn(
            console,
            f"{run}: this run has not ended ({status}), so its adapter may be of fewer steps than planned. Wait for "
            f"its end, or go on with it: `qvera train {run / RECIPE_FILE} --resume`.",
        )


def require_new_file(path: Path | None, ending: str = "") -> None:
    """Raise InputError where an output file exists or can't be made, before any work goes into it.

    ``ending``: that of its format, such as ``.jsonl``; a name with the ending of another format is refused.
    """
    if path == Path("-"):
        raise InputError("-: is the name of no file here. Name a file, or leave the option out.")
    if path is not None and ending and path.suffix.lower() in _ENDINGS - {ending}:
        raise InputError(f"{path}: {ending[1:].upper()} is written into it; expected a name that ends in {ending}.")
    if path is not None and path.exists():
        raise InputError(f"{path}: exists; nothing is overwritten, name another file.")
    if path is not None and not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: its directory does not exist or can't be written.")


def with_exit_code(
    command: str, function: Callable[..., int | None], show_traceback: Callable[[], bool]
) -> Callable[..., None]:
    """Wrap a command's function: it ends with its exit code, and errors become a message on stderr."""

    @functools.wraps(function)
    def run(**arguments: object) -> None:
        import logging
        import warnings

        # before other libraries are imported: a user of qvera can't act on what they show, and `Phase` shows progress
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # a filter, since DeepSpeed sets its logger's level when it is imported
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about PEFT
        try:
            _require_utf8(arguments)
            code = function(**arguments) or EXIT_DONE
            sys.stdout.flush()
        except (QveraError, KeyboardInterrupt, OSError) as error:
            if show_traceback():
                raise
            code = report(command, error)
        raise typer.Exit(code)

    return run


def _require_utf8(arguments: dict[str, object]) -> None:
    """Raise InputError where a text is none: recipes, tokenizers and JSON take no other bytes. Paths may be any."""
    for value in arguments.values():
        for text in value if isinstance(value, list) else [value]:
            try:
                str("" if isinstance(text, Path) else text).encode()
            except UnicodeEncodeError:
                raise InputError(f"{text!a} is not UTF-8 text. Is the terminal set to UTF-8?") from None


def report(command: str, error: QveraError | KeyboardInterrupt | OSError) -> int:
    """Print an error; return the exit code."""
    name = f"qvera {command}".strip()
    if isinstance(error, QveraError):
        if not error.shared or os.environ.get("LOCAL_RANK", "0") == "0":  # once on each node
            print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print(f"{name}: interrupted. The same command begins again.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not isinstance(error, BrokenPipeError):  # `qvera info ... | head`: nobody reads on
        where = f"{error.filename}: " if error.filename else ""
        advice = ". Make room there, and run the same command again." if where and error.errno in NO_SPACE else ""
        print(f"{name}: {where}{error.strerror or error}{advice}", file=sys.stderr)
    return EXIT_FAILED


def help_of(function: Callable[..., object]) -> tuple[str, str]:
    """A command's help and its example: the docstring of its function, and the section ``Example:`` at its end."""
    text, _, example = inspect.cleandoc(function.__doc__ or "").partition("\n\nExample:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "\n\n".join(paragraphs).replace("[", "\\["), inspect.cleandoc(example)  # rich reads [...] as markup


class LossyStream:
    """A stream that drops failed writes: its reader is gone (`2>&1 | head`), or its disk is full.

    After the first failure all later writes go to the null device, also those of processes that are started then.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Return the length of ``text``, written or not."""
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write or drop each line."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush, where somebody still reads."""
        self._try(self._stream.flush)

    def close(self) -> None:
        """Do nothing: the stream is the process's, and a log handler that outlives the command may close it."""

    def _try(self, call: Callable[..., object], *values: str) -> None:
        try:
            call(*values)
        except BlockingIOError:  # a reader that is slow for a moment, on a pipe that does not wait
            pass
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)


def drop(stream: TextIO) -> None:
    """Send a stream's buffer and all later writes to the null device."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), number)


@contextlib.contextmanager
def for_who_still_reads() -> Iterator[None]:
    """Drop the output of the block where nobody reads standard output any more: the work it tells of is done."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)


@contextlib.contextmanager
def command_streams() -> Iterator[None]:
    """Give a command streams that it can write to.

    A closed one (`>&-`) becomes the null device. What a terminal without UTF-8 can't show, or sends, becomes a ? or its
    like. Standard error, where progress goes, is a `LossyStream`, so that hours of training don't end with their `tee`.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for as long as the process lives
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    stderr = sys.stderr
    sys.stderr = LossyStream(stderr)  # type: ignore[assignment]  # a TextIO by what it does, not by its class
    try:
        yield
    finally:
        sys.stderr = stderr
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # else Python says so once more when it ends, with an exit code of its own
                drop(stream)
