"""The bodies of calls, as OpenAI's API and vLLM's have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qvera.data import Turn
from qvera.data.conversations import read_messages
from qvera.serve.api.errors import bad_request, shortened_name
from qvera.utils.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from qvera.serve.grammars import Grammar, Grammars
    from qvera.serve.tool_calls import ToolFormat

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "prediction",
    }
)
"""Keys of OpenAI's that change nothing about an answer here."""


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
        elsewhere: keys of another API → what to write here.
    """

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    elsewhere: ClassVar[Mapping[str, str]] = {}
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
            where = inside + shortened_name(key)
            if key not in self.neutral:
                known = [field.alias or name for name, field in type(self).model_fields.items()]
                hint = did_you_mean(shortened_name(key), known)
                if key in self.elsewhere:
                    hint = f"; here it is {self.elsewhere[key]}."
                raise bad_request(f"Unknown key {where!r}{hint}", where, "unknown_parameter")
            if value not in self.neutral[key]:
                instead = f"Here it is {self.elsewhere[key]}." if key in self.elsewhere else "Leave it out."
                raise bad_request(
                    f"{where}: is not supported here, and would change the {self.outcome}. {instead}",
                    where,
                    "unsupported_parameter",
                )
        for name in type(self).model_fields:
            value = getattr(self, name)
            for number, part in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(part, Body):
                    part.require_supported(f"{inside}{name}.{number}." if part is not value else f"{inside}{name}.")


class StreamOptions(BaseModel):
    include_usage: bool = False


ToolName = Annotated[Text, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchemaBody(Body):
    """A JSON schema with a name. The answer follows it, whatever ``strict`` says."""

    name: ToolName
    description: Text | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None


Token = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None


class GenerationBody(Body):
    """The keys that chat and completions have in common."""

    ignored = IGNORED
    neutral = {
        "min_p": (0,),
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
    elsewhere = {"adapter": "'model'", "extra_body": "the keys in it, beside 'model'"}
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
    logit_bias: Annotated[dict[Token, Bias], Field(max_length=1024)] | None = None

    def grammar(self, grammars: Grammars) -> Grammar | None:
        """Return the grammar that an answer must follow; None: there is none.

        Raises ApiError 400 that names the part of a schema that can't be kept to.
        """
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_schema" and asked.json_schema is None:
            raise bad_request("response_format.json_schema: is missing.", "response_format")
        schema = {"type": "object"} if asked.json_schema is None else asked.json_schema.json_schema
        try:
            return grammars.of_schema(schema, "response_format.json_schema.schema")
        except InputError as error:
            raise bad_request(str(error), "response_format") from None


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    url: Text


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(BaseModel):
    """The function that an assistant has called; ``arguments`` is JSON."""

    name: Text
    arguments: Text


class CallBody(BaseModel):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionBody(Body):
    """A function that a model may call, with a JSON schema. A call that must be made keeps to it without ``strict``."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool, or in ``tool_choice`` the one that must be called, of which only the name is read."""

    type: Literal["function"]
    function: FunctionBody


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(fail_fast=True)]


