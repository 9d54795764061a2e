"""Calls of tools: how a base's chat template writes them, and how they are read out of an answer while it comes.

Reading is by transformers' `ResponseParser`: by the checkpoint's own ``response_template``, else by one of those here.
"""

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from qvera.data.chat_template import ChatTemplate, TemplateError
from qvera.utils.errors import InputError, first_line

_NAME, _ARGUMENT = "qvera_probe", "qvera_mark"
_WRITTEN = re.compile(
    rf'(\{{\s*"name":\s*"){_NAME}("\s*,\s*"(?:arguments|parameters)":\s*)\{{\s*"{_ARGUMENT}":\s*"x"\s*\}}(\s*\}})'
)
"""A call as JSON: what stands before its name, between name and arguments, and behind them."""


def _template(opening: str, **calls: Any) -> dict[str, Any]:
    calls = {"open_pattern": opening, "repeats": True, "content": "json", **calls}
    calls.setdefault("transform", {"type": "function", "function": "{content}"})
    return {"start_anchor": "\0", "fields": {"tool_calls": calls, "content": {"content": "text"}}}


_TAGGED = _template(r"\s*<tool_call>", close="</tool_call>")
"""Hermes, Qwen 2.5 and 3, SmolLM3: JSON between tags."""
_BARE = _template(r"\A\s*(?:<\|python_tag\|>)?\s*(?=\{)")
"""Llama 3.1 to 3.3: the whole answer is JSON."""
_XML = _template(
    r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    close_pattern=r"</function>\s*</tool_call>",
    content="xml-inline",
    content_args={"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
    transform={"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
)
"""Qwen3-Coder and 3.5; as in transformers' own server."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model wants."""

    id: str
    name: str
    arguments: str  # JSON


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format in which a base writes calls of tools."""

    response_template: dict[str, Any]
    literals: tuple[str, str, str] | None = None
    """What it writes before a call's name, between name and arguments, and behind them; None: they are no JSON."""
    is_own: bool = False  # whether the template is the checkpoint's, which may look for where the answer began

    @classmethod
    def of(cls, template: ChatTemplate) -> Self:
        """Find the format by a call that the template writes.

        Raises InputError if it writes none, or writes it in a format that can't be read.
        """
        parameters = {"type": "object", "properties": {_ARGUMENT: {"type": "string"}}}
        tools = [{"type": "function", "function": {"name": _NAME, "description": "", "parameters": parameters}}]
        call = {"id": "call00001", "type": "function", "function": {"name": _NAME, "arguments": {_ARGUMENT: "x"}}}
        asked: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
        try:
            prompt = template.render(asked, tools, prompt=True)
            text = template.render([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools)
        except TemplateError as error:
            raise InputError(f"tools: the chat template ({template.name}) refuses calls of tools: {error}.") from None
        # a template is a program, so its format is known only by what it makes of a made-up call
        known: dict[str, Any] | None = None
        literals: tuple[str, str, str] | None = None
        if (found := _WRITTEN.search(text)) is not None:
            literals, before, behind = (found[1], found[2], found[3]), text[: found.start()], text[found.end() :]
            opening, closing = re.search(r"<tool_call>\s*$", before), re.match(r"\s*</tool_call>", behind)
            if opening is not None and closing is not None:
                literals, known = (opening[0] + found[1], found[2], found[3] + closing[0]), _TAGGED
            elif before.startswith(prompt) and before[len(prompt) :].strip() in ("", "<|python_tag|>"):
                known = _BARE
        elif f"<function={_NAME}>" in text:
            known = _XML
        own = getattr(template.tokenizer, "response_template", None)
        literals = None if known in (None, _XML) else literals
        if isinstance(own, dict) and "tool_calls" in own.get("fields", {}):
            return cls(own, literals, is_own=True)
        if known is None:
            written = text[len(prompt) :] if text.startswith(prompt) else text[-200:]
            how = f"writes calls as {written.strip()!r}" if _NAME in written else "has no calls of tools"
            raise InputError(
                f"tools: this model's chat template {how}, so the server reads none. It reads "
                "those between <tool_call> tags (Hermes, Qwen), the JSON of Llama 3.1, and what the tokenizer's "
                "response_template says."
            )
        return cls(known, literals)

    @property
    def is_single(self) -> bool:
        """Whether an answer has room for one call only."""
        return self.response_template is _BARE


class CallReader:
    """Takes the calls out of one answer's text while it comes. What looks like a call and is none stays text."""

    def __init__(
        self, form: ToolFormat, tools: Sequence[dict[str, Any]], prompt: str = "", at_most: int | None = None
    ) -> None:
        """``prompt``: the text before; read if the format is the checkpoint's own.

        ``at_most``: calls after which the answer is to end. Raises InputError: the format is invalid.
        """
        self._form, self._tools, self._at_most = form, tools, at_most
        self._names = {tool["function"]["name"] for tool in tools}
        self._unshown = ""  # text that is neither shown nor part of a call
        self._unfed = ""  # the end of it, which the parser has not got
        self.count = 0
        self._parser = self._new_parser(prompt if form.is_own else "")

    @property
    def is_full(self) -> bool:
        """Whether the answer has as many calls as it may have."""
        return self.count == self._at_most

    def read(self, text: str, ends: bool) -> tuple[str, list[ToolCall]]:
        """Read more text. Returns the part of it that is no call, and calls that are complete.

        ``ends``: the text is the answer's last.
        """
        shown, calls = "", list[ToolCall]()
        for character in text:  # one by one, so that none is lost behind a call that can't be read
            if self.is_full:
                break
            self._unshown += character
            self._unfed += character
            # the parser searches all the space before a call anew for each character, so space waits for the next word
            if not character.isspace():
                shown += self._take(self._feed, calls)
        if ends and not self.is_full:
            shown += self._take(self._feed, calls)
            shown += self._take(lambda: self._parser.finalize()[1], calls)
        return shown, calls

    def _feed(self) -> list[dict[str, Any]]:
        fed, self._unfed = self._unfed, ""
        found: list[dict[str, Any]] = self._parser.feed(fed)
        return found

    def _new_parser(self, prompt: str) -> Any:
        from transformers.utils.chat_parsing import ResponseParser

        try:
            return ResponseParser(self._form.response_template, prefix=prompt, tools=list(self._tools))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"tools: the tokenizer's response_template is invalid: {first_line(error)}") from None

    def _take(self, step: Callable[[], list[dict[str, Any]]], calls: list[ToolCall]) -> str:
        """Let the parser do a step. Returns text that is no part of a call; calls that are complete join ``calls``."""
        try:
            events = step()
        except (ValueError, KeyError, TypeError):  # what stands there is no JSON, for example
            return self._as_text()
        shown = ""
        for event in events:
            if event["field"] == "tool_calls":
                if event["type"] == "region_close":
                    if not (found := self._calls_in(event["value"])):  # it only looked like a call
                        return shown + self._as_text()
                    calls += found
                    self.count += len(found)
                    self._unshown = ""
            elif event["type"] == "region_chunk":
                shown += event["text"]
                self._unshown = self._unshown.partition(event["text"])[2]
        return shown

    def _as_text(self) -> str:
        """Return all text that was held back, and begin to read anew behind it."""
        text, self._unshown, self._parser = self._unshown, "", self._new_parser("")
        return text

    def _calls_in(self, value: Any) -> list[ToolCall]:
        """Return the calls in a region of the text; none if any is not of a known tool."""
        calls = []
        for each in value if isinstance(value, list) else [value]:
            function = each.get("function") if isinstance(each, dict) else None
            function = function if isinstance(function, dict) else {}
            name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return []
            calls.append(ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False)))
        return calls[: None if self._at_most is None else self._at_most - self.count]
