"""The bodies of calls, as OpenAI's API and vLLM's have them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qvera.serve.api.errors import bad_request, shortened
from qvera.utils.errors import did_you_mean

_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
    }
)
"""Keys of OpenAI's that change nothing about an answer here."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Keys that would change the answer and are not supported, with the values that ask for nothing."""


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
"""A list ends at its first fault: a body of a megabyte has room for half a million of them."""


class Body(BaseModel):
    """A body whose unknown keys are judged by `require_supported`; the schema tells clients not to send any."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    def require_supported(self) -> None:
        """Refuse keys that would change the answer and are not supported, and those that nobody knows.

        Raises:
            ApiError: 400; names the key.
        """
        for key, value in (self.model_extra or {}).items():
            if key in _IGNORED or value is None:
                continue
            if key not in _NEUTRAL:
                hint = did_you_mean(shortened(key), type(self).model_fields)
                raise bad_request(f"Unknown key {shortened(key)!r}{hint}", shortened(key), "unknown_parameter")
            if value not in _NEUTRAL[key]:
                raise bad_request(
                    f"{key}: is not supported here, and would change the answer. Leave it out.",
                    key,
                    "unsupported_parameter",
                )


class StreamOptions(BaseModel):
    """What a stream has beside the text."""

    include_usage: bool = False


class GenerationBody(Body):
    """What chat and completions have in common."""

    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Text | Texts | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class TextPart(BaseModel):
    """A part of a message; texts only."""

    type: Literal["text"]
    text: Text


class MessageBody(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Text | None = None
    tool_calls: None = None
    """Tools are not supported; left out in silence they would change the prompt."""

    def text(self) -> str:
        """Its parts in one."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[MessageBody], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0)] | None = None


class LoadLoraBody(BaseModel):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Text
    lora_path: Text | None = None
    """The directory in the server's directory of adapters; None: the one of this name."""
    load_inplace: bool = False


class UnloadLoraBody(BaseModel):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: Text
    lora_int_id: int | None = None


class AdapterBody(BaseModel):
    """POST /v1/load_adapter and /v1/unload_adapter."""

    name: Text
