"""`qvera card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.common import AdapterName, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text


def card(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run, an adapter, an export, or a hub id.")],
    adapter: AdapterName = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: README.md beside the weights.")] = None,
    repo: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Where it will be, for its commands.")] = None,
) -> None:
    """Write a model card from a run.

    A README.md as the Hugging Face hub reads it: base and its license, data, method, scores before and after, and how
    to use the adapter in PEFT, transformers, vLLM, Ollama and qvera. What the run's files do not say is left out.

    Example:
        qvera card runs/quickstart
    """
    quiet_libraries()

    from qvera.exporting.card import find_subject, model_card

    subject = find_subject(path, adapter)
    file = out or subject.directory / "README.md"
    require_new_file(file)
    replace_text(file, model_card(subject, repo))
    print(f"{file}: the card of {path}")
