"""What other servers' client tests check, in our words: Tinker's unchanged client against real training.

Two of them use nothing but the client. Their other files test the insides of their servers.

**SkyRL**, tests/tinker/test_api.py (NovaSky-AI/SkyRL at 00cfa9d2). All of its checks are here or in the files beside this
one, but for these:

- rows without ``weights`` count 1 a token: refused here by name, as the protocol has them;
- outputs with ``elementwise_loss``: the protocol has log-probabilities alone;
- ``load_state`` into a model that has taken steps: Tinker takes it as a model's first call only;
- ``get_checkpoint_archive_url`` and ``unload_model``: 0.38 has neither; external weights and ``finish`` took their place;
- ``topk_prompt_logprobs`` is refused: it is answered here; and the command lines of its own engine.

**open-rl**, tests/tinker_client_compat.py (gke-labs/open-rl at 33a30168), calls every public method of the client, with
ids that mostly do not exist. Here each method gets arguments with which it has to work.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.serve.tinker.conftest import serving

tinker = pytest.importorskip("tinker", reason="pip install 'qvera[test]'")
torch = pytest.importorskip("torch")

REFUSED = {
    "get_audit_log": "audit",
    "get_billing_usage": "billing/usage",
    "get_current_checkpoint_storage_usage": "checkpoints/current",
    "assign_session_project": "project",
    "export_session_trace": "trace",
    "search_sessions": "search",
    "whoami": "JWT",
}
"""Methods for what this server does not have: organizations, bills, projects, traces, and tokens of its own. What the
error names."""


@pytest.fixture(scope="module")
def url(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tiny_model_dir, tmp_path_factory.mktemp("tinker")) as (url, _):
        yield url


@pytest.fixture
def service(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-dummy")
    with tinker.ServiceClient(base_url=url, api_key="tml-dummy") as client:
        yield client


def datum(tokens: list[int], weights: list[float]) -> Any:
    inputs = {"target_tokens": tokens[1:], "weights": weights}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


ROWS = [datum([5, 6, 7, 8], [0.0, 0.0, 0.0]), datum([9, 10, 11, 12, 13], [0.0, 0.0, 1.0, 1.0])]


def logprobs(result: Any) -> list[list[float]]:
    return [output["logprobs"].data for output in result.loss_fn_outputs]


def own_cross_entropy(rows: list[Any], found: list[Any]) -> Any:
    losses = [-(lp * row.loss_fn_inputs["weights"].to_torch()).sum() for row, lp in zip(rows, found, strict=True)]
    return torch.stack(losses).sum(), {}


def test_a_training_run_of_skyrl(service: Any, tiny_model_dir: Path) -> None:
    names = [model.model_name for model in service.get_server_capabilities().supported_models]
    assert "tiny" in names
    training = service.create_lora_training_client(base_model=str(tiny_model_dir)).result()
    assert training.get_tokenizer().encode("Hello")
    path = training.save_state(name="0000").result().path
    training.save_weights_for_sampler(name="0000").result()  # of the same name, and another thing
    first = training.forward_backward(ROWS, "cross_entropy").result()
    training.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    assert first.metrics["loss:sum"] == pytest.approx(-sum(logprobs(first)[1][2:]), rel=1e-5)
    assert logprobs(training.forward(ROWS, "cross_entropy").result()) != logprobs(first)
    resumed = service.create_training_client_from_state(path).result()
    custom = resumed.forward_backward_custom(ROWS, own_cross_entropy).result()
    again = resumed.forward_backward(ROWS, "cross_entropy").result()
    assert logprobs(custom) == logprobs(again) == logprobs(first)
    assert resumed.optim_step(tinker.AdamParams()).result().metrics["grad_norm:mean"] > 0
    rest = service.create_rest_client()
    listed = [one.checkpoint_id for one in rest.list_checkpoints(training.model_id).result().checkpoints]
    assert sorted(listed) == ["sampler_weights/0000", "weights/0000"]
    runs = rest.list_training_runs().result()
    assert runs.cursor.total_count == len(runs.training_runs)
    run = next(run for run in runs.training_runs if run.training_run_id == training.model_id)
    assert (run.base_model, run.is_lora, run.lora_rank) == (str(tiny_model_dir), True, 32)
    assert not run.corrupted


def methods() -> list[tuple[str, str]]:
    """Client and method of every public method of the client."""
    found = []
    public = importlib.import_module("tinker.lib.public_interfaces")
    for module in pkgutil.iter_modules(public.__path__):
        name = "".join(part.capitalize() for part in module.name.split("_"))
        kind = getattr(importlib.import_module(f"{public.__name__}.{module.name}"), name, None)
        if (
            inspect.isclass(kind) and name.endswith("Client") and name != "AdminClient"
        ):  # all of its methods are RestClient's
            found += [(name, one) for one in dir(kind) if not one.startswith("_") and callable(getattr(kind, one))]
    return found


def result_of(value: Any) -> Any:
    """What a method's coroutine or future gives, within a time."""

    async def awaited(one: Any) -> Any:
        return await asyncio.wait_for(one, 20)

    if inspect.isawaitable(value) and not hasattr(value, "result"):
        value = asyncio.run(awaited(value))
    return value.result(timeout=20) if hasattr(value, "result") else value


