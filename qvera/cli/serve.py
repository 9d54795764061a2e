"""`qvera serve` and `qvera ui`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qvera.cli.common import console, progress, quiet_libraries, require_packages
from qvera.serve.api.access import DEFAULTS, is_loopback
from qvera.serve.requests import EngineSettings
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qvera.serve.engine import Engine
    from qvera.serve.fine_tuning.directory import TrainingDirectory
    from qvera.serve.fine_tuning.jobs import Jobs
    from qvera.serve.opening import Served


_ENGINE = EngineSettings()
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_TRAINING_PACKAGE = "python_multipart"  # it reads uploaded files


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="BASE_OR_RUN", help="A run, a directory of adapters, or a base: a directory or hub id."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory of adapters (default: the run's own).")
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Any but the loopback address needs --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="Who may use what; --new-key makes it.")] = None,
    new_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add a key to the file of --keys, print it, and end.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="With --new-key: a model it may use (repeatable; default: all)."),
    ] = None,
    may: Annotated[
        list[str] | None,
        typer.Option(metavar="use|load|train", help="With --new-key: what it may do (repeatable; default: use)."),
    ] = None,
    engine: Annotated[
        Literal["auto", "continuous", "static"],
        typer.Option(help="How requests are batched; auto: continuous where the model allows it."),
    ] = "auto",
    running: Annotated[int, typer.Option(min=1, metavar="N", help="Requests answered at a time.")] = (
        _ENGINE.max_running
    ),
    queue: Annotated[int, typer.Option(min=0, metavar="N", help="Requests that may wait; one more gets 429.")] = (
        _ENGINE.max_waiting
    ),
    slots: Annotated[int, typer.Option(min=1, metavar="N", help="Adapters on the device at a time.")] = _ENGINE.slots,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of the KV cache (default: as memory allows).")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest prompt.")] = (
        DEFAULTS.prompt_tokens
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = DEFAULTS.new_tokens,
    max_answers: Annotated[int, typer.Option(min=1, metavar="N", help="Answers of one call: prompts times n.")] = (
        DEFAULTS.answers
    ),
    max_open_answers: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --keys: answers that one key may have open.")
    ] = DEFAULTS.open_answers,
    max_connections: Annotated[int, typer.Option(min=1, metavar="N", help="Connections open at a time.")] = (
        DEFAULTS.connections
    ),
    max_body_bytes: Annotated[int, typer.Option(min=1, metavar="N", help="Largest body.")] = DEFAULTS.body_bytes,
    max_seconds: Annotated[float, typer.Option(min=0.1, metavar="S", help="Longest time of one call.")] = (
        DEFAULTS.seconds
    ),
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="After SIGTERM, running calls may finish for so long.")
    ] = DEFAULTS.drain_seconds,
    training_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take files and fine-tuning jobs, and keep them there.")
    ] = None,
    train_at_once: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --training-dir: jobs that are trained together.")
    ] = 8,
    training_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Of the time, while there are answers to give.")
    ] = _ENGINE.training_share,
    max_file_bytes: Annotated[int, typer.Option(min=1, metavar="N", help="Largest uploaded file.")] = (
        DEFAULTS.file_bytes
    ),
    log_calls: Annotated[bool, typer.Option("--log-calls", help="Write a line for each call.")] = False,
) -> None:
    """Serve a base and its adapters by OpenAI's API.

    An adapter is a model: name it as "model" of /v1/chat/completions or /v1/completions. SIGTERM or Ctrl-C lets
    running calls finish.

    Example:
        qvera serve runs/customers --port 8000
    """
    if new_key is not None:
        _add_key(keys, new_key, allow, may)
        return
    if allow or may:
        raise InputError("--allow, --may: describe a new key; give --new-key NAME too.")
    if model is None:
        raise InputError("name what to serve: a run, a directory of adapters, or a base.")
    _require_safe(host, keys)
    require_packages("serve", *_PACKAGES, *([] if training_dir is None else [_TRAINING_PACKAGE]))
    quiet_libraries()

    import dataclasses

    from qvera.evaluation.generate import PromptWriter, end_tokens
    from qvera.serve.api.access import KeyFile
    from qvera.serve.api.app import create_app
    from qvera.serve.api.server import Server, bound
    from qvera.serve.api.service import Service
    from qvera.serve.opening import open_served

    key_file = KeyFile(keys) if keys is not None else None
    limits = dataclasses.replace(
        DEFAULTS,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        answers=max_answers,
        open_answers=max_open_answers,
        connections=max_connections,
        body_bytes=max_body_bytes,
        file_bytes=max_file_bytes,
        seconds=max_seconds,
        drain_seconds=drain_seconds,
    )
    settings = dataclasses.replace(
        _ENGINE,
        max_running=running,
        max_waiting=queue,
        slots=slots,
        cache_tokens=cache_tokens,
        batching=engine,
        training_share=training_share,
    )
    with bound(host, port) as (listener, url), _opened(training_dir) as directory:
        with progress(f"Loading {model}"):
            served = open_served(model, adapters)
            base, prompts = served.opened.base, PromptWriter.of(served.opened)
            answering = _start_engine(served, settings)
        for name in served.store.hidden_names():
            said = f"The adapter {name!r} is called like the base, so it can't be asked for. Rename its directory."
            console.print(said, markup=False, highlight=False)
        with contextlib.ExitStack() as ending:
            ending.callback(answering.close)
            jobs = _open_jobs(directory, served, answering, train_at_once)
            ends = frozenset(end_tokens(base.model, base.tokenizer))
            app = create_app(Service(answering, served.store, prompts, ends, served.base_name, limits, key_file, jobs))
            if jobs is not None:
                ending.enter_context(jobs)
                ending.callback(answering.close)  # first: no thread trains while the jobs are saved
            said = f"{served.base_name} and {len(served.store.names()):,} adapters at {url}/v1"
            Server(app, log_calls=log_calls, on_start=lambda: console.print(said, markup=False, highlight=False)).run(
                sockets=[listener]
            )


@contextlib.contextmanager
def _opened(training_dir: Path | None) -> Iterator[TrainingDirectory | None]:
    if training_dir is None:
        yield None
        return
    from qvera.serve.fine_tuning.directory import TrainingDirectory

    with TrainingDirectory.open(training_dir) as directory:
        yield directory


def _open_jobs(directory: TrainingDirectory | None, served: Served, engine: Engine, at_once: int) -> Jobs | None:
    if directory is None:
        return None
    from qvera.serve.fine_tuning.jobs import open_jobs

    return open_jobs(directory, served, engine, at_once)


def _add_key(keys: Path | None, name: str, allow: list[str] | None, may: list[str] | None) -> None:
    from qvera.serve.api.access import ALL, new_key

    if keys is None:
        raise InputError("--new-key: name the file that it goes into with --keys FILE; it is made where it is missing.")
    key = new_key(keys, name, allow or [ALL], may or ["use"])
    console.print(f"{name} is in {keys}, as a hash. The key itself is shown only now:", markup=False, highlight=False)
    print(key)


def _require_safe(host: str, keys: Path | None) -> None:
    if not is_loopback(host) and keys is None:
        raise InputError(
            f"--host {host}: others can reach this address, so it needs --keys FILE. Make a key with "
            "`qvera serve --new-key NAME --keys FILE`, or leave --host out."
        )


def _start_engine(served: Served, settings: EngineSettings) -> Engine:
    from qvera.serve.engine import Engine
    from qvera.serve.opening import warm_up

    engine = Engine(served.opened.base, settings)
    if engine.why_static is not None:
        console.print(f"{engine.why_static} Answering in static batches.", markup=False, highlight=False)
    engine.start()
    try:
        warm_up(engine, served.store, served.own)
    except InputError:
        engine.close()
        raise
    return engine


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
