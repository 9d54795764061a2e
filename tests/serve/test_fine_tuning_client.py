"""The whole way as a user goes it: OpenAI's client against `qvera serve` as a process, which trains while it answers."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from safetensors.torch import load_file

from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from qvera.serve.api.access import new_key
from qvera.utils.paths import ADAPTER_WEIGHTS
from tests.helpers import wait_until
from tests.many_adapters import write_customers, write_run
from tests.serve.command import Command
from tests.serve.helpers import write_adapters
from tests.serve.scripted_training import chat_rows

pytestmark = pytest.mark.process
WORDS = {"anna": "red red", "ben": "blue"}


def rows_of(word: str, count: int = 16) -> bytes:
    """Rows whose every answer is ``word``."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": word}]}
        for k in range(count)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def adapters(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one adapter of another shape than those that jobs make."""
    root = tmp_path_factory.mktemp("trained") / "adapters"
    write_adapters(root, tiny_model_dir, {"old": 0})
    return root


def serve(model_dir: Path, adapters: Path, training: Path, *more: str) -> Command:
    return Command(str(model_dir), "--adapters", str(adapters), "--training-dir", str(training), *more)


def client_of(command: Command, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{command.url}/v1", api_key=key, timeout=60)


def begin(client: openai.OpenAI, rows: bytes, name: str | None, **hyperparameters: Any) -> Any:
    """Upload rows, and create a job of many small steps."""
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    used: Any = {"n_epochs": 20, "batch_size": 8, "learning_rate_multiplier": 5.0, **hyperparameters}
    model = client.models.list().data[0].id
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": used}}
    settings: dict[str, Any] = {} if name is None else {"suffix": name}
    return client.fine_tuning.jobs.create(model=model, training_file=file.id, method=method, seed=1, **settings)


def wait_for(client: openai.OpenAI, job: Any, *statuses: str) -> Any:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in statuses, 240)
    return client.fine_tuning.jobs.retrieve(job.id)


def steps_of(client: openai.OpenAI, job: Any) -> list[int]:
    """The steps in a job's events, the first one first."""
    events: list[Any] = list(client.fine_tuning.jobs.list_events(job.id))  # all pages of them
    return [event.data["step"] for event in reversed(events) if event.type == "metrics"]


def say(client: openai.OpenAI, model: str, text: str = "say 3") -> str:
    messages: Any = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=20)
    return str(answer.choices[0].message.content)


@pytest.mark.parametrize("engine", ["continuous", pytest.param("static", marks=pytest.mark.slow)])
def test_two_users_train_at_once_while_answers_go_on(
    engine: str, tiny_model_dir: Path, adapters: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    users = {name: new_key(keys, name, ["*"], ["use", "train"]) for name in WORDS}
    reader = new_key(keys, "reader", ["*"], ["use"])
    names = {name: f"{name} {engine}" for name in WORDS}
    more = ["--keys", str(keys), "--engine", engine, "--training-share", "0.5"]
    command = serve(tiny_model_dir, adapters, tmp_path / "training", *more)
    try:
        clients = {name: client_of(command, key) for name, key in users.items()}
        reading = client_of(command, reader)
        before = say(reading, "old")
        jobs = {name: begin(client, rows_of(WORDS[name]), names[name]) for name, client in clients.items()}
        with pytest.raises(openai.NotFoundError):
            clients["anna"].fine_tuning.jobs.retrieve(jobs["ben"].id)
        with pytest.raises(openai.PermissionDeniedError, match="may not train"):
            reading.files.create(file=("rows.jsonl", rows_of("x")), purpose="fine-tune")
        answered, done = [0], threading.Event()

        def keep_asking() -> None:
            while not done.is_set():
                assert say(reading, "old") == before
                answered[0] += 1

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            ended = {name: wait_for(client, jobs[name], "succeeded", "failed") for name, client in clients.items()}
        finally:
            done.set()
            asking.join()
        assert answered[0] > 3
        for name, client in clients.items():
            job = ended[name]
            assert job.status == "succeeded", job.error
            assert say(client, names[name]) == WORDS[name]
            assert say(reading, names[name], "say 9") == WORDS[name]
            assert steps_of(client, job) == list(range(1, 41))
            losses = client.files.content(job.result_files[0]).text.splitlines()
            assert len(losses) == 41
            assert float(losses[1].split(",")[1]) > float(losses[-1].split(",")[1])
            assert [checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id)] == [40]
            facts = httpx.get(
                f"{command.url}/v1/models/{names[name]}", headers={"Authorization": f"Bearer {users[name]}"}
            )
            assert facts.json()["qvera"]["rows"] == 16
        with pytest.raises(openai.PermissionDeniedError):
            clients["anna"].models.delete(names["ben"])
        assert clients["ben"].models.delete(names["ben"]).deleted
        with pytest.raises(openai.NotFoundError):
            say(clients["ben"], names["ben"])
        metrics = httpx.get(f"{command.url}/metrics", headers={"Authorization": f"Bearer {reader}"}).text
        assert 'qvera_fine_tuning_jobs{status="succeeded"} 2.0' in metrics
        assert float(re.findall(r"^qvera_training_seconds_total (\S+)", metrics, re.MULTILINE)[0]) > 0
    finally:
        assert command.stop() == 0, "".join(command.said)
    assert "Traceback" not in "".join(command.said)