class MessageBody(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Parts | None = None
    """None: of an assistant's message that only calls tools."""
    name: Text | None = None
    tool_calls: Annotated[list[CallBody], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    def turn(self, where: str) -> Turn:
        """Return the message, which stands at ``where``, as a turn of a row.

        Raises ApiError 400 or InputError if it has no content, or an image is no data: URL of base64.
        """
        if self.content is None and not self.tool_calls:
            raise bad_request(f"{where}: a message has content, or tool_calls of an assistant.", "messages")
        if self.tool_calls and self.role != "assistant":
            raise bad_request(
                f"{where}: tool_calls are an assistant's, and this is of the role {self.role}.", "messages"
            )
        for part in self.content or ():
            if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:"):
                raise bad_request(
                    "image_url: must be a data: URL; the server reads no files and no addresses.", "messages"
                )
        role = "system" if self.role == "developer" else self.role
        message = {**self.model_dump(), "role": role, "content": self.content or ""}
        if isinstance(self.content, list):
            message["content"] = [part.model_dump() for part in self.content]
        (turn,) = read_messages([message], "messages")
        return turn


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    elsewhere = {
        **GenerationBody.elsewhere,
        "system": "a message of the role 'system'",
        "max_output_tokens": "'max_completion_tokens'",
    }
    messages: Annotated[list[MessageBody], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolBody | None = None
    parallel_tool_calls: bool | None = True

    def turns(self) -> list[Turn]:
        """Return the conversation. Raises as `MessageBody.turn`, and ApiError 400 for a result of no call."""
        calls: set[str] = set()
        for number, message in enumerate(self.messages):
            calls |= {call.id for call in message.tool_calls or ()}
            if message.role == "tool" and message.tool_call_id not in calls:
                raise bad_request(
                    f"messages.{number}: is the result of the call {message.tool_call_id!r} (tool_call_id), which no "
                    "message before it has among its tool_calls.",
                    "messages",
                )
        return [message.turn(f"messages.{number}") for number, message in enumerate(self.messages)]

    def offered(self) -> list[dict[str, Any]]:
        """Return the tools as chat templates take them; none if none may be called.

        Raises ApiError 400: a tool is asked for that is not there, or two have one name.
        """
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise bad_request("tools: two have the same name.", "tools")
        if self.tool_choice == "required" and not names:
            raise bad_request("tool_choice: there are no tools to choose from.", "tool_choice")
        if isinstance(self.tool_choice, ToolBody) and (name := self.tool_choice.function.name) not in names:
            raise bad_request(f"tool_choice: no tool is called {name!r}{did_you_mean(name, names)}", "tool_choice")
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def most_calls(self) -> int | None:
        """The most calls of tools in one answer; None: any number."""
        return 1 if self.parallel_tool_calls is False or isinstance(self.tool_choice, ToolBody) else None

    def grammar_with(self, grammars: Grammars, form: ToolFormat) -> Grammar | None:
        """Return the grammar of an answer in which tools may or must be called; None: there is none."""
        answer, must = self.grammar(grammars), self.tool_choice not in (None, "auto")
        if answer is None and not must:  # calls that may be made need none
            return None
        if form.literals is None:
            raise bad_request("tools: this model's calls have no grammar here, so they can't be forced.", "tools")
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolBody):
            functions = [each for each in functions if each.name == self.tool_choice.function.name]
        nothing: dict[str, Any] = {"type": "object", "additionalProperties": False}
        parameters = {each.name: each.parameters or nothing for each in functions}
        single = form.is_single or self.most_calls == 1
        try:
            return grammars.of_calls(parameters, form.literals, single, None if must else answer)
        except InputError as error:
            raise bad_request(str(error), "tools") from None


Tokens = Annotated[list[Token], Field(fail_fast=True)]


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


def _multiplier(value: float) -> float:
    if value < 0.01:
        raise ValueError("is a factor for the recipe's learning rate, not a rate. Expected at least 0.01")
    return value


class HyperparametersBody(Body):
    """The hyperparameters of a job. ``auto`` means the value of the server's recipe."""

    outcome = "training"
    n_epochs: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False, strict=True)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1, le=1024, strict=True)] | Literal["auto"] = "auto"
    learning_rate_multiplier: (
        Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False, strict=True), AfterValidator(_multiplier)]
        | Literal["auto"]
    ) = "auto"


class SupervisedBody(Body):
    outcome = "training"
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    """The hyperparameters as OpenAI's newer clients send them."""

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
    elsewhere = {
        "n_epochs": "'hyperparameters.n_epochs'",
        "batch_size": "'hyperparameters.batch_size'",
        "learning_rate": "'hyperparameters.learning_rate_multiplier'",
    }
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
        """Return the hyperparameters, whether they stand in ``method`` or beside it. Raises ApiError 400 for both."""
        supervised = self.method and self.method.supervised
        inside = supervised and supervised.hyperparameters
        if inside is not None and self.hyperparameters is not None:
            raise bad_request("hyperparameters: stand in method too; give them once.", "hyperparameters")
        found = inside or self.hyperparameters or HyperparametersBody()
        return found.model_dump()
