"""OpenAI's API as its clients see it: answers, streams, log-probabilities, models, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qvera.data import Turn
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_chat_is_written_as_qvera_chat_writes_it(served: Served) -> None:
    answer = served.chat("say é", seed=5, temperature=0.5, top_p=0.9, max_tokens=7).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": answer["choices"][0]["message"]["content"], "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    (request,) = served.engine.requests
    assert list(request.prompt) == served.prompts.ids([Turn("user", "say é")])
    sampling = request.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.max_tokens) == (5, 0.5, 0.9, 7)
    assert sampling.top_logprobs is None
    assert request.adapter is None
    assert answer["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": 7,
        "total_tokens": len(request.prompt) + 7,
    }


def test_the_recipes_system_prompt_stands_before_messages_that_have_none(start: Start) -> None:
    served = start(system="be short")
    served.chat("hi")
    own = [{"role": "developer", "content": "be long"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    served.post("/v1/chat/completions", {"model": "tiny", "messages": own})
    prompts = [list(request.prompt) for request in served.engine.requests]
    assert prompts[0] == served.prompts.ids([Turn("system", "be short"), Turn("user", "hi")])
    assert prompts[1] == served.prompts.ids([Turn("system", "be long"), Turn("user", "hi")])


def test_an_adapter_is_a_model(served: Served) -> None:
    answers = [served.chat(model=name).json() for name in ("tiny", "anna", "ben")]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts == ["the word is red", "anna says blue", "ben says green"]
    assert len({answer["system_fingerprint"] for answer in answers}) == 3
    served.store.contents["anna"] = b"new"
    assert served.chat(model="anna").json()["system_fingerprint"] != answers[1]["system_fingerprint"]


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    whole = served.chat().json()["choices"][0]["message"]["content"]
    chunks = events(served.chat(stream=True, stream_options={"include_usage": True}).text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *pieces, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == served.engine.stats().generated_tokens // 2
    deltas = [chunk["choices"][0] for chunk in pieces]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(each["delta"].get("content", "") for each in deltas) == whole
    assert [each["finish_reason"] for each in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert len(deltas) > 5


def test_n_answers_have_seeds_and_places_of_their_own(served: Served) -> None:
    answer = served.chat(n=3, seed=2**63 - 1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["the word is red"] * 3
    assert [request.sampling.seed for request in served.engine.requests] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert answer["usage"]["prompt_tokens"] == len(served.engine.requests[0].prompt)
    chunks = events(served.chat(n=2, stream=True).text)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(each["delta"].get("content", "") for each in own) == "the word is red"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_frees_its_place(served: Served, stream: bool) -> None:
    served.said["tiny"] = "one two. three four five six" * 20
    response = served.chat(stop=["three fo", "never"], stream=stream, logprobs=True)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response.text)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        scored = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert choices[-1]["finish_reason"] == "stop"
    else:
        (choice,) = response.json()["choices"]
        text, scored = choice["message"]["content"], choice["logprobs"]["content"]
        assert choice["finish_reason"] == "stop"
    assert text == "one two. "
    tokens = [entry["token"] for entry in scored]
    assert len("".join(tokens[:-1])) < len(text) <= len("".join(tokens))  # the last one goes on into the stop string
    wait_until(lambda: served.engine.stats().finished == 1)
    assert served.engine.cancelled == [served.engine.requests[0].id]


def test_logprobs_of_a_chat_name_tokens_and_bytes(served: Served) -> None:
    served.said["tiny"] = "é!"
    (choice,) = served.chat(logprobs=True, top_logprobs=2).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "é!"
    assert [entry["token"] for entry in entries] == ["\\xc3", "\\xa9", "!"]
    assert all(entry["logprob"] == -0.5 for entry in entries)
    for entry in entries:
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    chunks = events(served.chat(logprobs=True, stream=True).text)
    streamed = [e for c in chunks for e in ((c["choices"][0]["logprobs"] or {}).get("content") or [])]
    assert [entry["token"] for entry in streamed] == ["\\xc3", "\\xa9", "!"]


def test_completions_take_texts_and_token_ids(served: Served) -> None:
    ids = served.prompts.encoder.encode_prompt("say red")
    for prompt in ("say red", ids, ["say red"], [ids]):
        answer = served.post("/v1/completions", {"model": "tiny", "prompt": prompt, "logprobs": 1}).json()
        (choice,) = answer["choices"]
        assert answer["object"] == "text_completion"
        assert choice["text"] == "the word is red"
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:n])) for n in range(len(logprobs["tokens"]))]
        assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    assert {request.prompt for request in served.engine.requests} == {tuple(ids)}
    two = served.post("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "n": 2, "max_tokens": 3}).json()
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    assert [r.prompt for r in served.engine.requests[-4:]] == [
        tuple(served.prompts.encoder.encode_prompt(text)) for text in "aabb"
    ]
    assert two["usage"]["prompt_tokens"] == 2


def test_models_are_listed_with_their_base(served: Served) -> None:
    with served.client() as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"], model["root"]) for model in listed] == [
            ("tiny", None, "tiny"),
            ("anna", "tiny", "tiny"),
            ("ben", "tiny", "tiny"),
        ]
        anna = client.get("/v1/models/anna").json()
        assert (anna["created"], anna["qvera"]) == (5, {"rows": 7, "size_bytes": 1, "base": "tiny"})
        assert client.get("/v1/models/tiny").json()["id"] == "tiny"
        assert client.get("/v1/models/anna*0.5+ben*0.5").json()["parent"] == "tiny"
        assert client.get("/v1/models/../../etc/passwd").status_code == 404


def test_a_blend_that_is_not_exact_is_refused_with_the_reason(served: Served) -> None:
    served.store.contents["bad"] = b"3"
    served.said["anna*0.5+ben*0.5"] = "both"
    assert served.chat(model="anna*0.5+ben*0.5").json()["choices"][0]["message"]["content"] == "both"
    refused = served.chat(model="anna*0.5+bad*0.5")
    assert refused.status_code == 400
    assert "different d" in refused.json()["error"]["message"]


CASES: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "ana"}, 404, "model", "did you mean 'anna'?"),
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"temperature": float("nan")}, 400, "temperature", "finite"),
    ({"model": "x" * 100_000}, 404, "model", "xxx…"),
    ({"y" * 100_000: 1}, 400, "y" * 200 + "…", "Unknown key"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 17}, 400, "n", "at most 16 answers"),
    ({"max_tokens": 5000}, 400, None, "The prompt has"),
    ({"max_tokens": 10, "max_completion_tokens": 11}, 400, "max_completion_tokens", "give one"),
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": [{"role": "user", "content": "x " * 2000}]}, 400, None, "at most 999 are taken"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "role"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "half a character"),
    ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
    ({"stop": [""]}, 400, "stop", "1 to 256 characters"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "at most 20"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    ({"logit_bias": {"5": 10}}, 400, "logit_bias", "not supported"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({"temprature": 0}, 400, "temprature", "did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("keys", "status", "param", "message"), CASES)
def test_a_bad_call_is_answered_in_openais_form(
    served: Served, keys: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **keys}
    with served.client() as client:
        text = json.dumps(body)  # httpx itself can't send half a character
        response = client.post("/v1/chat/completions", content=text, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]
    assert served.engine.requests == []


def test_keys_that_change_nothing_are_taken(served: Served) -> None:
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "logit_bias": {}}
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "tools": None, "response_format": {"type": "text"}}
    assert served.chat(**ignored, **neutral).status_code == 200


def test_other_bad_bodies(served: Served) -> None:
    cases: list[tuple[bytes, str, int]] = [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"model": 1e999}', "application/json", 400),
        (b'{"model": "tiny", "messages": [' + b"1," * 500_000 + b"1]}", "application/json", 400),
        (b'{"model": "tiny", "messages": []}', "text/plain", 400),
    ]
    with served.client() as client:
        for body, kind, status in cases:
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
            assert response.status_code == status, (body[:20], response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        assert client.get("/v1/chat/completions").status_code == 405


def test_an_engine_that_fails_says_so(served: Served) -> None:
    served.engine.fails = "out of memory"
    whole = served.chat()
    assert whole.status_code == 500
    assert "out of memory" in whole.json()["error"]["message"]
    last = json.loads(served.chat(stream=True).text.strip().split("\n\n")[-1][6:])
    assert last["error"]["code"] == "engine_error"
    served.engine.fails = None
    assert served.chat().status_code == 200


def test_a_full_queue_is_429_and_says_when_to_come_back(start: Start) -> None:
    served = start(places=1, queue=1)
    served.engine.hold.set()
    response = served.chat(n=3)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
    assert response.json()["error"]["type"] == "rate_limit_error"
    wait_until(lambda: len(served.engine.cancelled) == 2)  # those of the same call that had been taken
    served.engine.hold.clear()
    wait_until(lambda: served.engine.stats().running == 0)
    assert served.chat().status_code == 200


def test_adapters_are_loaded_and_unloaded_by_name(start: Start, tmp_path: Any) -> None:
    from tests.serve.api.doubles import NamedStore

    root = tmp_path / "adapters"
    (root / "carl").mkdir(parents=True)
    (root / "carl" / "content").write_text("carl")
    (root / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "content").write_text("x")
    (root / "link").symlink_to(tmp_path / "outside")
    served = start(store=NamedStore({"anna": b"1"}, root))
    assert served.post("/v1/load_adapter", {"name": "anna"}).json()["status"] == "loaded"
    assert served.post("/v1/unload_adapter", {"name": "anna"}).status_code == 200
    assert served.engine.loaded == served.engine.unloaded
    assert len(served.engine.loaded) == 1
    taken = {"lora_name": "carl", "lora_path": "carl"}
    assert served.post("/v1/load_lora_adapter", taken).status_code == 200
    assert served.post("/v1/load_lora_adapter", taken).status_code == 400
    assert served.post("/v1/load_lora_adapter", {**taken, "load_inplace": True}).status_code == 200
    assert "carl" in served.store.names()
    (root / "dora").mkdir()
    (root / "dora" / "content").write_text("dora")
    replaced = {"lora_name": "carl", "lora_path": "dora", "load_inplace": True}
    assert served.post("/v1/load_lora_adapter", replaced).status_code == 200
    for path in ("../outside", str(tmp_path / "outside"), "link", "/etc", ".", "..", "a\0b", "x" * 5000):
        refused = served.post("/v1/load_lora_adapter", {"lora_name": "evil", "lora_path": path})
        assert refused.status_code == 403, path
    assert served.post("/v1/load_lora_adapter", {"lora_name": "evil", "lora_path": "empty"}).status_code == 400
    assert served.post("/v1/load_adapter", {"name": "tiny"}).status_code == 400
    assert served.post("/v1/load_adapter", {"name": "nobody"}).status_code == 404
    assert served.post("/v1/unload_lora_adapter", {"lora_name": "carl"}).status_code == 200
    assert served.store.names() == ["anna"]


def test_metrics_and_health(served: Served) -> None:
    served.chat()
    served.chat(model="nobody")
    with served.client() as client:
        client.get("/made/up/1")
        assert client.get("/health").json() == {"status": "ok"}
        text = client.get("/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers["qvera_requests_running"]) == 0
    assert float(numbers["qvera_generated_tokens_total"]) == served.engine.stats().generated_tokens > 0
    assert numbers['qvera_calls_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert numbers['qvera_calls_total{path="/v1/chat/completions",status="404"}'] == "1.0"
    assert numbers['qvera_calls_total{path="other",status="404"}'] == "1.0"
    assert numbers["qvera_time_to_first_token_seconds_count"] == "1.0"
