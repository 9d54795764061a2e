"""What the next server does after one that was killed: the double keeps nothing, the disk has all."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qvera.utils.errors import InputError
from tests.serve.tinker.conftest import StartTinker, TinkerServer, soon


def killed(server: TinkerServer) -> TinkerServer:
    """Cut a server off from its directory, as it is at this moment."""
    server.tenants.runs.clear()
    return server


def test_pending_gradients_promises_and_seq_ids_live_on(start_tinker: StartTinker) -> None:
    first = start_tinker()
    model = first.model(seed=2)
    losses = first.train(model, 1, [4])
    first.result(losses)
    first.result(first.step(model, 2))
    first.result(first.train(model, 3, [5]))
    killed(first)
    pending = first.train(model, 4, [6])
    second = start_tinker()
    assert second.result(losses).metrics["loss:sum"] == 4
    assert second.result(pending).metrics["loss:sum"] == 6
    repeated = second.train(model, 4, [6])
    assert repeated.json() == pending.json()
    assert second.result(second.step(model, 5))["metrics"]["grad_norm:mean"] == 11
    assert second.tenants.models[model].value == 2 - 0.5 * 4 - 0.5 * 11


def test_calls_before_the_state_file_are_not_done_again(start_tinker: StartTinker) -> None:
    first = start_tinker(save_seconds=0.0)
    model = first.model(seed=2)
    first.result(first.train(model, 1, [4]))
    first.result(first.step(model, 2))
    first.result(first.train(model, 3, [5]))
    saved = first.directory / "models" / model.replace(":", "_") / "3.safetensors"
    soon(lambda: saved.exists() and len(list(saved.parent.iterdir())) == 1)
    soon(lambda: first.tinker.database.rows("SELECT applied_seq FROM models")[0][0] == 3)
    killed(first)
    second = start_tinker()
    assert not second.tenants.done_calls  # an idle model is read when it is called
    assert second.result(second.step(model, 4))["metrics"]["grad_norm:mean"] == 5
    assert [kind for _, kind in second.tenants.done_calls[:2]] == ["load", "step"]
    assert second.tenants.models[model].steps == 2


def test_a_save_that_was_promised_is_done_by_the_next_server(start_tinker: StartTinker) -> None:
    first = start_tinker()
    session = first.session()
    model = first.model(session, seed=2)
    killed(first)
    saves = [
        first.call("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}),
        first.call("save_weights_for_sampler", {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0}),
    ]
    second = start_tinker()
    assert second.result(saves[0])["path"] == f"tinker://{model}/weights/a"
    assert second.result(saves[1])["sampling_session_id"] == f"{session}:sample:0"


def test_refused_and_missing_calls_hold_up_nothing_after_a_restart(start_tinker: StartTinker) -> None:
    first = start_tinker()
    model = first.model()
    assert first.train(model, 1, loss="custom").status_code == 400
    first.result(first.train(model, 2, [3]))
    killed(first)
    second = start_tinker()
    assert second.result(second.step(model, 3))["metrics"]["grad_norm:mean"] == 3


def test_a_call_that_comes_after_its_turn_fails_after_a_restart_too(start_tinker: StartTinker) -> None:
    first = start_tinker(save_seconds=0.0)
    model = first.model()
    first.result(first.step(model, 2))  # call 1 was given up
    soon(lambda: first.tinker.database.rows("SELECT 1 FROM models WHERE applied_seq = 2"))
    second = start_tinker()
    assert "came after call 2" in second.result(second.train(model, 1))["error"]
    assert second.result(second.step(model, 3))["metrics"]["grad_norm:mean"] == 0


def test_a_part_that_came_late_is_not_done_again_on_a_state_that_has_it(
    start_tinker: StartTinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvera.serve.tinker.tenancy._TICK_SECONDS", 0.05)
    first = start_tinker(save_seconds=0.0, gap_seconds=0.1)
    model = first.model()
    first.result(first.train(model, 2, [5]))  # call 1 is not waited for any longer
    soon(lambda: first.tinker.database.rows("SELECT 1 FROM models WHERE applied_seq = 2"))
    monkeypatch.setattr(first.tinker.database, "saved", lambda *_: None)  # killed between a file and its entry
    first.result(first.train(model, 1, [4]))
    time.sleep(0.5)
    killed(first)
    second = start_tinker()
    assert second.result(second.step(model, 3))["metrics"]["grad_norm:mean"] == 9


def test_a_state_is_loaded_into_a_model_that_the_next_server_has_to_bring_back(start_tinker: StartTinker) -> None:
    first = start_tinker()
    session = first.session()
    saved = first.result(
        first.call("save_weights", {"model_id": first.model(session, seed=5), "seq_id": 1, "path": "a"})
    )
    model = first.model(session, 1, seed=2)
    killed(first)
    body = {"model_id": model, "seq_id": 1, "path": saved["path"], "optimizer": True}
    promised = first.call("load_weights", body)
    second = start_tinker()
    assert second.result(promised)["path"] == saved["path"]
    assert second.tenants.models[model].value == 5
    assert "error" not in second.result(second.step(model, 2))


def test_a_model_whose_loaded_state_was_deleted_before_it_was_saved_ends(
    start_tinker: StartTinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvera.serve.tinker.tenancy._TICK_SECONDS", 100.0)  # nothing is saved
    first = start_tinker()
    session = first.session()
    saver, model = first.model(session), first.model(session, 1)
    saved = first.result(first.call("save_weights", {"model_id": saver, "seq_id": 1, "path": "a"}))
    body = {"model_id": model, "seq_id": 1, "path": saved["path"], "optimizer": True}
    assert "error" not in first.result(first.call("load_weights", body))
    assert first.call(f"training_runs/{saver}/checkpoints/weights/a", method="DELETE").status_code == 204
    killed(first)
    pending = first.step(model, 2)
    second = start_tinker()
    assert "could not bring the model back" in second.result(pending)["error"]
    assert second.step(model, 3).status_code == 410
    assert "error" not in second.result(second.step(saver, 2))


def test_a_model_whose_state_is_damaged_ends_and_that_is_the_servers_fault(start_tinker: StartTinker) -> None:
    first = start_tinker(save_seconds=0.0)
    model = first.model()
    soon(lambda: first.tinker.database.rows("SELECT 1 FROM models WHERE applied_seq = 0"))
    (file,) = (first.directory / "models").glob("*/*.safetensors")
    file.write_text("damaged")
    second = start_tinker()
    failed = second.result(second.step(model, 1))
    assert failed["category"] == "server" and "could not bring the model back" in failed["error"]
    assert second.step(model, 2).status_code == 410


def test_a_session_that_had_ended_stays_ended(start_tinker: StartTinker) -> None:
    first = start_tinker()
    session = first.session()
    model = first.model(session)
    first.call(f"sessions/{session}/finish", {})
    second = start_tinker()
    assert second.call("session_heartbeat", {"session_id": session}).status_code == 410
    assert second.step(model, 1).status_code == 410
    assert not second.tenants.done_calls


class Killed(BaseException):
    """Where the process would end."""


def test_what_a_killed_server_left_unfinished_goes_and_what_its_database_names_stays(
    start_tinker: StartTinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    def places() -> set[str]:
        found = (path for pattern in ("models/*", "sessions/*", "runs/*/*/*") for path in first.directory.glob(pattern))
        return {str(path.relative_to(first.directory)) for path in found}

    first = start_tinker(save_seconds=0.0)
    sessions = live, ended = first.session(), first.session()
    models = [first.model(session) for session in sessions]
    for model in models:
        first.result(first.call("save_weights", {"model_id": model, "seq_id": 1, "path": "one"}))
        unnamed = {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0}
        first.result(first.call("save_weights_for_sampler", unnamed))
    soon(lambda: len(places()) == 6)
    checkpoints = first.tinker.checkpoints
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoints, "add", killed)
        checkpoints.copy(f"tinker://{models[0]}/weights/one", "local", None, "key")
    first.tenants.runs.clear()
    first.tinker.end_session(ended, "local")  # its files go when the engine has dropped its model
    assert len(places()) == 7 and len(list(first.directory.glob("runs/copy-*"))) == 1

    second = start_tinker()
    names = [model.replace(":", "_") for model in models]
    runs = {f"runs/{name}/weights/one" for name in names}  # a named checkpoint outlives its session
    assert places() == {f"models/{names[0]}", f"sessions/{live}", *runs}
    assert not list(first.directory.glob("runs/copy-*"))
    assert list(second.tinker._models) == [models[0]]  # a copy is no live model


def test_without_its_database_nothing_is_taken_for_remains(start_tinker: StartTinker) -> None:
    first = start_tinker()
    model = first.model()
    first.result(first.call("save_weights", {"model_id": model, "seq_id": 1, "path": "one"}))
    lost = first.directory / "tinker.sqlite"
    lost.rename(lost.with_name("elsewhere"))
    with pytest.raises(InputError, match="runs: is of something else, or tinker.sqlite beside it was lost"):
        start_tinker()
    assert list(first.directory.glob("runs/*/weights/one"))
