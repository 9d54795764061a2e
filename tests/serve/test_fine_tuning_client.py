"""The whole way as a user goes it: OpenAI's client against `qvera serve` as a process, which trains while it answers."""

from __future__ import annotations

import json
import re
import signal
import threading
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
from qvera.utils.files import ADAPTER_WEIGHTS
from tests.helpers import ROOT, wait_until
from tests.many_adapters import write_customers, write_run
from tests.serve.command import Command
from tests.serve.helpers import write_adapters
from tests.serve.scripted_training import chat_rows


@pytest.fixture
def adapters(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A directory with one adapter of another shape than those that jobs make."""
    write_adapters(tmp_path / "adapters", tiny_model_dir, {"old": 0})
    return tmp_path / "adapters"


def client_of(command: Command, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{command.url}/v1", api_key=key, timeout=60)


def begin(client: openai.OpenAI, word: str, name: str, epochs: int) -> Any:
    """Upload 16 rows whose every answer is this word, and create a job of two steps an epoch."""
    file = client.files.create(file=("rows.jsonl", chat_rows(16, answer=word)), purpose="fine-tune")
    used: Any = {"n_epochs": epochs, "batch_size": 8, "learning_rate_multiplier": 5.0}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": used}}
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, suffix=name, method=method, seed=1)


def succeeded(client: openai.OpenAI, job: Any) -> Any:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 240)
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "succeeded", ended.error
    return ended


def events_of(client: openai.OpenAI, job: Any) -> list[Any]:
    """All pages of them, the first one first."""
    return list(client.fine_tuning.jobs.list_events(job.id))[::-1]


def steps_of(client: openai.OpenAI, job: Any) -> list[int]:
    return [event.data["step"] for event in events_of(client, job) if event.type == "metrics"]


def say(client: openai.OpenAI, model: str, text: str = "say 3") -> str:
    messages: Any = [{"role": "user", "content": text}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=20)
    return str(answer.choices[0].message.content)


@pytest.mark.process
def test_two_users_train_at_once_while_answers_go_on(tiny_model_dir: Path, adapters: Path, tmp_path: Path) -> None:
    keys, words = tmp_path / "keys.json", {"anna": "red", "ben": "blue"}
    users = {name: new_key(keys, name, ["*"], ["use", "train"]) for name in words}
    reader = new_key(keys, "reader", ["*"], ["use"])
    line = [str(tiny_model_dir), "--adapters", str(adapters), "--training-dir", str(tmp_path / "training")]
    with Command(*line, "--keys", str(keys), "--training-share", "0.5") as command:
        clients = {name: client_of(command, key) for name, key in users.items()}
        reading = client_of(command, reader)
        before = say(reading, "old")
        jobs = {name: begin(client, words[name], name, 20) for name, client in clients.items()}
        with pytest.raises(openai.NotFoundError):
            clients["anna"].fine_tuning.jobs.retrieve(jobs["ben"].id)
        with pytest.raises(openai.PermissionDeniedError, match="may not train"):
            begin(reading, "x", "x", 1)
        answered, done = [0], threading.Event()

        def keep_asking() -> None:
            while not done.is_set():
                assert say(reading, "old") == before
                answered[0] += 1

        asking = threading.Thread(target=keep_asking)
        asking.start()
        try:
            ended = {name: succeeded(client, jobs[name]) for name, client in clients.items()}
        finally:
            done.set()
            asking.join()
        assert answered[0] > 3
        for name, client in clients.items():
            assert say(client, name) == say(reading, name, "say 9") == words[name]
            assert steps_of(client, jobs[name]) == list(range(1, 41))
            losses = client.files.content(ended[name].result_files[0]).text.splitlines()
            assert len(losses) == 41
            assert float(losses[1].split(",")[1]) > float(losses[-1].split(",")[1])
        with pytest.raises(openai.PermissionDeniedError):
            clients["anna"].models.delete("ben")
        assert clients["ben"].models.delete("ben").deleted
        with pytest.raises(openai.NotFoundError):
            say(clients["ben"], "ben")
        metrics = httpx.get(f"{command.url}/metrics", headers={"Authorization": f"Bearer {reader}"}).text
        assert 'qvera_fine_tuning_jobs{status="succeeded"} 2.0' in metrics
        assert re.search(r"^qvera_training_seconds_total (?!0\.0$)", metrics, re.MULTILINE)


@pytest.mark.process
def test_a_server_that_is_killed_and_one_that_is_stopped_go_on_to_the_same_adapter(
    tiny_model_dir: Path, adapters: Path, tmp_path: Path
) -> None:
    """The job is trained alone: when another one joins it is a matter of time, and then it is the same up to rounding."""
    training = tmp_path / "training"
    line = [str(tiny_model_dir), "--adapters", str(adapters), "--training-dir", str(training), "--train-at-once", "1"]
    command = Command(*line, save_steps=10)
    client = client_of(command)
    job, waiting = begin(client, "red blue", "stopped", 20), begin(client, "blue", "waiting", 1)
    wait_until((training / "states" / f"{job.id}.safetensors").exists)
    command.stop(signal.SIGKILL)
    with Command(*line) as command:
        client = client_of(command)
        wait_until(lambda: "goes on after step 10" in str(events_of(client, job)))
    assert not (adapters / "stopped").exists()
    with Command(*line) as command:
        client = client_of(command)
        whole = begin(client, "red blue", "whole", 20)
        for one in (job, waiting, whole):
            succeeded(client, one)
        assert [str(events_of(client, one)).count("goes on after step") for one in (job, whole)] == [2, 0]
        assert steps_of(client, job) == steps_of(client, whole) == list(range(1, 41))
    found, expected = (load_file(adapters / name / ADAPTER_WEIGHTS) for name in ("stopped", "whole"))
    assert all(vector.equal(found[key]) for key, vector in expected.items())


@pytest.mark.process
def test_a_job_trains_what_qvera_train_trains_by_the_recipe_of_the_served_run_and_the_documentation_s_example_runs(
    tiny_model_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: dict[str, Any] = {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": str(write_customers(tmp_path / "rows.csv", ["anna"])), "system": "be short", "seed": 3},
        "training": {"global_batch_size": 4, "learning_rate": 0.02, "num_train_epochs": 2, "sample_count": 0},
    }
    many = {**recipe, "data": {**recipe["data"], "adapter_column": "customer"}}
    run = write_run(tmp_path / "run", parse_recipe(many, "many"), ["anna"])
    rows, held_out = tmp_path / "rows.jsonl", tmp_path / "held out.jsonl"
    rows.write_bytes(chat_rows(11))
    held_out.write_bytes(chat_rows(3, first=50))
    own = {"path": str(rows), "eval_path": str(held_out)}
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], **own}}))
    alone = tmp_path / "alone"
    assert main(["train", str(tmp_path / "alone.yaml"), "--set", f"training.output_dir={alone}"]) == 0
    result = json.loads((alone / "run.json").read_text())["result"]
    with Command(str(run), "--training-dir", str(tmp_path / "training")) as command:
        client = client_of(command)
        files = [client.files.create(file=path, purpose="fine-tune").id for path in (rows, held_out)]
        asked: Any = {"training_file": files[0], "validation_file": files[1], "suffix": "new"}
        job = succeeded(client, client.fine_tuning.jobs.create(model="tiny-llama", **asked))
        assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size, job.seed) == (2, 4, 3)
        facts = httpx.get(f"{command.url}/v1/models/new").json()["qvera"]
        assert facts["loss_before"] == pytest.approx(result["eval_before"]["loss"], rel=1e-4)
        assert facts["loss"] == pytest.approx(result["eval_after"]["loss"], rel=1e-3)
        assert facts["rows"] == 11
        with pytest.raises(openai.BadRequestError, match="already"):
            client.fine_tuning.jobs.create(model="tiny-llama", **{**asked, "suffix": "anna"})
        page = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
        (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(compile(block.replace("http://127.0.0.1:8000", command.url), "docs/fine-tuning.md", "exec"), {})
        assert "The job has successfully completed" in capsys.readouterr().out
    vectors, found = (load_file(place / ADAPTER_WEIGHTS) for place in (alone / "adapter", run / "adapters" / "new"))
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
    model = {"path": str(tiny_model_dir), "compute_dtype": "float32"}
    write_adapters(run, tiny_model_dir, {"adapter": 0})
    recipe = {"model": model, "data": {"path": "rows.csv"}, "adapter": {"dropout": 0.1}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["serve", str(run), "--adapters", str(tmp_path / "adapters"), *training]) == 2
    said = capsys.readouterr().err
    assert "adapter.dropout: each adapter" in said and said.endswith("Or serve the base, with --adapters DIR.\n")
    (tmp_path / "file").write_text("")
    adapters = ["--adapters", str(tmp_path / "adapters")]
    assert main(["serve", str(tiny_model_dir), *adapters, "--training-dir", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
