"""The models of a server: list, describe, load and unload. An adapter is a model whose parent is the base."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from qvera.serve.api.access import Access
from qvera.serve.api.errors import ApiError, bad_request
from qvera.serve.api.fine_tuning import ask, training_of
from qvera.serve.api.schemas import AdapterBody, LoadLoraBody, UnloadLoraBody
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.fine_tuning.database import NotMade
from qvera.utils.adapter_names import unescape_name
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.jobs import Jobs

router = APIRouter()


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    """List the base, and every adapter that the sender may use."""
    access, service = require(request, "use"), service_of(request)

    def listed() -> Response:  # of thousands of adapters, a megabyte
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.names(access)]})

    return await service.in_thread(listed)


@router.get("/v1/models/{name:path}", response_model=None)
async def describe_model(request: Request, name: str) -> Response:
    """Describe one model. An adapter has its rows, scores, size and base, too."""
    access, service = require(request, "use"), service_of(request)

    def card() -> dict[str, Any]:
        service.require_model(name, access)
        if not _is_adapter(service, name):
            return _card(service, name)
        facts = {key: fact for key, fact in service.store.facts(name).items() if key != "directory"}
        if facts["base"] is not None and Path(facts["base"]).is_absolute():
            facts["base"] = Path(facts["base"]).name  # others need not know where it is
        return {**_card(service, name), "created": int(facts.pop("changed")), "qvera": facts}

    return JSONResponse(await service.in_thread(card))


@router.delete("/v1/models/{name:path}", response_model=None)
async def delete_model(request: Request, name: str) -> Response:
    """Delete a model that a fine-tuning job of the sender has made; answers that are running finish on it."""
    access, service, _ = training_of(request)

    def delete(jobs: Jobs, owner: str) -> None:
        service.require_model(name, access)
        not_made = ApiError(403, f"No fine-tuning job of this key has made {name!r}, so it can't delete it.", "model")
        if not _is_adapter(service, name):
            raise not_made
        # looked up before it is deleted, as its identity is needed afterwards
        adapter = None
        with contextlib.suppress(InputError):  # a damaged one can be deleted all the same
            adapter = service.store.resolve(name)
        try:
            jobs.delete_model(name, owner)
        except NotMade:
            raise not_made from None
        if adapter is not None:
            service.engine.unload(adapter.identity)

    await ask(request, delete)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


def _is_adapter(service: Service, name: str) -> bool:
    """Whether a name means one adapter, and neither the base nor a blend."""
    return name not in service.store.base_names and service.store.parts_of(name) == [name]


def _card(service: Service, name: str) -> dict[str, Any]:
    base = service.base_name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qvera",
        "root": base,
        "parent": None if name in service.store.base_names else base,
    }


@router.post("/v1/load_adapter", response_model=None)
async def load_adapter(request: Request, body: AdapterBody) -> Response:
    """Put an adapter's vectors on the device now, so that its first answer does not wait for that."""
    await _load(request, body.name)
    return JSONResponse({"name": body.name, "status": "loaded"})


@router.post("/v1/unload_adapter", response_model=None)
async def unload_adapter(request: Request, body: AdapterBody) -> Response:
    """Free an adapter's place on the device. The next request for it loads it again."""
    await _unload(request, body.name, forget=False)
    return JSONResponse({"name": body.name, "status": "unloaded"})


@router.post("/v1/load_lora_adapter", response_model=None)
async def load_lora_adapter(request: Request, body: LoadLoraBody) -> Response:
    """Give a directory within the server's directory of adapters a name, and load it, as vLLM does."""
    await _load(request, body.lora_name, body.lora_path, body.load_inplace)
    return JSONResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_model=None)
async def unload_lora_adapter(request: Request, body: UnloadLoraBody) -> Response:
    """Forget an adapter's name, as vLLM does. No new request finds it; running ones finish."""
    await _unload(request, body.lora_name, forget=True)
    return JSONResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _load(request: Request, name: str, directory: str | None = None, replace: bool = False) -> None:
    access, service = require(request, "load"), service_of(request)

    def load() -> None:
        _require_adapter(service, name, access)
        before = None
        if directory is not None:
            if name in service.store.names() and not replace:
                raise bad_request(
                    f"The adapter {name!r} is there already. Replace it with load_inplace: true.", "lora_name"
                )
            before = service.store.add(name, _inside(service.store.root, directory, access), replace)
        try:
            adapter = service.resolve(name, access)
            assert adapter is not None
            service.engine.load(adapter)
        except InputError:
            # a damaged directory leaves the name as it was
            if before is not None:
                service.store.add(name, before, replace=True)
            elif directory is not None:
                service.store.remove(name)
            raise

    await service.in_thread(load)


async def _unload(request: Request, name: str, forget: bool) -> None:
    access, service = require(request, "load"), service_of(request)

    def unload() -> None:
        _require_adapter(service, name, access)
        adapter = None
        try:
            adapter = service.resolve(name, access)
        except InputError:
            if not forget:  # a damaged one can be forgotten all the same
                raise
        if forget:
            service.store.remove(name)
        if adapter is not None:
            service.engine.unload(adapter.identity)

    await service.in_thread(unload)


def _require_adapter(service: Service, name: str, access: Access) -> None:
    if name in service.store.base_names:
        raise bad_request(f"{name!r} is the base, which is always there.")
    if not access.covers(name):
        raise service.unknown(name, access)


def _inside(root: Path | None, directory: str, access: Access) -> Path:
    """The path of a directory in the server's directory of adapters.

    Raises ApiError, the same one, if it lies elsewhere or is not the sender's, so nobody learns what exists.
    """
    if root is None:
        raise ApiError(403, "This server has no directory of adapters (--adapters DIR).", "lora_path")
    try:
        inside = (root / directory).resolve()
        good = inside.parent == root.resolve() and inside.is_dir() and access.covers(unescape_name(inside.name))
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        good = False
    if not good:
        raise ApiError(403, f"lora_path: expected the name of a directory in {root.name}/.", "lora_path")
    return root / inside.name