def test_a_killed_server_goes_on_to_the_same_adapters(tiny_model_dir: Path, adapters: Path, tmp_path: Path) -> None:
    """The job is trained alone: when another one joins it is a matter of time, and then it is the same up to rounding."""
    training, rows = tmp_path / "training", rows_of("red blue")
    command = serve(tiny_model_dir, adapters, training, "--train-at-once", "1")
    client = client_of(command)
    job = begin(client, rows, "killed", n_epochs=55)  # 110 steps, saved after 100
    waiting = begin(client, rows_of("blue"), "waiting", n_epochs=1)
    wait_until((training / "states" / f"{job.id}.safetensors").exists, 240)
    command.process.send_signal(signal.SIGKILL)
    command.process.wait(60)
    assert not (adapters / "killed").exists()
    command = serve(tiny_model_dir, adapters, training, "--train-at-once", "1")
    client = client_of(command)
    whole = begin(client, rows, "whole", n_epochs=55)
    for one in (job, waiting, whole):
        ended = wait_for(client, one, "succeeded", "failed")
        assert ended.status == "succeeded", ended.error
    for one in (job, whole):
        assert steps_of(client, one) == list(range(1, 111))
        events = list(client.fine_tuning.jobs.list_events(one.id))
        assert any("goes on after step" in event.message for event in events) == (one is job)
    assert command.stop() == 0, "".join(command.said)
    found = load_file(adapters / "killed" / ADAPTER_WEIGHTS)
    for key, expected in load_file(adapters / "whole" / ADAPTER_WEIGHTS).items():
        assert expected.equal(found[key]), key


