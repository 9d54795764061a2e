"""What a directory is, and adapters by name in a run that trained several or in a directory of adapters.

Names are those of the data; directory names are escaped (`qvera.utils.adapter_names`). Imports neither torch nor PEFT.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qvera.evaluation.report.read import entry_of
from qvera.utils.adapter_names import shown_name, unescape_name
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.files import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CERTIFICATE,
    RECIPE_FILE,
    no_directory,
    refuse_runs,
    try_read_json,
)

if TYPE_CHECKING:
    from qvera.data import Datasets
    from qvera.data.rows import Rows

_SHOWN_NAMES = 8  # an error lists at most this many names

_GONE = "it was trained, and its directory is no longer there"
_NOT_SAVED = {
    "done": _GONE,
    "stopped_early": _GONE,
    "not_finite": "its loss, gradient or held-out loss was not finite, so its vectors were not saved",
    "no_rows": "it had no rows left to train on",
}
"""Statuses of run.json whose adapters have no directory."""


def kind_of(path: Path) -> str:
    """What a directory is: the one decision that all commands share.

    ``many`` (a run that trained several adapters, or a directory of adapters), ``run``, ``adapter``, ``checkpoint`` (a
    base), or the kind of an export, as its certificate names it: ``lora``, ``merged``, ``gguf``, ``gguf-lora``.

    InputError: it is none of these.
    """
    if not path.is_dir():
        raise InputError(f"{no_directory(path)} Expected a run, an adapter directory or an exported checkpoint.")
    if adapters_root(path) is not None:
        return "many"
    if (path / RECIPE_FILE).is_file():
        return "run"
    is_export, certificate = (path / CERTIFICATE).is_file(), try_read_json(path / CERTIFICATE) or {}
    exported, format_number = str(certificate.get("kind", "merged")), certificate.get("format", 1)
    if (path / ADAPTER_CONFIG).is_file():
        return "lora" if exported == "lora" else "adapter"
    if format_number != 1 or exported not in ("lora", "peft", "merged", "gguf", "gguf-lora"):
        raise InputError(
            f"{path / CERTIFICATE}: has kind {exported!r} in format {format_number!r}, which this qvera does not know. "
            "A newer one may have written it: update qvera."
        )
    if exported in ("gguf", "gguf-lora"):
        return exported
    if (path / "config.json").is_file():
        return "merged" if is_export else "checkpoint"
    refuse_runs(path)
    raise InputError(
        f"{path}: is neither a run (it has no {RECIPE_FILE}) nor an adapter directory (no {ADAPTER_CONFIG}) nor an "
        "exported checkpoint (no config.json)."
    )


def no_adapter_in(path: Path) -> InputError:
    """The error about a base where an adapter is needed."""
    return InputError(
        f"{path}: is a checkpoint that no adapter was merged into. Expected a run, an adapter directory or an export."
    )


def adapters_root(path: Path) -> Path | None:
    """The directory that holds the adapters; None where ``path`` is neither such a run nor such a directory."""
    if (path / RECIPE_FILE).is_file():
        return path / ADAPTERS if (path / ADAPTERS).is_dir() else None
    others = (ADAPTER_CONFIG, "config.json", "run.json")  # of an adapter, a checkpoint, and a run without its recipe
    if any((path / file).is_file() for file in others) or not path.is_dir():
        return None
    with os.scandir(path) as entries:
        # stops at the first adapter that it finds
        return path if any((Path(entry.path) / ADAPTER_CONFIG).is_file() for entry in entries) else None


def named_directories(root: Path) -> dict[str, Path]:
    """Map the name of every adapter under ``root`` to its directory, sorted by name."""
    return {name: path for name, path in listed_directories(root).items() if (path / ADAPTER_CONFIG).is_file()}


def listed_directories(root: Path) -> dict[str, Path]:
    """Map the name of every directory under ``root`` to it, sorted by name, whatever is in it."""
    with os.scandir(root) as entries:
        # a save that was cut off has a hidden name
        found = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return dict(sorted((unescape_name(name), root / name) for name in found))


def run_of(adapter: Path) -> Path | None:
    """The run of an adapter directory RUN/adapter or RUN/adapters/NAME; None for any other."""
    adapter = adapter.resolve()
    beside = adapter.parent
    run = beside.parent if beside.name == ADAPTERS else beside
    inside = beside.name == ADAPTERS or adapter.name == "adapter"
    return run if inside and (run / RECIPE_FILE).is_file() else None


def name_of(adapter: Path) -> str | None:
    """The name of an adapter directory RUN/adapters/NAME; None for any other."""
    adapter = adapter.resolve()
    return unescape_name(adapter.name) if adapter.parent.name == ADAPTERS and run_of(adapter) is not None else None


def require_named(path: Path, name: str | None) -> Path:
    """The directory of the adapter ``name``. InputError: it does not exist, or ``name`` is None."""
    if name is not None:
        return require_all_named(path, [name])[name]
    known, listed = _known(path)
    raise InputError(f"{path}: has {len(known):,} adapters; name one with --adapter NAME. {listed}")


def require_all_named(path: Path, names: Iterable[str], sources: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Map these adapters to their directories; ``sources`` says where a name stands, if not in ``--adapter``.

    InputError: one does not exist.
    """
    known, listed = _known(path)
    found = {}
    for name in names:
        if name not in known:
            end = did_you_mean(name, known)
            if entry := entry_of(try_read_json(path / "run.json"), name):
                end = f": {_NOT_SAVED.get(str(entry.get('status')), 'it has not finished')}."
            said = f"--adapter {shown_name(name)}: {path} has no adapter of this name"
            if sources and name in sources:
                said = f"{sources[name]}: {path} has no adapter {shown_name(name)}"
            raise InputError(f"{said}{end} {listed}")
        found[name] = known[name]
    return found


