"""What every command does the same way."""

from __future__ import annotations

import os
from pathlib import Path

import transformers
from rich.console import Console

from qvera.utils.errors import InputError

console = Console(stderr=True)


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would drown our own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def require_new_file(path: Path) -> None:
    """Raises InputError where an output file can't be made, before any work goes into it."""
    if path.exists():
        raise InputError(f"{path}: exists; nothing is overwritten, name another file.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: its directory does not exist.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: no permission to write into its directory.")
