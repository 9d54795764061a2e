"""`qvera serve` and `qvera ui`."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qvera.cli.common import argument, check_target, flag, number, option, progress, say
from qvera.serve.api.access import DEFAULTS, is_loopback
from qvera.serve.requests import EngineSettings
from qvera.utils.errors import InputError, require_packages
from qvera.utils.files import runs_in
from qvera.utils.formatting import counted, first_of

if TYPE_CHECKING:
    from qvera.serve.background import BackgroundWork
    from qvera.serve.engine import Engine
    from qvera.serve.opening import Served


_ENGINE = EngineSettings()
_TRAIN_AT_ONCE, _MAX_RANK = 8, 64


def _address(host: str) -> str:
    if re.search(r"/|^[^:]*:\d+$", host):
        raise typer.BadParameter(f"{host!r} is more than an address such as 127.0.0.1; a port goes to --port.")
    return host


Port = Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: a free one.")]


def serve(
    model: Annotated[
        str | None, argument("BASE_OR_RUN", "A run, a directory of adapters, or a base: a directory or hub id.")
    ] = None,
    adapters: Annotated[Path | None, option("DIR", "A directory of adapters (default: the run's own).")] = None,
    host: Annotated[
        str, typer.Option(callback=_address, metavar="ADDRESS", help="Any but the loopback address needs --keys.")
    ] = "127.0.0.1",
    port: Port = 8000,
    keys: Annotated[Path | None, option("FILE", "Who may use what; --new-key makes it.")] = None,
    new_key: Annotated[str | None, option("NAME", "Add a key to the file of --keys, print it, and end.")] = None,
    allow: Annotated[
        list[str] | None, option("MODEL", "With --new-key: a model it may use (repeatable; default: all).")
    ] = None,
    may: Annotated[
        list[str] | None, option("use|load|train", "With --new-key: what it may do (repeatable; default: use).")
    ] = None,
    engine: Annotated[
        Literal["auto", "continuous", "static"],
        typer.Option(help="How requests are batched; auto: continuous where the model allows it."),
    ] = "auto",
    running: Annotated[int, number("Requests answered at a time.")] = _ENGINE.max_running,
    queue: Annotated[int, number("Requests that may wait; one more gets 429.", 0)] = _ENGINE.max_waiting,
    slots: Annotated[int, number("Adapters on the device at a time.")] = _ENGINE.slots,
    cache_tokens: Annotated[int | None, number("Tokens of the KV cache (default: as memory allows).")] = None,
    max_prompt_tokens: Annotated[int, number("Longest prompt.")] = DEFAULTS.prompt_tokens,
    max_new_tokens: Annotated[int, number("Longest answer.")] = DEFAULTS.new_tokens,
    max_answers: Annotated[int, number("Answers of one call: prompts times n.")] = DEFAULTS.answers,
    max_open_answers: Annotated[int, number("With --keys: answers a key may have open.")] = DEFAULTS.open_answers,
    max_connections: Annotated[
        int | None, number("Connections open at a time (default: 512; with --tinker 4096).")
    ] = None,
    max_body_bytes: Annotated[int, number("Largest body.")] = DEFAULTS.body_bytes,
    max_seconds: Annotated[float, number("Longest time of one call.", 0.1)] = DEFAULTS.seconds,
    drain_seconds: Annotated[float, number("After SIGTERM, calls may finish for so long.", 0)] = DEFAULTS.drain_seconds,
    training_dir: Annotated[Path | None, option("DIR", "Take files and fine-tuning jobs, and keep them there.")] = None,
    train_at_once: Annotated[int, number("With --training-dir: jobs trained together.")] = _TRAIN_AT_ONCE,
    training_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Of the time, while there are answers to give (default: 0.1; with --tinker 0.5).",
        ),
    ] = None,
    tinker: Annotated[
        bool, flag("--tinker", "With --training-dir: Tinker's API below /api/v1; clients train by loops of their own.")
    ] = False,
    max_rank: Annotated[int, number("With --tinker: most rank of LoRA.")] = _MAX_RANK,
    max_file_bytes: Annotated[int, number("Largest uploaded file.")] = DEFAULTS.file_bytes,
    batch_invariant: Annotated[
        bool, flag("--batch-invariant", "Answers are the same to the bit whoever shares the batch; slower.")
    ] = False,
    log_calls: Annotated[bool, flag("--log-calls", "Write a line for each call.")] = False,
) -> None:
    """Serve a base and its adapters by OpenAI's API.

    An adapter is a model: name it as "model" of /v1/chat/completions or /v1/completions. SIGTERM or Ctrl-C lets
    running calls finish.

    Example:
        qvera serve runs/customers --port 8000
    """
    from qvera.serve.api.access import ALL, KeyFile
    from qvera.serve.api.access import new_key as make_key

    if new_key is not None:
        if keys is None:
            raise InputError(
                "--new-key: name the file that it goes into with --keys FILE; it is made where it is missing."
            )
        key = make_key(keys, new_key, allow or [ALL], may or ["use"])
        say(f"{new_key} is in {keys}, as a hash. The key itself is shown only now:")
        print(key)
        return
    if allow or may:
        raise InputError("--allow, --may: describe a new key; give --new-key NAME too.")
    if model is None:
        raise InputError("name what to serve: a run, a directory of adapters, or a base.")
    if not is_loopback(host) and keys is None:
        raise InputError(
            f"--host {host}: others can reach this address, so it needs --keys FILE. Make a key with "
            "`qvera serve --new-key NAME --keys FILE`, or leave --host out."
        )
    if batch_invariant and engine == "static":
        raise InputError("--batch-invariant needs continuous batches: leave out --engine static.")
    if tinker and training_dir is None:
        raise InputError("--tinker: keeps what is trained in a directory; name one with --training-dir DIR.")
    idle = {"--train-at-once": train_at_once != _TRAIN_AT_ONCE, "--training-share": training_share is not None}
    for switch, is_on, options in (
        ("--training-dir", training_dir is not None, idle),
        ("--tinker", tinker, {"--max-rank": max_rank != _MAX_RANK}),
    ):
        if not is_on and (given := [name for name, is_given in options.items() if is_given]):
            raise InputError(f"{given[0]}: goes with {switch} only.")
    from qvera.evaluation.named_adapters import adapters_root

    if training_dir is not None and not tinker and adapters is None and adapters_root(Path(model)) is None:
        raise InputError(
            "--training-dir: what is trained becomes a model of the directory of adapters, and there is none. Name one "
            "with --adapters DIR; it may be empty."
        )
    require_packages("serve", "fastapi", "prometheus_client", "python_multipart", "uvicorn", *["zstandard"] * tinker)

    check_target(model, takes_bases=True)
    if adapters is not None and (runs := runs_in(adapters)):
        raise InputError(
            f"--adapters {adapters}: is a directory of runs. Expected one with an adapter in each of its directories. "
            f"Copy them there, `mkdir adapters; cp -r {runs[0]}/adapter adapters/{runs[0].name}`, and "
            "serve their base with --adapters adapters."
        )

    import dataclasses

    from qvera.serve.api.server import Server, bound

    key_file = KeyFile(keys) if keys is not None else None
    limits = dataclasses.replace(
        DEFAULTS,
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        answers=max_answers,
        open_answers=max_open_answers,
        connections=max_connections or (4096 if tinker else DEFAULTS.connections),
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
        batch_invariant=batch_invariant,
        # in a loop of RL nothing is trained while it samples, and it samples nothing while it trains
        training_share=training_share if training_share is not None else 0.5 if tinker else _ENGINE.training_share,
        answering_seconds=0.0 if tinker else _ENGINE.answering_seconds,
    )
    with bound(host, port) as (listener, url), contextlib.ExitStack() as ending:
        # these import torch, which takes long; a taken port is told before
        from qvera.evaluation.generate import PromptWriter, end_tokens
        from qvera.serve.api.app import create_app
        from qvera.serve.api.service import Service
        from qvera.serve.opening import open_served

        directory = jobs = tinker_api = None
        if training_dir is not None:
            from qvera.serve.fine_tuning.directory import TrainingDirectory

            directory = ending.enter_context(TrainingDirectory.open(training_dir))
        with progress(f"loading {model}"):
            served = open_served(model, adapters)
            base, prompts = served.opened.base, PromptWriter.of(served.opened)
            answering = start_engine(served, settings)
        for name in served.store.hidden_names():
            say(f"The adapter {name!r} is called like the base, so it can't be asked for. Rename its directory.")
        ending.callback(answering.close)
        works: list[BackgroundWork] = []
        if directory is not None and not (tinker and served.store.root is None):
            from qvera.serve.fine_tuning.jobs import open_jobs

            jobs = open_jobs(directory, served, answering, train_at_once)
            works.append(jobs.worker)
        elif tinker:
            say("Files and fine-tuning jobs are off: they need a directory of adapters (--adapters DIR).")
        if directory is not None and tinker:
            from qvera.serve.tinker.tenancy import open_tinker

            tinker_api = ending.enter_context(open_tinker(directory.path / "tinker", served, answering, max_rank))
            works.append(tinker_api.tenants)
        answering.set_background(*works)
        ends = frozenset(end_tokens(base.model, base.tokenizer))
        app = create_app(
            Service(answering, served.store, prompts, ends, served.base_name, limits, key_file, jobs, tinker_api)
        )
        if jobs is not None:
            ending.enter_context(jobs)
        ending.callback(answering.close)  # first: no thread trains while the jobs are saved
        names = served.store.names()
        if key_file is not None and (unknown := key_file.unknown({served.base_name, *names})):
            say(f"{keys}: no model here is called {first_of(unknown)} yet, which keys may use.", style="yellow")
        called = f" {names[0]!r}" if len(names) == 1 else ""
        said = f"{served.base_name} and {counted(len(names), 'adapter')}{called} at {url}/v1. Ctrl-C ends it."

        def stopping(calls: int) -> None:
            rest = f"; {counted(calls, 'call')} may finish within {drain_seconds:g} s. Again: at once" if calls else ""
            say(f"stopping{rest}")

        Server(app, log_calls=log_calls, on_start=lambda: say(said, soft_wrap=True), on_stop=stopping).run(
            sockets=[listener]
        )


def start_engine(served: Served, settings: EngineSettings) -> Engine:
    """A started engine, with an adapter loaded. InputError: the adapter that was named can't be served."""
    from qvera.models.structure import context_limit, rope_limit
    from qvera.serve.engine import Engine
    from qvera.serve.opening import warm_up
    from qvera.utils.memory import is_out_of_memory

    engine = Engine(served.opened.base, settings)
    if engine.why_static is not None:
        say(f"{engine.why_static} Answering in static batches.")
    if engine.longest_tokens < context_limit(engine.model) and engine.longest_tokens == rope_limit(engine.model.config):
        say(
            f"A prompt and its answer may have {engine.longest_tokens:,} tokens: a longer one would change this base's "
            "rotary embeddings for all requests of its step. `qvera generate` answers it."
        )
    engine.start()
    try:
        warm_up(engine, served.store, served.own)
    except (InputError, RuntimeError) as error:
        engine.close()
        if is_out_of_memory(error):
            raise InputError(
                f"the adapter and room for {settings.slots:,} others do not fit into memory. Lower --slots."
            ) from None
        raise
    return engine


