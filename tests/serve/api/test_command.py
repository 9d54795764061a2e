"""`qvera serve` as a process: a run of many adapters, asked over HTTP, says what `qvera generate` says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from qvera.serve.api.server import bound
from tests.many_adapters import write_customers, write_run
from tests.serve.command import Command

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("served")
    names = ["anna", "Ben & Söhne"]
    recipe = parse_recipe(
        {
            "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
            "adapter": {"rank": 8},
            "data": {
                "path": str(write_customers(here / "rows.csv", names)),
                "adapter_column": "customer",
                "system": "be short",
            },
            "training": {},
        },
        "customers",
    )
    return write_run(here / "run", recipe, names)


@pytest.fixture(scope="module")
def command(run: Path) -> Iterator[Command]:
    started = Command(str(run))
    yield started
    if started.process.poll() is None:
        assert started.stop() == 0, started.said
    assert "Traceback" not in started.said


def test_adapters_answer_as_qvera_generate_does(command: Command, run: Path, tmp_path: Path) -> None:
    names, question = ["anna", "Ben & Söhne"], "say red 3"
    out = tmp_path / "answers.jsonl"
    asked = [part for name in names for part in ("--adapter", name)]
    assert main(["generate", str(run), *asked, "--prompt", question, "--max-new-tokens", "12", "--out", str(out)]) == 0
    expected = {line["adapter"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}
    listed = httpx.get(f"{command.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny-llama", *sorted(names)]
    got = {}
    for name in names:
        (choice,) = command.chat(name, question, max_tokens=12).json()["choices"]
        got[name] = choice["message"]["content"]
    assert got == expected
    base = command.chat("tiny-llama", question, max_tokens=12).json()
    assert base["choices"][0]["message"]["content"] not in expected.values()


def test_logprobs_seeds_and_facts_come_from_the_engine(command: Command) -> None:
    twice = [
        command.chat("anna", "say", temperature=1.5, seed=3, n=2, max_tokens=8, logprobs=True, top_logprobs=3).json()
        for _ in range(2)
    ]
    contents = [[choice["message"]["content"] for choice in answer["choices"]] for answer in twice]
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[0][1]
    for entry in twice[0]["choices"][0]["logprobs"]["content"]:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] <= values[0] + 1e-6
    anna = httpx.get(f"{command.url}/v1/models/anna").json()
    assert anna["parent"] == "tiny-llama"
    assert anna["qvera"]["rank"] == 8
    assert anna["qvera"]["base"] == "tiny-llama"
    assert "/" not in json.dumps(anna)
    assert command.post("/v1/load_adapter", {"name": "anna"}).status_code == 200
    metrics = httpx.get(f"{command.url}/metrics").text
    assert re.search(r"^qvera_adapters_resident [1-9]", metrics, re.MULTILINE)
    unknown = command.chat("ana", "say").json()["error"]["message"]
    assert "did you mean 'anna'?" in unknown


def test_the_example_of_the_documentation_runs(command: Command, capsys: Any) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    block = block.replace("http://127.0.0.1:8000", command.url).replace("gina", "anna")
    exec(compile(block, "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out


def test_a_taken_port_is_named_before_anything_is_loaded(command: Command, capsys: Any) -> None:
    port = command.url.rsplit(":", 1)[1]
    assert main(["serve", "a base that is not there", "--port", port]) == 2
    assert f"--port {port}: can't be taken (Address already in use)" in capsys.readouterr().err


def test_sigterm_ends_the_process_after_the_running_answer(command: Command) -> None:
    body = {"model": "anna", "prompt": "say", "max_tokens": 200, "temperature": 2, "seed": 1, "stream": True}
    with httpx.stream("POST", f"{command.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
    assert command.process.wait(60) == 0


def test_a_base_with_a_directory_of_adapters(run: Path, tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """The base is loaded as the adapters' recipe says; a key opens it."""
    keys = tmp_path / "keys.json"
    assert main(["serve", "--new-key", "me", "--keys", str(keys)]) == 0
    key = capsys.readouterr().out.split()[-1]
    shutil.copytree(run / "adapters", tmp_path / "adapters")
    shutil.copytree(tmp_path / "adapters" / "anna", tmp_path / "adapters" / "tiny-llama")
    with bound("127.0.0.1", 0) as (_, url):
        pass
    body, statuses = {"model": "anna", "prompt": "say red 3", "max_tokens": 4, "temperature": 0}, []

    def ask() -> None:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                statuses.append(httpx.get(f"{url}/health").status_code)
                break
            time.sleep(0.1)
        else:
            return  # it has not started, and `main` tells why
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    line = [str(tiny_model_dir), "--adapters", str(tmp_path / "adapters"), "--keys", str(keys), "--engine", "static"]
    assert main(["serve", *line, "--port", url.rpartition(":")[2]]) == 0
    asking.join()
    assert statuses == [200, 401, 200]
    assert "The adapter 'tiny-llama' is called like the base, so it can't be asked for." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["x", "--host", "0.0.0.0"], "needs --keys FILE"),
        (["x", "--host", "example.com"], "needs --keys FILE"),
        (["x", "--adapters", "nowhere"], "--adapters nowhere: is no directory"),
        (["x", "--keys", "nowhere.json"], "qvera serve --new-key NAME --keys FILE"),
        (["--new-key", "me"], "--keys FILE"),
        (["x", "--may", "use"], "give --new-key NAME"),
        ([], "name what to serve"),
    ],
)
def test_bad_lines(line: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *line]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else real(name, *more)
    )
    assert main(["serve", "x"]) == 2
    assert "pip install 'qvera[serve]'" in capsys.readouterr().err
