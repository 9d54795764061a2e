"""The FastAPI app over an engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI

import qvera
from qvera.serve.api import chat, completions, errors, files, fine_tuning, health, models
from qvera.serve.api.guard import Guard
from qvera.serve.api.keys import KeyFile
from qvera.serve.api.limits import DEFAULTS, Limits
from qvera.serve.api.metrics import Metrics
from qvera.serve.api.service import Adapters, Service
from qvera.serve.page import add_page

if TYPE_CHECKING:
    from qvera.evaluation.prompts import PromptWriter
    from qvera.serve.engine import Engine
    from qvera.serve.fine_tuning.jobs import Jobs


def create_app(
    engine: Engine,
    store: Adapters,
    prompts: PromptWriter,
    stop_tokens: frozenset[int],
    *,
    base_name: str,
    limits: Limits = DEFAULTS,
    keys: KeyFile | None = None,
    jobs: Jobs | None = None,
) -> FastAPI:
    """OpenAI's API over an engine; ``app.state.service`` is its state.

    Args:
        engine: runs already, and is ended by the caller.
        prompts: how conversations are written, and the tokenizer.
        stop_tokens: ids, each of which ends an answer.
        base_name: how the base is listed; one of the store's ``base_names``.
        keys: None: no key is asked for. Only for the loopback address.
        jobs: fine-tuning; None: its routes say that this server trains nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.service.close()

    # The pages of FastAPI's documentation load scripts from other hosts.
    app = FastAPI(title="qvera", version=qvera.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    service = Service(
        engine,
        store,
        prompts,
        base_name,
        stop_tokens,
        vocabulary=len(prompts.encoder.tokenizer),
        limits=limits,
        keys=keys,
        metrics=Metrics(engine.stats, jobs),
        jobs=jobs,
    )
    app.state.service = service
    for room in (chat, completions, models, files, fine_tuning, health):
        app.include_router(room.router)
    add_page(app)
    errors.add_handlers(app)
    app.add_middleware(Guard, service=service)
    return app