def ui(
    runs: Annotated[list[Path], argument("RUNS", "Directories that hold runs, or directories of runs.")],
    host: Annotated[
        str, typer.Option(callback=_address, metavar="ADDRESS", help="Beyond the loopback address anyone can read.")
    ] = "127.0.0.1",
    port: Port = 8001,
    open_browser: Annotated[bool, flag("--open", "Open the page in a browser.")] = False,
    train: Annotated[bool, flag("--train", "A form that starts runs in the first RUNS, for who has the key.")] = False,
) -> None:
    """Show runs in a browser, while they train.

    A list of all runs, a page for each with curves that grow, comparisons, answers before and after, adapters. Reads
    the runs' files and writes nothing but --train's recipes. New runs show up by themselves. Ctrl-C ends it.

    Example:
        qvera ui runs
    """
    if train and not is_loopback(host):
        raise InputError(f"--train: starts processes, which others must not reach; leave out --host {host}.")
    require_packages("serve", "starlette", "uvicorn")

    from qvera.serve.api.server import Server, bound
    from qvera.serve.ui.app import create_app

    if train:
        with contextlib.suppress(OSError):  # it is there, or `create_app` says what is wrong with it
            runs[0].mkdir()
    app = create_app(runs, host, train)
    starter = app.state.service.pages.starter
    with bound(host, port) as (listener, url), contextlib.ExitStack() as ending:
        if starter is not None:
            ending.callback(starter.close)
            url = f"{url}/new?key={starter.key}"

        def started() -> None:
            print(url, flush=True)
            if not is_loopback(host):
                text = "Anyone who reaches this address can read the runs: their recipes, prompts and answers."
                say(text, soft_wrap=True)
            if open_browser:
                import webbrowser

                webbrowser.open(url)

        Server(app, on_start=started).run(sockets=[listener])
