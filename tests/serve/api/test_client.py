"""`qvera chat` and `qvera generate` with the address of a server in place of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from qvera.cli.main import main
from qvera.evaluation.judge import JudgePrompt, Pair, judge_pairs
from qvera.serve.api.access import KeyFile, new_key
from qvera.serve.client import KEY_VARIABLE, ServerClient, server_url
from qvera.utils.errors import InputError
from tests.helpers import wait_until
from tests.serve.api.conftest import Start


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("https://example.org/models/v1/", "https://example.org/models"),
        ("runs/http", None),
    ],
)
def test_an_address_is_known_from_a_run(typed: str, address: str | None) -> None:
    assert server_url(Path(typed)) == address


def test_chat_keeps_the_conversation(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    served = start()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n/reset\nagain\n/quit\n"))
    assert main(["chat", served.url, "--adapter", "anna", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == [served.said["anna"]] * 3
    lengths = [len(request.prompt) for request in served.engine.requests]
    assert lengths[0] < lengths[1] > lengths[2]
    assert {request.adapter.name for request in served.engine.requests if request.adapter} == {"anna"}


def test_generate_asks_each_adapter_that_rows_name_or_options(start: Start, tmp_path: Path) -> None:
    served = start()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "adapter": n}) + "\n" for n in ("anna", "ben")))
    assert main(["generate", served.url, str(rows), "--out", str(tmp_path / "rows.out")]) == 0
    asked = ["--adapter", "ben", "--adapter", "anna", "--prompt", "say it"]
    assert main(["generate", served.url, *asked, "--out", str(tmp_path / "options.out")]) == 0
    assert main(["generate", served.url, "--base", "--prompt", "say it", "--out", str(tmp_path / "base.out")]) == 0
    found = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.out").read_text().splitlines()]
        for name in ("rows", "options", "base")
    }
    for name, order in (("rows", ["anna", "ben"]), ("options", ["ben", "anna"])):
        assert [(line["adapter"], line["answer"]) for line in found[name]] == [(n, served.said[n]) for n in order]
    assert found["base"] == [{"source": "--prompt 1", "prompt": "say it", "answer": served.said["tiny"]}]


def test_a_busy_server_is_asked_again(start: Start, tmp_path: Path) -> None:
    served = start(places=1, queue=0, retry_seconds=1)
    rows = tmp_path / "prompts.txt"
    rows.write_text("one\ntwo\nthree\n")
    assert main(["generate", served.url, str(rows), "--adapter", "anna", "--out", str(tmp_path / "out")]) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 3
    wait_until(lambda: served.engine.stats().running == 0)


def test_a_server_of_ours_judges_pairs(start: Start) -> None:
    served = start()
    client = ServerClient.at(served.url)
    model = client.pick_judge("tiny")

    def ask(text: str) -> str:
        return client.chat(model, [{"role": "user", "content": text}], temperature=0.0, max_tokens=20)

    judged = judge_pairs([Pair("q", "one", "two")], JudgePrompt.read(), ask)
    assert [row["replies"] for row in judged] == [[served.said["tiny"]] * 2]
    assert judged[0]["outcome"] == "unreadable"
    with pytest.raises(InputError, match="has 3 models. Name one with --judge-model: "):
        client.pick_judge(None)


def test_what_a_server_refuses_is_said(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    key = new_key(tmp_path / "keys.json", "all", ["*"], ["use"])
    served = start(keys=KeyFile(tmp_path / "keys.json"))
    ask = ["generate", served.url, "--prompt", "say it"]

    def refused(*options: str) -> str:
        assert main([*ask, *options]) == 2
        return str(capsys.readouterr().err)

    assert f"Set {KEY_VARIABLE} to a key of this server" in refused("--adapter", "anna")
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert "Name one with --adapter NAME: anna, ben" in refused()
    assert "has no model of this name; did you mean 'anna'?" in refused("--adapter", "ana")
    assert "--static-cache: is for a run" in refused("--static-cache")
    monkeypatch.setenv(KEY_VARIABLE, new_key(tmp_path / "keys.json", "anna", ["anna"], ["use"]))
    assert "--base: this key may not use the base" in refused("--base")
    monkeypatch.setenv(KEY_VARIABLE, new_key(tmp_path / "keys.json", "later", ["later"], ["use"]))
    assert "has no model that this key may use" in refused()
    monkeypatch.setenv(KEY_VARIABLE, key)
    served.engine.fails = "the engine broke"
    assert main([*ask, "--adapter", "anna"]) == 1
    assert "the engine broke" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: Any) -> None:
    assert main(["chat", "http://127.0.0.1:9", "--adapter", "anna"]) == 1
    assert "can't be reached" in capsys.readouterr().err
