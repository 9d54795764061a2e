"""`qvera ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvera.cli.common import console, require_packages
from qvera.serve.api.access import is_loopback


def ui(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="Directories that hold runs, or directories of runs.")
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Beyond the loopback address anyone can read.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: a free one.")] = 8001,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show runs in a browser, while they train.

    A list of all runs, a page for each with curves that grow, comparisons, answers before and after, adapters. Reads
    the runs' files and writes nothing. New runs show up by themselves. Ctrl-C ends it.

    Example:
        qvera ui runs
    """
    require_packages("serve", "starlette", "uvicorn")

    from qvera.serve.api.server import Server, bound
    from qvera.serve.ui.app import create_app

    app = create_app(runs, host)
    with bound(host, port) as (listener, url):

        def started() -> None:
            print(url, flush=True)
            if not is_loopback(host):
                console.print(
                    "Anyone who reaches this address can read the runs: their recipes, prompts and answers.",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
            if open_browser:
                import webbrowser

                webbrowser.open(url)

        Server(app, on_start=started).run(sockets=[listener])