def test_sigterm_saves_what_is_trained_and_the_example_of_the_documentation_runs(
    tiny_model_dir: Path, adapters: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = serve(tiny_model_dir, adapters, tmp_path / "training")
    client = client_of(command)
    job = begin(client, rows_of("red"), "long", n_epochs=1000)
    paused = begin(client, rows_of("blue"), "later", n_epochs=2)
    client.fine_tuning.jobs.pause(paused.id)
    wait_until(lambda: len(client.fine_tuning.jobs.list_events(job.id).data) > 10)
    began = time.monotonic()
    assert command.stop() == 0, "".join(command.said)
    assert time.monotonic() - began < 30
    command = serve(tiny_model_dir, adapters, tmp_path / "training")
    client = client_of(command)
    wait_until(lambda: any("goes on after" in e.message for e in client.fine_tuning.jobs.list_events(job.id)), 60)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert str(client.fine_tuning.jobs.retrieve(paused.id).status) == "paused"
    client.fine_tuning.jobs.resume(paused.id)
    assert wait_for(client, paused, "succeeded", "failed").status == "succeeded"
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    wait_until(lambda: len([e for e in client.fine_tuning.jobs.list_events(job.id) if "goes on" in e.message]) == 2)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    bad = begin(client, b'{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n', "bad")
    failed = wait_for(client, bad, "failed", "succeeded")
    assert failed.error.message.startswith("rows.jsonl:2: prompt must be text")
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_bytes(chat_rows(8))
    exec(compile(block.replace("http://127.0.0.1:8000", command.url), "docs/fine-tuning.md", "exec"), {})
    assert command.stop() == 0, "".join(command.said)
    assert "The job has successfully completed" in capsys.readouterr().out
    assert (adapters / "support").is_dir()
    assert not (adapters / "long").exists()


def test_a_job_trains_what_qvera_train_trains_by_the_recipe_of_the_served_run(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": str(write_customers(tmp_path / "rows.csv", ["anna"])), "system": "be short", "seed": 3},
        "training": {"global_batch_size": 4, "learning_rate": 0.02, "num_train_epochs": 2, "sample_count": 0},
    }
    many = {**recipe, "data": {**recipe["data"], "adapter_column": "customer"}}
    run = write_run(tmp_path / "run", parse_recipe(many, "many"), ["anna"])
    rows, held_out = tmp_path / "trained.jsonl", tmp_path / "held out.jsonl"
    rows.write_bytes(chat_rows(11))
    held_out.write_bytes(chat_rows(3, first=50))
    own = {"path": str(rows), "eval_path": str(held_out)}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], **own}}))
    alone = tmp_path / "alone"
    assert main(["train", str(tmp_path / "alone.yaml"), "--set", f"training.output_dir={alone}"]) == 0
    result = json.loads((alone / "run.json").read_text())["result"]
    command = Command(str(run), "--training-dir", str(tmp_path / "training"))
    try:
        client = client_of(command)
        files = [client.files.create(file=path, purpose="fine-tune").id for path in (rows, held_out)]
        asked: Any = {"training_file": files[0], "validation_file": files[1], "suffix": "new"}
        job = wait_for(client, client.fine_tuning.jobs.create(model="tiny-llama", **asked), "succeeded", "failed")
        assert job.status == "succeeded", job.error
        assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size, job.seed) == (2, 4, 3)
        facts = httpx.get(f"{command.url}/v1/models/new").json()["qvera"]
        assert facts["loss_before"] == pytest.approx(result["eval_before"]["loss"], rel=1e-4)
        assert facts["loss"] == pytest.approx(result["eval_after"]["loss"], rel=1e-3)
        assert facts["rows"] == 11
        client.fine_tuning.jobs.create(model="tiny-llama", **asked, extra_body={"replace": True})
        with pytest.raises(openai.BadRequestError, match="already"):
            client.fine_tuning.jobs.create(model="tiny-llama", **{**asked, "suffix": "anna"})
    finally:
        assert command.stop() == 0, "".join(command.said)
    vectors = load_file(alone / "adapter" / ADAPTER_WEIGHTS)
    found = load_file(run / "adapters" / "new" / ADAPTER_WEIGHTS)
    assert found.keys() == vectors.keys()
    for key, vector in vectors.items():
        torch.testing.assert_close(found[key], vector, rtol=1e-3, atol=1e-5)


def test_training_needs_a_place_for_adapters_and_a_recipe_that_fits(
    tiny_model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    training = ["--training-dir", str(tmp_path / "training"), "--port", "0"]
    assert main(["serve", str(tiny_model_dir), *training]) == 2
    assert "--adapters DIR" in capsys.readouterr().err
    run = tmp_path / "run"
    (tmp_path / "adapters").mkdir()
    recipe = {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "data": {"path": "rows.csv"},
        "adapter": {"dropout": 0.1},
    }
    write_adapters(run, tiny_model_dir, {"adapter": 0})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["serve", str(run), "--adapters", str(tmp_path / "adapters"), *training]) == 2
    assert "adapter.dropout: each adapter" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["serve", str(tiny_model_dir), "--training-dir", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
