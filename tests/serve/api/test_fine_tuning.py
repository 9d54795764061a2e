"""Fine-tuning jobs over HTTP, with a trainer that has no model: what a client is told, and what it may do."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from qvera.serve.api.access import KeyFile, new_key
from qvera.serve.fine_tuning import preparing
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start, send
from tests.serve.scripted_training import chat_rows

Headers = dict[str, dict[str, str]]


@pytest.fixture
def training(start: Start, tmp_path: Path) -> Served:
    return start(training_dir=tmp_path / "training")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyFile, Headers]:
    path = tmp_path / "keys.json"
    headers = {
        name: {"Authorization": f"Bearer {new_key(path, name, allow, ['use', 'train'])}"}
        for name, allow in {"anna": ["anna", "tiny"], "ben": ["*"]}.items()
    }
    return KeyFile(path), headers


def create(served: Served, headers: Any = None, rows: bytes | None = None, **body: Any) -> httpx.Response:
    """Upload rows, and create a job over them."""
    file_id = send(served, rows, headers=headers).json()["id"]
    return served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file_id, **body}, headers=headers)


def ask(served: Served, path: str, headers: Any = None, method: str = "GET", **parameters: Any) -> httpx.Response:
    with served.client() as client:
        return client.request(method, f"/v1/{path}", params=parameters, headers=headers)


def job(served: Served, job_id: str, headers: Any = None) -> dict[str, Any]:
    return ask(served, f"fine_tuning/jobs/{job_id}", headers).json()


def wait_for(served: Served, job_id: str, *statuses: str, headers: Any = None) -> dict[str, Any]:
    wait_until(lambda: job(served, job_id, headers)["status"] in statuses, 30)
    return job(served, job_id, headers)


def messages(served: Served, job_id: str, headers: Any = None) -> list[str]:
    """Of its events, the oldest first."""
    events = ask(served, f"fine_tuning/jobs/{job_id}/events", headers, limit=100).json()["data"]
    return [event["message"] for event in reversed(events)]


def test_a_job_becomes_a_model_and_tells_its_steps(training: Served) -> None:
    held_out = send(training, chat_rows(2, first=90), "held out.jsonl").json()["id"]
    hyperparameters = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5}
    made = create(
        training,
        suffix="Ben & Söhne",
        seed=7,
        metadata={"who": "me"},
        validation_file=held_out,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    ).json()
    assert (made["object"], made["status"], made["fine_tuned_model"]) == ("fine_tuning.job", "validating_files", None)
    assert made["hyperparameters"] == made["method"]["supervised"]["hyperparameters"] == hyperparameters
    assert (made["seed"], made["metadata"], made["validation_file"]) == (7, {"who": "me"}, held_out)
    done = wait_for(training, made["id"], "succeeded", "failed")
    assert done["fine_tuned_model"] == "Ben & Söhne", done
    assert done["trained_tokens"] == 60  # four rows in steps of two, three times over
    assert done["finished_at"] >= done["created_at"]
    assert done["error"] is None
    said = messages(training, made["id"])
    assert [text for text in said if text.startswith("Step")] == [
        *[f"Step {k}/6: training loss={1 / k:.4f}" for k in range(1, 7)],
        "Step 6/6: validation loss=0.5000",
    ]
    assert said[-2:] == ["New fine-tuned model created: Ben & Söhne", "The job has successfully completed"]
    events = ask(training, f"fine_tuning/jobs/{made['id']}/events", limit=3).json()
    assert events["has_more"]
    more = ask(training, f"fine_tuning/jobs/{made['id']}/events", after=events["data"][-1]["id"], limit=1).json()[
        "data"
    ]
    assert more[0]["message"] == "Step 6/6: training loss=0.1667"
    assert more[0]["type"] == "metrics"
    assert more[0]["data"]["learning_rate"] == pytest.approx(0.5 * 4e-3)
    results = ask(training, f"files/{done['result_files'][0]}/content").text
    lines = list(csv.DictReader(io.StringIO(results)))
    assert [line["train_loss"][:6] for line in lines] == [str(1 / k)[:6] for k in range(1, 7)]
    assert lines[-1]["valid_loss"] == "0.5"
    assert ask(training, f"files/{done['result_files'][0]}").json()["purpose"] == "fine-tune-results"
    [checkpoint] = ask(training, f"fine_tuning/jobs/{made['id']}/checkpoints").json()["data"]
    assert checkpoint["step_number"] == 6
    assert checkpoint["metrics"] == {"step": 6, "train_loss": 1 / 6, "valid_loss": 0.5}
    answer = training.chat(model="Ben & Söhne")
    assert answer.status_code == 200
    facts = ask(training, "models/Ben & Söhne").json()["qvera"]
    assert (facts["rows"], facts["loss_before"], facts["loss"]) == (4, 2.0, 0.5)
    (training.trained.root / "Ben=20=26=20Söhne" / "adapter_model.safetensors").write_bytes(b"other vectors")
    facts = ask(training, "models/Ben & Söhne").json()["qvera"]
    assert (facts["rows"], facts["loss"]) == (None, None)  # nothing is known of these
    with training.client() as client:
        metrics = client.get("/metrics").text
    assert 'qvera_fine_tuning_jobs{status="succeeded"} 1.0' in metrics
    assert "qvera_training_tokens_total 60.0" in metrics


BAD_ROWS = [
    (chat_rows(2) + b'{"messages": [{"role": "king", "content": "x"}]}\n', ":3: messages[0]: unknown role"),
    (chat_rows(2) + b"{", ":3: not valid JSON"),
    (b"", ": holds no rows"),
    (b'{"colour": "red"}\n', ":1: the columns match no known format"),
    (b"\xff\xfe\n", ":1: not UTF-8 text"),
    (json.dumps(dict.fromkeys(map(str, range(9000)), 1)).encode(), ":1: the columns match no known format"),
]


def test_a_bad_file_fails_its_job_and_names_the_line(training: Served) -> None:
    for rows, message in BAD_ROWS:
        bad = send(training, rows, "held out.jsonl").json()["id"]
        for made, name, param in (
            (create(training, rows=rows).json(), "rows.jsonl", "training_file"),
            (create(training, validation_file=bad).json(), "held out.jsonl", "validation_file"),
        ):
            failed = wait_for(training, made["id"], "failed", "succeeded")
            assert failed["status"] == "failed"
            assert failed["error"]["message"].startswith(f"{name}{message}")
            assert len(failed["error"]["message"]) <= 2001
            assert str(training.trained.directory.path) not in json.dumps(failed)
            assert (failed["error"]["code"], failed["error"]["param"]) == ("invalid_training_file", param)
            assert messages(training, made["id"])[-1] == failed["error"]["message"]
            assert failed["fine_tuned_model"] is None


def test_a_file_that_is_read_as_a_whole_may_not_be_large(training: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_MOST_JSON_BYTES", 1 << 20)
    for size, status in ((1 << 19, "succeeded"), ((1 << 20) + 1, "failed")):
        rows = json.dumps([{"prompt": "say", "completion": "red"}]).encode().ljust(size)
        file_id = send(training, rows, "rows.json").json()["id"]
        made = training.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file_id}).json()
        ended = wait_for(training, made["id"], "succeeded", "failed")
        assert ended["status"] == status
    assert "rows.json: a .json file is read as a whole, so it may have at most 1 MiB" in ended["error"]["message"]
    monkeypatch.setattr(preparing, "_MOST_LINE_BYTES", 200)
    for length, status in ((200, "succeeded"), (201, "failed")):
        rows = chat_rows(2) + chat_rows(1).strip().ljust(length - 1) + b"\n" + chat_rows(1)
        ended = wait_for(training, create(training, rows=rows).json()["id"], "succeeded", "failed")
        assert ended["status"] == status
    assert ended["error"]["message"].startswith("rows.jsonl:3: a line may have at most 200 bytes")


WRONG_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "anna"}, "model", "expected the base, 'tiny'"),
    ({"training_file": "file-no"}, "training_file", "there is no file 'file-no'"),
    ({"training_file": "../x"}, "training_file", "there is no file '../x'"),
    ({"validation_file": "file-no"}, "validation_file", "there is no file"),
    ({"integrations": [{"type": "wandb"}]}, "integrations", "not supported"),
    ({"method": {"type": "dpo", "dpo": {}}}, "method", "supervised"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "not supported"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "did you mean 'n_epochs'"),
    ({"hyperparameters": {"batch_size": 0}}, "hyperparameters", "greater than or equal to 1"),
    ({"hyperparameters": {"batch_size": True}}, "hyperparameters", "valid integer"),
    ({"hyperparameters": {"n_epochs": -1}}, "hyperparameters", "greater than 0"),
    ({"hyperparameters": {"n_epochs": 1001}}, "hyperparameters", "less than or equal to 1000"),
    (
        {
            "hyperparameters": {"n_epochs": 1},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        },
        "hyperparameters",
        "give them once",
    ),
    ({"suffix": "tiny"}, "suffix", "is the name of the base"),
    ({"suffix": " "}, "suffix", "blank"),
    ({"suffix": "x" * 65}, "suffix", "at most 64"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"metadata": {str(k): "x" for k in range(17)}}, "metadata", "at most 16"),
    ({"colour": "red"}, "colour", "Unknown key"),
]


def test_what_can_t_be_done_is_refused_by_name(training: Served) -> None:
    for body, param, message in WRONG_BODIES:
        answer = create(training, **body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert message in error["message"]
        assert error["param"] == param
    assert ask(training, "fine_tuning/jobs").json()["data"] == []


def test_a_name_that_is_taken_is_replaced_only_where_that_is_asked_for(training: Served) -> None:
    training.trained.driver.hold.set()
    first = create(training, suffix="anna").json()
    again = create(training, suffix="anna")
    assert again.status_code == 400
    assert "another job makes anna already" in again.json()["error"]["message"]
    training.trained.driver.go_on()
    wait_for(training, first["id"], "succeeded")
    before = training.chat(model="anna").json()["system_fingerprint"]
    taken = create(training, suffix="anna").json()["error"]
    assert (taken["code"], taken["param"]) == ("name_taken", "suffix")
    training.trained.driver.hold.set()
    second = create(training, suffix="anna", replace=True).json()
    assert training.chat(model="anna").json()["system_fingerprint"] == before  # until it is done
    training.trained.driver.go_on()
    wait_for(training, second["id"], "succeeded")
    assert training.chat(model="anna").json()["system_fingerprint"] != before


def test_what_is_no_adapter_or_came_meanwhile_is_not_replaced(training: Served) -> None:
    other = training.trained.root / "backup"
    other.mkdir()
    (other / "precious").write_text("yes")
    refused = create(training, suffix="backup", replace=True)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "name_taken"
    assert (other / "precious").read_text() == "yes"
    training.trained.driver.hold.set()
    made = create(training, suffix="anna").json()
    came = training.trained.root / "anna"
    came.mkdir()
    (came / "adapter_config.json").write_text("{}")
    training.trained.driver.go_on()
    assert wait_for(training, made["id"], "failed")["error"]["code"] == "name_taken"
    assert [file.name for file in came.iterdir()] == ["adapter_config.json"]


def hold_at(served: Served, step: int) -> Callable[[], None]:
    """Hold the trainer before this step of all parts; returns what lets it go on."""
    go_on, steps = threading.Event(), 0

    def before(name: str) -> None:
        nonlocal steps
        steps += name == "run_slice"
        if steps == step and name == "run_slice":
            go_on.wait(30)

    served.trained.trainer.before = before
    return go_on.set


def test_a_running_job_is_cancelled(training: Served) -> None:
    go_on = hold_at(training, 3)
    made = create(training, hyperparameters={"n_epochs": 50}).json()
    wait_for(training, made["id"], "running")
    cancelled = ask(training, f"fine_tuning/jobs/{made['id']}/cancel", method="POST").json()
    assert cancelled["status"] == "cancelled"
    go_on()
    wait_until(lambda: not training.trained.trainer.in_flight)
    assert job(training, made["id"])["status"] == "cancelled"
    assert job(training, made["id"])["finished_at"] is not None
    assert list(training.trained.directory.states.iterdir()) == []
    assert list(training.trained.root.iterdir()) == []
    for action in ("cancel", "pause", "resume"):
        late = ask(training, f"fine_tuning/jobs/{made['id']}/{action}", method="POST")
        assert late.status_code == 400
        assert "is cancelled" in late.json()["error"]["message"]


def test_a_paused_job_goes_on_where_it_was(training: Served) -> None:
    go_on = hold_at(training, 4)
    made = create(training, hyperparameters={"n_epochs": 6, "batch_size": 4}).json()
    wait_for(training, made["id"], "running")
    assert ask(training, f"fine_tuning/jobs/{made['id']}/pause", method="POST").json()["status"] == "paused"
    go_on()
    wait_until(lambda: not training.trained.trainer.in_flight)
    assert job(training, made["id"])["status"] == "paused"
    other = create(training).json()
    wait_for(training, other["id"], "succeeded")  # its slot is free for others
    assert ask(training, f"fine_tuning/jobs/{made['id']}/resume", method="POST").status_code == 200
    assert wait_for(training, made["id"], "succeeded", "failed")["trained_tokens"] == 60
    steps = [text for text in messages(training, made["id"]) if text.startswith("Step")]
    assert steps == [f"Step {k}/6: training loss={1 / k:.4f}" for k in range(1, 7)]  # none twice
    assert any("goes on after step 4" in text for text in messages(training, made["id"]))


def test_a_queued_job_is_paused_and_cancelled_before_it_begins(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", training_slots=1)
    go_on = hold_at(served, 2)
    first = create(served, hyperparameters={"n_epochs": 50}).json()
    wait_for(served, first["id"], "running")
    waiting = [create(served).json()["id"] for _ in range(3)]
    for job_id in waiting:
        wait_for(served, job_id, "queued")
    assert ask(served, f"fine_tuning/jobs/{waiting[0]}/cancel", method="POST").json()["status"] == "cancelled"
    assert ask(served, f"fine_tuning/jobs/{waiting[1]}/pause", method="POST").json()["status"] == "paused"
    go_on()
    wait_for(served, waiting[2], "succeeded")
    assert [job(served, job_id)["status"] for job_id in waiting] == ["cancelled", "paused", "succeeded"]
    ask(served, f"fine_tuning/jobs/{waiting[1]}/resume", method="POST")
    wait_for(served, waiting[1], "succeeded")


def test_a_job_that_diverges_ends_alone_and_auto_is_what_the_server_s_recipe_says(training: Served) -> None:
    training.trained.driver.hold.set()
    bad, good = (create(training, hyperparameters={"n_epochs": "auto"}).json() for _ in range(2))
    assert good["hyperparameters"] == {"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": 1.0}
    training.trained.trainer.not_finite.add(bad["id"])
    training.trained.driver.go_on()
    failed = wait_for(training, bad["id"], "failed")
    assert failed["error"] == {"code": "training_failed", "message": "step 1: its loss is not finite.", "param": None}
    done = wait_for(training, good["id"], "succeeded")
    assert done["fine_tuned_model"] == "ft-" + good["id"].removeprefix("ftjob-")


def test_keys_have_jobs_models_and_limits_of_their_own(start: Start, tmp_path: Path, keys: Any) -> None:
    file, headers = keys
    anna, ben = headers["anna"], headers["ben"]
    served = start(training_dir=tmp_path / "training", keys=file, open_jobs=2)
    served.trained.driver.hold.set()
    made = create(served, anna, suffix="anna", metadata={"a": "1"}).json()
    assert "this key has models of its own" in create(served, anna).json()["error"]["message"]
    assert "may not use" in create(served, anna, suffix="ben").json()["error"]["message"]
    stolen = served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": made["training_file"]}, headers=ben)
    assert stolen.status_code == 400
    mine = create(served, ben, suffix="ben", metadata={"a": "2"}).json()
    for path in ("", "/events", "/checkpoints"):
        assert ask(served, f"fine_tuning/jobs/{made['id']}{path}", ben).status_code == 404
    for action in ("cancel", "pause", "resume"):
        assert ask(served, f"fine_tuning/jobs/{made['id']}/{action}", ben, method="POST").status_code == 404
    assert [one["id"] for one in ask(served, "fine_tuning/jobs", ben).json()["data"]] == [mine["id"]]
    assert ask(served, "fine_tuning/jobs", ben, **{"metadata[a]": "1"}).json()["data"] == []
    assert len(ask(served, "fine_tuning/jobs", ben, **{"metadata[a]": "2"}).json()["data"]) == 1
    create(served, ben)
    full = create(served, ben)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "too_many")
    in_use = ask(served, f"files/{made['training_file']}", anna, method="DELETE")
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "file_in_use")
    served.trained.driver.go_on()
    wait_for(served, made["id"], "succeeded", headers=anna)
    wait_for(served, mine["id"], "succeeded", headers=ben)
    assert ask(served, f"files/{made['training_file']}", anna, method="DELETE").status_code == 200
    assert ask(served, "models/anna", ben, method="DELETE").status_code == 403  # it may use it, and did not make it
    assert ask(served, "models/tiny", ben, method="DELETE").status_code == 403
    assert ask(served, "models/ben", anna, method="DELETE").status_code == 404
    gone = ask(served, "models/anna", anna, method="DELETE")
    assert gone.json() == {"id": "anna", "object": "model", "deleted": True}
    assert not (served.trained.root / "anna").exists()
    assert (served.trained.root / "ben").exists()
    say = {"model": "anna", "messages": [{"role": "user", "content": "hi"}]}
    assert served.post("/v1/chat/completions", say, headers=anna).status_code == 404


def test_openai_s_client_does_not_ask_again_what_somebody_has_to_change_first(
    start: Start, tmp_path: Path, keys: Any
) -> None:
    file, headers = keys
    served = start(training_dir=tmp_path / "training", keys=file, open_jobs=1)
    served.trained.driver.hold.set()
    made = create(served, headers["ben"]).json()
    key = headers["ben"]["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, timeout=30) as client:
        with pytest.raises(openai.ConflictError):
            client.files.delete(made["training_file"])
        with pytest.raises(openai.RateLimitError):
            client.fine_tuning.jobs.create(model="tiny", training_file=made["training_file"])
    with served.client() as asking:
        calls = asking.get("/metrics", headers=headers["ben"]).text
    assert 'qvera_calls_total{path="/v1/files",status="409"} 1.0' in calls
    assert 'qvera_calls_total{path="/v1/fine_tuning/jobs",status="429"} 1.0' in calls
    served.trained.driver.go_on()
    wait_for(served, made["id"], "succeeded", headers=headers["ben"])


def test_whoever_has_fewest_running_is_next(start: Start, tmp_path: Path, keys: Any) -> None:
    file, headers = keys
    served = start(training_dir=tmp_path / "training", keys=file, training_slots=2)
    served.trained.driver.hold.set()
    began: list[str] = []
    greedy = [create(served, headers["ben"]).json()["id"] for _ in range(4)]
    modest = create(served, headers["anna"], suffix="anna").json()["id"]
    for job_id in greedy:
        wait_for(served, job_id, "queued", headers=headers["ben"])
    wait_for(served, modest, "queued", headers=headers["anna"])
    begin = served.trained.trainer.begin

    def noted(run: Any, saved: Path | None = None) -> None:
        began.append(run.id)
        begin(run, saved)

    served.trained.trainer.begin = noted  # type: ignore[method-assign]
    served.trained.driver.go_on()
    wait_for(served, greedy[-1], "succeeded", headers=headers["ben"])
    assert began == [greedy[0], modest, *greedy[1:]]
