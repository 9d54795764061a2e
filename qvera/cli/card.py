"""`qvera card` and `qvera push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.common import AdapterName, console, progress, quiet_libraries, require_new_file
from qvera.utils import formatting
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


def push(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run, an adapter directory, or an export.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the hub.")],
    adapter: AdapterName = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made now is private.")] = False,
) -> None:
    """Send an adapter or an export to the hub.

    A run's adapter, or the files of what `qvera export` wrote, and README.md: the one beside them, else the card that
    `qvera card` writes. Recipes, data and certificates stay here. The token is that of `hf auth login` or HF_TOKEN.

    Example:
        qvera push runs/quickstart anna/orders --private
    """
    quiet_libraries()

    from qvera.exporting.card import contents_of, files_of, find_subject, local_base
    from qvera.models.hub import send_files

    subject = find_subject(path, adapter)
    files = files_of(subject)
    if (base := local_base(subject)) is not None:
        console.print(
            f"The adapter names a directory of this computer as its base, {base}. Others need that model under the "
            "same name. Train with a hub id in model.path to name it for them.",
            style="yellow",
            markup=False,
            highlight=False,
        )
    size = sum(file.stat().st_size for file in files)
    with progress(f"Sending {formatting.size(size)}"):
        contents = contents_of(subject, repo)
        address = send_files(contents, repo, private=private, message=f"{subject.kind} by qvera")
    print(f"{address}: {formatting.size(size)} in {len(contents) - 1} files, and README.md")
