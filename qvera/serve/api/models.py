"""The models of a server: list, describe, load and unload. An adapter is a model whose parent is the base."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor

from qvera.serve.api.access import Access
from qvera.serve.api.errors import ApiError, bad_request
from qvera.serve.api.fine_tuning import Trainer
from qvera.serve.api.schemas import AdapterBody, LoadLoraBody, UnloadLoraBody
from qvera.serve.api.service import Sender, Service, User, sent_by
from qvera.serve.fine_tuning.database import not_made
from qvera.utils.adapter_names import unescape_name
from qvera.utils.errors import InputError


class _Name(PathConvertor):
    """A name in a path. A path of Starlette's own ends at a line break, which a name may hold."""

    regex = "(?s:.*)"


register_url_convertor("qvera_model", _Name())  # Starlette has one table for all applications of a process
router = APIRouter()
Loader = Annotated[Sender, sent_by(Sender, "load")]


@router.get("/v1/models")
def list_models(sender: User) -> JSONResponse:
    """List the base, and every adapter that the sender may use."""
    service = sender.service  # written here, in a thread: of thousands of adapters it is a megabyte
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.names(sender.access)]})


@router.get("/v1/models/{name:qvera_model}")
def describe_model(sender: User, name: str) -> dict[str, Any]:
    """Describe one model. An adapter has its rows, scores, size and base, too."""
    service = sender.service
    service.require_model(name, sender.access)
    if not _is_adapter(service, name):
        return _card(service, name)
    facts = {key: fact for key, fact in service.store.facts(name).items() if key != "directory"}
    if facts["base"] is not None and Path(facts["base"]).is_absolute():
        facts["base"] = Path(facts["base"]).name  # others need not know where it is
    return {**_card(service, name), "created": int(facts.pop("changed")), "qvera": facts}


@router.delete("/v1/models/{name:qvera_model}")
def delete_model(training: Trainer, name: str) -> dict[str, Any]:
    """Delete a model that a fine-tuning job of the sender has made; answers that are running finish on it."""
    service = training.service
    service.require_model(name, training.access)
    if not _is_adapter(service, name):
        raise not_made(name)
    # looked up before it is deleted, as its identity is needed afterwards
    adapter = None
    with contextlib.suppress(InputError):  # a damaged one can be deleted all the same
        adapter = service.store.resolve(name)
    training.jobs.delete_model(name, training.owner)
    if adapter is not None:
        service.engine.unload(adapter.identity)
    return {"id": name, "object": "model", "deleted": True}


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


@router.post("/v1/load_adapter")
def load_adapter(sender: Loader, body: AdapterBody) -> dict[str, str]:
    """Put an adapter's vectors on the device now, so that its first answer does not wait for that."""
    _load(sender, body.name)
    return {"name": body.name, "status": "loaded"}


@router.post("/v1/unload_adapter")
def unload_adapter(sender: Loader, body: AdapterBody) -> dict[str, str]:
    """Free an adapter's place on the device. The next request for it loads it again."""
    _unload(sender, body.name, forget=False)
    return {"name": body.name, "status": "unloaded"}


@router.post("/v1/load_lora_adapter")
def load_lora_adapter(sender: Loader, body: LoadLoraBody) -> str:
    """Give a directory within the server's directory of adapters a name, and load it, as vLLM does."""
    _load(sender, body.lora_name, body.lora_path, body.load_inplace)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter")
def unload_lora_adapter(sender: Loader, body: UnloadLoraBody) -> str:
    """Forget an adapter's name, as vLLM does. No new request finds it; running ones finish."""
    _unload(sender, body.lora_name, forget=True)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _load(sender: Sender, name: str, directory: str | None = None, replace: bool = False) -> None:
    service, before = sender.service, None
    _require_adapter(sender, name)
    if directory is not None:
        if name in service.store.names() and not replace:
            raise bad_request(
                f"The adapter {name!r} is there already. Replace it with load_inplace: true.", "lora_name"
            )
        before = service.store.add(name, _inside(service.store.root, directory, sender.access), replace)
    try:
        adapter = service.resolve(name, sender.access)
        assert adapter is not None
        service.engine.load(adapter)
    except InputError:
        # a damaged directory leaves the name as it was
        if before is not None:
            service.store.add(name, before, replace=True)
        elif directory is not None:
            service.store.remove(name)
        raise


def _unload(sender: Sender, name: str, forget: bool) -> None:
    service, adapter = sender.service, None
    _require_adapter(sender, name)
    try:
        adapter = service.resolve(name, sender.access)
    except InputError:
        if not forget:  # a damaged one can be forgotten all the same
            raise
    if forget:
        service.store.remove(name)
    if adapter is not None:
        service.engine.unload(adapter.identity)


def _require_adapter(sender: Sender, name: str) -> None:
    if name in sender.service.store.base_names:
        raise bad_request(f"{name!r} is the base, which is always there.")
    if not sender.access.covers(name):
        raise sender.service.unknown(name, sender.access)


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
