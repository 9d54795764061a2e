"""POST /v1/responses for texts and functions: OpenAI's newer API over the same answers. Nothing is stored."""

from __future__ import annotations

import itertools
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from qvera.serve.api.completions import Generation, Piece, asked_chat
from qvera.serve.api.errors import ApiError, bad_request
from qvera.serve.api.schemas import IGNORED, Body, ChatBody, FunctionBody, Text, ToolName
from qvera.serve.api.server import EventStream, sse
from qvera.serve.api.service import User

_NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
}
"""Keys of chat → those of this API, for errors."""

router = APIRouter()


class ItemPart(BaseModel):
    type: Literal["input_text", "output_text", "input_image"]
    text: Text = ""
    image_url: Text = ""


def _no_reference(kind: object) -> object:
    if kind == "item_reference":
        raise ValueError("an item_reference finds nothing, as no answer is stored here. Send the item itself")
    return kind


class Item(BaseModel):
    """A message, a call that an earlier answer asked for, or a call's result."""

    type: Annotated[Literal["message", "function_call", "function_call_output"], BeforeValidator(_no_reference)] = (
        "message"
    )
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | Annotated[list[ItemPart], Field(fail_fast=True)] | None = None
    call_id: Text | None = None
    name: Text = ""
    arguments: Text = "{}"
    output: Text | Annotated[list[ItemPart], Field(fail_fast=True)] = ""


class FlatFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: ToolName = "answer"
    description: Text | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSection(Body):
    neutral = {"verbosity": ("medium",)}
    format: FlatFormat | None = None


class FlatTool(FunctionBody):
    type: Literal["function"]


class FlatName(Body):
    type: Literal["function"]
    name: Text


