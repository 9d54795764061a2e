"""The order of a model's calls: gaps, repetition, refused calls, and what belongs to whom."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from qvera.serve.api.access import new_key
from qvera.serve.tinker.calls import OptimStep, parsed
from qvera.serve.tinker.messages import MESSAGES
from qvera.training.tenants import CallFailed, Done
from qvera.utils.errors import InputError
from tests.serve.tinker.conftest import StartTinker, TinkerServer, rows_body, soon


def test_a_loop_trains_and_its_results_come_by_promises(server: TinkerServer) -> None:
    model = server.model(seed=2)
    first = server.result(server.train(model, 1, [4, 5]))
    assert first.metrics["loss:sum"] == 9
    assert len(first.loss_fn_outputs[0].fields["logprobs"].data) == 2 * 4
    server.result(server.train(model, 2, [1]))
    assert server.result(server.step(model, 3)) == {"metrics": {"grad_norm:mean": 10.0}}  # gradients add up
    assert server.tenants.models[model].value == 2 - 0.5 * 10


def test_parts_of_a_call_that_come_out_of_order_all_count_before_the_step(server: TinkerServer) -> None:
    model = server.model()
    accepted = [server.train(model, seq, [seq]) for seq in (2, 3, 1)]
    step = server.step(model, 4)
    assert server.result(step)["metrics"]["grad_norm:mean"] == 6
    assert [server.result(one).metrics["loss:sum"] for one in accepted] == [2, 3, 1]


def test_a_repeated_call_is_done_once(server: TinkerServer) -> None:
    model = server.model()
    accepted = [server.train(model, 1, [5]) for _ in range(3)]
    assert len({one.json()["request_id"] for one in accepted}) == 1
    assert server.result(server.step(model, 2))["metrics"]["grad_norm:mean"] == 5


def test_a_refused_call_has_used_its_seq_id(server: TinkerServer) -> None:
    model = server.model()
    refused = [
        server.train(model, 1, loss="stable_reinforce"),
        server.call("create_custom_thing", {"model_id": model, "seq_id": 2}),
        server.call("optim_step", {"model_id": model, "seq_id": 3, "optimizer_params": {"type": "dimuon"}}),
        server.step(model, 4, beta1=7),
        server.train(model, 5, [VOCABULARY_PLUS]),
    ]
    assert [one.status_code for one in refused] == [400, 404, 400, 400, 400]
    assert all(isinstance(one.json()["detail"], str) for one in refused)
    assert "GET 'optim_step'" in server.call("optim_step", method="GET").json()["detail"]
    assert "dimuon" in refused[2].json()["detail"]
    assert "beta1" in refused[3].json()["detail"]
    began = time.monotonic()
    server.result(server.train(model, 6, [3]))
    assert time.monotonic() - began < 0.4  # it waited for none of them


VOCABULARY_PLUS = 64


@pytest.mark.parametrize(
    "adam", ["eps: 0", "beta2: 1", "beta1: NaN", "learning_rate: NaN", "weight_decay: -1", "grad_clip_norm: Infinity"]
)
def test_a_step_takes_no_numbers_that_no_step_can_be_made_of(adam: str) -> None:
    name, value = adam.split(": ")
    with pytest.raises(InputError, match=f"adam_params.{name}: Input should be"):
        parsed(OptimStep, f'{{"adam_params": {{"{name}": {value}}}}}'.encode())


def test_a_missing_seq_id_holds_up_later_calls_only_for_a_while(server: TinkerServer) -> None:
    model = server.model()
    assert server.result(server.train(model, 2, [3])).metrics["loss:sum"] == 3
    server.result(server.train(model, 1, [4]))  # late, and no step lies between
    assert server.result(server.step(model, 3))["metrics"]["grad_norm:mean"] == 7
    late = server.result(server.step(model, 5))
    assert "error" not in late
    error = server.result(server.train(model, 4, [9]))
    assert error["category"] == "user"
    assert "came after call 5" in error["error"]


def test_a_failed_call_tells_why_and_leaves_the_model_as_it_was(server: TinkerServer) -> None:
    model = server.model()
    server.result(server.train(model, 1, [5]))
    failed = server.call("save_weights", {"model_id": model, "seq_id": 2, "path": "a/b"})
    assert failed.status_code == 400
    assert server.result(server.step(model, 3))["metrics"]["grad_norm:mean"] == 5


def test_bodies_may_come_compressed_and_bombs_are_refused(start_tinker: StartTinker) -> None:
    server = start_tinker(body_bytes=1 << 16)
    model = server.model()

    def send(body: bytes) -> httpx.Response:
        headers = {"X-API-Key": "tml-x", "Content-Encoding": "zstd"}
        return httpx.post(f"{server.url}/api/v1/forward_backward", content=body, headers=headers)

    bomb = zstandard.compress(b"\0" * (10 << 20))
    assert send(bomb).status_code == 400
    assert send(b"no frame").status_code == 400
    assert server.result(send(zstandard.compress(rows_body(model, 1, [[7]])))).metrics["loss:sum"] == 7
    assert server.call("forward_backward", b"\0" * (1 << 17)).status_code == 413


@pytest.mark.parametrize("path", ["get_info", "optim_step", "save_weights", "forward_backward"])
def test_foreign_and_unknown_models_look_the_same(start_tinker: StartTinker, path: str) -> None:
    server = start_tinker(names=("anna", "tom"))
    model = server.model(key="anna")
    answers = []
    for name in (model, model.replace(":0", ":1")):
        body = rows_body(name, 1, [[1]]) if path == "forward_backward" else {"model_id": name, "seq_id": 1}
        answer = server.call(path, body, "tom")
        answers.append((answer.status_code, answer.json()["detail"].replace(name, "")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    server.result(server.train(model, 1, key="anna"), "anna")  # and used nothing up


@pytest.mark.parametrize("may", ["use", "load"])
def test_a_key_that_trains_nothing_finds_no_path_that_is_not_there(start_tinker: StartTinker, may: Any) -> None:
    server = start_tinker(names=("anna",))
    server.keys["tom"] = new_key(server.directory.parent / "keys.json", "tom", ["*"], [may])
    for path, method in (("nothing/here", "GET"), ("create_thing", "POST"), ("optim_step", "GET")):
        body = {"model_id": server.model(key="anna"), "seq_id": 1}
        answers = [server.call(path, body, key, method=method) for key in ("anna", "tom")]
        assert [one.status_code for one in answers] == [404, 404], path
        assert answers[1].json()["detail"].startswith(f"This server does not know {method}")
    assert server.call("optim_step", {"model_id": "x", "seq_id": 1}, "tom").status_code == 403
    assert httpx.get(f"{server.url}/api/v1/downloads/x").status_code == 404  # without a key


def test_calls_behind_a_state_that_can_not_be_loaded_fail_with_it(
    start_tinker: StartTinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, loads = start_tinker(gap_seconds=100), list[Done]()
    session = server.session()
    saved = server.result(server.call("save_weights", {"model_id": server.model(session), "seq_id": 1, "path": "one"}))
    model = server.model(session, 1)
    monkeypatch.setattr(server.tenants, "load", lambda *arguments: loads.append(arguments[-1]))
    body = {"model_id": model, "seq_id": 1, "path": saved["path"], "optimizer": True}
    load, waits = server.call("load_weights", body), server.train(model, 3)  # the second part of a call, whose first...
    loads[0](CallFailed("its file is damaged"))
    assert server.result(load)["error"] == "its file is damaged"
    assert server.train(model, 2).status_code == 410  # ...comes when the model has ended
    soon(lambda: server.tinker.database.open_of("local", samples=False) == (0, 0))
    assert server.result(waits)["error"] == "The model was not made: its file is damaged"
    soon(lambda: model not in server.tenants.models)


def test_a_load_that_comes_late_is_refused_and_the_model_goes_on(server: TinkerServer) -> None:
    session = server.session()
    model, other = server.model(session), server.model(session, 1)
    saved = server.result(server.call("save_weights", {"model_id": other, "seq_id": 1, "path": "one"}))
    server.result(server.step(model, 2))
    late = {"model_id": model, "seq_id": 1, "path": saved["path"], "optimizer": True}
    assert "came after call 2" in server.result(server.call("load_weights", late))["error"]
    assert "error" not in server.result(server.step(model, 3))


def test_a_load_into_a_model_that_is_refused_has_used_its_seq_id(start_tinker: StartTinker) -> None:
    server = start_tinker(gap_seconds=100)
    model = server.model()
    body = {"model_id": model, "seq_id": 1, "path": "tinker://x/weights/y", "optimizer_config": {"type": "dimuon"}}
    assert server.call("load_weights", body).status_code == 400
    server.train(model, 2)
    soon(lambda: server.tinker.database.open_of("local", samples=False) == (0, 0))


def test_a_session_that_ends_while_a_model_is_made_for_it_keeps_none(
    server: TinkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, shape = server.session(), server.tinker._shape

    def ending(asked: Any) -> Any:
        server.tinker.end_session(session, "local")
        return shape(asked)

    monkeypatch.setattr(server.tinker, "_shape", ending)
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    assert server.call("create_model", body).status_code == 410
    assert not server.tinker._models


def test_rows_that_come_sparse_count_as_what_they_take_in_memory(start_tinker: StartTinker) -> None:
    server = start_tinker(open_bytes=1 << 20)
    model = server.model()
    server.tenants.runs.clear()
    request = MESSAGES["ForwardBackwardRequest"](model_id=model, seq_id=1, loss_fn="cross_entropy")
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.zeros(100, "<i4").tobytes()
    for name, dtype in (("target_tokens", 2), ("weights", 1)):
        tensor = datum.loss_fn_inputs[name]
        tensor.sparse_csr.crow_indices, tensor.dtype = np.zeros(101, "<i8").tobytes(), dtype
        tensor.shape.extend([100, 1024])
    body = request.SerializeToString()
    assert len(body) < 4096 and server.call("forward_backward", body).status_code == 200
    refused = server.train(model, 2)
    assert refused.status_code == 429 and "1,229,600 bytes of calls open" in refused.json()["detail"]
    server.tenants.runs.set()


def test_promises_and_sessions_of_others_are_unknown(start_tinker: StartTinker) -> None:
    server = start_tinker(names=("anna", "tom"))
    session = server.session("anna")
    model = server.model(session, key="anna")
    accepted = server.train(model, 1, key="anna")
    assert server.call("retrieve_future", accepted.json(), "tom").status_code == 404
    assert server.call("session_heartbeat", {"session_id": session}, "tom").status_code == 404
    assert server.call(f"sessions/{session}/finish", {}, "tom").status_code == 404
    assert server.call("session_heartbeat", {"session_id": session}, "nobody").status_code == 401
    assert server.call("session_heartbeat", {"session_id": session}, "anna").status_code == 200


def test_a_call_is_not_held_for_a_client_that_has_gone(server: TinkerServer) -> None:
    model = server.model()
    server.tenants.runs.clear()
    accepted = server.train(model, 1)
    with pytest.raises(httpx.ReadTimeout):
        headers = {"X-API-Key": "tml-anything"}
        httpx.post(f"{server.url}/api/v1/retrieve_future", json=accepted.json(), headers=headers, timeout=0.5)
    soon(lambda: not server.tinker.database._waiting, 3.0)
    server.tenants.runs.set()
    assert server.result(accepted).metrics["loss:sum"] == 6


def test_a_finished_session_is_gone_and_its_models_are_free(server: TinkerServer) -> None:
    session = server.session()
    model = server.model(session)
    assert server.call(f"sessions/{session}/finish", {"reason": {"type": "success"}}).status_code == 204
    assert server.call(f"sessions/{session}/finish", {}).status_code == 204  # asked again, as after a lost answer
    assert server.call("session_heartbeat", {"session_id": session}).status_code == 410
    assert server.step(model, 1).status_code == 410
    soon(lambda: model not in server.tenants.models)


def test_an_ended_session_is_forgotten_once_nothing_of_it_is_left(server: TinkerServer) -> None:
    sessions = plain, saved, live = [server.session() for _ in range(3)]
    models = [server.model(session) for session in sessions]
    path = server.result(server.call("save_weights", {"model_id": models[1], "seq_id": 1, "path": "a"}))["path"]
    copy = server.call("copy_weights", {"source_path": path}).json()["tinker_path"]
    for model in models:
        body = {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0}
        server.result(server.call("save_weights_for_sampler", body))
    bad = {"session_id": live, "model_seq_id": 1, "path": path, "optimizer": True}
    server.tenants.models.clear()
    for file in server.directory.glob("runs/*/*/*/*"):
        file.write_text("damaged")
    assert "error" in server.result(server.call("load_weights", bad))
    for session in (plain, saved):
        server.call(f"sessions/{session}/finish", {})
    database = server.tinker.database

    def left() -> dict[str, set[str]]:
        columns = {"sessions": "id", "models": "session", "samplers": "session", "promises": "target"}
        return {
            table: {row[0].partition(":")[0] for row in database.rows(f"SELECT {column} FROM {table}")}
            for table, column in columns.items()
        }

    assert left()["sessions"] == set(sessions)
    about = {"session": plain, "owner": "local", "base": "tiny", "created": 1.0}
    database.insert("samplers", id=f"{plain}:sample:1", **about)  # one that was made while its session ended
    for table in ("sessions", "models", "samplers"):
        database.rows(f"UPDATE {table} SET ended = ended - 3601")  # an hour later
    database.rows("UPDATE promises SET done_at = done_at - 3601000000")
    soon(lambda: plain not in left()["sessions"])
    assert left() == {
        "sessions": {saved, live},
        "models": {saved, live, ""},
        "samplers": {live},
        "promises": {live},  # its calls may be done again
    }
    assert server.call("session_heartbeat", {"session_id": plain}).status_code == 404
    assert server.call(f"training_runs/{models[1]}", method="GET").json()["last_checkpoint"]["tinker_path"] == path
    assert server.call("load_weights", bad).status_code == 410  # a model that was not made keeps its id
    for one in (path, copy):
        place = one.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
        assert server.call(f"training_runs/{place}", method="DELETE").status_code == 204
    soon(lambda: saved not in left()["sessions"])
    assert left()["models"] == {live}


def test_a_session_without_heartbeats_ends(start_tinker: StartTinker) -> None:
    server = start_tinker(session_seconds=0.2)
    session = server.session()
    server.model(session)
    soon(lambda: server.call("session_heartbeat", {"session_id": session + "x"}) and not server.tenants.models)
    assert server.call("session_heartbeat", {"session_id": session}).status_code == 410


def test_limits_of_a_key_say_to_wait(start_tinker: StartTinker) -> None:
    server = start_tinker(sessions=2, models=1, open_calls=2)
    session = server.session()
    model = server.model(session)
    server.tenants.runs.clear()
    assert server.train(model, 1).status_code == 200
    waiting = server.train(model, 2)
    refused = server.train(model, 3)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    server.tenants.runs.set()
    server.result(waiting)
    server.result(server.train(model, 3))  # it had not used its seq_id
    body = {"session_id": session, "model_seq_id": 1, "base_model": "tiny"}
    assert server.call("create_model", body).status_code == 429
    server.session()
    assert server.call("create_session", {}).status_code == 429


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "other"}, "expected 'tiny'"),
        ({"base_model": "tiny:vera-0"}, "takes 1 to 1,024"),
        ({"lora_config": {"rank": 65}}, "takes 1 to 64"),
        ({"lora_config": {"rank": 4, "train_mlp": False, "train_attn": False}}, "train_mlp and train_attn"),
        ({"optimizer_config": {"type": "dimuon"}}, "dimuon"),
        ({"model_seq_id": -1}, "model_seq_id"),
    ],
)
def test_models_that_can_not_be_made_are_refused_by_name(
    server: TinkerServer, changes: dict[str, object], words: str
) -> None:
    body = {"session_id": server.session(), "model_seq_id": 0, "base_model": "tiny", **changes}
    answer = server.call("create_model", body)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


def test_a_session_says_what_is_trained_and_a_model_what_it_is(server: TinkerServer) -> None:
    made = server.call("create_session", {"tags": [], "sdk_version": "0.38.0"}).json()
    assert "train_unembed is not trained" in made["warning_message"]
    model = server.model(made["session_id"], base="hub/tiny:vera-256", train_mlp=False)
    info = server.call("get_info", {"model_id": model}).json()
    assert (info["is_lora"], info["lora_rank"], info["model_name"]) == (False, 256, "hub/tiny:vera-256")
    assert info["model_data"]["tokenizer_id"] == "tiny"


def test_states_are_saved_loaded_and_belong_to_their_owner(start_tinker: StartTinker) -> None:
    server = start_tinker(names=("anna", "tom"))
    session = server.session("anna")
    model = server.model(session, key="anna", seed=3)
    server.train(model, 1, [4], key="anna")
    server.step(model, 2, key="anna")
    saved = server.result(server.call("save_weights", {"model_id": model, "seq_id": 3, "path": "one"}, "anna"), "anna")
    assert saved["path"] == f"tinker://{model}/weights/one"
    again = server.call("save_weights", {"model_id": model, "seq_id": 4, "path": "one"}, "anna")
    assert "exists" in server.result(again, "anna")["error"]
    body = {"session_id": session, "model_seq_id": 1, "path": saved["path"], "optimizer": True}
    loaded = server.result(server.call("load_weights", body, "anna"), "anna")
    assert loaded["model_id"] == f"{session}:train:1"
    assert server.tenants.models[loaded["model_id"]] == server.tenants.models[model]
    assert server.call("get_info", {"model_id": loaded["model_id"]}, "anna").json()["lora_rank"] == 8
    older = server.model(session, 2, key="anna")
    body = {"model_id": older, "seq_id": 1, "path": saved["path"], "optimizer": False}
    server.result(server.call("load_weights", body, "anna"), "anna")
    assert (server.tenants.models[older].value, server.tenants.models[older].steps) == (1.0, 0)
    foreign = {"session_id": server.session("tom"), "model_seq_id": 0, "path": saved["path"], "optimizer": True}
    assert server.call("load_weights", foreign, "tom").status_code == 404


def test_saves_of_one_name_at_the_same_moment_are_one_and_a_refusal(server: TinkerServer) -> None:
    model = server.model(seed=2)
    server.tenants.runs.clear()
    saves = [server.call("save_weights", {"model_id": model, "seq_id": 1, "path": "one"})]
    server.train(model, 2, [4])
    server.step(model, 3)
    saves += [
        server.call("save_weights", {"model_id": model, "seq_id": seq, "path": "one", "overwrite": overwrite})
        for seq, overwrite in ((4, False), (5, True))
    ]
    server.tenants.runs.set()
    first, refused, over = map(server.result, saves)
    assert first["path"] == over["path"] and refused["category"] == "user" and "exists" in refused["error"]
    runs = list(server.directory.glob("runs/*/*/*/*"))
    assert [path.parts[-2:] for path in runs] == [("one", "state.safetensors")]
    assert json.loads(runs[0].read_text())["steps"] == 1


def test_an_ephemeral_sampler_has_the_weights_of_its_moment(server: TinkerServer) -> None:
    session = server.session()
    model = server.model(session, seed=2)
    body = {"model_id": model, "sampling_session_seq_id": 0}
    server.tenants.runs.clear()
    accepted = server.call("save_weights_for_sampler", {**body, "seq_id": 1})
    server.train(model, 2, [4])
    step = server.step(model, 3)
    server.tenants.runs.set()
    server.result(step)
    made = server.result(accepted)
    assert made == {"path": None, "sampling_session_id": f"{session}:sample:0", "type": "save_weights_for_sampler"}
    (row,) = server.tinker.database.rows("SELECT * FROM samplers")
    with open(server.directory / row["directory"] / "adapter.json") as file:
        assert json.load(file) == 2


def test_the_files_of_a_session_go_when_the_engine_writes_none_of_them(server: TinkerServer) -> None:
    session = server.session()
    model = server.model(session)
    places = [server.directory / "sessions" / session, server.directory / "models" / model.replace(":", "_")]
    for place in places:
        place.mkdir(parents=True)
    server.tenants.runs.clear()
    server.call("save_weights_for_sampler", {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0})
    server.call(f"sessions/{session}/finish", {})
    assert server.step(model, 2).status_code == 410
    assert all(place.is_dir() for place in places)
    server.tenants.runs.set()
    soon(lambda: not any(place.exists() for place in places))


def test_unnamed_samplers_that_nobody_asks_for_go_but_the_newest(server: TinkerServer) -> None:
    session = server.session()
    model, place = server.model(session), server.directory / "sessions" / session

    def save(number: int, kind: str) -> None:
        body = {"model_id": model, "seq_id": number + 1, "sampling_session_seq_id": number, "kind": kind}
        server.result(server.call("save_weights_for_sampler", body))

    for number in range(12):
        save(number, "snapshot")
    save(12, "inflight")
    asked = {"sampling_session_id": f"{session}:sample:1", "seq_id": 1, "prompt": {"chunks": [{"tokens": [5]}]}}
    assert server.call("asample", asked).status_code == 200
    assert len(list(place.iterdir())) == 13
    server.tinker.database.rows("UPDATE samplers SET created = created - 3601")  # an hour later
    for directory in place.iterdir():
        os.utime(directory, (1e9, 1e9))
    save(13, "inflight")
    kept = [1, *range(4, 12)]
    assert {one.name for one in place.iterdir()} == {f"0-snapshot-{number}" for number in kept} | {"0-inflight-13"}
    gone = server.call("asample", {**asked, "sampling_session_id": f"{session}:sample:0"})
    assert gone.status_code == 410 and "was not asked for long" in gone.json()["detail"]
    assert server.call(f"samplers/{session}:sample:12", method="GET").status_code == 200  # it has the newest weights


def test_metrics_name_routes_and_no_paths_that_clients_invent(server: TinkerServer) -> None:
    server.session()
    server.call("invented/1")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'path="/api/v1/create_session",status="200"' in text
    assert "invented" not in text


@pytest.mark.parametrize(
    "path",
    [
        "create_session",
        "session_heartbeat",
        "create_model",
        "load_weights",
        "get_info",
        "optim_step",
        "save_weights",
        "save_weights_for_sampler",
        "forward_backward",
        "retrieve_future",
        "retrieve_futures",
        "copy_weights",
        "nothing/of/this/kind",
    ],
)
def test_bad_bodies_get_an_answer_and_never_a_failure(server: TinkerServer, path: str) -> None:
    model = server.model()
    place = {"model_id": model, "session_id": model.partition(":")[0]}
    bodies: list[object] = [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"\x0a\xff\xff\xff\xff\x0f",
        b'{"model_id": "\\ud800"}',
    ]
    seqs: list[object] = [-1, 0, 10**30, 1.5, None, "x", []]
    bodies += [{**place, "seq_id": seq} for seq in seqs]
    bodies += [{**place, "model_seq_id": 10**30, "base_model": [], "path": 3, "optimizer": "no"}]
    bodies += [{"model_id": "\0", "session_id": "\0", "request_id": "\0' OR 1", "seq_id": 1}]
    half = dict.fromkeys(("model_id", "session_id", "request_id", "source_path", "user_metadata"), "\ud800")
    sent = json.dumps({**half, "target": {"sampling_session_id": "\ud800"}, "sampling_session_seq_id": 1}).encode()
    answers = [server.call(path, body) for body in bodies]
    answers.append(
        httpx.post(f"{server.url}/api/v1/{path}", content=sent, headers={"Content-Type": "application/json"})
    )
    for answer in answers:
        assert answer.status_code in (200, 400, 404, 422), answer.text
        assert answer.status_code == 200 or isinstance(answer.json()["detail"], str)