def _known(path: Path) -> tuple[dict[str, Path], str]:
    """Return the adapters by name, and a sentence that names the first of them."""
    root = adapters_root(path)
    assert root is not None
    known = named_directories(root)
    if not known:
        recipe = root.parent / RECIPE_FILE
        raise InputError(f"{path}: has no finished adapter yet; go on with `qvera train {recipe} --resume`.")
    names = ", ".join(map(shown_name, list(known)[:_SHOWN_NAMES]))
    more = f" and {len(known) - _SHOWN_NAMES:,} more; `qvera info {path}` lists them" * (len(known) > _SHOWN_NAMES)
    return known, f"There are: {names}{more}."


def refuse_name(path: Path, name: str | None) -> None:
    """Raise InputError where ``--adapter`` was given for a single adapter or a checkpoint."""
    if name is not None:
        raise InputError(
            f"--adapter {shown_name(name)}: is for a run that trained many adapters, or a directory of adapters, and "
            f"{path} is neither. Leave it out."
        )


def rows_of(datasets: Datasets, name: str | None) -> tuple[Rows, Rows]:
    """The training and the held-out rows of one adapter, or all where ``name`` is None or the data names no adapters.

    An adapter that the data does not name has none, such as one that a server's job has trained on rows of its own.
    """
    if name is None or not datasets.adapters:
        return datasets.train, datasets.eval
    own = next((adapter for adapter in datasets.adapters if adapter.name == name), None)
    if own is None:
        return datasets.train[:0], datasets.eval[:0]
    return datasets.train.take(own.train), datasets.eval.take(own.eval)


def require_held_out_rows(datasets: Datasets, name: str | None) -> Rows:
    """The held-out rows of `rows_of`. InputError: there are none."""
    if rows := rows_of(datasets, name)[1]:
        return rows
    whose = "the recipe holds out no rows" if name is None else f"adapter {shown_name(name)} has no held-out rows"
    raise InputError(f"{whose}, so there is nothing to score it on. Name a file with --data.")
