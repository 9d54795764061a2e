"""Tinker's RestClient, unchanged, over checkpoints that its TrainingClient has saved."""

from __future__ import annotations

import datetime
import errno
import os
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest

from qvera.utils.errors import RunFailed
from tests.serve.tinker.conftest import StartTinker, TinkerServer
from tests.serve.tinker.test_client import client_of

tinker = pytest.importorskip("tinker", reason="pip install 'qvera[test]'")


def rest_of(server: TinkerServer, key: str = "anything") -> Any:
    return tinker.RestClient(base_url=server.url, api_key=f"tml-{key}")


def test_what_was_saved_is_listed_with_its_run_and_session(server: TinkerServer) -> None:
    service, rest = client_of(server), rest_of(server)
    training = service.create_lora_training_client(
        "tiny", rank=8, user_metadata={"renderer_name": "role_colon"}
    ).result()
    run, paths = training.model_id, []
    for name in ("a", "b", "c"):
        paths.append(training.save_state(name, ttl_seconds=7200 if name == "c" else None).result().path)
    paths.append(training.save_weights_for_sampler("a").result().path)
    assert paths[0] == f"tinker://{run}/weights/a" and paths[3] == f"tinker://{run}/sampler_weights/a"

    listed = rest.list_checkpoints(run).result().checkpoints
    assert [one.tinker_path for one in listed] == paths[::-1]
    assert listed[0].checkpoint_type == "sampler" and listed[0].size_bytes > 0 and not listed[0].public
    left = listed[1].expires_at - datetime.datetime.now(datetime.UTC)
    assert 7100 < left.total_seconds() <= 7200 and listed[2].expires_at is None
    pages = [rest.list_user_checkpoints(limit=3, offset=offset).result() for offset in (0, 3)]
    assert [one.tinker_path for page in pages for one in page.checkpoints] == paths[::-1]
    assert pages[0].cursor.total_count == 4

    found = rest.get_training_run_by_tinker_path(paths[3]).result()
    assert rest.get_training_run(run).result() == found == rest.list_training_runs().result().training_runs[0]
    assert (found.base_model, found.is_lora, found.lora_rank) == ("tiny", True, 8)
    assert found.user_metadata == {"renderer_name": "role_colon"}
    assert found.last_checkpoint.tinker_path == paths[2] and found.last_sampler_checkpoint.tinker_path == paths[3]
    info = rest.get_weights_info_by_tinker_path(paths[0]).result()
    assert (info.base_model, info.lora_rank, info.train_unembed, info.train_mlp) == ("tiny", 8, False, True)

    (session,) = rest.list_sessions().result().sessions
    assert rest.get_session(session).result().training_run_ids == [run]


def test_a_deleted_a_published_and_a_copied_checkpoint(start_tinker: StartTinker) -> None:
    server = start_tinker(names=("anna", "tom"))
    training = client_of(server, server.keys["anna"]).create_lora_training_client("tiny", rank=8, seed=5).result()
    path = training.save_state("a").result().path
    anna, tom = (rest_of(server, server.keys[name]) for name in ("anna", "tom"))
    for refused in (
        lambda: tom.get_weights_info_by_tinker_path(path),
        lambda: tom.publish_checkpoint_from_tinker_path(path),
        lambda: tom.delete_checkpoint_from_tinker_path(path),
        lambda: tom.get_training_run_by_tinker_path(path),
        lambda: tom.list_checkpoints(training.model_id),
        lambda: tom.copy_weights(path, "project"),
    ):
        with pytest.raises(tinker.NotFoundError):
            refused().result()
    anna.publish_checkpoint_from_tinker_path(path).result()
    assert anna.list_user_checkpoints().result().checkpoints[0].public
    with pytest.raises(tinker.NotFoundError):  # the name alone does not say of which kind
        anna.delete_checkpoint(training.model_id, "a").result()
    assert (
        client_of(server, server.keys["tom"]).create_training_client_from_state(path).result().get_info().lora_rank == 8
    )
    copied = tom.copy_weights(path, "project", ttl_seconds=3600).result()
    anna.unpublish_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        tom.get_weights_info_by_tinker_path(path).result()
    anna.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.NotFoundError):
        anna.get_weights_info_by_tinker_path(path).result()
    assert not list(server.directory.glob("runs/session*/weights/*"))
    resumed = client_of(server, server.keys["tom"]).create_training_client_from_state_with_optimizer(copied).result()
    assert server.tenants.models[resumed.model_id].value == 5
    assert tom.get_training_run_by_tinker_path(copied).result().last_checkpoint.tinker_path == copied