def test_each_method_of_the_client_works_or_is_refused_by_name(
    service: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_PROJECT_ID", "none")  # `copy_weights` asks for one
    base, count = str(tiny_model_dir), iter(range(1000))
    training = service.create_lora_training_client(base_model=base, rank=2).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    clients = {"ServiceClient": service, "TrainingClient": training, "SamplingClient": sampler}
    clients["RestClient"] = service.create_rest_client()
    used = training.save_weights_for_sampler("used").result().path
    external = training.save_weights_external("out").result().path

    def state() -> str:
        return str(training.save_state(f"state-{next(count)}").result().path)

    values: dict[str, Callable[[], Any]] = {
        "adam_params": tinker.AdamParams,
        "base_model": lambda: base,
        "checkpoint_id": lambda: state().split("/", 3)[3],
        "data": lambda: ROWS,
        "ending_before": lambda: datetime(2026, 2, 1, tzinfo=UTC),
        "fn": lambda: lambda logprobs, weights: ((logprobs * weights).sum(), {}),
        "handle": sampler.get_sampler_handle,
        "holder": lambda: service.holder,
        "input_ranks": lambda: {"logprobs": 1, "weights": 1},
        "loss_fn": lambda: "cross_entropy",
        "model_path": lambda: used,
        "name": lambda: f"name-{next(count)}",
        "num_samples": lambda: 1,
        "optim_params": tinker.AdamParams,
        "path": state,
        "project_id": lambda: "project",
        "prompt": lambda: tinker.ModelInput.from_ints([5, 6]),
        "queue_state": lambda: None,
        "queue_state_reason": lambda: None,
        "rank": lambda: 2,
        "request": lambda: tinker.types.SessionSearchRequest(),
        "sampler_id": lambda: sampler._sampling_session_id,
        "sampling_params": lambda: tinker.SamplingParams(max_tokens=1),
        "session_id": service.holder.get_session_id,
        "starting_on": lambda: datetime(2026, 1, 1, tzinfo=UTC),
        "status": lambda: "success",
        "tinker_path": state,
        "training_run_id": lambda: training.model_id,
        "ttl_seconds": lambda: 3600,
    }
    wrong = {}
    for client, method in sorted(methods(), key=lambda one: one[1] == "close"):
        plain = method.removesuffix("_async")
        call = getattr(clients[client], method)
        if plain.startswith("load_state"):
            fresh = service.create_lora_training_client(base_model=base, rank=2).result()
            call = getattr(fresh, method)
        also = ("rank", "base_model", "optim_params")
        parameters = inspect.signature(call).parameters.values()
        given = {one.name: values[one.name]() for one in parameters if one.default is one.empty and one.kind < 2}
        given |= {one.name: values[one.name]() for one in parameters if one.name in also}
        if plain == "forward_backward_custom":
            given["loss_fn"] = own_cross_entropy
        if plain in ("get_external_weights_urls",):
            given["tinker_path"] = external
        if plain == "create_sampling_client":
            given = {"model_path": used}
        try:
            result_of(call(**given))
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if bool(said) != (plain in REFUSED) or REFUSED.get(plain, "") not in said:
            wrong[f"{client}.{method}"] = said
    assert wrong == {}
