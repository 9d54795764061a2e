"""Errors for people, and the exit code that a script sees for each."""

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, run the same command again


class QveraError(Exception):
    """An error whose message is for the person who ran the command; the CLI prints it without a traceback."""

    exit_code = EXIT_FAILED
    shared = False
    """All processes of a run raise it together, so only one prints it."""


class InputError(QveraError):
    """An input is wrong: a recipe, a data file, a directory. Nothing was written. Exit code 2.

    The message names the file, line or key, what was found, what was expected and what to do.
    """

    exit_code = EXIT_INPUT


class RunFailed(QveraError):
    """A run that had started could not go on (a NaN loss, a full disk); what was saved before is kept. Exit code 1."""


class NotFinite(RunFailed):
    """The loss or its gradient became NaN or infinite; no step was taken with it."""


class OwnCodeFailed(RunFailed):
    """A metric, a loss or a reward of the caller's failed. The step before is whole, so it is saved."""


class OutOfMemory(RunFailed):
    """Memory ran out: in a step, which was undone, or with a single row to answer or to score."""


class Interrupted(QveraError):
    """Ctrl-C, SIGTERM or SIGHUP: the state was saved, and ``--resume`` goes on from it. Exit code 75."""

    exit_code = EXIT_INTERRUPTED


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message as a sentence; some list every model that they know after it."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if line.endswith(".") else line + "."


def one_line(error: BaseException) -> str:
    """Write an error's message on one line without a full stop; or its type, if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:299] + "…").rstrip(".")


def call_problem(function: Callable[..., object], arguments: int) -> str | None:
    """Say why a caller's function can't be called with so many arguments; None: it can, or nobody can tell."""
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError as error:
        return str(error)
    except ValueError:  # written in C, without a signature
        pass
    return None


def require_takes(function: Callable[..., object], arguments: int, where: str) -> None:
    """Raise InputError where a caller's function can't be called with so many arguments; ``where`` names it."""
    if (problem := call_problem(function, arguments)) is not None:
        given = f"{arguments} argument{'s' if arguments > 1 else ''}"
        raise InputError(f"{where}: is called with {given}, which it does not take ({problem}).")


_PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn"}
"""Module → its package, where that is called otherwise."""


def require_packages(extra: str, *modules: str, what: str = "") -> None:
    """Raise InputError where a module of one of qvera's extras is missing. ``what`` needs it, if no command does."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            package = _PACKAGES.get(module, module.replace("_", "-"))
            raise InputError(
                f"{what}needs the package {package}, which is not installed. Install it with: pip install "
                f"'qvera[{extra}]'."
            )


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """End a sentence about an unknown name: "; did you mean 'x'?", or a full stop where no known name is near."""
    near = _nearest(str(name), list(map(str, known)))
    return "." if near is None else f"; did you mean {near!r}?"


def did_you_mean_path(path: Path, others: Iterable[Path]) -> str:
    """`did_you_mean` for a path that is not there, with the whole path of the one that is near."""
    near = near_path(path, others)
    return "." if near is None else f"; did you mean {str(near)!r}?"


def near_path(path: Path, others: Iterable[Path]) -> Path | None:
    """Return the path whose name is most like that of ``path``, or None. A suffix that both have does not count."""
    by_name = {other.name.removesuffix(path.suffix): other for other in others}
    near = _nearest(path.name.removesuffix(path.suffix), list(by_name))
    return None if near is None else by_name[near]


def _nearest(typed: str, names: list[str]) -> str | None:
    near = [one for one in names if one.casefold() == typed.casefold()] or difflib.get_close_matches(typed, names, n=1)
    near = near or [one for one in names if typed and one.startswith(typed)]
    return near[0] if near else None
