"""Fine-tuning jobs over HTTP, with a trainer that has no model: what a client is told, and what it may do."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from qvera.serve.fine_tuning import jobs
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start, send
from tests.serve.scripted_training import chat_rows

Headers = dict[str, str] | None


@pytest.fixture
def training(start: Start, tmp_path: Path) -> Served:
    return start(training_dir=tmp_path / "training")


def create(served: Served, headers: Headers = None, rows: bytes | None = None, **body: Any) -> httpx.Response:
    """Upload rows, and create a job over them."""
    file_id = send(served, rows, headers=headers).json()["id"]
    return served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file_id, **body}, headers=headers)


def ask(served: Served, path: str, headers: Headers = None, method: str = "GET", **parameters: Any) -> httpx.Response:
    with served.client() as client:
        return client.request(method, f"/v1/{path}", params=parameters, headers=headers)


def change(served: Served, made: dict[str, Any], how: str) -> httpx.Response:
    return ask(served, f"fine_tuning/jobs/{made['id']}/{how}", method="POST")


def wait_for(served: Served, made: dict[str, Any], *statuses: str, headers: Headers = None) -> dict[str, Any]:
    """The job, once it has one of these statuses."""
    found: dict[str, Any] = {}

    def has_it() -> bool:
        found.update(ask(served, f"fine_tuning/jobs/{made['id']}", headers).json())
        return found["status"] in statuses

    wait_until(has_it, 30)
    return found


def events(served: Served, made: dict[str, Any], what: str = "") -> list[str]:
    """The messages of its events, the oldest first, that begin like this."""
    found = ask(served, f"fine_tuning/jobs/{made['id']}/events", limit=100).json()["data"]
    return [event["message"] for event in reversed(found) if event["message"].startswith(what)]


def test_a_job_becomes_a_model_and_tells_its_steps(training: Served) -> None:
    held_out = send(training, chat_rows(2, first=90), "held out.jsonl").json()["id"]
    hyperparameters = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    name, asked = "Ben & Söhne", {"seed": 7, "metadata": {"who": "me"}, "validation_file": held_out}
    made = create(training, suffix=name, method=method, **asked).json()
    assert (made["object"], made["status"], made["fine_tuned_model"]) == ("fine_tuning.job", "validating_files", None)
    assert made["hyperparameters"] == made["method"]["supervised"]["hyperparameters"] == hyperparameters
    assert {key: made[key] for key in asked} == asked
    done = wait_for(training, made, "succeeded", "failed")
    assert (done["fine_tuned_model"], done["error"]) == (name, None)
    assert done["trained_tokens"] == 60  # four rows in steps of two, three times over
    assert done["finished_at"] >= done["created_at"]
    losses = [f"Step {k}/6: training loss={1 / k:.4f}" for k in range(1, 7)]
    assert events(training, made, "Step") == [*losses, "Step 6/6: validation loss=0.5000"]
    last = [f"New fine-tuned model created: {name}", "The job has successfully completed"]
    assert events(training, made)[-2:] == last
    job = f"fine_tuning/jobs/{made['id']}"
    page = ask(training, f"{job}/events", limit=3).json()
    assert page["has_more"]
    [more] = ask(training, f"{job}/events", after=page["data"][-1]["id"], limit=1).json()["data"]
    assert (more["message"], more["type"]) == (losses[-1], "metrics")
    assert more["data"]["learning_rate"] == pytest.approx(0.5 * 4e-3)
    [results] = done["result_files"]
    lines = list(csv.DictReader(io.StringIO(ask(training, f"files/{results}/content").text)))
    assert [line["train_loss"][:6] for line in lines] == [str(1 / k)[:6] for k in range(1, 7)]
    assert lines[-1]["valid_loss"] == "0.5"
    assert ask(training, f"files/{results}").json()["purpose"] == "fine-tune-results"
    [checkpoint] = ask(training, f"{job}/checkpoints").json()["data"]
    assert checkpoint["step_number"] == 6
    assert checkpoint["metrics"] == {"step": 6, "train_loss": 1 / 6, "valid_loss": 0.5}
    assert training.chat(model=name).status_code == 200
    facts = ask(training, f"models/{name}").json()["qvera"]
    assert (facts["rows"], facts["loss_before"], facts["loss"]) == (4, 2.0, 0.5)
    (training.root / "Ben=20=26=20Söhne" / "adapter_model.safetensors").write_bytes(b"other vectors")
    facts = ask(training, f"models/{name}").json()["qvera"]
    assert (facts["rows"], facts["loss"]) == (None, None)  # nothing is known of these
    metrics = httpx.get(f"{training.url}/metrics").text
    assert 'qvera_fine_tuning_jobs{status="succeeded"} 1.0' in metrics
    assert "qvera_training_tokens_total 60.0" in metrics


def test_a_model_with_a_line_break_in_its_name_is_found_and_deleted_and_no_other_one_instead(training: Served) -> None:
    for name in ("two", "two\n", "two\nlines"):
        wait_for(training, create(training, suffix=name).json(), "succeeded")
    for name in ("two\n", "two\nlines"):
        assert ask(training, f"models/{quote(name)}").json()["id"] == name
        assert ask(training, f"models/{quote(name)}", method="DELETE").json()["id"] == name
    assert [model["id"] for model in ask(training, "models").json()["data"]].count("two") == 1


def test_columns_that_nothing_reads_are_told(training: Served) -> None:
    rows = b"".join(b'{"text": "ticket %d", "label": "billing"}\n' % number for number in range(4))
    made = create(training, rows=rows).json()
    wait_for(training, made, "succeeded", "failed")
    assert events(training, made, "Rows are") == [
        "Rows are read as text. Columns not read: label. To train on labels, call the columns prompt and completion."
    ]


# What is refused

BAD_ROWS = [
    (chat_rows(2) + b'{"messages": [{"role": "king", "content": "x"}]}\n', ":3: messages[0]: unknown role"),
    (chat_rows(2) + b"{", ":3: not valid JSON"),
    (b"\xff\xfe\n", ":1: not UTF-8 text"),
    (json.dumps(dict.fromkeys(map(str, range(9000)), 1)).encode(), ":1: the columns match no known format"),
    (
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        ":1: has a chosen and a rejected answer. Set training.objective: dpo (or orpo) to train on such pairs. No job "
        "trains on pairs: `qvera train` does.",
    ),
]


def test_a_learning_rate_in_place_of_its_multiplier_is_refused(training: Served) -> None:
    refused = create(training, hyperparameters={"learning_rate_multiplier": 1e-4})
    assert refused.status_code == 400
    assert "is a factor for the recipe's learning rate, not a rate" in refused.json()["error"]["message"]


def test_a_bad_file_fails_its_job_and_names_the_line(training: Served) -> None:
    for rows, message in BAD_ROWS:
        bad = send(training, rows, "held out.jsonl").json()["id"]
        for made, name, param in (
            (create(training, rows=rows).json(), "rows.jsonl", "training_file"),
            (create(training, validation_file=bad).json(), "held out.jsonl", "validation_file"),
        ):
            failed = wait_for(training, made, "failed", "succeeded")
            error = failed["error"]
            assert (failed["status"], failed["fine_tuned_model"]) == ("failed", None)
            assert (error["code"], error["param"]) == ("invalid_training_file", param)
            assert error["message"].startswith(f"{name}{message}")
            assert len(error["message"]) <= 2001
            assert events(training, made)[-1] == error["message"]
            assert str(training.jobs.directory.path) not in json.dumps(failed)


def test_a_file_that_is_read_as_a_whole_may_not_be_large(training: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MOST_JSON_BYTES", 1 << 20)
    row, line = json.dumps([{"prompt": "say", "completion": "red"}]).encode(), chat_rows(1).strip()

    def ends(name: str, rows: bytes) -> Any:
        file_id = send(training, rows, name).json()["id"]
        made = training.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file_id}).json()
        return (wait_for(training, made, "succeeded", "failed")["error"] or {"message": "none"})["message"]

    assert ends("rows.json", row.ljust(1 << 20)) == "none"
    said = ends("rows.json", row.ljust((1 << 20) + 1))
    assert "rows.json: a .json file is read as a whole, so it may have at most 1 MiB" in said
    said = ends("rows.jsonl", chat_rows(2) + line.ljust(4 << 20) + b"\n" + chat_rows(1))
    assert said.startswith("rows.jsonl:3: the row has more than 4,194,304 characters.")


ONE_EPOCH = {"hyperparameters": {"n_epochs": 1}}
WRONG_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "anna"}, "model", "expected the base, 'tiny'"),
    ({"training_file": "../x"}, "training_file", "there is no file '../x'; expected an id"),
    ({"validation_file": "file-no"}, "validation_file", "there is no file"),
    ({"integrations": [{"type": "wandb"}]}, "integrations", "not supported"),
    ({"method": {"type": "dpo", "dpo": {}}}, "method", "supervised"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "not supported"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "did you mean 'n_epochs'"),
    ({"hyperparameters": {"batch_size": 0}}, "hyperparameters", "greater than or equal to 1"),
    ({"hyperparameters": {"batch_size": True}}, "hyperparameters", "valid integer"),
    ({"hyperparameters": {"n_epochs": 1001}}, "hyperparameters", "less than or equal to 1000"),
    ({**ONE_EPOCH, "method": {"type": "supervised", "supervised": ONE_EPOCH}}, "hyperparameters", "give them once"),
    ({"n_epochs": 3}, "n_epochs", "here it is 'hyperparameters.n_epochs'."),
    ({"suffix": "tiny"}, "suffix", "is the name of the base"),
    ({"suffix": ""}, "suffix", "at least 1 item, not 0"),
    ({"suffix": " "}, "suffix", "blank"),
    ({"suffix": "x" * 65}, "suffix", "at most 64"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"metadata": {str(k): "x" for k in range(17)}}, "metadata", "at most 16"),
    ({"colour": "red"}, "colour", "Unknown key"),
]


def test_what_can_t_be_done_is_refused_by_name(training: Served) -> None:
    for body, param, message in WRONG_BODIES:
        answer = create(training, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        assert message in answer.json()["error"]["message"]
    assert ask(training, "fine_tuning/jobs").json()["data"] == []


def test_a_name_that_is_taken_is_replaced_only_where_that_is_asked_for(training: Served) -> None:
    def identity() -> str:
        return str(training.chat(model="anna").json()["system_fingerprint"])

    training.engine.trains.clear()
    first = create(training, suffix="anna").json()
    again = create(training, suffix="anna")
    assert again.status_code == 400
    assert "another job makes anna already" in again.json()["error"]["message"]
    training.engine.trains.set()
    wait_for(training, first, "succeeded")
    before = identity()
    taken = create(training, suffix="anna").json()["error"]
    assert (taken["code"], taken["param"]) == ("name_taken", "suffix")
    training.engine.trains.clear()
    second = create(training, suffix="anna", replace=True).json()
    assert identity() == before  # until it is done
    training.engine.trains.set()
    wait_for(training, second, "succeeded")
    assert identity() != before


def test_what_is_no_adapter_or_came_meanwhile_is_not_replaced(training: Served) -> None:
    other, came = training.root / "backup", training.root / "anna"
    other.mkdir()
    (other / "precious").write_text("yes")
    refused = create(training, suffix="backup", replace=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "name_taken")
    assert (other / "precious").read_text() == "yes"
    training.engine.trains.clear()
    made = create(training, suffix="anna").json()
    came.mkdir()
    (came / "adapter_config.json").write_text("{}")
    training.engine.trains.set()
    assert wait_for(training, made, "failed")["error"]["code"] == "name_taken"
    assert [file.name for file in came.iterdir()] == ["adapter_config.json"]


# What is done to a job


def hold_at(served: Served, step: int) -> Callable[[], None]:
    """Hold the trainer before this step of all parts; returns what lets it go on."""
    go_on, steps = threading.Event(), 0

    def before(name: str) -> None:
        nonlocal steps
        steps += name == "run_slice"
        if steps == step and name == "run_slice":
            go_on.wait(30)

    served.trainer.before = before
    return go_on.set


def test_jobs_are_paused_and_cancelled_before_they_begin_and_while_they_run(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", training_slots=1)
    go_on = hold_at(served, 4)
    running = create(served, hyperparameters={"n_epochs": 6, "batch_size": 4}).json()
    wait_for(served, running, "running")
    queued, waiting, last = (create(served).json() for _ in range(3))
    for made in (queued, waiting, last):
        wait_for(served, made, "queued")
    assert [change(served, made, "pause").json()["status"] for made in (running, waiting)] == ["paused"] * 2
    assert change(served, queued, "cancel").json()["status"] == "cancelled"
    go_on()
    wait_for(served, last, "succeeded")  # the slot is free for others
    for made in (running, waiting):
        wait_for(served, made, "paused")
        assert change(served, made, "resume").status_code == 200
    wait_for(served, waiting, "succeeded")
    assert wait_for(served, running, "succeeded", "failed")["trained_tokens"] == 60
    losses = [f"Step {k}/6: training loss={1 / k:.4f}" for k in range(1, 7)]
    assert events(served, running, "Step") == losses  # none twice
    assert events(served, running, "Fine-tuning job goes on after step 4")
    go_on = hold_at(served, 2)
    stopped = create(served, hyperparameters={"n_epochs": 50}, suffix="stopped").json()
    wait_for(served, stopped, "running")
    assert change(served, stopped, "cancel").json()["status"] == "cancelled"
    go_on()
    wait_until(lambda: not served.trainer.in_flight)
    assert not (served.root / "stopped").exists()
    assert list(served.jobs.directory.states.iterdir()) == []
    for made in (queued, stopped):
        assert wait_for(served, made, "cancelled")["finished_at"] is not None
        for how in ("cancel", "pause", "resume"):
            late = change(served, made, how)
            assert late.status_code == 400
            assert "is cancelled" in late.json()["error"]["message"]


def test_a_job_that_diverges_ends_alone_and_auto_is_what_the_server_s_recipe_says(training: Served) -> None:
    training.engine.trains.clear()
    bad, good = (create(training, hyperparameters={"n_epochs": "auto"}).json() for _ in range(2))
    assert good["hyperparameters"] == {"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": 1.0}
    training.trainer.not_finite[bad["id"]] = "step 1: its loss is not finite."
    training.engine.trains.set()
    diverged = {"code": "training_failed", "message": "step 1: its loss is not finite.", "param": None}
    assert wait_for(training, bad, "failed")["error"] == diverged
    assert wait_for(training, good, "succeeded")["fine_tuned_model"] == "ft-" + good["id"].removeprefix("ftjob-")


# Keys

KEYS = {"anna": ("anna tiny", "use train"), "ben": ("*", "use train")}


def test_keys_have_jobs_models_and_limits_of_their_own(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", keys=KEYS, open_jobs=2)
    anna, ben = served.headers.values()
    served.engine.trains.clear()
    made = create(served, anna, suffix="anna", metadata={"a": "1"}).json()
    assert "this key has models of its own" in create(served, anna).json()["error"]["message"]
    assert "may not use" in create(served, anna, suffix="ben").json()["error"]["message"]
    stolen = served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": made["training_file"]}, headers=ben)
    assert stolen.status_code == 400
    mine = create(served, ben, suffix="ben", metadata={"a": "2"}).json()
    for path in ("", "/events", "/checkpoints"):
        assert ask(served, f"fine_tuning/jobs/{made['id']}{path}", ben).status_code == 404
    for how in ("cancel", "pause", "resume"):
        assert ask(served, f"fine_tuning/jobs/{made['id']}/{how}", ben, method="POST").status_code == 404
    for asked in ({}, {"metadata[a]": "1"}, {"metadata[a]": "2"}):
        found = [one["id"] for one in ask(served, "fine_tuning/jobs", ben, **asked).json()["data"]]
        assert found == ([] if asked == {"metadata[a]": "1"} else [mine["id"]])
    last = create(served, ben).json()
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=ben["Authorization"][7:], timeout=30) as client:
        # what somebody has to change first is not asked for again
        with pytest.raises(openai.ConflictError) as in_use:
            client.files.delete(last["training_file"])
        with pytest.raises(openai.RateLimitError) as full:
            client.fine_tuning.jobs.create(model="tiny", training_file=last["training_file"])
    assert (in_use.value.code, full.value.code) == ("file_in_use", "too_many")
    calls = httpx.get(f"{served.url}/metrics", headers=ben).text
    assert 'qvera_calls_total{path="/v1/files/{file_id}",status="409"} 1.0' in calls
    assert 'qvera_calls_total{path="/v1/fine_tuning/jobs",status="429"} 1.0' in calls
    served.engine.trains.set()
    wait_for(served, made, "succeeded", headers=anna)
    wait_for(served, mine, "succeeded", headers=ben)
    assert ask(served, f"files/{made['training_file']}", anna, method="DELETE").status_code == 200
    assert ask(served, "models/anna", ben, method="DELETE").status_code == 403  # it may use it, and did not make it
    assert ask(served, "models/tiny", ben, method="DELETE").status_code == 403
    assert ask(served, "models/ben", anna, method="DELETE").status_code == 404
    gone = ask(served, "models/anna", anna, method="DELETE")
    assert gone.json() == {"id": "anna", "object": "model", "deleted": True}
    assert [path.name for path in served.root.iterdir() if path.name in ("anna", "ben")] == ["ben"]
    assert served.chat(model="anna", headers=anna).status_code == 404


def test_whoever_has_fewest_running_is_next(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", keys=KEYS, training_slots=2)
    anna, ben = served.headers.values()
    served.engine.trains.clear()
    greedy = [create(served, ben).json() for _ in range(4)]
    modest = create(served, anna, suffix="anna").json()
    for made in greedy:
        wait_for(served, made, "queued", headers=ben)
    wait_for(served, modest, "queued", headers=anna)
    served.engine.trains.set()
    wait_for(served, greedy[-1], "succeeded", headers=ben)
    assert served.trainer.begun == [made["id"] for made in (greedy[0], modest, *greedy[1:])]
