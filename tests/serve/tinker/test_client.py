"""Tinker's own client, unchanged, against a server whose training is a double."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.tinker.conftest import StartTinker, TinkerServer

tinker = pytest.importorskip("tinker", reason="pip install 'qvera[test]'")
torch = pytest.importorskip("torch")


def datum(tokens: list[int]) -> Any:
    """A row whose targets are its tokens, all with weight 1."""
    inputs = {"target_tokens": torch.tensor(tokens), "weights": torch.ones(len(tokens))}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def client_of(server: TinkerServer, key: str = "anything") -> Any:
    return tinker.ServiceClient(base_url=server.url, api_key=f"tml-{key}")


def test_the_client_trains_saves_and_goes_on_from_a_state(server: TinkerServer) -> None:
    service = client_of(server)
    training = service.create_lora_training_client("tiny", rank=8, seed=3).result()
    assert training.get_info().lora_rank == 8
    adam = tinker.AdamParams(learning_rate=0.5)
    both = training.forward_backward([datum([1, 2]), datum([4])], "cross_entropy"), training.optim_step(adam)
    result = both[0].result()
    assert result.metrics["loss:sum"] == 7
    assert [out["logprobs"].data for out in result.loss_fn_outputs] == [[-3.0, -3.0], [-3.0]]
    assert both[1].result().metrics == {"grad_norm:mean": 7.0}
    assert len(training.forward([datum([1])], "cross_entropy").result().loss_fn_outputs) == 1
    path = training.save_state("one").result().path
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert server.tenants.models[resumed.model_id] == server.tenants.models[training.model_id]
    with pytest.raises(tinker.BadRequestError, match="stable_reinforce"):
        training.forward_backward([datum([1])], "stable_reinforce").result()
    training.optim_step(adam).result()  # it is still usable


def test_a_call_in_parts_and_a_loss_of_the_clients_own_add_up(server: TinkerServer) -> None:
    training = client_of(server).create_lora_training_client("tiny", rank=8, seed=0).result()
    result = training.forward_backward([datum([1, 1])] * 2500, "cross_entropy").result()  # three parts
    assert (result.metrics["loss:sum"], len(result.loss_fn_outputs)) == (5000, 2500)

    def loss(rows: list[Any], logprobs: list[Any]) -> Any:
        return sum((one * one).sum() for one in logprobs), {"mine": 1.0}

    own = training.forward_backward_custom([datum([2, 3])], loss).result()
    assert own.metrics["mine"] == 1.0
    assert training.optim_step(tinker.AdamParams()).result().metrics["grad_norm:mean"] == 5005


def test_a_client_ends_its_session_and_others_do_not_see_its_states(start_tinker: StartTinker) -> None:
    server = start_tinker(names=("anna", "tom"))
    with client_of(server, server.keys["anna"]) as service:
        training = service.create_lora_training_client("tiny", rank=8).result()
        path = training.save_state("one").result().path
    assert not server.tinker._models
    with pytest.raises(tinker.NotFoundError):
        client_of(server, server.keys["tom"]).create_training_client_from_state(path).result()
