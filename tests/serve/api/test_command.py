"""`qvera serve` as a process: a run of many adapters, asked over HTTP, says what `qvera generate` says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from qvera.serve.api.server import bound
from tests.helpers import ROOT, commands, wait_until
from tests.many_adapters import write_customers, write_run
from tests.serve.command import Command

pytestmark = pytest.mark.process
NAMES = ["Ben & Söhne", "anna"]


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("served")
    rows = str(write_customers(here / "rows.csv", NAMES))
    recipe = {
        "model": {"path": str(tiny_model_dir), "compute_dtype": "float32"},
        "adapter": {"rank": 8},
        "data": {"path": rows, "adapter_column": "customer", "system": "be short"},
    }
    return write_run(here / "run", parse_recipe(recipe, "customers"), NAMES)


@pytest.fixture(scope="module")
def command(run: Path) -> Iterator[Command]:
    with Command(str(run)) as command:
        yield command


def ask(command: Command, model: str, **keys: Any) -> Any:
    messages = [{"role": "user", "content": "say red 3"}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12, **keys}
    return command.post("/v1/chat/completions", body).json()


def test_adapters_answer_as_qvera_generate_does(command: Command, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    line = ["--adapter", NAMES[0], "--adapter", NAMES[1], "--prompt", "say red 3", "--max-new-tokens", "12"]
    assert main(["generate", str(run), *line, "--out", str(out)]) == 0
    expected = {line["adapter"]: line["answer"] for line in map(json.loads, out.read_text().splitlines())}
    listed = httpx.get(f"{command.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny-llama", *NAMES]
    got = {name: ask(command, name)["choices"][0]["message"]["content"] for name in ("tiny-llama", *NAMES)}
    assert got.pop("tiny-llama") not in expected.values()
    assert got == expected
    assert ask(command, str(run))["error"]["code"] == "model_not_found", "a run is not its base"


def test_logprobs_seeds_and_facts_come_from_the_engine(command: Command) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 3}
    twice = [ask(command, "anna", **drawn)["choices"] for _ in range(2)]
    contents = [[choice["message"]["content"] for choice in choices] for choices in twice]
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[0][1]
    for entry in twice[0][0]["logprobs"]["content"]:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] <= values[0] + 1e-6
    anna = httpx.get(f"{command.url}/v1/models/anna").json()
    assert (anna["parent"], anna["qvera"]["rank"], anna["qvera"]["base"]) == ("tiny-llama", 8, "tiny-llama")
    assert "/" not in json.dumps(anna)
    assert command.post("/v1/load_adapter", {"name": "anna"}).status_code == 200
    assert re.search(r"^qvera_adapters_resident [1-9]", httpx.get(f"{command.url}/metrics").text, re.MULTILINE)


def test_the_example_of_the_documentation_runs(command: Command, capsys: Any) -> None:
    block, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(encoding="utf-8"), re.DOTALL)
    block = block.replace("http://127.0.0.1:8000", command.url).replace("gina", "anna")
    block = block.replace("stream=True", "stream=True, seed=1")  # a drawn answer may be empty
    exec(compile(block, "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out
    (curl,) = (line for line in commands("docs/serve.md") if line.startswith("curl ") and "completions" in line)
    line = shlex.split(curl.replace("http://127.0.0.1:8000", command.url).replace("chloe", "anna"))
    found = subprocess.run(line, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(found.stdout)["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_taken_port_is_named_before_anything_is_loaded(
    command: Command, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = command.url.rsplit(":", 1)[1]
    monkeypatch.setitem(sys.modules, "qvera.evaluation.generate", None)  # it imports torch
    assert main(["serve", "a base that is not there", "--port", port]) == 2
    assert (
        f"--port {port}: can't be taken (Address already in use). Another program listens there"
        in capsys.readouterr().err
    )


def test_sigterm_ends_the_process_after_the_running_answer(command: Command) -> None:
    body = {"model": "anna", "prompt": "say", "max_tokens": 200, "temperature": 2, "seed": 1, "stream": True}
    with httpx.stream("POST", f"{command.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        command.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
    assert command.wait() == 0
    assert "/v1. Ctrl-C ends it.\nstopping" in command.said
    assert f"tiny-llama and {len(NAMES)} adapters at http" in command.said


def test_a_base_with_a_directory_of_adapters(run: Path, tiny_model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """The base is loaded as the adapters' recipe says; a key opens it."""
    keys, statuses = str(tmp_path / "keys.json"), list[int]()
    assert main(["serve", "--new-key", "me", "--keys", keys]) == 0
    key = capsys.readouterr().out.split()[-1]
    adapters = shutil.copytree(run / "adapters", tmp_path / "adapters")
    shutil.copytree(adapters / "anna", adapters / "tiny-llama")
    with bound("127.0.0.1", 0) as (_, url):
        pass

    def is_there() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    def ask_and_end() -> None:
        wait_until(is_there, 60)
        body = {"model": "anna", "prompt": "say red 3", "max_tokens": 4, "temperature": 0}
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask_and_end)
    asking.start()
    line = [str(tiny_model_dir), "--adapters", str(adapters), "--keys", keys, "--engine", "static"]
    assert main(["serve", *line, "--port", url.rpartition(":")[2]]) == 0
    asking.join()
    assert statuses == [401, 200]
    assert "The adapter 'tiny-llama' is called like the base, so it can't be asked for." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["x", "--host", "0.0.0.0"], "needs --keys FILE"),
        (["x", "--host", "example.com"], "needs --keys FILE"),
        (["x", "--host", "127.0.0.1:8000"], "a port goes to --port"),
        (["x", "--train-at-once", "2"], "--train-at-once: goes with --training-dir only"),
        (["x", "--max-rank", "8"], "--max-rank: goes with --tinker only"),
        (["x", "--adapters", "nowhere"], "--adapters nowhere: no such directory. Make one, or name a run"),
        (["x", "--adapters", __file__], f"--adapters {__file__}: is a file, not a directory."),
        (["x", "--keys", "nowhere.json"], "qvera serve --new-key NAME --keys FILE"),
        (["x", "--training-dir", "jobs"], "with --adapters DIR; it may be empty"),
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
