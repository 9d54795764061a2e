"""Faults under load against a real server, in small; and the judge of its answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from tests.stress import serve_faults, serve_load

pytestmark = pytest.mark.process


def test_an_answer_of_the_wrong_adapter_is_a_fault_at_the_time_when_it_is_wrong() -> None:
    truth = serve_load.Truth()
    truth.prompts, truth.texts = [[1]], {("old", 0): "old", ("new", 0): "new"}

    def judged(status: int, text: str = "") -> str:
        answer = httpx.MockTransport(lambda _: httpx.Response(status, json={"choices": [{"text": text}]}))
        tally = serve_load.Tally()

        async def ask() -> None:
            async with httpx.AsyncClient(base_url="http://x", transport=answer) as client:
                await serve_load.ask_known(client, truth, ("name", 0), tally)

        asyncio.run(ask())
        return "right" * tally.right + "refused" * tally.refused + "fault" * len(tally.faults)

    truth.becomes("name", "old")
    assert [judged(200, "old"), judged(200, "new"), judged(400), judged(500)] == ["right", "fault", "fault", "fault"]
    truth.becomes("name", "old", "new", serve_load.REFUSED)
    assert [judged(200, "old"), judged(200, "new"), judged(400)] == ["right", "right", "refused"]
    assert [judged(200, "other"), judged(500)] == ["fault", "fault"]
    truth.becomes("name", "new")
    assert [judged(200, "old"), judged(200, "new"), judged(404)] == ["fault", "right", "fault"]


@pytest.mark.parametrize(
    "parts",
    [["files", "bodies"], pytest.param(["kill", "slow", "disk"], marks=pytest.mark.matrix)],
    ids=" ".join,
)
def test_a_server_stands_the_faults_under_load(parts: list[str], tiny_model_dir: Path, tmp_path: Path) -> None:
    sizes = ["--adapters", "2", "--seconds", "3", "--kills", "2", "--changes", "6", "--slow", "24", "--bodies", "60"]
    out = tmp_path / "faults.json"
    code = serve_faults.main(["--base", str(tiny_model_dir), "--parts", *parts, *sizes, "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["faults"] == []
    assert code == 0
    assert document["load"]["right"] > 0
    assert all(part in document for part in parts)
