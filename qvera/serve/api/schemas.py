"""The bodies of calls, as OpenAI's API and vLLM's have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qvera.data import Turn
from qvera.data.conversations import read_messages
from qvera.serve.api.errors import bad_request, shortened
from qvera.utils.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from qvera.serve.grammars import Grammar, Grammars

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
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
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
    """A body whose unknown keys are judged by `require_supported`; the schema tells clients not to send any.

    Attributes:
        ignored: keys of OpenAI's that change nothing here.
        neutral: keys that would change ``outcome`` and are not supported, with the values that ask for nothing.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    outcome: ClassVar[str] = "answer"
    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    def require_supported(self, inside: str = "") -> None:
        """Refuse keys that would change the outcome and are not supported, and those that nobody knows.

        Args:
            inside: where in the whole body this part is, such as ``method.``.

        Raises:
            ApiError: 400; names the key.
        """
        for key, value in (self.model_extra or {}).items():
            if key in self.ignored or value is None:
                continue
            where = inside + shortened(key)
            if key not in self.neutral:
                hint = did_you_mean(shortened(key), type(self).model_fields)
                raise bad_request(f"Unknown key {where!r}{hint}", where, "unknown_parameter")
            if value not in self.neutral[key]:
                raise bad_request(
                    f"{where}: is not supported here, and would change the {self.outcome}. Leave it out.",
                    where,
                    "unsupported_parameter",
                )
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), Body):
                part.require_supported(f"{inside}{name}.")


class StreamOptions(BaseModel):
    """What a stream has beside the text."""

    include_usage: bool = False


class TextFormat(Body):
    """An answer is any text."""

    type: Literal["text"]


class JsonFormat(Body):
    """An answer is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaBody(Body):
    """A JSON schema with a name."""

    name: Annotated[Text, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """It is kept to in either case."""


class JsonSchemaFormat(Body):
    """An answer is JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaBody


ResponseFormat = Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None


class GenerationBody(Body):
    """What chat and completions have in common."""

    ignored = _IGNORED
    neutral = _NEUTRAL
    model: Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Text | Texts | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = -1
    """As vLLM's: the most tokens to draw from; -1 and 0: all."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = 1.0
    """As vLLM's: of tokens in the prompt and the answer."""
    logit_bias: (
        Annotated[
            dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
            Field(max_length=1024),
        ]
        | None
    ) = None

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """What an answer must follow. Raises ApiError 400 that names the part of a schema that can't be kept to."""
        asked, schema = self.response_format, dict[str, Any](type="object")
        if asked is None or isinstance(asked, TextFormat):
            return None
        if isinstance(asked, JsonSchemaFormat):
            schema = asked.json_schema.json_schema
        try:
            return grammars.of_schema(schema, "response_format.json_schema.schema")
        except InputError as error:
            raise bad_request(str(error), "response_format") from None


class TextPart(BaseModel):
    """A text in a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    """Where an image is."""

    url: Text


class ImagePart(BaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class MessageBody(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(fail_fast=True)]
    name: Text | None = None
    tool_calls: None = None
    """Tools are not supported; left out in silence they would change the prompt."""

    def turn(self) -> Turn:
        """As rows have it. Raises ApiError 400 or InputError: an image is no data: URL of base64."""
        for part in self.content:
            if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:"):
                raise bad_request(
                    "image_url: must be a data: URL; the server reads no files and no addresses.", "messages"
                )
        role = "system" if self.role == "developer" else self.role
        parts = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        (turn,) = read_messages([{"role": role, "content": parts, "name": self.name}], "messages")
        return turn


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


class HyperparametersBody(Body):
    """How a job trains; ``auto``: as the recipe of the server says."""

    outcome = "training"
    n_epochs: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False, strict=True)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=1024, strict=True)] | Literal["auto"] = "auto"
    learning_rate_multiplier: (
        Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False, strict=True)] | Literal["auto"]
    ) = "auto"


class SupervisedBody(Body):
    """The only method there is."""

    outcome = "training"
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    """How OpenAI's newer clients send hyperparameters."""

    outcome = "training"
    neutral = {"dpo": (), "reinforcement": ()}
    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


MetadataKey = Annotated[Text, Field(max_length=64)]
MetadataValue = Annotated[Text, Field(max_length=512)]


class JobBody(Body):
    """POST /v1/fine_tuning/jobs."""

    outcome = "training"
    neutral = {"integrations": ([],)}
    model: Text
    """The base."""
    training_file: Text
    validation_file: Text | None = None
    suffix: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    """The name of the model that comes out."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    replace: bool = False
    """Not OpenAI's: whether a model of this name is replaced when the job succeeds."""

    def asked(self) -> dict[str, Any]:
        """The hyperparameters, wherever they stand."""
        of_method = None if self.method is None or self.method.supervised is None else self.method.supervised
        inside = None if of_method is None else of_method.hyperparameters
        if inside is not None and self.hyperparameters is not None:
            raise bad_request("hyperparameters: stand in method too; give them once.", "hyperparameters")
        found = inside or self.hyperparameters or HyperparametersBody()
        return found.model_dump()