class ResponsesBody(Body):
    """POST /v1/responses."""

    ignored = IGNORED | {"stream_options"}  # its obfuscation
    neutral = {
        "background": (False,), "conversation": (), "include": ([],), "max_tool_calls": (), "previous_response_id": (),
        "prompt": (), "reasoning": ({}, {"effort": "none"}), "stop": (), "top_logprobs": (0,),
        "truncation": ("disabled",),
    }  # fmt: skip
    elsewhere = {
        "messages": "'input'", "response_format": "'text.format'", "max_tokens": "'max_output_tokens'",
        **dict.fromkeys(("previous_response_id", "conversation"), "the earlier items, sent again in 'input'"),
    }  # fmt: skip
    model: Text
    input: Text | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    stream: bool | None = False
    tools: Annotated[list[FlatTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatName | None = None
    parallel_tool_calls: bool | None = True
    text: TextSection | None = None

    def as_chat(self) -> ChatBody:
        """Return the same question to /v1/chat/completions. Raises ApiError 400 if it can't be asked there."""
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in items:
            if item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            elif item.type == "function_call":  # calls stand in one message with the text before them
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": item.role, "content": _content(item.content)})
        asked = self.model_dump(include={"model", "temperature", "top_p", "stream", "parallel_tool_calls"})
        asked |= {"messages": messages, "max_completion_tokens": self.max_output_tokens}
        nested = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()]
        asked |= {"tools": nested or None, "tool_choice": self.tool_choice}
        if isinstance(self.tool_choice, FlatName):
            asked["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text is not None and (form := self.text.format) is not None:
            asked["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                asked["response_format"]["json_schema"] = {"name": form.name, "schema": form.json_schema}
        try:
            return ChatBody.model_validate(asked)
        except ValidationError as error:
            first = error.errors()[0]
            raise bad_request(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.", str(first["loc"][0])) from None


def _content(value: str | list[ItemPart] | None) -> str | list[dict[str, Any]] | None:
    return [_part(part) for part in value] if isinstance(value, list) else value


def _part(part: ItemPart) -> dict[str, Any]:
    if part.type == "input_image":
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    return {"type": "text", "text": part.text}


@router.post("/v1/responses")
async def respond(sender: User, body: ResponsesBody) -> Response:
    """Answer a conversation, by OpenAI's newer API."""
    body.require_supported()
    try:
        answers = await asked_chat(sender, body.as_chat())
    except ApiError as error:
        items = body.input if isinstance(body.input, list) else []
        if body.instructions is not None or any(item.type == "function_call" for item in items):
            error.message = re.sub(r"\bmessages\.\d+", "messages", error.message)  # items have other numbers
        for chats, ours in _NAMES.items():
            error.message = error.message.replace(chats, ours)
        error.param = _NAMES.get(error.param or "", error.param)
        raise
    writer = _Writer(body, answers)
    if body.stream:
        await sender.hold(answers.start())
        return EventStream(_events(writer, answers), answers.close)
    [pieces] = await sender.hold(answers.whole())
    for piece in pieces:
        list(writer.add(piece))  # its events are for streams only
    return JSONResponse(writer.response())


async def _events(writer: _Writer, answers: Generation) -> AsyncIterator[bytes]:
    def line(event: dict[str, Any]) -> bytes:
        return sse(event, event["type"])

    for kind in ("created", "in_progress"):
        yield line(writer.event(kind, response=writer.response()))
    try:
        async for piece in answers.pieces():
            for event in writer.add(piece):
                yield line(event)
    except ApiError as error:
        writer.status, writer.error = "failed", {"code": "server_error", "message": error.message}
    yield line(writer.event(writer.status, response=writer.response()))


class _Writer:
    """A response while it grows: the items of its output, and the events that tell of each."""

    def __init__(self, body: ResponsesBody, answers: Generation) -> None:
        self._answers, self._numbers = answers, itertools.count()
        shown = {"model", "instructions", "max_output_tokens", "temperature", "top_p", "tools", "parallel_tool_calls"}
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self._head |= {"tools": [], "tool_choice": "auto", "store": False, "incomplete_details": None, "usage": None}
        self._head |= body.model_dump(include={*shown, "tool_choice"}, exclude_none=True)
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # whether the last item is a message that goes on
        self.status, self.error = "in_progress", dict[str, str]()

    def event(self, kind: str, **content: Any) -> dict[str, Any]:
        """Return the next event. It is about the last item, unless ``content`` has the whole response."""
        place: dict[str, Any] = {} if "response" in content else {"output_index": len(self._output) - 1}
        if place and "item" not in content:
            place["item_id"] = self._output[-1]["id"]
        if kind.startswith(("content_part", "output_text")):
            place["content_index"] = 0
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **place, **content}

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        return {**self._head, "status": self.status, "output": self._output, "error": self.error or None}

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Add a piece of the answer, and yield the events that tell of it."""
        # an answer without any text or call has an empty message
        if piece.text or (piece.finish is not None and not (self._output or piece.calls)):
            if not self._is_open:
                yield from self._open(type="message", role="assistant", content=[])
                self._output[-1]["content"].append({"type": "output_text", "text": "", "annotations": []})
                yield self.event("content_part.added", part=self._output[-1]["content"][0])
                self._is_open = True
            self._output[-1]["content"][0]["text"] += piece.text
            yield self.event("output_text.delta", delta=piece.text, logprobs=[])
        for call in piece.calls:
            yield from self._close_message("completed")
            yield from self._open(type="function_call", call_id=call.id, name=call.name, arguments="")
            yield self.event("function_call_arguments.delta", delta=call.arguments)
            yield self.event("function_call_arguments.done", name=call.name, arguments=call.arguments)
            self._output[-1] |= {"arguments": call.arguments, "status": "completed"}
            yield self.event("output_item.done", item=self._output[-1])
        if piece.finish is not None:
            self.status = "incomplete" if piece.finish == "length" else "completed"
            yield from self._close_message(self.status)
            given, made = self._answers.prompt_tokens, self._answers.new_tokens
            counts = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
            cached = {"cached_tokens": self._answers.cached_tokens}
            details = {"input_tokens_details": cached, "output_tokens_details": {"reasoning_tokens": 0}}
            self._head["usage"] = {**counts, **details}
            if self.status == "incomplete":
                self._head["incomplete_details"] = {"reason": "max_output_tokens"}

    def _open(self, **item: Any) -> Iterator[dict[str, Any]]:
        self._output.append({"id": f"item_{uuid.uuid4().hex}", "status": "in_progress", **item})
        yield self.event("output_item.added", item=self._output[-1])

    def _close_message(self, status: str) -> Iterator[dict[str, Any]]:
        if self._is_open:
            self._is_open, self._output[-1]["status"] = False, status
            [part] = self._output[-1]["content"]
            yield self.event("output_text.done", text=part["text"], logprobs=[])
            yield self.event("content_part.done", part=part)
            yield self.event("output_item.done", item=self._output[-1])