def test_the_time_that_a_checkpoint_stays_can_be_changed(server: TinkerServer) -> None:
    training, rest = client_of(server).create_lora_training_client("tiny", rank=8).result(), rest_of(server)
    path = training.save_state("a").result().path
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert rest.list_user_checkpoints().result().checkpoints[0].expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert rest.list_user_checkpoints().result().checkpoints[0].expires_at is None
    with pytest.raises(tinker.BadRequestError, match="greater than or equal to 3600"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 60).result()
    with pytest.raises(tinker.BadRequestError, match="is no name of a checkpoint"):
        training.save_state("a b").result()
    with pytest.raises(tinker.RequestFailedError, match="exists"):
        training.save_state("a").result()
    assert training.save_state("a", overwrite=True).result().path == path


def test_external_weights_are_downloaded_without_a_key(start_tinker: StartTinker) -> None:
    server = start_tinker(names=("anna", "tom"))
    training = client_of(server, server.keys["anna"]).create_lora_training_client("tiny", rank=8, seed=5).result()
    path = training.save_weights_external("out").result().path
    assert path == f"tinker://{training.model_id}/external_weights/out"
    urls = rest_of(server, server.keys["anna"]).get_external_weights_urls(path).result()
    assert list(urls.urls) == ["adapter.json"]
    url = urls.urls["adapter.json"]
    assert urllib.request.urlopen(url).read() == b"5.0"
    token = url.split("/")[-2]
    for wrong in (url.replace(token, "x" * len(token)), url.replace("adapter.json", "other")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(wrong)
        assert caught.value.code == 404
    with pytest.raises(tinker.NotFoundError):
        rest_of(server, server.keys["tom"]).get_external_weights_urls(path).result()


def test_an_encrypted_export_needs_its_key(server: TinkerServer) -> None:
    pyrage = pytest.importorskip("pyrage")
    training = client_of(server).create_lora_training_client("tiny", rank=8, seed=5).result()
    identity = pyrage.x25519.Identity.generate()
    recipients = [str(identity.to_public())]
    path = training.save_weights_external("out", age_encryption_recipients=recipients).result().path
    urls = rest_of(server).get_external_weights_urls(path).result().urls
    assert list(urls) == ["adapter.json.age"]
    assert pyrage.decrypt(urllib.request.urlopen(urls["adapter.json.age"]).read(), [identity]) == b"5.0"
    with pytest.raises(tinker.BadRequestError, match="expected keys that begin with age1 or ssh-"):
        training.save_weights_external("bad", age_encryption_recipients=["age1x"]).result()


def test_encryption_is_refused_where_the_server_can_not_do_it(
    server: TinkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    training = client_of(server).create_lora_training_client("tiny", rank=8).result()
    with pytest.raises(tinker.BadRequestError, match="it lacks pyrage"):
        training.save_weights_external("out", age_encryption_recipients=["age1x"]).result()
    training.save_weights_external("out").result()


def test_a_full_disk_is_told_in_a_way_that_lets_the_client_ask_again(
    start_tinker: StartTinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_tinker()

    training = client_of(server).create_lora_training_client("tiny", rank=8).result()
    path = training.save_state("mine").result().path

    def refusing(*_: Any, **__: Any) -> None:
        raise RunFailed("tinker.sqlite: the disk is full")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server.tinker, "create_session", refusing)
    monkeypatch.setattr(os, "makedirs", full)
    for call, body in (("create_session", {}), ("copy_weights", {"source_path": path})):
        answer = server.call(call, body)
        assert (answer.status_code, "x-should-retry" in answer.headers) == (507, False), call
        assert answer.json()["detail"] == "The server's disk is full, or can't be written. Nothing was changed."
