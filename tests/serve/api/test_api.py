"""OpenAI's API as its clients see it: answers, streams, log-probabilities, models, errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from starlette.convertors import CONVERTOR_TYPES

from qvera.data import Turn
from qvera.serve.requests import EngineDead
from qvera.utils.errors import InputError
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start
from tests.serve.scripted_training import write_files


def streamed(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Of one answer of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def scored_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens of a stream with their log-probabilities."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content") or []]


def test_a_chat_is_written_as_qvera_chat_writes_it(served: Served) -> None:
    shaping = {
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": 1, "6": -100},
    }
    answer = served.chat("say é", seed=5, temperature=0.5, top_p=0.9, top_k=4, max_tokens=7, **shaping).json()
    [choice], [request] = answer["choices"], served.engine.requests
    message = {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert answer["object"] == "chat.completion"
    assert choice == {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    assert list(request.prompt) == served.prompts.ids([Turn("user", "say é")])
    sampling, tokens = request.sampling, len(request.prompt)
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.max_tokens) == (5, 0.5, 0.9, 7)
    assert (sampling.top_k, sampling.top_logprobs, request.adapter) == (4, None, None)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-1, 0.5, 1.1)
    assert sampling.logit_bias == ((5, 1.0), (6, -100.0))
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 7, "total_tokens": tokens + 7}


def test_the_recipes_system_prompt_stands_before_messages_that_have_none(start: Start) -> None:
    served = start(system="be short")
    served.chat("hi")
    own = [{"role": "developer", "content": "be long"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    served.post("/v1/chat/completions", {"model": "tiny", "messages": own})
    expected = [served.prompts.ids([Turn("system", text), Turn("user", "hi")]) for text in ("be short", "be long")]
    assert [list(request.prompt) for request in served.engine.requests] == expected


def test_an_adapter_is_a_model_and_so_is_a_blend_that_is_exact(served: Served) -> None:
    served.said["anna*0.5+ben*0.5"] = "both"
    answers = [served.chat(model=name).json() for name in ("tiny", "anna", "ben", "anna*0.5+ben*0.5")]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts == ["the word is red", "anna says blue", "ben says green", "both"]
    assert len({answer["system_fingerprint"] for answer in answers}) == 4
    write_files(served.root / "anna", b"new")
    assert served.chat(model="anna").json()["system_fingerprint"] != answers[1]["system_fingerprint"]
    served.engine.refuses = "anna and ben have different d."
    refused = served.chat(model="anna*0.5+ben*0.5")
    assert refused.status_code == 400
    assert "different d" in refused.json()["error"]["message"]


def test_a_host_application_may_call_a_path_convertor_of_its_own_model(served: Served) -> None:
    assert "model" not in CONVERTOR_TYPES and "qvera_model" in CONVERTOR_TYPES  # one table for the whole process


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    whole = served.chat().json()["choices"][0]["message"]["content"]
    *pieces, usage = chunks = streamed(served.chat(stream=True, stream_options={"include_usage": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == served.engine.stats().generated_tokens // 2
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == whole
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in pieces]
    assert reasons == [None] * (len(pieces) - 1) + ["stop"]
    assert len(pieces) > 5


def test_n_answers_have_seeds_and_places_of_their_own(served: Served) -> None:
    answer = served.chat(n=3, seed=2**63 - 1).json()
    found = [(choice["index"], choice["message"]["content"]) for choice in answer["choices"]]
    assert found == [(index, "the word is red") for index in range(3)]
    assert [request.sampling.seed for request in served.engine.requests] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert answer["usage"]["prompt_tokens"] == len(served.engine.requests[0].prompt)
    chunks = streamed(served.chat(n=2, stream=True))
    assert [text_of(chunks, index) for index in (0, 1)] == ["the word is red"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_frees_its_place(served: Served, stream: bool) -> None:
    served.said["tiny"] = "one two. three four five six" * 20
    response = served.chat(stop=["three fo", "never"], stream=stream, logprobs=True)
    if stream:
        chunks = streamed(response)
        text, scored, choice = text_of(chunks), scored_of(chunks), chunks[-1]["choices"][0]
    else:
        (choice,) = response.json()["choices"]
        text, scored = choice["message"]["content"], choice["logprobs"]["content"]
    assert (text, choice["finish_reason"]) == ("one two. ", "stop")
    tokens = [entry["token"] for entry in scored]
    assert len("".join(tokens[:-1])) < len(text) <= len("".join(tokens))  # the last one goes on into the stop string
    wait_until(lambda: served.engine.stats().finished == 1)
    assert served.engine.cancelled == [served.engine.requests[0].id]


def test_logprobs_of_a_chat_name_tokens_and_bytes(served: Served) -> None:
    served.said["tiny"] = "é!"
    entries = served.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "é!"
    assert [(entry["token"], entry["logprob"]) for entry in entries] == [("\\xc3", -0.5), ("\\xa9", -0.5), ("!", -0.5)]
    for entry in entries:
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    chunks = streamed(served.chat(logprobs=True, stream=True))
    assert [entry["token"] for entry in scored_of(chunks)] == ["\\xc3", "\\xa9", "!"]


def test_completions_take_texts_and_token_ids(served: Served) -> None:
    encode = served.prompts.encoder.encode_prompt
    ids = encode("say red")
    for prompt in ("say red", ids, ["say red"], [ids]):
        answer = served.post("/v1/completions", {"model": "tiny", "prompt": prompt, "logprobs": 1}).json()
        (choice,) = answer["choices"]
        logprobs, text = choice["logprobs"], choice["text"]
        assert (answer["object"], text) == ("text_completion", "the word is red")
        assert "".join(logprobs["tokens"]) == text
        assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:n])) for n in range(len(logprobs["tokens"]))]
        assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    assert {request.prompt for request in served.engine.requests} == {tuple(ids)}
    two = served.post("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "n": 2, "max_tokens": 3}).json()
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    assert [request.prompt for request in served.engine.requests[-4:]] == [tuple(encode(text)) for text in "aabb"]
    assert two["usage"]["prompt_tokens"] == 2


def test_models_are_listed_with_their_base(served: Served) -> None:
    with served.client() as client:
        listed = client.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["tiny", "anna", "ben"]
        assert [(model["parent"], model["root"]) for model in listed] == [(None, "tiny"), *[("tiny", "tiny")] * 2]
        anna = client.get("/v1/models/anna").json()
        assert time.time() - 60 < anna["created"] <= time.time()
        assert (anna["qvera"]["rank"], anna["qvera"]["base"], anna["qvera"]["rows"]) == (7, "tiny", None)
        assert client.get("/v1/models/tiny").json()["id"] == "tiny"
        assert client.get("/v1/models/anna*0.5+ben*0.5").json()["parent"] == "tiny"
        assert client.get("/v1/models/../../etc/passwd").status_code == 404


TOOL = {"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "stick"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "stock", "arguments": "{}"}}
CASES: list[tuple[dict[str, Any], int, str | None, str]] = [
    *[({"model": near}, 404, "model", "does not exist; did you mean 'anna'?") for near in ("ana", "ANNA", " anna")],
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"system": "knit"}, 400, "system", "Unknown key 'system'; here it is a message of the role 'system'."),
    ({"temperature": float("nan")}, 400, "temperature", "finite"),
    ({"model": "x" * 100_000}, 404, "model", "xxx…"),
    ({"y" * 100_000: 1}, 400, "y" * 200 + "…", "Unknown key"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"top_k": -2}, 400, "top_k", "greater than or equal to -1"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 17}, 400, "n", "at most 16 answers"),
    ({"n": 10**9, "tools": [TOOL]}, 400, "n", "at most 16 answers"),  # before a reader of calls is made for each
    ({"max_tokens": 5000}, 400, None, "maximum context length is 1,000 tokens. The prompt has 11, and 5,000 new ones"),
    ({"model": "anna+ben"}, 404, "model", "does not exist. In a blend each adapter has a weight, such as anna*0.5."),
    ({"messages": [{"content": "hi"}]}, 400, "messages", "messages.0.role: Field required."),
    ({"max_tokens": 10, "max_completion_tokens": 11}, 400, "max_completion_tokens", "give one"),
    ({"messages": []}, 400, "messages", "at least 1 item, not 0"),
    (
        {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
        400,
        "messages",
        "content.0: Field required: 'type'.",
    ),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, 400, "messages", "result of the call 'a'"),
    ({"tool_choice": {"type": "any"}}, 400, "tool_choice", "tool_choice.type: Input should be 'function'."),
    ({"adapter": "anna"}, 400, "adapter", "here it is 'model'."),
    ({"extra_body": {"top_k": 1}}, 400, "extra_body", "here it is the keys in it, beside 'model'."),
    ({"messages": [{"role": "user", "content": "x " * 2000}]}, 400, None, "A prompt may have 999, an answer 999."),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "role"),
    ({"messages": [{"role": "user"}]}, 400, "messages", "has content"),
    ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, 400, "messages", "tool_calls are an assistant's"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "half a character"),
    ({"stop": ["a"] * 33}, 400, "stop", "at most 32"),
    ({"stop": [""]}, 400, "stop", "1 to 256 characters"),
    ({"stop": [1]}, 400, "stop", "stop.0: Input should be a valid string"),
    ({"stop": 7}, 400, "stop", "stop: Input should be a valid string. Or: Input should be a valid list."),
    ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "at most 20"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias", "less than or equal to 100"),
    ({"logit_bias": {"red": 1}}, 400, "logit_bias", "valid integer"),
    ({"frequency_penalty": 2.5}, 400, "frequency_penalty", "less than or equal to 2"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "greater than or equal to 0.01"),
    ({"min_p": 0.5}, 400, "min_p", "not supported"),
    ({"tools": [TOOL]}, 400, None, "this model's chat template has no calls of tools"),
    ({"tools": [TOOL, TOOL], "tool_choice": "none"}, 400, "tools", "same name"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "function: Field required"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools", "tools.0.type: Input should be 'function'."),
    ({"tools": [{**TOOL, "defer": True}]}, 400, "tools.0.defer", "Unknown key"),
    ({"tools": [TOOL], "tool_choice": NAMED}, 400, "tool_choice", "did you mean 'stock'"),
    ({"tool_choice": "required"}, 400, "tool_choice", "no tools to choose from"),
    ({"functions": [{"name": "stock"}]}, 400, "functions", "not supported"),
    ({"response_format": {"type": "grammar"}}, 400, "response_format", "'json_schema'"),
    ({"response_format": {"type": "json_object", "schema": {}}}, 400, "response_format.schema", "Unknown key"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        400,
        "response_format",
        "schema: Field",
    ),
    ({"temprature": 0}, 400, "temprature", "did you mean 'temperature'?"),
]


def test_a_bad_call_is_answered_in_openais_form(served: Served) -> None:
    for keys, status, param, message in CASES:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **keys}
        text, kind = json.dumps(body), {"Content-Type": "application/json"}  # httpx itself can't send half a character
        response = httpx.post(f"{served.url}/v1/chat/completions", content=text, headers=kind)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), keys
        assert set(error) == {"message", "type", "param", "code"}
        assert message in error["message"]
    assert served.engine.requests == []


def test_a_prompt_of_another_path_is_told_its_path(served: Served) -> None:
    def said(path: str, **body: object) -> str:
        return str(httpx.post(f"{served.url}{path}", json={"model": "tiny", **body}).json()["error"]["message"])

    messages = [{"role": "user", "content": "hi"}]
    wanted = "prompt: Field required. 'messages' is a key of /v1/chat/completions."
    assert said("/v1/completions", messages=messages) == wanted
    assert (
        said("/v1/chat/completions", prompt="hi") == "messages: Field required. 'prompt' is a key of /v1/completions."
    )
    assert said("/v1/responses", messages=messages) == wanted.replace("prompt", "input")
    assert said("/v1/completions") == "prompt: Field required."
    unnamed = served.post("/v1/completions", {"prompt": "hi"}).json()["error"]["message"]
    assert unnamed == "model: Field required. GET /v1/models lists the models."
    nested = {"format": {"type": "json_schema", "json_schema": {}}}
    wanted = "Unknown key 'text.format.json_schema'; did you mean 'schema'?"
    assert said("/v1/responses", input="hi", text=nested) == wanted
    of_chat = {"type": "function", "function": {"name": "stock"}}
    assert said("/v1/responses", input="hi", tool_choice=of_chat) == "tool_choice.name: Field required."
    assert said("/v1/responses", input="hi", stop=".").startswith("stop: is not supported here")


def test_keys_that_change_nothing_are_taken(served: Served) -> None:
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "logit_bias": {}}
    ignored |= {"tools": [TOOL], "tool_choice": "none"}
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}}
    assert served.chat(**ignored, **neutral).status_code == 200


JSON = "application/json"


def test_what_is_no_call_at_all_is_refused(served: Served) -> None:
    many = b'{"model": "tiny", "messages": [' + b"1," * 500_000 + b"1]}"
    bodies = [b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b"", b'{"model": 1e999}', many]
    calls = [(body, JSON) for body in bodies]
    calls += [(b'{"model": "tiny", "messages": []}', "application/x-www-form-urlencoded")]  # as curl -d sends it
    with served.client() as client:
        for body, kind in calls:
            response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
            assert response.status_code == 400, (body[:20], response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert ("send it" in response.text and "Content-Type: application/json" in response.text) == (kind != JSON)
        empty, cut = (
            client.post("/v1/chat/completions", content=body, headers={"Content-Type": JSON}) for body in (b"", b"{")
        )
        assert empty.json()["error"]["message"] == "The body is empty. Expected JSON."
        assert cut.json()["error"]["message"].endswith("in double quotes, at character 2.")
        for path in ("/chat/completions", "//v1/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completion"):
            assert "Did you mean /v1/chat/completions?" in client.post(f"{served.url}{path}", json={}).text
        said = served.chat(response_format="json").json()["error"]["message"]
        assert said == 'response_format: Input should be an object. Such as {"type": "json_object"}.'
        assert client.head("/health").status_code == 200
        assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
        other = client.get("/v1/chat/completions")
        assert (other.status_code, other.json()["error"]["message"]) == (405, "GET: this path takes POST.")
        other = client.put("/v1/models/anna")
        assert (other.headers["Allow"], other.json()["error"]["message"]) == (
            "GET, DELETE",
            "PUT: this path takes GET and DELETE.",
        )


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


def test_an_engine_that_has_ended_is_503(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise EngineDead("its thread failed")

    monkeypatch.setattr(served.engine, "submit", refuse)
    for stream in (False, True):
        response = served.chat(stream=stream)
        assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
        assert response.json()["error"]["message"] == "The engine has ended: its thread failed"


def test_adapters_are_loaded_and_unloaded_by_name(start: Start, tmp_path: Path) -> None:
    root, outside = tmp_path / "adapters", tmp_path / "outside"
    for place in (root / "carl", root / "dora", outside):
        write_files(place, place.name.encode())
    (root / "empty").mkdir()
    (root / "link").symlink_to(outside)
    served = start(root=root, keys={"all": ("*", "use load"), "carl": ("carl", "use load")})

    def call(how: str, who: str = "all", **body: Any) -> httpx.Response:
        return served.post(f"/v1/{how}", body, headers=served.headers[who])

    assert call("load_adapter", name="carl").json()["status"] == "loaded"
    assert call("unload_adapter", name="carl").status_code == 200
    assert served.engine.loaded == served.engine.unloaded
    assert len(served.engine.loaded) == 1
    asked = {"lora_name": "mine", "lora_path": "carl"}
    again = {**asked, "load_inplace": True}
    answers = [call("load_lora_adapter", **one) for one in (asked, asked, again, {**again, "lora_path": "dora"})]
    assert [answer.status_code for answer in answers] == [200, 400, 200, 200]
    assert served.store.facts("mine")["directory"] == root / "dora"
    with mock.patch.object(served.engine, "load", side_effect=InputError("its file is cut off")):
        assert call("load_lora_adapter", **again).status_code == 400
    assert served.store.facts("mine")["directory"] == root / "dora"  # as before
    for path in ("../outside", str(outside), "link", "/etc", ".", "..", "a\0b", "x" * 5000):
        assert call("load_lora_adapter", lora_name="evil", lora_path=path).status_code == 403, path
    assert call("load_lora_adapter", lora_name="evil", lora_path="empty").status_code == 400
    assert [call("load_adapter", name=name).status_code for name in ("tiny", "nobody")] == [400, 404]
    assert call("unload_lora_adapter", lora_name="mine").status_code == 200
    assert "mine" not in served.store.names()
    # a key gives its names to no other directory, nor does it learn which there are
    again["lora_name"] = "carl"
    answers = [call("load_lora_adapter", "carl", **{**again, "lora_path": path}) for path in ("dora", "nobody", "carl")]
    assert [answer.status_code for answer in answers] == [403, 403, 200]
    assert answers[0].json() == answers[1].json()


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
    for path, status in (("/v1/chat/completions", 200), ("/v1/chat/completions", 404), ("other", 404)):
        assert numbers[f'qvera_calls_total{{path="{path}",status="{status}"}}'] == "1.0"
    assert numbers["qvera_time_to_first_token_seconds_count"] == "1.0"
