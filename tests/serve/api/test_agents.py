"""What agents ask of a server, by the official client: `qvera serve --tinker` over a base, a VeRA and a LoRA."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.conftest import small_tokenizer
from tests.serve.command import Command
from tests.serve.helpers import write_adapters
from tests.serve.tool_templates import HERMES

pytestmark = pytest.mark.process
pytest.importorskip("llguidance")
ASK: Any = {"messages": [{"role": "user", "content": "3 red mugs"}], "temperature": 1.0}
NO_SPACE = {str(i): -100 for i in range(290) if small_tokenizer().decode(i).isspace()}
"""A bias against white space between the parts of JSON, which a random model writes too much of."""


class Mug(BaseModel):
    color: Literal["red", "blue"]
    count: int = Field(ge=0, le=99)


class Order(BaseModel):
    mug: Mug
    gift: bool


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, list[str]]]:
    """A client of the server, and the names of its models."""
    here = tmp_path_factory.mktemp("agents")
    shutil.copytree(tiny_model_dir, here / "tiny")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = HERMES.replace("tool | tojson", "tool.function.name")  # the tiny model's context is short
    tokenizer.save_pretrained(here / "tiny")
    write_adapters(here / "adapters", here / "tiny", {"vera": 1})
    write_adapters(here / "adapters", here / "tiny", {"lora": 2}, method="lora", rank=4)
    options = ["--adapters", str(here / "adapters"), "--training-dir", str(here / "training"), "--tinker"]
    with (
        Command(str(here / "tiny"), *options) as command,
        openai.OpenAI(base_url=f"{command.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, ["tiny", "vera", "lora"]


def test_an_answer_is_an_object_of_the_class_that_was_asked_for(models: tuple[openai.OpenAI, list[str]]) -> None:
    client, (base, vera, lora) = models
    asked: Any = {"seed": 1, "logit_bias": NO_SPACE, "max_tokens": 100, **ASK}
    [choice] = client.chat.completions.parse(model=vera, response_format=Mug, **asked).choices
    assert (choice.finish_reason, type(choice.message.parsed)) == ("stop", Mug)
    with client.chat.completions.stream(model=vera, response_format=Mug, **asked) as stream:
        assert stream.get_final_completion().choices[0].message.content == choice.message.content
    found = client.responses.parse(
        model=lora, text_format=Mug, input="3 red mugs", temperature=0, max_output_tokens=150
    )
    assert found.status == "incomplete" or type(found.output_parsed) is Mug
    plain = client.chat.completions.create(
        model=base, n=2, response_format={"type": "json_object"}, top_logprobs=0, logprobs=True, **asked
    )
    assert all(one.message.content.startswith("{") for one in plain.choices)
    with pytest.raises(openai.BadRequestError, match=r"json_schema.schema.properties.a: .*uniqueItems") as refused:
        schema: Any = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
        wish: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        client.chat.completions.create(model="tiny", response_format=wish, **ASK)
    assert refused.value.param == "response_format"


def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_class(
    models: tuple[openai.OpenAI, list[str]],
) -> None:
    client, (base, vera, lora) = models
    tools: Any = [openai.pydantic_function_tool(each) for each in (Mug, Order)]
    asked: Any = {"seed": 1, "logit_bias": NO_SPACE, "max_tokens": 150, "tools": tools, **ASK}
    named: Any = {"type": "function", "function": {"name": "Order"}}
    [choice] = client.chat.completions.parse(model=vera, tool_choice=named, **asked).choices
    [call] = choice.message.tool_calls or []
    assert (choice.finish_reason, type(call.function.parsed_arguments)) == ("tool_calls", Order)
    required: Any = {"model": lora, "tool_choice": "required", "parallel_tool_calls": False}
    [choice] = client.chat.completions.parse(**required, **asked).choices
    [call] = choice.message.tool_calls or []
    assert type(call.function.parsed_arguments) in (Mug, Order)
    with client.chat.completions.stream(model=base, response_format=Mug, **asked) as stream:  # an answer or calls
        message = stream.get_final_completion().choices[0].message
    assert message.parsed is not None or message.tool_calls
