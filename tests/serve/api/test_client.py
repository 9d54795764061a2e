"""`qvera chat` and `qvera generate` with the address of a server in place of a run."""

from __future__ import annotations

import io
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main
from qvera.serve.client import KEY_VARIABLE, ServerClient, server_url
from qvera.utils.errors import InputError
from tests.cli.helpers import stopped_after
from tests.helpers import Terminal
from tests.serve.api.conftest import Served, Start


def test_an_address_is_known_from_a_run() -> None:
    assert server_url(Path("http://127.0.0.1:8000")) == "http://127.0.0.1:8000"
    assert server_url(Path("http://127.0.0.1:8000/v1")) == "http://127.0.0.1:8000"
    assert server_url(Path("https://example.org/models/v1/")) == "https://example.org/models"
    assert server_url(Path("http://127.0.0.1:8000/v1/chat/completions")) == "http://127.0.0.1:8000"
    assert server_url(Path("runs/http")) is None


def test_chat_keeps_the_conversation(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n/reset\nagain\n/quit\n"))
    assert main(["chat", served.url, "--adapter", "anna", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == [served.said["anna"]] * 3
    lengths = [len(request.prompt) for request in served.engine.requests]
    assert lengths[0] < lengths[1] > lengths[2]
    assert {request.adapter.name for request in served.engine.requests if request.adapter} == {"anna"}


def test_a_context_ends_an_answer_and_a_refusal_ends_no_chat(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """512 new tokens, the default, are more than the context: the answer has what is left."""
    monkeypatch.setattr("sys.stdin", Terminal())
    lines = iter(["hello", "long " * 3000, "and more", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", served.url, "--adapter", "anna", "--max-new-tokens", "100000"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [served.said["anna"]] * 2
    assert "A prompt may have" in said.err
    first, second = served.engine.requests
    assert len(first.prompt) < len(second.prompt) < 1000, "the refused message is forgotten"


def test_generate_asks_each_adapter_that_rows_name_or_options_and_a_busy_server_again(
    start: Start, tmp_path: Path
) -> None:
    served, rows = start(places=1, queue=0), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "adapter": n}) + "\n" for n in ("anna", "ben")))

    def answers(*line: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{len(line)}.out"
        assert main(["generate", served.url, *line, "--out", str(out)]) == 0
        return [json.loads(answer) for answer in out.read_text().splitlines()]

    for line, order in (
        ([str(rows)], ["anna", "ben"]),
        (["--adapter", "ben", "--adapter", "anna", "--prompt", "say it"], ["ben", "anna"]),
    ):
        found = [(answer["adapter"], answer["answer"]) for answer in answers(*line)]
        assert found == [(name, served.said[name]) for name in order]
    base = {"source": "--prompt 1", "prompt": "say it", "answer": served.said["tiny"]}
    assert answers("--base", "--prompt", "say it") == [base]
    rows.write_text(json.dumps({"instruction": "say it", "input": "twice", "output": "it"}) + "\n")
    (answer,) = answers(str(rows), "--adapter", "ben", "--batch-size", "1")
    assert answer["prompt"] == "say it\n\ntwice"
    without, with_input = (len(served.engine.requests[i].prompt) for i in (-2, -1))
    assert without < with_input, "the server reads an instruction's input too"


def test_what_a_server_refuses_is_said(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    served = start(keys={"all": ("*", "use"), "anna": ("anna", "use"), "later": ("later", "use")})

    def refused(key: str, *options: str, code: int = 2) -> str:
        if key:
            monkeypatch.setenv(KEY_VARIABLE, served.headers[key]["Authorization"].removeprefix("Bearer "))
        assert main(["generate", served.url, "--prompt", "say it", *options]) == code
        return str(capsys.readouterr().err)

    assert f"Set {KEY_VARIABLE} to a key of this server" in refused("", "--adapter", "anna")
    assert "Name one with --adapter NAME: anna, ben" in refused("all")
    assert "has no model ana; did you mean 'anna'? There are tiny, anna, ben." in refused("all", "--adapter", "ana")
    assert "--base: this key may not use the base" in refused("anna", "--base")
    assert "has no model that this key may use" in refused("later")
    with pytest.raises(InputError, match="has no model that this key may use"):
        ServerClient.at(served.url).pick_judge(None)
    served.engine.fails = "the engine broke"
    assert "the engine broke" in refused("all", "--adapter", "anna", code=1)


def test_a_row_whose_adapter_a_server_does_not_have_is_named(served: Served, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    for second, said in (({"adapter": "ana"}, "has no model ana; did you mean 'anna'?"), ({}, "names no adapter")):
        lines = [{"prompt": "say", "adapter": "anna"}, {"prompt": "say", **second}]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["generate", served.url, str(rows)]) == 2
        found = capsys.readouterr().err
        assert "rows.jsonl:2: " in found and said in found


def test_answers_of_a_server_are_kept_too(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, line = (
        tmp_path / "a.jsonl",
        ["generate", served.url, "--adapter", "anna", "--adapter", "ben", "--batch-size", "1"],
    )
    line += ["--prompt", "say it", "--prompt", "and again", "--out", str(out)]
    with monkeypatch.context() as patch:
        stopped_after(3, KeyboardInterrupt(), patch)
        assert main(line) == 75
    before = len(served.engine.requests)
    assert main(line) == 0
    assert len(served.engine.requests) - before <= 1
    found = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["answer"] for row in found] == [served.said["anna"], served.said["ben"]] * 2


def test_https_to_a_server_without_it(served: Served, capsys: Any) -> None:
    assert main(["generate", served.url.replace("http:", "https:"), "--prompt", "say it"]) == 1
    assert "Is it a server of http://?" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_is_said(capsys: Any) -> None:
    """Of the list of models, and of what a server refuses."""
    heads = iter(["200 OK", "429 Busy", "403 No"])

    def answer(listener: socket.socket) -> None:
        for head in heads:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(
                    f'HTTP/1.1 {head}\r\nRetry-After: 0\r\nContent-Length: 500\r\n\r\n{{"data": ['.encode()
                )

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=answer, args=(listener,))
        answering.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for code, message in (
            (1, "the connection broke in the middle of an answer: IncompleteRead"),
            (2, "answered 403"),
        ):
            assert main(["generate", url, "--prompt", "say it"]) == code
            assert message in capsys.readouterr().err
        answering.join()


def test_a_server_that_is_not_there(capsys: Any) -> None:
    assert main(["chat", "http://127.0.0.1:9", "--adapter", "anna"]) == 1
    assert "can't be reached" in capsys.readouterr().err
